"""The registry: what each dataset needs for flags, configs and sources, without its packages."""

import dataclasses
import subprocess
import sys

import pytest

from data_pipelines.datasets import DATASETS
from univg_jax import fields
from univg_jax.errors import UserError


@pytest.mark.parametrize("name", DATASETS)
def test_each_dataset_says_what_flags_and_configs_need(name):
    dataset = DATASETS[name]
    assert dataset.name == name
    assert dataset.summary
    assert dataset.families
    for field in dataclasses.fields(dataset.options):
        assert fields.rule_of(field).help
        assert isinstance(field.default, field.type)
    assert dataset.make_options({}) == dataset.options()


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
