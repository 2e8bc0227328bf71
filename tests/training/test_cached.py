"""Training from a cache is training from the pixels: all tasks, two buckets, eight devices."""

import dataclasses

import jax
import numpy as np
import pytest

from data_pipelines.cache import CachedLatents, Picture, latents_writer, picture_key, pictures
from data_pipelines.tasks import TASKS
from tests import helpers
from tests.data_pipelines import test_cached_latents as data
from univg_jax import sharding
from univg_jax.conditioning import encode_images
from univg_jax.settings import Config
from univg_jax.training.step import TrainStep

STEPS = 3
IDENTITY = dict(kind="linear", channels=8, downsampling=4)


@pytest.fixture(scope="module")
def step():
    conditioner, frozen = helpers.tiny_conditioner()
    config = helpers.tiny_config()
    config.flow.weight_changes = ("ie",)  # which compares pixels
    fns = TrainStep(
        config=Config.of(config),
        model=helpers.tiny_model(conditioner, depth=1),
        conditioner=conditioner,
        task_names=tuple(TASKS),
    )
    return fns, frozen


@pytest.fixture(scope="module")
def folder(step, tmp_path_factory):
    """The latents of all steps but the last one."""
    fns, frozen = step
    codec = fns.conditioner.codec
    encode = jax.jit(lambda pixels: encode_images(codec, frozen["codec"], pixels))
    folder = tmp_path_factory.mktemp("cache")
    writer = latents_writer(folder, encode=encode, identity=IDENTITY, batch_size=lambda shape: 4)
    stream = data.make_stream()
    for position in range(data.CONFIG.data.batch_size * (STEPS - 1)):
        row = stream.row(position)
        for pixels in pictures(row.example, task=row.task, drop=row.drop).values():
            if (key := picture_key(pixels)) not in writer.done:
                writer.done.add(key)
                writer.add(key, Picture(pixels=pixels, name=""), group=pixels.shape)
    writer.flush()
    writer.finish()
    return folder


def losses(step, collator):
    """What the steps measure, and the shapes of their batches."""
    fns, frozen = step
    mesh = sharding.make_mesh(data=2, fsdp=4)
    stream = data.make_stream(collator)
    with jax.set_mesh(mesh):
        frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
        specs = [
            sharding.with_shardings(spec, sharding.batch_sharding(mesh)) for spec in stream.specs()
        ]
        init = lambda: fns.init(jax.random.key(0), frozen, specs[0])  # noqa: E731
        shardings = sharding.tree_shardings(jax.eval_shape(init), mesh)
        state = jax.jit(init, out_shardings=shardings)()
        update = fns.compiled_update(shardings)
        found, shapes = [], set()
        for _ in range(STEPS):
            batch = next(stream)
            shapes.add(batch.target.shape[1:3])
            state, metrics = update(state, frozen, sharding.shard_batch(batch, mesh))
            found.append(jax.device_get(metrics))
    return found, shapes


def test_training_from_the_cache_is_training_from_pixels(step, folder):
    latents = CachedLatents(folder, draws_sources=True, encode_missing=True)
    latents.check(IDENTITY)
    cached = dataclasses.replace(data.PLAIN, latents=latents)
    (want, shapes), (found, _) = (losses(step, collator) for collator in (data.PLAIN, cached))
    assert shapes == set(data.SHAPES)
    assert sum(metrics["count"] for metrics in want).min() > 0  # of every task
    # What is stored is what was encoded, bit for bit; what the step encodes, one row of a device at
    # a time, is summed in another order than all rows at once: float32 rounds at 6e-8.
    for metrics, expected in zip(found, want, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), metrics, expected)
