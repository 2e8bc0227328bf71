"""Datasets on disk: found, opened and read in part, or refused in one line; fingerprints."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import sources
from data_pipelines.build import write_dataset
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
    emoji_scenes.build(tmp_path, options, processes=1)
    scenes = open_source("scenes", "train", data_dir=str(tmp_path))
    assert len(scenes) == 16
    assert set(scenes.read(3, ("image", "caption"))) == {"image", "caption"}
    assert set(scenes.fields) == set(scenes.read(0))
    assert open_source(str(tmp_path / "scenes"), "train").name == f"{tmp_path / 'scenes'}/train"
    with pytest.raises(UserError, match=r"unknown split of .*'trian'; did you mean 'train'"):
        open_source("scenes", "trian", data_dir=str(tmp_path))
    with pytest.raises(UserError, match="holds several datasets"):
        open_source(str(tmp_path), "train")


def test_a_dataset_is_looked_for_in_a_bucket(bucket):
    (bucket / "data" / "scenes").mkdir(parents=True)
    with pytest.raises(NotFoundError, match=r"no dataset at gs://bucket/data/scene: .*'scenes'"):
        open_source("scene", "train", data_dir="gs://bucket/data")


# --- fingerprints ---

WRITE = """
import sys
import numpy as np
from data_pipelines.build import write_dataset
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
    monkeypatch.setattr(sources, "HASHED_WHOLE", whole)
    mine = write(tmp_path / "mine")
    copy = shutil.copytree(mine, tmp_path / "copy")
    (copy / "dataset_info.json").touch()
    assert fingerprint(copy) == fingerprint(mine)
    assert fingerprint(mine) != fingerprint(mine, "test")
    # One record differs, in a caption of as many letters.
    assert fingerprint(write(tmp_path / "other", caption="x")) != fingerprint(mine)


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
