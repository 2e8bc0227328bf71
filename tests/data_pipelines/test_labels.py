"""Labels that are out by less than a pixel are mended, and what has other units is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import labels, tasks
from data_pipelines.tasks import TASKS
from univg_jax.errors import UserError


def picture(height: int, width: int) -> dict:
    return dict(image=np.zeros((height, width, 3), np.uint8))


def check(record: dict, *needs: str) -> dict:
    return labels.check(record, ("image", *needs), where="toy[7]")


def boxes(record: dict, *boxes: tuple[float, ...]) -> dict:
    phrases = [f"object {k}" for k in range(len(boxes))]
    return record | dict(boxes=np.array(boxes, np.float32).reshape(-1, 4), phrases=phrases)


SIDES = st.integers(8, 900)
LESS_THAN_A_PIXEL = st.floats(-0.99, 0.99)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), height=SIDES, width=SIDES)
def test_a_box_out_by_less_than_a_pixel_is_clipped(data, height, width):
    """A box in whole pixels, each corner then moved by less than one."""
    x0, x1 = sorted(data.draw(st.tuples(*[st.integers(0, width)] * 2)))
    y0, y1 = sorted(data.draw(st.tuples(*[st.integers(0, height)] * 2)))
    # An inversion by a pixel would be a fault, so the corners of a side move alike.
    dx, dy = data.draw(LESS_THAN_A_PIXEL), data.draw(LESS_THAN_A_PIXEL)
    true = np.array([x0 / width, y0 / height, x1 / width, y1 / height])
    moved = true + np.array([dx / width, dy / height] * 2)
    clean = check(boxes(picture(height, width), moved), "boxes", "phrases")
    expected = np.clip(moved.astype(np.float32), 0, 1)
    is_empty = expected[0] >= expected[2] or expected[1] >= expected[3]
    assert len(clean["boxes"]) == len(clean["phrases"]) == (0 if is_empty else 1)
    for box in clean["boxes"]:
        np.testing.assert_array_equal(box, expected)


def test_an_empty_box_goes_with_its_phrase():
    thin, inverted = (0.5, 0.5, 0.5, 0.9), (0.5, 0.1, 0.4999, 0.2)
    record = boxes(picture(100, 100), (0.1, 0.1, 0.4, 0.4), thin, inverted, (0, 0, 1, 1))
    before = {name: list(record[name]) for name in ("boxes", "phrases")}
    clean = check(record, "boxes", "phrases")
    assert clean["phrases"] == ["object 0", "object 3"]
    np.testing.assert_array_equal(clean["boxes"], record["boxes"][[0, 3]])
    assert len(record["boxes"]) == len(before["boxes"]) == 4, "the given record stays as it is"


def test_a_record_whose_boxes_are_all_empty_is_unsuitable():
    record = boxes(picture(16, 16), (0.5, 0.5, 0.5, 0.9)) | dict(caption="object 0")
    with pytest.raises(tasks.UnsuitableRecord, match="no box"):
        TASKS["lg"].example(record, np.random.default_rng(0), 16)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((0.5, 0.1, 0.4, 0.2), "box 0 inverted: 0.5 0.1 0.4 0.2, expected x0 < x1"),
        ((0.5, 0.1, 1.02, 0.2), "box 0 outside the image: 0.5 0.1 1.02 0.2, expected x0 y0 x1 y1"),
        ((-0.02, 0.1, 0.5, 0.2), "outside the image"),
        ((0.5, 0.1, np.nan, 0.2), "outside the image"),
        ((10, 20, 30, 40), "expected x0 y0 x1 y1 in [0, 1] of width and height, not pixels"),
    ],
)
def test_a_wrong_box_is_a_fault(box, message):
    with pytest.raises(UserError) as error:
        check(boxes(picture(100, 100), box), "boxes", "phrases")
    assert str(error.value).startswith("toy[7]: field 'boxes' has ")
    assert message in str(error.value)


def joints(x: float, y: float, visible: float) -> np.ndarray:
    return np.tile(np.array([[x, y, visible]], np.float32), (17, 1))


@settings(max_examples=100, deadline=None)
@given(
    height=SIDES,
    width=SIDES,
    out=st.tuples(LESS_THAN_A_PIXEL, LESS_THAN_A_PIXEL),
    corner=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    visibility=st.sampled_from([1, 2]),
)
def test_a_joint_out_by_less_than_a_pixel_is_clipped(height, width, out, corner, visibility):
    x, y = corner[0] + out[0] / width, corner[1] + out[1] / height
    clean = check(picture(height, width) | dict(joints=joints(x, y, visibility)), "joints")
    expected = [*np.clip(np.array([x, y], np.float32), 0, 1), visibility]
    np.testing.assert_array_equal(clean["joints"], np.tile(np.float32(expected), (1, 17, 1)))


def test_a_joint_that_is_not_visible_may_lie_anywhere():
    clean = check(picture(10, 10) | dict(joints=joints(-3, 400, 0)), "joints")
    assert not clean["joints"].any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (joints(20, 12, 2), "joint 0 outside the image: 20 12, expected x y in [0, 1] of width"),
        (joints(1.2, 0.5, 1), "joint 0 outside the image: 1.2 0.5, expected x y in [0, 1]"),
        (joints(0.5, 0.5, -1), "has visibility -1, expected 0, 1 or 2"),
    ],
)
def test_wrong_joints_are_a_fault(given, message):
    with pytest.raises(UserError) as error:
        check(picture(32, 32) | dict(joints=given), "joints")
    assert message in str(error.value)


PLANES = dict(
    masks=lambda h, w: np.ones((2, h, w), np.uint8),
    edit_mask=lambda h, w: np.ones((h, w), np.uint8),
    depth=lambda h, w: np.full((h, w), 3, np.float32),
)


@pytest.mark.parametrize("field", PLANES)
@pytest.mark.parametrize("size", [(20, 30), (21, 30), (19, 31), (20, 29)])
def test_a_plane_that_differs_by_a_pixel_gets_the_pictures_size(field, size):
    clean = check(picture(20, 30) | {field: PLANES[field](*size)}, field)[field]
    np.testing.assert_array_equal(clean, PLANES[field](20, 30))


@pytest.mark.parametrize("field", PLANES)
def test_a_plane_of_another_size_is_a_fault(field):
    with pytest.raises(UserError, match=r"has 18x30 pixels but the image 20x30$"):
        check(picture(20, 30) | {field: PLANES[field](18, 30)}, field)
    with pytest.raises(UserError, match=r"30x20 pixels but the image 20x30, which its EXIF data"):
        check(picture(20, 30) | {field: PLANES[field](30, 20)}, field)


@pytest.mark.parametrize(("factor", "accepted"), [(0.001, False), (1, True), (1000, False)])
def test_depth_in_other_units_is_a_fault(factor, accepted):
    record = picture(20, 30)
    record["depth"] = np.linspace(0, 20 * factor, 600, dtype=np.float32).reshape(20, 30)
    if accepted:
        assert check(record, "depth")["depth"] is record["depth"]
    else:
        with pytest.raises(UserError, match=r"has a median of .* m; expected meters"):
            check(record, "depth")


def test_depth_that_is_nowhere_known_is_unsuitable():
    record = picture(16, 16) | dict(depth=np.zeros((16, 16), np.float32))
    with pytest.raises(tasks.UnsuitableRecord, match="no known depth"):
        TASKS["depth"].example(record, np.random.default_rng(0), 16)


def test_white_in_a_mask_may_be_255_and_nothing_else():
    record = picture(4, 4) | dict(masks=np.eye(4, dtype=np.uint8)[None] * np.uint8(255))
    np.testing.assert_array_equal(check(record, "masks")["masks"], np.eye(4)[None])
    record["masks"] = np.full((1, 4, 4), 7, np.uint8)
    with pytest.raises(UserError, match="has the value 7; expected 0 and 1"):
        check(record, "masks")


@pytest.mark.parametrize("field", ["image", "source", "face"])
@pytest.mark.parametrize(
    "pixels", [None, np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_picture_is_a_fault(field, pixels):
    with pytest.raises(
        UserError, match=rf"^toy\[7\]: field '{field}' is .*, expected uint8 pixels"
    ):
        check(picture(4, 4) | {field: pixels}, field)
