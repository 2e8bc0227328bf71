"""Lists of pictures with depth, and the score of a case."""

import zipfile

import numpy as np
import pytest

from tests.evaluation.depth_files import read_by_hand
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import depth, metrics
from univg_jax.evaluation.depth import DepthCase


def case(seed=0, height=12, width=10):
    rng = np.random.default_rng(seed)
    meters = rng.uniform(0.5, 12, (height, width))
    return DepthCase(
        name="a.png",
        image=np.zeros((height, width, 3), np.uint8),
        depth=meters,
        valid=rng.random(meters.shape) < 0.7,
        limits=(1.0, 10.0),
    )


def test_a_prediction_is_aligned_and_clipped_and_compared_where_depth_counts():
    one = case()
    prediction = 1 / one.depth  # nothing that is linear in depth
    scores = one.score(prediction)
    want = read_by_hand(prediction, one.depth, one.valid, *one.limits)
    assert (scores["abs_rel"].value, scores["delta1"].value) == pytest.approx(want, abs=1e-12)
    elsewhere = np.where(one.valid, prediction, np.nan)
    assert one.score(elsewhere)["abs_rel"].value == scores["abs_rel"].value


def test_the_mean_is_over_images_however_many_pixels_count():
    cases = [case(0), case(1, 40, 30)]
    rows = [one.score(1 / one.depth)["abs_rel"] for one in cases]
    assert metrics.merge(rows).value == pytest.approx(np.mean([r.value for r in rows]), abs=1e-12)


def test_a_prediction_of_another_size_is_resized():
    ramp = np.linspace(1, 9, 40)[:, None] * np.ones((1, 20))
    one = DepthCase(
        name="a.png",
        image=np.zeros((40, 20, 3), np.uint8),
        depth=ramp,
        valid=np.ones(ramp.shape, bool),
        limits=(1.0, 10.0),
    )
    # Rows of a half of the size lie between two of the ramp's.
    half = ramp.reshape(20, 2, 10, 2).mean(axis=(1, 3))
    assert one.score(half)["abs_rel"].value < 0.02
    assert one.score(half.astype(np.float32))["delta1"].value == 1


def test_lists_are_read_and_their_lines_named(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("a.jpg a.png 518.8\n\n  b.jpg\tb.png 518.8 more\n")
    assert depth.read_list(file, columns=2) == [("a.jpg", "a.png"), ("b.jpg", "b.png")]
    file.write_text("a.jpg a.png\n\nc.jpg\n")
    with pytest.raises(UserError, match=r"list.txt line 3 is 'c.jpg': expected 2 names"):
        depth.read_list(file, columns=2)
    file.write_text("\n")
    with pytest.raises(UserError, match=r"list.txt is empty: expected a list of pictures"):
        depth.read_list(file, columns=2)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"list.txt cannot be read: "):
        depth.read_list(file, columns=2)
    with pytest.raises(NotFoundError, match=r"nowhere.txt does not exist: expected a list"):
        depth.read_list(tmp_path / "nowhere.txt", columns=2)


def test_files_are_read_from_archives_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "files.zip", "w") as archive:
        archive.writestr("scene/a.npy", b"content")
    assert depth.open_files(tmp_path / "files.zip")("scene/a.npy") == b"content"
    with pytest.raises(NotFoundError, match=r"there is no 'scene/b.npy' in .*files.zip"):
        depth.open_files(tmp_path / "files.zip")("scene/b.npy")
