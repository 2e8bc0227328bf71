"""DIODE: .npy files, and the data's own mask."""

import io

import numpy as np
import pytest

from tests.evaluation.depth_files import (
    LISTS,
    needs_lists,
    read_by_hand,
    scene,
    summary_of_truths,
    write_png,
)
from univg_jax.errors import UserError
from univg_jax.evaluation import depth
from univg_jax.evaluation.benchmarks import diode

STEM = "indoors/scene_00021/scan_00189/00021_00189_indoors_200_010"


def write(root):
    picture, meters = scene(24, 32, near=0.7, far=400)
    meters[:, :4] = 0
    mask = np.ones((24, 32), np.float32)
    mask[:6] = 0
    write_png(root / f"{STEM}.png", picture)
    np.save(root / f"{STEM}_depth.npy", meters.astype(np.float32)[..., None])
    np.save(root / f"{STEM}_depth_mask.npy", mask)
    (root / "list.txt").write_text(f"{STEM}.png {STEM}_depth.npy {STEM}_depth_mask.npy\n")
    return root


@pytest.fixture
def source(tmp_path):
    return write(tmp_path)


def test_depth_counts_where_the_mask_says_so(source):
    (case,) = diode.open_cases(source, source / "list.txt")
    picture, meters = scene(24, 32, near=0.7, far=400)
    np.testing.assert_array_equal(case.image, picture)
    valid = np.zeros((24, 32), bool)
    valid[6:, 4:] = True  # what has no depth does not count, although the mask has it
    np.testing.assert_array_equal(case.valid, valid)
    assert case.depth[valid].max() < 350  # of the ramp; farther would count, too
    prediction = np.sqrt(meters)
    scores = case.score(prediction)
    want = read_by_hand(prediction, meters.astype(np.float32).astype(float), valid, 0.6, 350)
    assert (scores["abs_rel"].value, scores["delta1"].value) == pytest.approx(want, abs=1e-12)


def test_a_true_depth_is_scored(source, tmp_path):
    found = summary_of_truths(f"diode:list_file={source / 'list.txt'}", source, tmp_path / "out")
    assert found["official/delta1"] > found["constant/delta1"]
    assert found["official/abs_rel"] < found["constant/abs_rel"]
    assert found["failures/missing"] == 0


def test_depth_beyond_the_range_counts_if_the_mask_has_it(source):
    np.save(source / f"{STEM}_depth_mask.npy", np.ones((24, 32), bool))
    (case,) = diode.open_cases(source, source / "list.txt")
    assert case.depth[case.valid].max() > 350


def test_other_arrays_are_named(source):
    cases = diode.open_cases(source, source / "list.txt")
    file = source / f"{STEM}_depth.npy"
    for array, message in (
        (np.zeros((24, 32, 2)), r"its depth is float64 \[24, 32, 2\]: expected numbers \[h, w\]"),
        (np.zeros((24, 32), "U1"), r"its depth is <U1 \[24, 32\]: expected numbers"),
        (np.zeros((24, 31)), r"its depth \[24, 31\] and the mask \[24, 32\]: expected one size"),
    ):
        np.save(file, array)
        with pytest.raises(UserError, match=message):
            cases[0]
    file.write_bytes(b"rgb")
    with pytest.raises(UserError, match=r"010.png: its depth is no .npy file of numbers: "):
        cases[0]
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], object), allow_pickle=True)
    file.write_bytes(pickled.getvalue())
    with pytest.raises(UserError, match=r"no .npy file of numbers: Object arrays cannot be loaded"):
        cases[0]


@needs_lists
def test_the_official_list_has_all_pictures():
    rows = depth.read_list(LISTS / "diode_val_all_filename_list.txt", columns=3)
    assert len(set(rows)) == diode.NUM_IMAGES
    assert all(mask.endswith("_depth_mask.npy") for _, _, mask in rows)
