"""A step of each stage in bfloat16: devices change nothing but the order of float32 sums."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import emoji
from tests.helpers import fake_batch
from univg_jax import assembly, encoders, sharding
from univg_jax.batch import BatchShape
from univg_jax.settings import Config
from univg_jax.training.step import TrainStep
from univg_jax.trees import named_leaves

TASK_NAMES = ("t2i", "ie", "ip", "lg", "depth", "pose", "seg", "id")


def fill(tree, key):
    """Standard normal numbers, or coins, in the shapes of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        jax.random.bernoulli(k, 0.3, x.shape)
        if x.dtype == bool
        else jax.random.normal(k, x.shape, x.dtype)
        for k, x in zip(keys, leaves, strict=True)
    )


@functools.cache
def inputs(stage):
    """A step's functions, parameters of which every one has a gradient, and encoded rows."""
    config = emoji.get_config(stage=stage, preset="smoke")
    config.optim.update(dict(name="adamw", clip=0.0))
    config.model.overrides.dtype = "bfloat16"
    config = Config.of(config)
    found = encoders.abstract(config.conditioning)
    step = TrainStep(
        config=config,
        model=assembly.make_model(config, found.conditioner),
        conditioner=found.conditioner,
        task_names=TASK_NAMES,
    )
    batch = fake_batch(shape=BatchShape.of(config.data), batch_size=16)
    # Every other row counts in parts, some cells of it not at all.
    counts = np.random.default_rng(3).random(batch.loss_mask.shape) < 0.3
    counts[:, : counts.shape[1] // 2] = False
    counts[1::2] = True
    batch = dataclasses.replace(batch, loss_mask=counts.astype(np.uint8))
    shapes = step.conditioner.encoded_spec(found.frozen, batch)
    x0, conditions = fill(shapes, jax.random.key(0))
    state = step.init(jax.random.key(1), found.frozen, batch)
    noise = fill(state.params, jax.random.key(2))
    params = jax.tree.map(lambda p, n: p + 0.05 * n, state.params, noise)
    return step, dataclasses.replace(state, params=params), (x0, conditions, batch)


def gradients(stage, axes):
    """Loss and gradients of one step on a mesh: AdamW's first moment is (1 - b1) gradients."""
    step, state, rows = inputs(stage)
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = sharding.make_mesh(**axes, devices=devices)
    with jax.set_mesh(mesh):
        shardings = sharding.tree_shardings(state, mesh)
        state = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
        update = step.compiled_update(shardings, encoded=True)
        state, metrics = update(state, *sharding.shard_batch(jax.device_get(rows), mesh))
    moments = {k: v for k, v in named_leaves(state.opt_state).items() if "/mu/" in k}
    assert len(moments) == len(jax.tree.leaves(state.params))
    return float(metrics["loss"]), jax.device_get(moments)


one = functools.cache(lambda stage: gradients(stage, dict(data=1)))


@pytest.mark.parametrize(
    "axes", [dict(data=2, fsdp=2), dict(data=1, fsdp=8)], ids=["2x2", "fsdp=8"]
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_in_bfloat16_is_the_same_on_any_devices(stage, axes):
    loss, moments = gradients(stage, axes)
    expected_loss, expected = one(stage)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    for name, got in moments.items():
        scale = np.linalg.norm(expected[name])
        assert scale > 0, name
        # A value between two bfloat16 numbers, 2^-8 apart, may be rounded to the other, in each of
        # the layers that a gradient passes.
        assert np.linalg.norm(got - expected[name]) < 2**-6 * scale, name
