"""NYUv2: millimeters, Eigen's crop, lists and HDF5 files."""

import os
import pathlib

import numpy as np
import pytest

from data_pipelines import renderings
from tests.evaluation import evaluation_cases as data
from tests.evaluation.depth_files import (
    LISTS,
    needs_lists,
    read_by_hand,
    scene,
    summary_of_truths,
    write_png,
)
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import depth
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import nyuv2
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.score_files import score_images


def write(root):
    """Two pictures of which the second has no depth at its middle, and one too far at a corner."""
    for number in (1, 2):
        picture, meters = scene(480, 640, near=0.8, far=9.5, seed=number)
        if number == 2:
            meters[200:300, 200:300] = 0
            meters[45, 41] = 10  # the end of the range does not count
        folder = root / "test" / "kitchen_0004"
        write_png(folder / f"rgb_{number:04d}.png", picture)
        write_png(folder / f"depth_{number:04d}.png", np.rint(meters * 1000).astype(np.uint16))
    names = [
        [f"test/kitchen_0004/{kind}_{n:04d}.png" for kind in ("rgb", "depth", "filled")]
        for n in (1, 2)
    ]
    (root / "list.txt").write_text("\n".join(map(" ".join, names)))
    return root


@pytest.fixture
def source(tmp_path):
    return write(tmp_path)


def test_cases_have_meters_and_count_in_the_crop(source):
    cases = nyuv2.open_cases(source, source / "list.txt")
    assert [case.name for case in cases] == [
        "test/kitchen_0004/rgb_0001.png",
        "test/kitchen_0004/rgb_0002.png",
    ]
    picture, meters = scene(480, 640, near=0.8, far=9.5, seed=1)
    first, second = cases
    np.testing.assert_array_equal(first.image, picture)
    np.testing.assert_allclose(first.depth, meters, atol=0.0005)  # half a millimeter
    inside = np.zeros((480, 640), bool)
    inside[45:471, 41:601] = True
    np.testing.assert_array_equal(first.valid, inside)
    inside[200:300, 200:300] = inside[45, 41] = False
    np.testing.assert_array_equal(second.valid, inside)
    prediction = np.sqrt(second.depth)
    scores = second.score(prediction)
    want = read_by_hand(prediction, second.depth, inside, 1e-3, 10)
    assert (scores["abs_rel"].value, scores["delta1"].value) == pytest.approx(want, abs=1e-12)


def test_a_true_depth_is_scored_and_a_missing_picture_is_the_worst(source, tmp_path):
    found = summary_of_truths(f"nyuv2:list_file={source / 'list.txt'}", source, tmp_path / "out")
    assert found["official/abs_rel"] < 0.02  # of a gray level, and of pixels between
    assert found["official/delta1"] == 1
    assert found["constant/abs_rel"] > 0.3
    assert (found["strict/delta1"], found["failures/missing"]) == (0.5, 1)


def test_what_is_generated_is_read_as_depth_of_the_whole_picture(source, tmp_path):
    """An answer that is black at the top and white at the bottom, where the scene is near."""

    def answer(batch, task):
        assert task == "depth"
        ramp = np.linspace(0, 255, batch.target.shape[1]).astype(np.uint8)
        return np.broadcast_to(ramp[:, None, None], batch.target.shape)

    bench = open_benchmark(f"nyuv2:list_file={source / 'list.txt'}")
    rows, out = bench.read(source, excerpt=True), tmp_path / "out"
    generate(bench.requests(rows), out, answer=answer, collator=data.COLLATOR, batch_size=2)
    file = out / "test/kitchen_0004/rgb_0002.png"
    assert file.exists()
    scored = score_images(bench, rows, out, {})
    picture = answer(type("B", (), {"target": np.zeros((1, 48, 48, 3))}), "depth")[0]
    want = rows[1].case().score(renderings.decode_depth(picture))["abs_rel"].value
    assert scored.rows[1]["official/abs_rel"].value == pytest.approx(want)
    assert bench.quality(scored.rows[1]) == scored.rows[1]["official/delta1"].value


