"""Datasets in a bad state are refused by the name of the file, and nothing is imported."""

import importlib
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from data_pipelines.build import write_dataset
from data_pipelines.sources import open_source
from univg_jax.errors import UserError
from univg_jax.images import png_bytes

TRAIN = "records-train.array_record-00000-of-00001"


def record(k: int) -> dict:
    image = png_bytes(np.full((4, 4, 3), k, np.uint8))
    return dict(image=image, caption=f"shade {k}", phrases=["a shade"], expressions=[])


def write(folder: pathlib.Path, *, first: int = 0, count: int = 5) -> pathlib.Path:
    write_dataset(folder, dict(train=map(record, range(first, first + count)), test=[record(0)]))
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "mine")


@pytest.fixture
def mine(sound, tmp_path):
    return pathlib.Path(shutil.copytree(sound, tmp_path / "mine"))


def edit_json(file: pathlib.Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def cut(folder):
    data = (folder / TRAIN).read_bytes()
    (folder / TRAIN).write_bytes(data[: len(data) // 2])


def foreign(folder):
    other = write(folder.parent / "other", count=6)
    shutil.copy(other / TRAIN, folder / TRAIN)


def foreign_of_as_many(folder):
    other = folder.parent / "other"
    image = record(0)["image"]
    write_dataset(other, dict(train=[dict(image=image, instruction="do", source=image)] * 5))
    shutil.copy(other / TRAIN, folder / TRAIN)


def change_info(**values):
    return lambda folder: edit_json(folder / "dataset_info.json", lambda info: info.update(values))


def elsewhere(folder):
    split = dict(name="train", shardLengths=["5"], filepathTemplate="../other/{SPLIT}")
    change_info(splits=[split])(folder)


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (lambda f: (f / TRAIN).unlink(), TRAIN, "does not exist, but dataset_info.json names it"),
        (lambda f: (f / TRAIN).write_bytes(b""), TRAIN, "is truncated, or no ArrayRecord file"),
        (
            lambda f: (f / TRAIN).write_bytes(b"PK" * 2**17),
            TRAIN,
            "is truncated, or no ArrayRecord",
        ),
        (cut, TRAIN, "is truncated, or no ArrayRecord file"),
        (foreign, TRAIN, "has 6 records, but dataset_info.json says 5"),
        (foreign_of_as_many, TRAIN, "its first record has not the fields of features.json"),
        (
            lambda f: shutil.copy(f / TRAIN, f / "records-train.array_record-00001-of-00002"),
            "records-train.array_record-00001-of-00002",
            "is no shard that dataset_info.json names",
        ),
        (
            lambda f: (f / "dataset_info.json").write_text("{"),
            "dataset_info.json",
            "is not JSON",
        ),
        (
            lambda f: (f / "dataset_info.json").write_bytes(b"\xff\xfe"),
            "dataset_info.json",
            "is not JSON",
        ),
        (
            lambda f: (f / "dataset_info.json").write_text("[]"),
            "dataset_info.json",
            "is not a JSON",
        ),
        (
            lambda f: (f / "dataset_info.json").write_text("[" * 10**5),
            "dataset_info.json",
            "nested",
        ),
        (change_info(splits=[]), "dataset_info.json", "names no splits"),
        (change_info(splits=7), "dataset_info.json", "is damaged"),
        (change_info(fileFormat="tfrecord"), "dataset_info.json", "are 'tfrecord'; expected"),
        (elsewhere, "dataset_info.json", "its files are in another folder"),
        (lambda f: (f / "features.json").unlink(), "features.json", "does not exist"),
        (lambda f: (f / "features.json").write_text("nul"), "features.json", "is not JSON"),
        (lambda f: (f / "features.json").write_text("{}"), "features.json", "names no fields"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said_in_a_line_by_file(mine, damage, file, message):
    damage(mine)
    with pytest.raises(UserError, match=message) as error:
        open_source("mine", "train", data_dir=str(mine.parent))
    assert str(mine / file) in str(error.value)
    assert "\n" not in str(error.value)


def test_another_split_may_be_damaged_but_not_missing_from_its_list(mine):
    (mine / TRAIN).write_bytes(b"")
    assert len(open_source("mine", "test", data_dir=str(mine.parent))) == 1


def test_one_damaged_record_is_no_damaged_dataset(mine):
    data = bytearray((mine / TRAIN).read_bytes())
    data[64:128] = bytes(64)  # the header of the first record
    (mine / TRAIN).write_bytes(data)
    source = open_source("mine", "train", data_dir=str(mine.parent))
    assert source.read(1)["caption"].startswith("shade")
    with pytest.raises(RuntimeError):
        source.read(0)


HOSTILE = "hostile_features.Feature"


def rename_class(*path):
    """Names a class of our own module in features.json, at a place inside it."""

    def change(content):
        for key in path:
            content = content[key]
        content["pythonClassName"] = HOSTILE

    return change


def add(feature):
    return lambda content: content["featuresDict"]["features"].update(extra=feature)


@pytest.mark.parametrize(
    "change",
    [
        rename_class(),
        rename_class("featuresDict", "features", "image"),
        rename_class("featuresDict", "features", "phrases", "sequence", "feature"),
        add({"pythonClassName": HOSTILE, "text": {}}),
        add({"python_class_name": HOSTILE, "jsonFeature": {"json": "{}"}}),
        # TFDS reads the JSON inside of this JSON, and imports what it names.
        lambda content: content["featuresDict"]["features"].update(
            phrases={
                "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
                "jsonFeature": {
                    "json": json.dumps(
                        {"feature": {"type": HOSTILE, "content": {}}, "length": None}
                    )
                },
            }
        ),
        lambda content: content.update(type=HOSTILE, content={}, featuresDict={}),
    ],
)
def test_features_json_never_imports_what_it_names(mine, change, monkeypatch, tmp_path):
    (tmp_path / "hostile_features.py").write_text("import pathlib; pathlib.Path('trace').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    edit_json(mine / "features.json", change)
    edit_json(mine / "dataset_info.json", lambda info: info.update(moduleName="hostile_features"))
    with pytest.raises(UserError, match=r"features\.json"):
        open_source("mine", "train", data_dir=str(mine.parent))
    assert not (tmp_path / "trace").exists()
    importlib.import_module("hostile_features")  # it could have been
    assert (tmp_path / "trace").exists()
    del sys.modules["hostile_features"]


def test_a_field_that_is_none_of_ours_is_left_out(mine):
    name = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"
    edit_json(mine / "features.json", add({"pythonClassName": name, "classLabel": {}}))
    assert "extra" not in open_source("mine", "train", data_dir=str(mine.parent)).fields
