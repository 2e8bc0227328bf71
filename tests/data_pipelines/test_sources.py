"""Datasets on disk: found, opened and read in part, or refused in one line; fingerprints."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import records, tfds_folder
from data_pipelines.build import build, write_dataset
from data_pipelines.datasets import emoji_scenes
from data_pipelines.sources import MemorySource, open_source
from univg_jax.errors import NotFoundError, UserError
from univg_jax.images import png_bytes


def test_a_missing_dataset_suggests_the_nearest(tmp_path):
    (tmp_path / "scenes").mkdir()
    with pytest.raises(NotFoundError, match="did you mean 'scenes'"):
        open_source("scene", "train", data_dir=str(tmp_path))
    with pytest.raises(NotFoundError, match="unfinished build"):
        open_source("scenes", "train", data_dir=str(tmp_path))


def test_a_dataset_is_opened_by_its_name_or_path_and_read_in_part(tmp_path):
    options = emoji_scenes.Options(resolution=16, num_scenes=16, nouns=4)
    build(emoji_scenes.DATASET, tmp_path, options, processes=1)
    scenes = open_source("scenes", "train", data_dir=str(tmp_path))
    assert len(scenes) == 16
    assert set(scenes.read(3, ("image", "caption"))) == {"image", "caption"}
    assert set(scenes.fields) == set(scenes.read(0))
    assert open_source(str(tmp_path / "scenes"), "train").name == f"{tmp_path / 'scenes'}/train"
    with pytest.raises(UserError, match=r"unknown split of .*'trian'; did you mean 'train'"):
        open_source("scenes", "trian", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="holds several datasets"):
        open_source(str(tmp_path), "train")


def test_a_build_of_one_person_a_picture_is_still_read(tmp_path):
    """In earlier builds joints were [17, 3], and depth was in millimeters."""
    joints = np.full((17, 3), 0.5, np.float32)
    depth = png_bytes(np.full((4, 4), 2500, np.uint16))
    image = png_bytes(np.zeros((4, 4, 3), np.uint8))
    record = dict(image=image, joints=joints[None], depth=depth)
    write_dataset(tmp_path / "old", dict(train=[record]))
    features = tmp_path / "old" / "features.json"
    content = json.loads(features.read_text())
    shape = content["featuresDict"]["features"]["joints"]["tensor"]["shape"]
    assert shape["dimensions"] == ["-1", "17", "3"]
    shape["dimensions"] = ["17", "3"]  # what is stored in the records is the same
    features.write_text(json.dumps(content))
    found = open_source("old", "train", data_dir=str(tmp_path)).read(0)
    np.testing.assert_array_equal(found["joints"], joints[None])
    np.testing.assert_array_equal(found["depth"], np.float32(2.5))


def test_a_record_written_with_the_joints_of_one_person_has_one(tmp_path):
    joints = np.full((17, 3), 0.5, np.float32)
    image = png_bytes(np.zeros((4, 4, 3), np.uint8))
    write_dataset(tmp_path / "mine", dict(train=[dict(image=image, joints=joints)]))
    found = open_source("mine", "train", data_dir=str(tmp_path))
    np.testing.assert_array_equal(found.read(0)["joints"], joints[None])


def test_all_fields_of_real_datasets_are_stored_and_read(tmp_path):
    image, plane = (png_bytes(np.zeros(shape, np.uint8)) for shape in ((4, 6, 3), (4, 6)))
    full = dict(
        image=image,
        captions=["a pig", "pig"],
        caption_kinds=["long", "short"],
        **records.encode_depth(np.full((4, 6), 299.0)),
        boxes=np.float32([[0, 0, 1, 1]] * 2),
        phrases=["a pig", "pig"],
        phrase_captions=np.array([0, 1]),
        masks=[plane],
        expressions=["pig", "sow"],
        expression_masks=np.array([0, 0]),
        joints=np.zeros((3, 17, 3), np.float32),
        ignore_mask=plane,
    )
    empty = dict(captions=[], caption_kinds=[], phrases=[], expressions=[], masks=[])
    empty |= {name: full[name][:0] for name in ("boxes", "phrase_captions", "expression_masks")}
    empty |= dict(joints=full["joints"][:0])
    write_dataset(tmp_path / "mine", dict(train=[full, full | empty]))
    found = open_source("mine", "train", data_dir=str(tmp_path))
    assert set(found.fields) == set(full) - {"depth_scale"}
    first, second = found.read(0), found.read(1)
    for name in ("captions", "caption_kinds", "phrases", "expressions"):
        assert first[name] == full[name]
    for name in ("boxes", "phrase_captions", "expression_masks", "joints"):
        np.testing.assert_array_equal(first[name], full[name])
    np.testing.assert_allclose(found.read(0, ("depth",))["depth"], 299, rtol=1e-6)
    assert first["masks"].shape == (1, 4, 6)
    assert first["ignore_mask"].shape == (4, 6)
    assert all(len(second[name]) == 0 for name in empty)


def test_a_dataset_is_looked_for_in_a_bucket(bucket):
    (bucket / "data" / "scenes").mkdir(parents=True)
    with pytest.raises(NotFoundError, match=r"no dataset at gs://bucket/data/scene: .*'scenes'"):
        open_source("scene", "train", data_dir="gs://bucket/data")


# --- fingerprints ---

WRITE = """
import sys
import numpy as np
from data_pipelines.build import build, write_dataset
from univg_jax.images import png_bytes
image = png_bytes(np.zeros((2, 2, 3), np.uint8))
records = [dict(image=image, caption=f"{k}", instruction="", source=image) for k in range(40)]
write_dataset(sys.argv[1], {"train": records, "test": records[:1]})
"""


def fingerprint(folder, split="train"):
    return open_source(folder.name, split, data_dir=str(folder.parent)).fingerprint()


def write(folder, **changes):
    image = png_bytes(np.zeros((2, 2, 3), np.uint8))
    records = [dict(image=image, caption=f"{k}", instruction="", source=image) for k in range(40)]
    records[7] |= changes
    write_dataset(folder, {"train": records, "test": records[:1]})
    return folder


@pytest.mark.parametrize("whole", [2**26, 0], ids=["all records", "some"])
def test_a_fingerprint_is_of_the_content_wherever_it_lies(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(tfds_folder, "HASHED_WHOLE", whole)
    mine = write(tmp_path / "mine")
    copy = shutil.copytree(mine, tmp_path / "copy")
    (copy / "dataset_info.json").touch()
    assert fingerprint(copy) == fingerprint(mine)
    assert fingerprint(mine) != fingerprint(mine, "test")
    # One record differs, in a caption of as many letters.
    assert fingerprint(write(tmp_path / "other", caption="x")) != fingerprint(mine)
    # What a build has noted is what its records say; of longer shards it is not believed.
    noted = fingerprint(mine)
    longer = write(tmp_path / "longer", caption="x" * 200_000)
    shutil.copy(mine / "build.json", longer)
    assert fingerprint(longer) != noted
    (mine / "build.json").unlink()
    assert fingerprint(mine) == noted


@pytest.mark.parametrize("damage", ["{", "[]", '{"files": 3}', '{"files": {}, "fingerprints": []}'])
def test_a_damaged_note_of_a_build_is_no_fingerprint(tmp_path, damage):
    mine = write(tmp_path / "mine")
    noted = fingerprint(mine)
    (mine / "build.json").write_text(damage)
    assert fingerprint(mine) == noted


def test_a_dataset_that_another_process_makes_again_has_the_same_fingerprint(tmp_path):
    """Its files differ: each process writes the fields of a record in an order of its own."""
    subprocess.run([sys.executable, "-c", WRITE, tmp_path / "again"], check=True)
    assert fingerprint(tmp_path / "again") == fingerprint(write(tmp_path / "mine"))


def test_records_in_memory_have_a_fingerprint_too():
    def of(**changes):
        item = dict(image=np.zeros((2, 2, 3), np.uint8), caption="a", phrases=["b"]) | changes
        return MemorySource("mine", [item, item]).fingerprint()

    assert of() == of(image=np.zeros((2, 2, 3), np.uint8))
    others = [
        of(image=np.ones((2, 2, 3), np.uint8)),
        of(image=np.zeros((4, 3), np.uint8)),
        of(caption="b"),
        of(phrases=["b", ""]),
        of(phrases="b"),
        of(person=1),
    ]
    assert len({of(), *others}) == 1 + len(others)
