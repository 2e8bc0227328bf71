"""Settings: they load without JAX, state each default once, and refuse what cannot be."""

import json
import subprocess
import sys

import pytest

from experiments import base, emoji, stage2_multitask, stage3_identity
from univg_jax.errors import UserError
from univg_jax.settings import Config


def test_they_load_without_jax():
    code = "import sys, univg_jax.settings; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "config",
    [base.get_config(), stage2_multitask.get_config(), stage3_identity.get_config(encoders="sd3"),
     emoji.get_config(stage=3)],
    ids=lambda config: config.name,
)  # fmt: skip
def test_a_config_survives_the_way_to_disk_and_back(config):
    settings = Config.of(config)
    on_disk = json.loads(json.dumps(settings.to_dict()))
    assert on_disk == json.loads(json.dumps(config.to_dict())), "a run on disk keeps its config"
    assert Config.of(on_disk) == settings


def test_what_is_left_out_takes_its_default():
    assert Config.of({}) == Config()
    assert Config.of({"optim": {"lr": 1}}).optim.lr == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(optim=dict(name="adamv")), "unknown optim.name 'adamv'; did you mean 'adamw'"),
        (dict(optim=dict(schedule="cosin")), "did you mean 'cosine'"),
        (dict(optim=dict(leaning_rate=1.0)), "unknown key of optim: 'leaning_rate'"),
        (dict(optim=dict(warmpu=3)), "did you mean 'warmup'"),
        (
            dict(optim=dict(schedule="cosine", warmup=5, decay_steps=4)),
            "optim.decay_steps=4: expected more than optim.warmup=5",
        ),
        (dict(optimizer={}), "unknown key of config: 'optimizer'; did you mean 'optim'"),
        (dict(sampling=dict(guidance=dict(ie=dict(image=1.5)))), "needs a text scale"),
        (dict(train=dict(sample_every=0)), "train.sample_every=0: expected a whole number >= 1"),
        (dict(train=dict(log_every=-1)), "train.log_every=-1: expected a whole number >= 1"),
        (dict(data=dict(batch_size=0)), "data.batch_size=0"),
        (dict(optim=dict(accumulate=3)), "optim.accumulate=3 does not divide data.batch_size=512"),
        (dict(seed=-1), "seed=-1: expected a whole number >= 0"),
        (dict(init_from=dict(which="emma")), "did you mean 'ema'"),
        (
            dict(tasks=dict(t2i=dict(weight=float("nan"), sources=["a"]))),
            "expected a finite number",
        ),
        (dict(tasks=dict(t2i=dict(weight=0, sources=["a"]))), "no task has a weight above zero"),
        (dict(tasks=dict(t2i=dict(weight=1, sources=[]))), "tasks.t2i has no source"),
        (
            dict(tasks=dict(t2i=dict(weight=1, sources={"a": -1.0}))),
            "tasks.t2i.sources.a=-1.0: expected a finite number >= 0",
        ),
        (dict(tasks=dict(t2i=dict(weight=1, sources=["a"], drop_text=0.95))), "sum to at most 1"),
    ],
)
def test_what_cannot_be_is_one_line(config, message):
    with pytest.raises(UserError) as error:
        Config.of(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_task_takes_sources_or_their_weights():
    c = base.get_config()
    c.tasks = dict(t2i=base.task(1.0, {"a": 1.0, "./v1.0/b": 3.0}), ip=base.task(1.0, "a", "c"))
    tasks = Config.of(c).tasks
    assert dict(tasks["t2i"].sources) == {"a": 1.0, "./v1.0/b": 3.0}
    assert tasks["ip"].source_names == ("a", "c")
    assert Config.of(json.loads(json.dumps(Config.of(c).to_dict()))) == Config.of(c)


def test_the_codec_is_fitted_on_what_all_stages_train_by_their_rows():
    stages = (
        dict(t2i=base.task(1.0, "a")),
        dict(t2i=base.task(0.25, "a", "b"), ie=base.task(0.75, "c")),
    )
    expected = {"t2i": {"a": 10 + 0.5, "b": 0.5}, "ie": {"c": 3.0}}
    assert base.by_rows(stages, steps=(10, 4)) == expected
