import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import transforms


def make_record(height: int, width: int, box: tuple[int, int, int, int]) -> dict:
    """One object: the same rectangle as image, source, masks, depth, box, and joints at its
    corners.
    """
    x0, y0, x1, y1 = box
    mask = np.zeros((height, width), np.uint8)
    mask[y0:y1, x0:x1] = 1
    relative = np.array([[x0 / width, y0 / height, x1 / width, y1 / height]], np.float32)
    joints = np.zeros((17, 3), np.float32)
    joints[5] = [*relative[0, :2], 1]  # left shoulder, right shoulder
    joints[6] = [*relative[0, 2:], 1]
    image = np.repeat(mask[..., None] * np.uint8(200), 3, axis=2)
    return dict(
        image=image,
        source=image.copy(),
        edit_mask=mask,
        masks=mask[None],
        depth=np.where(mask, 2.0, 10.0).astype(np.float32),
        boxes=relative,
        joints=joints,
        caption="a block",
    )


@st.composite
def records(draw):
    height, width = draw(st.integers(24, 90)), draw(st.integers(24, 90))
    x0, y0 = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
    x1, y1 = draw(st.integers(x0 + 10, width)), draw(st.integers(y0 + 10, height))
    return make_record(height, width, (x0, y0, x1, y1))


def box_of(mask: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(mask)
    h, w = mask.shape
    return np.array([x.min() / w, y.min() / h, (x.max() + 1) / w, (y.max() + 1) / h])


def assert_consistent(record: dict) -> None:
    """The box frames each plane's rectangle to within a pixel: a resized edge falls inside one."""
    height, width = record["image"].shape[:2]
    box = record["boxes"][0]
    pixels = (box[2] - box[0]) * width, (box[3] - box[1]) * height
    if min(pixels) < 2:  # nearly nothing is left of it
        return
    tolerance = 1.01 * np.array([1 / width, 1 / height] * 2)
    planes = [record["masks"][0], record["edit_mask"], record["depth"] == 2.0]
    planes += [record[name][..., 0] > 100 for name in ("image", "source")]
    for plane in planes:
        assert plane.shape == (height, width)
        assert (np.abs(box_of(plane) - box) <= tolerance).all()


@settings(max_examples=60, deadline=None)
@given(
    record=records(), resolution=st.integers(16, 64), seed=st.integers(0, 99), center=st.booleans()
)
def test_a_box_moves_with_its_mask(record, resolution, seed, center):
    rng = None if center else np.random.default_rng(seed)
    out = transforms.resize_and_crop(record, resolution=resolution, rng=rng)
    assert out["image"].shape == out["source"].shape == (resolution, resolution, 3)
    assert_consistent(out)
    assert out["caption"] == record["caption"]


def test_a_crop_hides_joints_and_empties_boxes_outside_it():
    record = make_record(40, 80, (60, 5, 75, 20))
    out = transforms.crop(record, top=0, left=0, height=40, width=40)
    assert out["joints"][:, 2].sum() == 0
    assert out["boxes"][0, 0] == out["boxes"][0, 2] == 1
    assert not out["masks"].any()


def test_people_keep_their_visibilities_and_move_with_the_picture():
    joints = np.zeros((3, 17, 3), np.float32)
    joints[0, 0], joints[1, 1], joints[2, 2] = [0.25, 0.5, 1], [0.4, 0.1, 2], [0.9, 0.5, 2]
    record = make_record(40, 80, (0, 0, 10, 10)) | dict(joints=joints)
    out = transforms.resize_and_crop(
        transforms.crop(record, top=0, left=0, height=40, width=40), resolution=16
    )["joints"]
    np.testing.assert_allclose(out[0, 0], [0.5, 0.5, 1])
    np.testing.assert_allclose(out[1, 1], [0.8, 0.1, 2], rtol=1e-6)
    assert out[2, 2, 2] == 0
    assert (out[..., 2] > 0).sum() == 2
    none = record | dict(joints=joints[:0])
    assert transforms.resize_and_crop(none, resolution=8)["joints"].shape == (0, 17, 3)


@settings(max_examples=60, deadline=None)
@given(height=st.integers(8, 60), width=st.integers(8, 60), seed=st.integers(0, 999))
def test_what_is_ignored_stays_ignored(height, width, seed):
    rng = np.random.default_rng(seed)
    ignored = (rng.random((height, width)) < 0.05).astype(np.uint8)
    record = dict(image=np.zeros((height, width, 3), np.uint8), ignore_mask=ignored)
    out = transforms.resize(record, height=8, width=8)["ignore_mask"]
    assert set(np.unique(out)) <= {0, 1}
    for y, x in np.argwhere(ignored):  # the pixel that has its center
        assert out[int((y + 0.5) / height * 8), int((x + 0.5) / width * 8)]


def test_a_crop_outside_the_image_is_an_error():
    with pytest.raises(ValueError, match="leaves the image of 40x80"):
        transforms.crop(make_record(40, 80, (0, 0, 10, 10)), top=10, left=0, height=40, width=40)


def test_a_record_of_the_right_size_is_returned_as_it_is():
    record = make_record(32, 32, (4, 4, 20, 20))
    assert transforms.resize_and_crop(record, resolution=32, rng=np.random.default_rng(0)) is record


def test_shrinking_averages_pixel_areas():
    image = np.zeros((4, 4, 3), np.uint8)
    image[::2] = 200
    small = transforms.resize_image(image, height=2, width=2)
    np.testing.assert_array_equal(small, np.full((2, 2, 3), 100, np.uint8))


def test_no_object_left_keeps_the_planes():
    record = make_record(32, 48, (4, 4, 20, 20)) | dict(masks=np.zeros((0, 32, 48), np.uint8))
    assert transforms.resize_and_crop(record, resolution=16)["masks"].shape == (0, 16, 16)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), height=st.integers(8, 64), width=st.integers(8, 64))
def test_a_hole_is_neither_nothing_nor_everything(seed, height, width):
    hole = transforms.sample_hole(np.random.default_rng(seed), height=height, width=width)
    assert hole.shape == (height, width, 1)
    assert set(np.unique(hole)) == {0, 1}
    np.testing.assert_array_equal(
        hole, transforms.sample_hole(np.random.default_rng(seed), height=height, width=width)
    )


def test_holes_come_inside_and_at_the_border():
    holes = [
        transforms.sample_hole(np.random.default_rng(seed), height=48, width=48)[..., 0]
        for seed in range(300)
    ]
    border = np.array([hole[[0, -1]].all() or hole[:, [0, -1]].all() for hole in holes])
    # 30% are outpainting; five standard deviations of a binomial of 300 are 0.13, and some strokes
    # touch borders
    assert 0.17 < border.mean() < 0.5
    areas = np.array([hole.mean() for hole in holes])
    assert 0.2 < areas.mean() < 0.7
    assert cv2.connectedComponents(1 - holes[0])[0] >= 2
