"""The shapes of buckets, and which of them a picture is nearest to."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from univg_jax import buckets, configs
from univg_jax.errors import UserError

SIDES = st.integers(1, 3000)
SHAPES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=9, unique_by=lambda s: s[1] / s[0])


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_standard_shapes_have_the_area_of_the_square_and_even_sides(side):
    shapes = buckets.standard(side)
    assert len(shapes) == len(set(shapes)) == 9
    assert (side, side) in shapes
    for height, width in shapes:
        assert height % (side // 16) == width % (side // 16) == 0
        assert 0.94 * side**2 < height * width <= side**2
        assert (width, height) in shapes
    ratios = [width / height for height, width in shapes]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (0.5, 2.0)


def test_shapes_of_every_area_hold_the_same_pictures():
    heights, widths = np.random.default_rng(0).integers(1, 5000, (2, 1000))
    small, large = (buckets.nearest(buckets.standard(s), heights, widths) for s in (256, 1024))
    np.testing.assert_array_equal(small, large)


def test_there_are_no_standard_shapes_of_odd_sides():
    with pytest.raises(UserError, match="no standard buckets of 250 px: expected a multiple of 16"):
        buckets.standard(250)


@given(shapes=SHAPES, height=st.integers(1, 70_000), width=st.integers(1, 70_000))
def test_the_nearest_is_that_of_the_least_difference_of_log_ratios(shapes, height, width):
    (found,) = buckets.nearest(shapes, np.array([height]), np.array([width]))
    gaps = [abs(math.log(w / h) - math.log(width / height)) for h, w in shapes]
    assert gaps[found] <= min(gaps) + 1e-12


@pytest.mark.parametrize("shapes", [[(1, 1), (1, 4)], [(1, 4), (1, 1)]])
def test_a_picture_on_a_border_belongs_to_the_first(shapes):
    sizes = np.array([[1, 2], [50_000, 100_000], [50_000, 100_001], [50_000, 99_999]], np.uint32)
    found = buckets.nearest(shapes, sizes[:, 0], sizes[:, 1])
    wide, square = shapes.index((1, 4)), shapes.index((1, 1))
    assert found.tolist() == [0, 0, wide, square]


def test_common_pictures_are_in_the_shapes_meant_for_them():
    shapes = buckets.standard(1024)
    sizes = {(3, 2): (1216, 832), (4, 3): (1152, 896), (16, 9): (1344, 768), (9, 10): (1024, 1024)}
    for size, expected in sizes.items():
        (found,) = buckets.nearest(shapes, np.array([size[0]]), np.array([size[1]]))
        assert shapes[found] == expected


# --- settings ---


def test_buckets_are_set_in_a_config_and_by_a_flag():
    config = configs.load("stage1_t2i:size=b,res=512,buckets=true")
    assert config.data.buckets == buckets.standard(512)
    assert configs.load("stage3_identity:res=256,buckets=true").data.buckets[0] == (352, 176)
    given = configs.load("stage1_t2i", ["data.buckets=((256,128),(128,256))"])
    assert given.data.buckets == ((256, 128), (128, 256))
    assert configs.load("stage1_t2i").data.buckets == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("((256,0),)", "data.buckets=0: expected a whole number >= 1"),
        ("256", "data.buckets=256: expected a list of 2, each a whole number >= 1"),
        ("(256,128)", "data.buckets=256: expected a list of 2"),
        ("((64,32),(32,16))", "data.buckets: 64x32 and 32x16 have one aspect ratio"),
    ],
)
def test_buckets_that_cannot_be_are_named(value, message):
    with pytest.raises(UserError) as error:
        configs.load("stage1_t2i", [f"data.buckets={value}"])
    assert str(error.value).startswith(message)
