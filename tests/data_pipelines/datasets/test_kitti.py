"""KITTI depth: exact levels, joined with pictures, from native files to a batch."""

import os
import pathlib
import shutil
import zipfile

import numpy as np
import pytest

from data_pipelines.datasets.kitti import DATASET
from tests.data_pipelines.datasets import building
from tests.native import kitti as fixture
from tests.native import shapes
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "."))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
DRIVE = "2011_09_26_drive_0001_sync"
DEPTH = f"{DRIVE}/proj_depth/groundtruth/image_02/0000000005.png"
RGB = f"2011_09_26/{DRIVE}/image_02/data/0000000005.png"


@pytest.fixture
def options(tmp_path):
    return fixture.write(tmp_path)


def test_each_depth_with_its_picture(options):
    native = building.open_native(DATASET, options)
    assert native.splits == ("train", "validation")
    for split, count in fixture.RECORDS.items():
        made, skipped = building.read(native, split)
        assert len(made) == count
        assert not skipped
    made, _ = building.read(native, "train")
    assert sorted(made)[0] == f"{DRIVE}/image_02/0000000005"
    record = made[f"{DRIVE}/image_02/0000000005"]
    levels = fixture.levels(124, 38, seed=5)
    np.testing.assert_array_equal(record["depth"], levels.astype(np.float32) / 256)
    assert 70 > record["depth"].max() > 50
    assert (record["depth"] == 0).mean() > 0.8
    np.testing.assert_array_equal(record["image"], shapes.ground(124, 38, seed=5))
    assert made["2011_09_28_drive_0002_sync/image_02/0000000005"]["image"].shape == (37, 122, 3)


def test_levels_stay_as_they_are(options):
    native = building.open_native(DATASET, options)
    (entry, *_) = (e for part in native.parts("train") for e in native.entries(part))
    stored = native.make(entry.raw)
    assert stored["depth_scale"] == 1 / 256


def test_a_batch_of_depth(options):
    made, _ = building.read(building.open_native(DATASET, options), "train")
    batch = building.batch(made.values(), "depth")
    assert batch.target.any(axis=(1, 2, 3)).all()
    assert (batch.loss_mask.mean(axis=(1, 2, 3)) < 0.9).all()


def test_zips_as_downloaded(options, tmp_path):
    plain, _ = building.read(building.open_native(DATASET, options), "train")
    with zipfile.ZipFile(tmp_path / "data_depth_annotated.zip", "w") as archive:
        for split in ("train", "val"):
            for path in sorted((tmp_path / split).rglob("*.png")):
                archive.write(path, path.relative_to(tmp_path))
            shutil.rmtree(tmp_path / split)
    with zipfile.ZipFile(tmp_path / "raw" / f"{DRIVE}.zip", "w") as archive:
        for path in sorted((tmp_path / "raw" / "2011_09_26").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path / "raw"))
    shutil.rmtree(tmp_path / "raw" / "2011_09_26")
    native = building.open_native(DATASET, options)
    assert native.splits == ("train", "validation")
    zipped, skipped = building.read(native, "train")
    assert zipped.keys() == plain.keys()
    assert not skipped
    for key in plain:
        np.testing.assert_array_equal(zipped[key]["depth"], plain[key]["depth"])


def test_lists_in_place_of_all(options, tmp_path):
    path = tmp_path / "eigen.txt"
    path.write_text(
        f"{RGB} {DEPTH} 721.5377\r\n{RGB.replace('005', '009')} None 721.5377\n"
        f"/{RGB.replace('005', '006')} {DEPTH.replace('005', '006')} 721.5377"  # no last newline
    )
    native = building.open_native(DATASET, dict(options, test_list=str(path)))
    assert native.splits == ("test",)
    made, skipped = building.read(native, "test")
    assert [key.rsplit("/", 1)[1] for key in made] == ["0000000005", "0000000006"]
    assert not skipped
    path.write_text("a b c d\n")
    with pytest.raises(UserError, match=r"eigen\.txt line 1 is 'a b c d': expected `rgb depth"):
        native.parts("test")
    path.unlink()
    with pytest.raises(NotFoundError, match=r"eigen\.txt does not exist"):
        native.parts("test")


def test_what_is_wrong_with_one_depth_leaves_it_out(options, tmp_path):
    native = building.open_native(DATASET, options)
    path = tmp_path / "train" / DEPTH
    for content, message in [
        (
            shapes.png(fixture.levels(124, 40, seed=5)),
            "124 x 38 pixels and its annotations are for",
        ),
        (shapes.png(np.zeros((38, 124), np.uint16)), "has no depth at all"),
        (shapes.png(np.zeros((38, 124), np.uint8)), "is not a 16-bit gray PNG"),
        (b"", "is not a readable image"),
    ]:
        path.write_bytes(content)
        made, skipped = building.read(native, "train")
        assert len(made) == 3
        assert message in skipped[f"{DRIVE}/image_02/0000000005"]
    fixture.write(tmp_path)
    (tmp_path / "raw" / RGB).unlink()
    _, skipped = building.read(native, "train")
    assert f"there is no picture '{RGB}' in" in skipped[f"{DRIVE}/image_02/0000000005"]


def test_missing_and_foreign_folders_are_named(options, tmp_path):
    with pytest.raises(NotFoundError, match=r"expected train/2011_09_26_drive_0001_sync/proj_dep"):
        building.open_native(DATASET, dict(source=str(tmp_path / "raw")))
    shutil.rmtree(tmp_path / "raw")
    native = building.open_native(DATASET, options)
    with pytest.raises(
        NotFoundError, match=r"raw release.*: expected .*2011_09_26/2011_09_26_drive"
    ):
        native.parts("train")
    with pytest.raises(NotFoundError, match=r"nowhere is not a folder: expected KITTI's raw"):
        building.open_native(DATASET, dict(options, raw=str(tmp_path / "nowhere")))


@needs_samples
def test_real_lists(options, tmp_path):
    path = SAMPLES / "depth_lists" / "kitti_depth" / "eigen_val_from_train_sub_100.txt"
    from data_pipelines.datasets import kitti

    pairs = kitti._read_list(str(path))
    assert len(pairs) == len(path.read_text().splitlines()) == 100
    # The first of its rows, with pictures of our own in its place.
    rgb, depth = pairs[0]
    for root, name, pixels in [
        ("raw", rgb, shapes.ground(124, 38, seed=1)),
        ("train", depth, fixture.levels(124, 38, seed=1)),
    ]:
        (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / root / name).write_bytes(shapes.png(pixels))
    native = building.open_native(DATASET, dict(options, val_list=str(path)))
    made, skipped = building.read(native, "validation")
    assert len(made) >= 1
    assert len(made) + len(skipped) == 100