def test_a_list_has_all_pictures_and_is_named_by_its_hash(source):
    bench = open_benchmark(f"nyuv2:list_file={source / 'list.txt'}")
    assert len(bench.settings["list"]) == 64
    with pytest.raises(UserError, match="the list has 2 pictures with depth: expected 654"):
        bench.read(source)
    (source / "list.txt").write_text("../a.png ../b.png")
    with pytest.raises(UserError, match=r"has the picture '../a.png': expected one in a folder"):
        bench.read(source, excerpt=True)
    with pytest.raises(NotFoundError, match=r"no.txt does not exist: expected a list of pictures"):
        open_benchmark(f"nyuv2:list_file={source / 'no.txt'}")


def test_files_that_are_missing_or_of_another_kind_are_named(source):
    folder = source / "test" / "kitchen_0004"
    cases = nyuv2.open_cases(source, source / "list.txt")
    write_png(folder / "depth_0001.png", np.zeros((480, 640, 3), np.uint8))
    with pytest.raises(UserError, match=r"rgb_0001.png: its depth has mode RGB: expected a 16-b"):
        cases[0]
    write_png(folder / "depth_0001.png", np.zeros((48, 64), np.uint16))
    with pytest.raises(UserError, match=r"rgb_0001.png: its depth is \[48, 64\]: expected \[480,"):
        cases[0]
    write_png(folder / "rgb_0002.png", np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(UserError, match=r"rgb_0002.png: the picture is \[48, 64\], its depth \[4"):
        cases[1]
    (folder / "rgb_0002.png").unlink()
    with pytest.raises(NotFoundError, match=r"rgb_0002.png: there is no 'test/kitchen_0004/rgb_0"):
        cases[1]


def test_hdf5_files_need_no_list(tmp_path):
    h5py = pytest.importorskip("h5py")
    picture, meters = scene(480, 640, near=0.8, far=9.5)
    (tmp_path / "val").mkdir()
    with h5py.File(tmp_path / "val" / "00002.h5", "w") as file:
        file["rgb"], file["depth"] = np.moveaxis(picture, -1, 0), meters.astype(np.float32)
    (case,) = nyuv2.open_cases(tmp_path)
    assert case.name == "val/00002.h5"
    np.testing.assert_array_equal(case.image, picture)
    np.testing.assert_array_equal(case.depth, meters.astype(np.float32))
    (tmp_path / "val" / "00002.h5").write_bytes(b"no")
    with pytest.raises(UserError, match=r"val/00002.h5: is not an HDF5 file of `rgb` and `depth`"):
        nyuv2.open_cases(tmp_path)[0]
    (tmp_path / "val" / "00002.h5").unlink()
    with pytest.raises(NotFoundError, match=r"has no .h5 files: expected these, or a list"):
        nyuv2.open_cases(tmp_path)


@pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
def test_real_hdf5_files_are_read():
    pytest.importorskip("h5py")
    root = pathlib.Path(os.environ["UNIVG_SAMPLES"]) / "nyuv2"
    (case,) = nyuv2.open_cases(root / "nyudepthv2")
    assert case.image.shape == (480, 640, 3)
    # Its depth is 1 m everywhere, which any constant is aligned to.
    assert case.score(np.full((480, 640), 7.0))["abs_rel"].value == 0
    with pytest.raises(UserError, match=r"1.h5: its rgb is float64 \[3, 6, 4\]: expected uint8"):
        nyuv2.open_cases(root / "tiny")[0]


@needs_lists
@pytest.mark.parametrize(
    "name", ["nyu_filename_list_test.txt", "zoedepth_nyudepthv2_test_files_with_gt.txt"]
)
def test_official_lists_have_all_pictures(name):
    rows = depth.read_list(LISTS / name, columns=2)
    assert len(set(rows)) == len(rows) == nyuv2.NUM_IMAGES
    assert all("rgb_" in rgb and "depth_" in depth for rgb, depth in rows)
