import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_pipelines import renderings


def make_skeleton(rng: np.random.Generator) -> np.ndarray:
    """A person of 60% to 90% of the image's height in a free pose, all joints visible."""

    def away(point, length, angle):
        return point + length * np.array([np.sin(angle), np.cos(angle)])

    size = rng.uniform(0.6, 0.9)
    top = 0.5 - size / 2
    neck = np.array([0.5 + rng.uniform(-0.1, 0.1), top + 0.22 * size])
    hip = away(neck, 0.3 * size, rng.uniform(-0.15, 0.15))
    joints = np.ones((17, 3), np.float32)
    joints[0, :2] = nose = neck - [0, 0.12 * size]
    for side, i in ((1, 0), (-1, 1)):
        joints[1 + i, :2] = nose + np.array([side * 0.04 * size, -0.02 * size])
        joints[3 + i, :2] = nose + np.array([side * 0.08 * size, 0])
        joints[5 + i, :2] = shoulder = neck + np.array([side * 0.12 * size, 0])
        joints[11 + i, :2] = base = hip + np.array([side * 0.07 * size, 0])
        angle = side * rng.uniform(0.1, 2.6)
        joints[7 + i, :2] = elbow = away(shoulder, 0.17 * size, angle)
        joints[9 + i, :2] = away(elbow, 0.16 * size, angle + rng.uniform(-1.2, 1.2))
        angle = side * rng.uniform(0, 0.6)
        joints[13 + i, :2] = knee = away(base, 0.22 * size, angle)
        joints[15 + i, :2] = away(knee, 0.22 * size, angle + side * rng.uniform(-0.5, 0.3))
    joints[:, :2] = joints[:, :2].clip(0.01, 0.99)
    return joints


def draw(*people: np.ndarray, height: int = 64, width: int = 64) -> np.ndarray:
    return renderings.render_pose(np.stack(people), height=height, width=width)


def decode_errors(*, resolution: int, noise: float, blur: float, number: int = 40) -> np.ndarray:
    """Pixels between true and decoded joints, [number 17]; infinite where none was found."""
    rng = np.random.default_rng(0)
    errors = np.zeros((number, 17))
    for i in range(number):
        joints = make_skeleton(rng)
        image = draw(joints, height=resolution, width=resolution).astype(np.float32)
        if blur:
            image = cv2.GaussianBlur(image, (0, 0), blur)
        image = (image + rng.normal(0, 1, image.shape) * noise).clip(0, 255).astype(np.uint8)
        decoded = renderings.decode_pose(image)
        errors[i] = np.linalg.norm(decoded[:, :2] - joints[:, :2], axis=1) * resolution
        errors[i, decoded[:, 2] == 0] = np.inf
    return errors


@pytest.mark.parametrize("resolution", [48, 64])
def test_an_exact_skeleton_decodes_to_its_joints(resolution):
    errors = decode_errors(resolution=resolution, noise=0, blur=0)
    assert errors.mean() < 0.8  # antialiasing leaves half a pixel; ends hidden by nearer limbs more
    assert (errors < 0.05 * resolution).mean() > 0.98  # the usual PCK radius


@pytest.mark.parametrize("resolution", [48, 64])
def test_a_blurred_and_noisy_skeleton_decodes(resolution):
    errors = decode_errors(resolution=resolution, noise=15, blur=0.7)
    assert np.median(errors) < 0.8  # a quarter of a line's thickness at 48 px
    # one joint in twenty-five, where limbs of a small figure overlap
    assert (errors < 0.05 * resolution).mean() > 0.96


def test_limbs_are_drawn_only_between_visible_joints():
    joints = make_skeleton(np.random.default_rng(1))
    joints[[9, 10, 15], 2] = 0
    decoded = renderings.decode_pose(draw(joints))
    assert (decoded[[9, 10, 15], 2] == 0).all()
    assert (decoded[[5, 6, 7, 8, 16], 2] > 0.5).all()


def test_the_largest_person_is_in_front_whatever_the_order():
    large, small = (make_skeleton(np.random.default_rng(seed)) for seed in (1, 2))
    small[:, :2] = 0.5 + 0.3 * (small[:, :2] - 0.5)
    both = draw(large, small)
    np.testing.assert_array_equal(both, draw(small, large))
    alone = draw(large)
    drawn = (alone > 0).any(axis=-1)
    assert (draw(small) > 0).any(axis=-1)[drawn].any()  # they overlap
    whole = (alone.max(axis=-1) == 255) & (alone.min(axis=-1) == 0)  # no edge of a line
    np.testing.assert_array_equal(both[whole], alone[whole])
    assert (both != alone).any()


def test_hidden_joints_are_drawn_and_unlabeled_ones_are_not():
    joints = make_skeleton(np.random.default_rng(3))
    everywhere = draw(joints)
    joints[:, 2] = 2
    joints[::2, 2] = 1
    np.testing.assert_array_equal(draw(joints), everywhere)
    nobody = np.zeros_like(joints)
    np.testing.assert_array_equal(draw(joints, nobody), everywhere)
    assert not draw(nobody).any()


