"""Golden renders: every experiment, under review.

`UPDATE_GOLDEN=1 pytest tests/test_experiments.py` renews them.
"""

import functools
import os
import pathlib

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from data_pipelines.datasets import DATASETS
from tests.test_sharding import unused_rules
from univg_jax import assembly, configs, encoders, sharding
from univg_jax.batch import BatchShape
from univg_jax.errors import NotFoundError
from univg_jax.settings import Config
from univg_jax.training.step import TrainState, TrainStep, num_parameters
from univg_jax.trees import flatten

GOLDEN = pathlib.Path(__file__).parent / "golden"
MESH = AbstractMesh((1, 16, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
LARGE = 2**22  # bytes
SPECS = (
    "stage1_t2i.py:size=xl,res=256",
    "stage2_multitask.py:size=xl,res=512",
    "stage3_identity.py:size=l,res=1024",
    "emoji.py:stage=3,preset=quickstart",
    "emoji.py:stage=1,preset=long",
)


def load(spec: str) -> Config:
    return configs.load(f"experiments/{spec}")


@functools.cache
def abstract_state(spec: str) -> TrainState:
    """Shapes of the training state, without computing anything."""
    config = load(spec)
    found = encoders.abstract(config.conditioning)
    step = TrainStep(
        config=config,
        model=assembly.make_model(config, found.conditioner),
        conditioner=found.conditioner,
        task_names=(),
    )
    batch = BatchShape.of(config.data).spec(1)
    return jax.eval_shape(step.init, jax.random.key(0), found.frozen, batch)


def render(spec: str) -> str:
    config, params = load(spec), abstract_state(spec).params
    if config.data.dataset:
        assembly.check_config(config)
    settings = sorted(flatten(config.to_dict()).items())
    leaves = sharding.leaf_specs(params, sharding.tree_shardings(params, MESH), larger_than=LARGE)
    lines = [
        *(spec, "", f"parameters {num_parameters(params):,}", ""),
        *(f"{key} = {value!r}" for key, value in settings),
        *("", "parameters of 4 MiB or more on a mesh of data=1, fsdp=16, tensor=4:"),
        *(f"  {leaf.path} {leaf.shape} {leaf.spec}" for leaf in leaves),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("spec", SPECS)
def test_experiment_is_as_reviewed(spec):
    file = GOLDEN / (spec.replace(".py:", "_").replace(",", "_").replace("=", "-") + ".txt")
    text = render(spec)
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert file.exists(), (
        f"{file} is missing: UPDATE_GOLDEN=1 pytest tests/test_experiments.py, and read it"
    )
    assert text == file.read_text()


@pytest.mark.parametrize("spec", SPECS)
def test_every_rule_is_used_and_nothing_large_is_replicated(spec):
    state = abstract_state(spec)
    assert unused_rules(state.params) == []
    shardings = sharding.tree_shardings(state, MESH)
    for leaf in sharding.leaf_specs(state, shardings, larger_than=LARGE):
        assert any(axis is not None for axis in leaf.spec), (
            f"{leaf.path} {leaf.shape} is replicated"
        )


def test_stage_two_shows_only_what_differs_from_stage_one():
    one, two = (flatten(load(f"{n}.py").to_dict()) for n in ("stage1_t2i", "stage2_multitask"))
    changed = {
        k
        for k in one.keys() | two.keys()
        if one.get(k) != two.get(k) and not k.startswith("tasks.")
    }
    assert changed == {"name", "init_from.path"}


def test_the_mixtures_are_the_papers():
    two, three = load("stage2_multitask.py"), load("stage3_identity.py")
    shares = {name: task.weight for name, task in two.tasks.items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert (shares["t2i"], shares["ie"], shares["ip"], shares["lg"]) == (0.28, 0.47, 0.20, 0.02)
    assert shares["depth"] + shares["pose"] + shares["seg"] == pytest.approx(0.03)
    assert three.tasks["id"].weight == pytest.approx(
        sum(task.weight for name, task in three.tasks.items() if name != "id")
    )
    assert three.train.steps * 10 == two.train.steps


@pytest.mark.parametrize("stage", ["stage1_t2i", "stage2_multitask", "stage3_identity"])
def test_the_recipe_reads_datasets_that_can_be_built(stage):
    recipe, embedded = load(f"{stage}.py:data=recipe"), load(f"{stage}.py")
    families = {
        family: dataset
        for dataset in DATASETS.values()
        for family in dataset.families or (dataset.name,)
    }
    assert recipe.tasks.keys() == embedded.tasks.keys()
    for name, task in recipe.tasks.items():
        assert task.weight == embedded.tasks[name].weight
        for source in task.sources:
            assert name in families[source].tasks, f"{source} does not serve {name}"


def test_a_missing_dataset_of_the_recipe_is_named_with_the_command_that_makes_it(tmp_path):
    config = configs.load("experiments/stage1_t2i.py:data=recipe", [f"data.dir={tmp_path}"])
    with pytest.raises(NotFoundError, match=r"univg data build --dataset=captions .*--out="):
        assembly.check_data(config, "train")


@pytest.mark.parametrize(
    ("stage", "tasks"), [("stage1_t2i", ["t2i"]), ("stage2_multitask", ["t2i", "ip"])]
)
def test_one_argument_takes_a_folder_of_ones_own(stage, tasks):
    config = load(f"{stage}.py:size=tiny,folder=/my/pictures")
    assert sorted(config.tasks) == sorted(tasks)
    assert config.data.dataset == "captions"
    assert config.data.build["source"] == "/my/pictures"
