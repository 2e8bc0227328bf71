"""How alike pictures are: sizes, scales and cosines."""

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.benchmarks.picture_scorers import SCORERS, plain
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import similarity
from univg_jax.images import write_png


def test_distances_are_of_rgb_in_0_to_1():
    image = plain((0, 255, 51))
    found = similarity.distances(image, plain((0, 0, 0)))
    assert found["l1"] == pytest.approx((1 + 0.2) / 3)
    assert found["l2"] == pytest.approx((1 + 0.04) / 3)  # the mean square, without a root
    assert similarity.distances(image, image) == {"l1": 0, "l2": 0}


def test_the_picture_is_resized_to_the_size_of_the_other_one():
    rng = np.random.default_rng(0)
    small, large = (rng.integers(0, 256, (s, s, 3), dtype=np.uint8) for s in (20, 30))
    enlarged = np.asarray(Image.fromarray(small).resize((30, 30), Image.Resampling.BICUBIC))
    by_hand = np.abs(enlarged.astype(float) - large).mean() / 255
    assert similarity.distances(small, large)["l1"] == pytest.approx(by_hand)
    assert similarity.distances(large, small)["l1"] != pytest.approx(by_hand, abs=1e-3)
    assert similarity.resized(small, like=plain("red", 7, 9)).shape == (7, 9, 3)


def test_cosines_by_the_users_networks():
    found = similarity.compare(plain("red"), plain("green", 8, 9), "a red pig", SCORERS)
    assert found["clip_t"] == pytest.approx(1)
    assert found["clip_i"] == pytest.approx(0)
    assert found["dino"] == pytest.approx(1)
    assert set(found) == set(similarity.METRICS)


def test_a_picture_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(NotFoundError, match=r"a\.png does not exist: expected a target"):
        similarity.read_rgb(tmp_path / "a.png", what="a target")
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"a\.png is not a readable image"):
        similarity.read_rgb(tmp_path / "a.png", what="a target")
    write_png(tmp_path / "a.png", plain("red"))
    np.testing.assert_array_equal(similarity.read_rgb(tmp_path / "a.png", what=""), plain("red"))
