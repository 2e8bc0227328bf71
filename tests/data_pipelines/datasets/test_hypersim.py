"""Hypersim: planar depth by each scene's camera, tone mapping, broken frames."""

import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.datasets import hypersim
from data_pipelines.datasets.hypersim import DATASET
from tests.data_pipelines.datasets import building
from tests.native import hypersim as fixture
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "."))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)


@pytest.fixture
def options(tmp_path):
    return fixture.write(tmp_path)


def test_frames_of_the_public_release_with_planar_depth(options):
    native = building.open_native(DATASET, options)
    made, skipped = building.read(native, "train")
    assert sorted(made) == [
        *("ai_001_001/cam_00/0000", "ai_001_001/cam_01/0005"),
        "ai_001_002/cam_00/0000",  # in a zip
    ]
    assert list(skipped) == ["ai_001_001/cam_01/0007"]
    assert "frame.0007.depth_meters.hdf5" in skipped["ai_001_001/cam_01/0007"]
    for key, record in made.items():
        depth = record["depth"]
        hole = np.zeros_like(depth, bool)
        hole[:4, :6] = True
        assert not depth[hole].any()
        wall = 3 + int(key[-4:])
        # The wall is parallel to the sensor: what a distance along the ray is not.
        np.testing.assert_allclose(depth[~hole], wall, rtol=2e-3)
        width, height = fixture.SIZES[key[:10]]
        assert record["image"].shape == (height, width, 3)
    for split in ("validation", "test"):
        assert len(building.read(native, split)[0]) == fixture.RECORDS[split]


def test_a_batch_of_depth(options):
    made, _ = building.read(building.open_native(DATASET, options), "train")
    batch = building.batch(made.values(), "depth")
    assert batch.target.any(axis=(1, 2, 3)).all()


def test_tone_mapping_makes_the_percentile_as_bright_as_it_should_be():
    rng = np.random.default_rng(0)
    color = np.exp(rng.normal(size=(40, 50, 1))).astype(np.float32) * np.ones(3, np.float32)
    valid = np.ones((40, 50), bool)
    shown = hypersim.tone_map(color, valid)
    assert abs(np.percentile(shown, 90) / 255 - 0.8) < 0.01
    # What is not valid does not count, but is shown.
    bright = color.copy()
    bright[:20] *= 1000
    valid[:20] = False
    np.testing.assert_array_equal(hypersim.tone_map(bright, valid)[20:], hypersim.tone_map(
        color, valid)[20:])  # fmt: skip
    assert (hypersim.tone_map(bright, valid)[:20] == 255).mean() > 0.9
    # A dark picture is black, one without anything valid is not exposed.
    assert not hypersim.tone_map(color * 1e-6, ~np.zeros((40, 50), bool)).any()
    plain = hypersim.tone_map(np.full((4, 4, 3), 0.5, np.float32), np.zeros((4, 4), bool))
    assert (plain == round(0.5 ** (1 / 2.2) * 255)).all()
    broken = color.copy()
    broken[0, 0], broken[0, 1] = np.nan, np.inf
    shown = hypersim.tone_map(broken, np.ones((40, 50), bool))
    assert (shown[0, 0] == 0).all()
    assert (shown[0, 1] == 255).all()


def test_the_stored_picture_is_close_to_the_tone_mapped_one(options):
    native = building.open_native(DATASET, options)
    entry = next(e for part in native.parts("test") for e in native.entries(part))
    with Image.open(io.BytesIO(native.make(entry.raw)["image"])) as picture:
        assert picture.format == "JPEG"
        stored = np.asarray(picture).astype(int)
    path = next(pathlib.Path(options["source"], "ai_002_001").rglob("frame.0003.color.hdf5"))
    color = hypersim.read_hdf5(path.read_bytes(), "color").astype(np.float32)
    valid = np.isfinite(fixture.distances("ai_002_001", 3))
    assert np.abs(stored - hypersim.tone_map(color, valid)).mean() < 2


