"""KITTI depth: the benchmark's cut, Eigen's and Garg's regions, and the official list."""

import tarfile

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
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import kitti_depth

DRIVE = "2011_09_26_drive_0002_sync"
RGB = f"2011_09_26/{DRIVE}/image_02/data/00000000{{}}.png"
DEPTH = f"{DRIVE}/proj_depth/groundtruth/image_02/00000000{{}}.png"
SIZE = (375, 1242)


def levels(seed):
    _, meters = scene(*SIZE, near=3, far=95, seed=seed)
    known = np.random.default_rng(seed).random(SIZE) < 0.2  # a laser sees some pixels only
    return np.rint(meters * known * 256).astype(np.uint16)


def write(root, *, raw="", depth=""):
    """Frames 54 and 69 as KITTI has them; the list has one more, without depth."""
    for frame in (54, 69):
        picture, _ = scene(*SIZE, near=3, far=95, seed=frame)
        write_png(root / raw / RGB.format(frame), picture)
        write_png(root / depth / DEPTH.format(frame), levels(frame))
    rows = [(69, DEPTH.format(69)), (42, "None"), (54, DEPTH.format(54))]
    lines = [f"{RGB.format(frame)} {depth} 721.5377" for frame, depth in rows]
    (root / "list.txt").write_text("\n".join(lines))
    return root


@pytest.fixture
def source(tmp_path):
    return write(tmp_path, raw="raw", depth="val")


def cut(pixels):
    return pixels[23:, 13:1229]  # 375 - 352 rows of sky; 1242 - 1216 columns, half on each side


@pytest.mark.parametrize(
    ("region", "rows", "columns"),
    [("eigen", (117, 321), (43, 1172)), ("garg", (143, 349), (43, 1172))],
    ids=["eigen", "garg"],
)
def test_cases_are_cut_and_count_in_a_region(source, region, rows, columns):
    cases = kitti_depth.open_cases(source, source / "list.txt", region=region)
    assert [case.name for case in cases] == [RGB.format(69), RGB.format(54)]
    picture, _ = scene(*SIZE, near=3, far=95, seed=69)
    case = cases[0]
    np.testing.assert_array_equal(case.image, cut(picture))
    meters = cut(levels(69)) / 256
    np.testing.assert_array_equal(case.depth, meters)
    valid = (meters > 0) & (meters < 80)
    inside = np.zeros_like(valid)
    inside[slice(*rows), slice(*columns)] = True
    np.testing.assert_array_equal(case.valid, valid & inside)
    prediction = np.linspace(9, 1, 352)[:, None] * np.ones((1, 1216))
    scores = case.score(prediction)
    want = read_by_hand(prediction, meters, valid & inside, 1e-5, 80)
    assert (scores["abs_rel"].value, scores["delta1"].value) == pytest.approx(want, abs=1e-12)


def test_one_archive_of_the_lists_files_is_read(tmp_path):
    write(tmp_path / "files")
    with tarfile.open(tmp_path / "kitti_eigen_split_test.tar", "w") as archive:
        archive.add(tmp_path / "files", arcname=".")
    file = tmp_path / "files" / "list.txt"
    cases = kitti_depth.open_cases(tmp_path / "kitti_eigen_split_test.tar", file)
    folder = kitti_depth.open_cases(tmp_path / "files", file)
    assert len(cases) == len(folder) == 2
    for a, b in zip(cases, folder):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.depth, b.depth)


def test_a_generated_picture_is_of_the_cut(source, tmp_path):
    """Depth is known at some pixels only, and black elsewhere: blurred, it is still the best."""
    (source / "list.txt").rename(source / kitti_depth.LIST)
    found = summary_of_truths("kitti_depth:region=garg", source, tmp_path / "out")
    assert 0 < found["official/abs_rel"] < found["constant/abs_rel"]
    assert found["failures/missing"] == 1
    settings = open_benchmark("kitti_depth:region=garg").settings
    assert settings == {"list": "", "region": "garg"}


def test_what_is_missing_or_unknown_is_told(source, tmp_path):
    file = source / "list.txt"
    with pytest.raises(UserError, match="unknown region of KITTI 'eigne'; did you mean 'eigen'"):
        kitti_depth.open_cases(source, file, region="eigne")
    with pytest.raises(
        NotFoundError, match=r"no.txt does not exist: expected a list of `rgb depth"
    ):
        kitti_depth.open_cases(source, tmp_path / "no.txt")
    cases = kitti_depth.open_cases(source, file)
    write_png(source / "raw" / RGB.format(69), np.zeros((300, 1242, 3), np.uint8))
    write_png(source / "val" / DEPTH.format(69), np.ones((300, 1242), np.uint16))
    with pytest.raises(UserError, match=r"069.png: it has 1242 x 300 pixels: expected 1216 x 352"):
        cases[0]


@needs_lists
def test_the_official_list_has_652_pictures_with_depth(tmp_path):
    write(tmp_path, depth="val")
    cases = kitti_depth.open_cases(tmp_path, LISTS / "kitti_eigen_test_files_with_gt.txt")
    assert len(cases) == kitti_depth.NUM_IMAGES
    assert cases[0].name == RGB.format(69)