def test_lines_of_a_distant_person_are_thin():
    joints = make_skeleton(np.random.default_rng(4))
    covered = []
    for scale in (1, 0.5, 0.1):
        person = joints.copy()
        person[:, :2] = 0.5 + scale * (person[:, :2] - 0.5)
        covered.append((draw(person, height=256, width=256) > 0).any(axis=-1).mean() / scale**2)
    assert covered[2] < 1.6 * covered[1]  # about the same share of its own size


def test_a_skeleton_in_a_wide_picture_decodes():
    joints = make_skeleton(np.random.default_rng(5))
    decoded = renderings.decode_pose(draw(joints, height=48, width=80))
    assert np.median(np.abs(decoded[:, :2] - joints[:, :2]) * [80, 48]) < 1.5


def test_an_empty_picture_has_no_joints():
    decoded = renderings.decode_pose(np.zeros((48, 48, 3), np.uint8))
    assert (decoded[:, 2] == 0).all()
    assert (decoded[:, :2] == 0.5).all()


def test_anything_decodes_without_error():
    rng = np.random.default_rng(0)
    for image in (
        rng.integers(0, 256, (48, 48, 3)).astype(np.uint8),
        np.full((48, 64, 3), 255, np.uint8),
        # Limbs of a pixel, or less.
        *rng.integers(0, 256, (9, 16, 16, 3)).astype(np.uint8),
        *rng.integers(0, 256, (9, 1, 2, 3)).astype(np.uint8),
    ):
        decoded = renderings.decode_pose(image)
        assert np.isfinite(decoded).all()


def test_limb_colors_are_distinct():
    colors = np.array([limb.color for limb in renderings.LIMBS], float)
    gaps = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1e6 * np.eye(len(colors))
    assert gaps.min() >= 127  # thirty degrees of hue


@settings(deadline=None)
@given(hnp.arrays(np.float32, (6, 5), elements=st.floats(0.5, 80, width=32)))
def test_depth_survives_its_rendering(depth):
    image = renderings.render_depth(depth)
    # half a gray level of 255 over log(160): a factor of exp(0.5 / 255 * 5.08) = 1.01
    np.testing.assert_allclose(renderings.decode_depth(image), depth, rtol=0.0102)
    near, far = (
        np.unravel_index(depth.argmin(), depth.shape),
        np.unravel_index(depth.argmax(), depth.shape),
    )
    assert image[near][0] >= image[far][0]


def test_unknown_depth_is_black_and_near_is_bright():
    depth = np.array([[0.0, np.nan, np.inf, 80.0, 0.5, 0.1]], np.float32)
    np.testing.assert_array_equal(renderings.render_depth(depth)[0, :, 0], [0, 0, 0, 0, 255, 255])


@settings(deadline=None)
@given(known=hnp.arrays(np.uint8, (9, 12), elements=st.integers(0, 1)), seed=st.integers(0, 9))
def test_what_is_unknown_is_filled_from_near(known, seed):
    known[4, 5] = 1
    picture = np.random.default_rng(seed).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    filled = renderings.fill_unknown(picture, known[..., None])
    np.testing.assert_array_equal(filled[known > 0], picture[known > 0])
    places = np.argwhere(known)
    for y, x in np.argwhere(known == 0):
        distances = np.hypot(*(places - [y, x]).T)
        # OpenCV's mask of 5 pixels measures distances to 2%.
        near = places[distances <= 1.02 * distances.min() + 1e-6]
        assert any((filled[y, x] == picture[a, b]).all() for a, b in near)
    other = np.where(known[..., None] > 0, picture, 255 - picture)
    np.testing.assert_array_equal(renderings.fill_unknown(other, known[..., None]), filled)


def test_a_mask_is_white_on_black_and_decodes_at_one_half():
    mask = np.array([[0, 1], [1, 0]], np.uint8)
    image = renderings.render_mask(mask)
    np.testing.assert_array_equal(image[..., 0], [[0, 255], [255, 0]])
    np.testing.assert_array_equal(renderings.decode_mask(image), mask)
    gray = np.array([[127, 128]], np.uint8)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(renderings.decode_mask(gray), [[0, 1]])


def test_layout_draws_large_boxes_behind_small_ones():
    boxes = np.array([[0.25, 0.25, 0.5, 0.5], [0, 0, 0.75, 0.75]], np.float32)
    canvas = renderings.render_layout(boxes, ["red", "blue"], height=8, width=8)
    expected = np.full((8, 8, 3), renderings.GRAY, np.uint8)
    expected[0:6, 0:6] = renderings.PALETTE["blue"]
    expected[2:4, 2:4] = renderings.PALETTE["red"]
    np.testing.assert_array_equal(canvas, expected)
