"""Golden renders: every experiment, under review. `UPDATE_GOLDEN=1 pytest
tests/test_experiments.py` renews them.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from univg_jax import assembly, checkpoint, sharding
from univg_jax.batch import batch_spec
from univg_jax.cli.config import load_config
from univg_jax.conditioning import Conditioner
from univg_jax.models.codec import PatchCodec
from univg_jax.models.identity import IdentityEncoder
from univg_jax.models.minilm import MiniLM
from univg_jax.models.text import SentenceText
from univg_jax.training import optim

GOLDEN = pathlib.Path(__file__).parent / "golden"
SPECS = (
    "stage1_t2i.py:size=xl,res=256",
    "stage2_multitask.py:size=xl,res=512",
    "stage3_identity.py:size=l,res=1024",
    "emoji.py:stage=3,preset=quickstart",
    "emoji.py:stage=1,preset=long",
)


def conditioner_of(config: ConfigDict) -> Conditioner:
    c = config.conditioning
    identity = IdentityEncoder(dim=c.identity.dim) if c.identity is not None else None
    return Conditioner(
        text=SentenceText(encoder=MiniLM()),
        codec=PatchCodec(patch=c.codec.patch, channels=c.codec.channels),
        identity=identity,
    )


def abstract_state(config: ConfigDict):
    """Shapes of the training state and of the frozen parameters, without computing anything."""
    conditioner = conditioner_of(config)
    model = assembly.make_model(config, conditioner)
    c = config.data
    spec = dict(
        batch_size=1,
        resolution=c.resolution,
        num_tokens=c.num_tokens,
        face_resolution=c.face_resolution,
    )
    side, channels = c.resolution // conditioner.downsampling, conditioner.latent_channels

    def conditions():
        from univg_jax.batch import Conditions

        face = conditioner.face_dim or 0
        return Conditions(
            cond_latents=jnp.zeros((1, side, side, channels)),
            mask=jnp.zeros((1, side, side, 1)),
            text_emb=jnp.zeros((1, c.num_tokens, conditioner.text_dim)),
            text_mask=jnp.ones((1, c.num_tokens), bool),
            pooled_emb=jnp.zeros((1, conditioner.pooled_dim)),
            face_emb=jnp.zeros((1, face)),
            identity_slot=jnp.zeros((1, c.num_tokens), bool),
        )

    def init():
        x0 = jnp.zeros((1, side, side, channels))
        params = model.init(jax.random.key(0), x0, jnp.zeros(1), conditions())["params"]
        opt_state = optim.make_optimizer(train.optim_config(config)).init(params)
        return train.TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, ema=params)

    assert batch_spec(**spec).size == 1
    return jax.eval_shape(init)


def render(spec: str) -> str:
    config = load_config(f"experiments/{spec}")
    assembly.check_config(config) if "emoji" in spec else None
    state = abstract_state(config)
    mesh = AbstractMesh((1, 16, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    lines = [spec, "", f"parameters {count:,}", ""]
    lines += [
        f"{key} = {value!r}" for key, value in sorted(checkpoint.flat(config.to_dict()).items())
    ]
    lines += ["", "parameters of 4 MiB or more on a mesh of data=1, fsdp=16, tensor=4:"]
    shardings = sharding.tree_shardings(state.params, mesh)
    lines += [
        f"  {leaf.path} {leaf.shape} {leaf.spec}"
        for leaf in sharding.leaf_specs(state.params, shardings, larger_than=2**22)
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
    state = abstract_state(load_config(f"experiments/{spec}"))
    assert sharding.unused_rules(state.params) == ()
    mesh = AbstractMesh((1, 16, 4), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    shardings = sharding.tree_shardings(state, mesh)
    for leaf in sharding.leaf_specs(state, shardings, larger_than=2**22):
        assert any(axis is not None for axis in leaf.spec), (
            f"{leaf.path} {leaf.shape} is replicated"
        )


def test_stage_two_shows_only_what_differs_from_stage_one():
    one = checkpoint.flat(load_config("experiments/stage1_t2i.py").to_dict())
    two = checkpoint.flat(load_config("experiments/stage2_multitask.py").to_dict())
    changed = {
        k
        for k in one.keys() | two.keys()
        if one.get(k) != two.get(k) and not k.startswith("tasks.")
    }
    assert changed == {"name", "init_from.path"}


def test_the_mixtures_are_the_papers():
    two = load_config("experiments/stage2_multitask.py").tasks
    shares = {name: task.weight for name, task in two.items()}
    assert sum(shares.values()) == pytest.approx(1)
    assert (shares["t2i"], shares["ie"], shares["ip"], shares["lg"]) == (0.28, 0.47, 0.20, 0.02)
    assert shares["depth"] + shares["pose"] + shares["seg"] == pytest.approx(0.03)
    three = load_config("experiments/stage3_identity.py")
    assert three.tasks.id.weight == pytest.approx(
        sum(t.weight for n, t in three.tasks.items() if n != "id")
    )
    assert three.train.steps * 10 == load_config("experiments/stage2_multitask.py").train.steps
