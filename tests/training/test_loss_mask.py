"""Sparse labels train: what does not count has no part in a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import tasks
from data_pipelines.collate import Collator
from data_pipelines.reader import Reader
from data_pipelines.sources import MemorySource
from tests.data_pipelines import toy
from tests.helpers import SHAPE, tiny_config, tiny_step
from univg_jax import flow
from univg_jax.batch import Batch

ROWS = 8


def kitti_like(*, invalid: float, share: float = 0.16) -> list[dict]:
    """Pictures of ramps whose depth is known at a share of the pixels, `invalid` elsewhere."""
    rng = np.random.default_rng(0)
    made = []
    for k in range(ROWS):
        depth = np.linspace(80, 2 + k, 24, dtype=np.float32)[:, None] * np.ones((1, 40), np.float32)
        image = np.repeat((depth * 3).astype(np.uint8)[..., None], 3, axis=2)
        known = rng.random(depth.shape) < share
        made.append(dict(image=image, depth=np.where(known, depth, np.float32(invalid))))
    return made


def make_batch(records: list[dict]) -> Batch:
    collator = Collator(tokenizer=toy.tokenize, shape=SHAPE)
    reader = Reader("depth", MemorySource("kitti", records), collator=collator)
    rows = [reader.row(k, np.random.default_rng(k), sample_id=k) for k in range(len(records))]
    return collator(rows)


SPARSE = make_batch(kitti_like(invalid=0.0))


@functools.cache
def tiny(accumulate: int = 1) -> tuple:
    """A tiny run's functions, its encoders' parameters, a state, and its compiled update."""
    config = tiny_config()
    config.optim.update(dict(accumulate=accumulate, lr=1e-2, warmup=1))
    step, frozen = tiny_step(config)
    step = dataclasses.replace(step, task_names=tuple(tasks.TASKS))
    state = step.init(jax.random.key(0), frozen, SPARSE)
    return step, frozen, state, jax.jit(step.update)


def test_a_step_does_not_depend_on_what_invalid_pixels_hold():
    _, frozen, state, update = tiny()
    batches = [make_batch(kitti_like(invalid=value)) for value in (0.0, np.nan, np.inf, -7.0)]
    assert 0.05 < batches[0].loss_mask.mean() < 0.3
    states = [jax.device_get(update(state, frozen, batch)) for batch in batches]
    for other in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, states[0], other)


def test_rows_without_a_pixel_that_counts_have_no_gradient():
    _, frozen, state, update = tiny()
    batch = dataclasses.replace(SPARSE, loss_mask=np.zeros_like(SPARSE.loss_mask))
    _, metrics = update(state, frozen, batch)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0.0


def test_only_cells_that_count_have_a_gradient():
    step, frozen, _, _ = tiny()
    counts = np.zeros_like(SPARSE.loss_mask)
    counts[:, :4] = 1
    batch = dataclasses.replace(SPARSE, loss_mask=counts)
    x0, conditions = step.encode(frozen, batch)

    def loss(x0):
        weight = step.loss_weights(x0, conditions.cond_latents, batch)
        t, noise = jnp.ones(ROWS), jnp.ones_like(x0)
        # A model that sees one cell at a time.
        return jnp.sum(flow.loss_at(lambda x, t: x, x0, noise=noise, t=t, weight=weight))

    gradient = np.asarray(jax.grad(loss)(x0))
    assert (gradient[:, :1] != 0).all()
    assert not gradient[:, 1:].any()


def test_sparse_depth_trains():
    _, frozen, state, update = tiny()
    losses = []
    for _ in range(60):
        state, metrics = update(state, frozen, SPARSE)
        losses.append(float(metrics["loss"]))
    # Noise and time differ from step to step: means of ten.
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_sparse_row_counts_like_a_dense_one(accumulate):
    _, frozen, state, update = tiny(accumulate)
    dense = np.ones_like(SPARSE.loss_mask)
    dense[::2] = SPARSE.loss_mask[::2]
    batch = dataclasses.replace(SPARSE, loss_mask=dense)
    _, metrics = update(state, frozen, batch)
    losses = [
        float(update(state, frozen, dataclasses.replace(batch, valid=np.arange(8) == k))[1]["loss"])
        for k in range(ROWS)
    ]
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_validation_leaves_out_what_does_not_count():
    step, frozen, state, _ = tiny()
    validate = jax.jit(step.validate)
    whole = dataclasses.replace(SPARSE, loss_mask=np.ones_like(SPARSE.loss_mask))
    sparse, dense = (validate(state.params, frozen, batch) for batch in (SPARSE, whole))
    assert float(sparse["loss_sum"].sum()) != pytest.approx(float(dense["loss_sum"].sum()), 1e-6)
    assert int(sparse["count"][list(tasks.TASKS).index("depth")]) == ROWS
