"""Datasets on disk: found, opened and read in part, or refused in one line."""

import pytest

from data_pipelines.datasets import emoji_scenes
from data_pipelines.sources import open_source
from univg_jax.errors import NotFoundError, UserError


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