def test_what_is_wrong_with_one_frame_leaves_it_out(options, tmp_path):
    native = building.open_native(DATASET, options)
    folder = tmp_path / "ai_001_001" / "images" / "scene_cam_00_geometry_hdf5"
    path = folder / "frame.0000.depth_meters.hdf5"
    whole = path.read_bytes()
    for content, message in [
        (whole[:400], "is not an HDF5 file"),
        (b"", "is not an HDF5 file"),
        (fixture.hdf5(np.full((48, 64), np.nan, np.float16)), "the frame has no geometry"),
        (fixture.hdf5(np.ones((48, 60), np.float16)), "depth_meters [48, 60]"),
        (fixture.hdf5(np.ones((48, 64), np.int32)), "no array of floats"),
    ]:
        path.write_bytes(content)
        made, skipped = building.read(native, "train")
        assert len(made) == 2
        assert message in skipped["ai_001_001/cam_00/0000"]


def test_cameras_that_are_empty_or_told_in_two_ways(options, tmp_path):
    native = building.open_native(DATASET, options)
    path = tmp_path / "metadata_camera_parameters.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1].replace("0.6", "0.7")]))
    _, skipped = building.read(native, "train")
    assert "has two cameras of ai_001_001" in skipped["ai_001_001/cam_00/0000"]
    path.write_text("\n".join([lines[0], lines[1].replace("0.6", ""), *lines[2:4]]))
    _, skipped = building.read(native, "train")
    assert "'M_cam_from_uv_00' is empty" in skipped["ai_001_001/cam_00/0000"]
    path.write_text("\n".join([lines[0], *lines[2:4]]))
    _, skipped = building.read(native, "train")
    assert "has no camera of the scene" in skipped["ai_001_001/cam_00/0000"]


def test_missing_and_foreign_files_are_named(options, tmp_path):
    with pytest.raises(NotFoundError, match=r"metadata_images_split_scene_v1\.csv or "):
        building.open_native(DATASET, dict(source=str(tmp_path / "ai_001_001")))
    native = building.open_native(DATASET, options)
    cameras = tmp_path / "metadata_camera_parameters.csv"
    splits = tmp_path / "metadata_images_split_scene_v1.csv"
    good = splits.read_text()
    splits.write_text(cameras.read_text())
    with pytest.raises(UserError, match=r"scene_v1\.csv has no column 'camera_name'"):
        native.parts("train")
    splits.write_text(good.replace("ai_00", "ai_70"))
    with pytest.raises(
        NotFoundError, match=r"has none of the 2 scenes of train: .*ai_701_001\.zip"
    ):
        native.parts("train")
    splits.write_text(good.replace("cam_00", "../cam"))
    with pytest.raises(UserError, match=r"scene_v1\.csv row 0 is of 'ai_001_001 \.\./cam 0'"):
        native.parts("train")


@needs_samples
def test_the_real_depth_file():
    """Its camera's sensor is not centered: the usual focal length gives another depth."""
    folder = SAMPLES / "hypersim"
    name = "ai_037_002/images/scene_cam_00_geometry_hdf5/frame.0000.depth_meters.hdf5.part-"
    content = b"".join((folder / f"{name}{end}").read_bytes() for end in ("aa", "ab"))
    distance = hypersim.read_hdf5(content, name).astype(np.float32)
    assert distance.shape == (768, 1024)
    cameras = hypersim._read_cameras(str(folder / "metadata_camera_parameters.csv"))
    assert len(cameras) == 242
    assert all(isinstance(c, tuple) for c in cameras.values())
    planar = hypersim.planar_depth(distance, np.reshape(cameras["ai_037_002"], (3, 3)))
    assert np.nanmax(distance / planar) == pytest.approx(1.30, abs=0.005)
    x, y = np.meshgrid(np.arange(1024) - 511.5, np.arange(768) - 383.5)
    naive = distance * 886.81 / np.sqrt(x**2 + y**2 + 886.81**2)
    error = np.abs(naive / planar - 1)
    assert np.nanmean(error) == pytest.approx(0.023, abs=0.0005)
    assert np.nanmax(error) == pytest.approx(0.057, abs=0.0005)


@needs_samples
def test_the_real_split_file(tmp_path):
    path = str(SAMPLES / "hypersim" / "metadata_images_split_scene_v1.csv")
    rows = [line.split(",") for line in pathlib.Path(path).read_text().splitlines()[1:]]
    counts = {}
    for split, name in {"train": "train", "validation": "val", "test": "test"}.items():
        frames = hypersim._read_frames(path, split)
        counts[split] = sum(map(len, frames.values()))
        assert counts[split] == sum(row[3] == "True" and row[5] == name for row in rows)
    assert sum(counts.values()) < len(rows)
