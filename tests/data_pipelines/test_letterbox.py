"""A picture inside a canvas of another shape, and back."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from data_pipelines import renderings
from data_pipelines.letterbox import Letterbox

sides = st.integers(1, 60)
shapes = st.tuples(sides, sides)


@given(picture=shapes, canvas=shapes)
def test_the_window_is_the_largest_of_the_pictures_shape_in_the_middle(picture, canvas):
    top, left, height, width = Letterbox(picture, canvas).window
    assert height == canvas[0] or width == canvas[1]
    for start, side, whole in ((top, height, canvas[0]), (left, width, canvas[1])):
        assert side >= 1
        assert 0 <= start <= whole - start - side <= start + 1
    # A side is off by less than a pixel, but for a picture thinner than a pixel there.
    scale = min(canvas[0] / picture[0], canvas[1] / picture[1])
    assert abs(height - max(1, picture[0] * scale)) < 1
    assert abs(width - max(1, picture[1] * scale)) < 1


@given(picture=shapes, canvas=shapes, around=st.sampled_from(["edge", "gray"]))
def test_what_is_restored_has_the_pictures_size_and_only_its_pixels(picture, canvas, around):
    letterbox = Letterbox(picture, canvas)
    image = np.full((*picture, 3), 200, np.uint8)
    placed = letterbox.place(image, around=around)
    assert placed.shape == (*canvas, 3)
    top, left, height, width = letterbox.window
    outside = np.ones(canvas, bool)
    outside[top : top + height, left : left + width] = False
    assert (placed[outside] == (200 if around == "edge" else renderings.GRAY)).all()
    np.testing.assert_array_equal(letterbox.restore({"image": placed})["image"], image)


@given(picture=shapes, canvas=shapes, data=st.data())
def test_nothing_of_a_hole_is_left(picture, canvas, data):
    """Not a pixel of what a user marks may show in what the model is given."""
    letterbox = Letterbox(picture, canvas)
    row = data.draw(st.integers(0, picture[0] - 1))
    column = data.draw(st.integers(0, picture[1] - 1))
    hole = np.zeros(picture, np.uint8)
    hole[row, column] = 1
    marked = np.where(hole[..., None] > 0, np.uint8(255), np.zeros((*picture, 3), np.uint8))
    placed, kept = letterbox.place(marked, around="gray"), letterbox.place_hole(hole) == 0
    if height_and_width_shrink(picture, letterbox):  # a cubic's tail of a larger one is no trace
        assert not placed[kept].any()
    outside = letterbox.place_hole(np.zeros(picture, np.uint8))
    _, _, height, width = letterbox.window
    assert outside.sum() == canvas[0] * canvas[1] - height * width
    assert letterbox.place_hole(hole).sum() > outside.sum()


def height_and_width_shrink(picture, letterbox):
    return letterbox.window[2] <= picture[0] and letterbox.window[3] <= picture[1]


def test_a_picture_of_the_canvas_shape_keeps_its_bits():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    letterbox = Letterbox((9, 7), (9, 7))
    assert letterbox.place(image, around="edge") is image
    assert letterbox.restore({"image": image})["image"] is image


@pytest.mark.parametrize("picture", [(40, 90), (90, 40)])
def test_joints_move_with_the_picture(picture):
    letterbox = Letterbox(picture, (64, 64))
    joints = np.tile(np.float32([0.25, 0.75, 1]), (1, 17, 1))
    top, left, height, width = letterbox.window
    placed = joints.copy()
    placed[..., 0] = (left + joints[..., 0] * width) / 64
    placed[..., 1] = (top + joints[..., 1] * height) / 64
    placed[0, 16] = [0.01, 0.01, 1]  # beside the picture
    canvas = np.zeros((64, 64, 3), np.uint8)
    restored = letterbox.restore({"image": canvas, "joints": placed})["joints"]
    np.testing.assert_allclose(restored[:, :16], joints[:, :16], atol=1e-6)  # float32
    assert restored[0, 16, 2] == 0
