"""The registry: what each dataset needs for flags, configs and sources, without its packages."""

import dataclasses
import subprocess
import sys

import pytest

from data_pipelines.build import build
from data_pipelines.datasets import DATASETS
from data_pipelines.tasks import TASKS
from univg_jax import fields
from univg_jax.errors import UserError


@pytest.mark.parametrize("name", DATASETS)
def test_each_dataset_says_what_flags_and_configs_need(name):
    dataset = DATASETS[name]
    assert dataset.name == name
    for text in (dataset.summary, dataset.size, dataset.license, dataset.where, dataset.example):
        assert text
        assert "\n" not in text
    assert dataset.tasks
    assert set(dataset.tasks) <= set(TASKS)
    for field in dataclasses.fields(dataset.options):
        assert fields.rule_of(field).help
    assert dataset.make_options({}) == dataset.options()


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "emoji_scenes"])
def test_each_dataset_of_native_files_names_what_is_missing(name, tmp_path):
    dataset = DATASETS[name]
    for source in ("", str(tmp_path / "nowhere"), str(tmp_path)):
        with pytest.raises(UserError) as error:
            build(dataset, tmp_path / "out", dataset.make_options(dict(source=source)))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out" / name).exists()


def test_options_come_from_a_config_or_are_refused_by_name():
    dataset = DATASETS["emoji_scenes"]
    options = dataset.make_options(dict(resolution=32, nouns=6))
    assert dataclasses.asdict(options) == dict(resolution=32, num_scenes=10_000, seed=0, nouns=6)
    with pytest.raises(
        UserError,
        match=r"unknown key of data\.build: 'resolutoin'; did you mean 'resolution'",
    ):
        dataset.make_options(dict(resolutoin=32))
    with pytest.raises(UserError, match=r"data\.build\.seed=0\.5: expected a whole number >= 0"):
        dataset.make_options(dict(seed=0.5))


def test_the_registry_loads_without_what_a_build_needs():
    code = "import sys, data_pipelines.datasets; "
    code += "print({'jax', 'tensorflow_datasets', 'dicebear', 'resvg_py'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
