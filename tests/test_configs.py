"""Config files, their arguments and overrides, and what a typo gets."""

import pytest

from univg_jax import configs
from univg_jax.errors import UserError


def test_arguments_are_those_of_get_config():
    c = configs.load("experiments/stage1_t2i.py:size=l,res=512")
    assert c.model.size == "l"
    assert c.data.resolution == 512


def test_overrides_keep_the_type_of_the_default():
    c = configs.load(
        "experiments/base.py",
        [
            "optim.lr=1",
            "optim.freeze=('a', 'b')",
            "seed=7",
            "name=x",
            "sampling.interval=(0.1, 0.9)",
        ],
    )
    assert (c.optim.lr, type(c.optim.lr)) == (1.0, float)
    assert c.optim.freeze == ("a", "b")
    assert c.seed == 7
    assert c.name == "x"
    assert c.sampling.interval == (0.1, 0.9)


def test_fields_of_the_model_may_be_added():
    c = configs.load(
        "experiments/base.py", ["model.overrides.depth=4", "model.overrides.remat=full"]
    )
    assert c.model.overrides == {"depth": 4, "remat": "full"}


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        (
            "experiments/stage1.py",
            [],
            "config file 'experiments/stage1.py' does not exist; did you mean 'experiments/",
        ),
        ("experiments/emoji.py:stag=1", [], "takes no argument 'stag'; did you mean 'stage'?"),
        ("experiments/emoji.py:stage=x", [], "emoji.py:stage='x': expected a whole number"),
        (
            "experiments/emoji.py:preset=smok",
            [],
            "preset='smok' is not one of smoke, quickstart, long",
        ),
        (
            "experiments/base.py",
            ["optim.lrate=1"],
            "unknown config key 'optim.lrate'; did you mean 'optim.lr'?",
        ),
        ("experiments/base.py", ["lr=1"], "unknown config key 'lr'; did you mean 'optim.lr'?"),
        ("experiments/base.py", ["optim.lr.x=1"], "unknown config key 'optim.lr.x'"),
        ("experiments/base.py", ["optim=1"], "--config.optim is a group; set one of optim."),
        (
            "experiments/base.py",
            ["optim.lr=fast"],
            "optim.lr='fast': expected a finite number >= 0",
        ),
        (
            "experiments/base.py",
            ["train.steps=1.5"],
            "train.steps=1.5: expected a whole number >= 1",
        ),
        ("experiments/base.py", ["seed"], "--config.seed has no value"),
    ],
)
def test_bad_input_is_one_clear_line(spec, overrides, message):
    with pytest.raises(UserError) as error:
        configs.load(spec, overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
