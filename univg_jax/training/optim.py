"""From gradients to parameters: schedule, optimizer, clipping, freezing, accumulation, EMA.

A step is: gradients -> mean over micro-batches -> clip by global norm -> moments -> weight decay ->
learning rate -> parameters -> EMA. Frozen parameters have no optimizer state.
"""

import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from univg_jax import settings
from univg_jax.errors import UserError
from univg_jax.settings import Optim
from univg_jax.trees import map_named, named_leaves

# Weight decay acts on kernels. Norm scales, biases and tables have other names.
DECAYED = r"(^|/)kernel$"
# Muon orthogonalizes hidden matrices. A modulation kernel is left out: it is six matrices in one.
MUON = r"block.*/(q|k|v|attn_out|mlp/in|mlp/out)/kernel$"


def make_schedule(config: Optim, *, total_steps: int) -> optax.Schedule:
    """Learning rate of step t = 0, 1, ...: `lr * min(1, (t+1)/warmup) * shape(t)`.

    shape is 1 (constant) or, after the warm-up, `(1 + cos(pi (t-warmup)/(end-warmup))) / 2`
    (cosine), which is zero from `end` on. `end` is `config.decay_steps`, or `total_steps` where
    that is None. A run of fewer steps than the warm-up has no cosine.
    """
    end = total_steps if config.decay_steps is None else config.decay_steps

    def schedule(step: Int[Array, ""] | int) -> Float[Array, ""]:
        t = jnp.asarray(step, jnp.float32)
        rate = config.lr * jnp.minimum(1.0, (t + 1) / max(config.warmup, 1))
        if config.schedule == "cosine":
            share = (t - config.warmup) / max(end - config.warmup, 1)
            rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
        return rate

    return schedule


def make_optimizer(config: Optim, *, total_steps: int) -> optax.GradientTransformation:
    """The optimizer of a config, for gradients that are already the mean over the step's rows.

    Raises UserError at `init` for a freeze pattern that freezes nothing.
    """
    schedule = make_schedule(config, total_steps=total_steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        OPTIMIZERS[config.name](config, schedule),
    )
    if not config.freeze:
        return optimizer

    def labels(params: PyTree) -> PyTree:
        names = list(named_leaves(params))
        for pattern in config.freeze:
            if not any(re.search(pattern, name) for name in names):
                raise UserError(
                    f"optim.freeze: {pattern!r} matches no parameter; the first are {names[:3]}"
                )
        frozen = "|".join(f"(?:{pattern})" for pattern in config.freeze)
        return map_named(lambda n, _: "frozen" if re.search(frozen, n) else "trained", params)

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def value_and_grad(
    loss_fn: Callable[[PyTree, PyTree], tuple[Array, PyTree]],
    *,
    accumulate: int = 1,
    weight: Callable[[PyTree], Array] | None = None,
) -> Callable[[PyTree, PyTree], tuple[tuple[Array, PyTree], PyTree]]:
    """`(params, rows) -> ((loss, per_row), gradients)`, in `accumulate` passes over micro-batches.

    `loss_fn(params, rows) -> (loss, per_row)` gives a mean over the rows, and any tree of arrays
    with one entry a row. Loss and gradient are sum_j w_j g_j / sum_j w_j in float32, whatever the
    parameters are, over the micro-batches j, with `weight(rows)` the number of rows that the loss
    averages over (default: all alike), so they equal the whole batch's. Raises UserError where the
    rows do not divide.

    Unlike `optax.MultiSteps` this is one compiled step a batch: schedule, EMA, logs and checkpoints
    count batches, no accumulator is stored, and the optimizer runs once.
    """

    def one_pass(params: PyTree, rows: PyTree) -> tuple[tuple[Array, PyTree], PyTree]:
        found, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rows)
        return found, jax.tree.map(lambda x: x.astype(jnp.float32), grads)

    if accumulate == 1:
        return one_pass

    def accumulated(params: PyTree, rows: PyTree) -> tuple[tuple[Array, PyTree], PyTree]:
        size = len(jax.tree.leaves(rows)[0])
        if size % accumulate:
            raise UserError(f"optim.accumulate={accumulate} does not divide the batch of {size}")

        # Micro-batch j is rows j, j+accumulate, ...: every device cuts its own rows and none moves.
        def split(x: Array) -> Array:
            return x.reshape(size // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

        def join(x: Array) -> Array:
            return x.swapaxes(0, 1).reshape(size, *x.shape[2:])

        def add(total: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
            (loss, per_row), grads = one_pass(params, rows)
            w = jnp.float32(1) if weight is None else jnp.asarray(weight(rows), jnp.float32)
            term = jax.tree.map(lambda x: w * x, (loss, grads))
            return jax.tree.map(jnp.add, total, (w, *term)), per_row

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        (total, loss, grads), per_row = jax.lax.scan(
            add, (jnp.float32(0), jnp.float32(0), zeros), jax.tree.map(split, rows)
        )
        # A batch without any valid row has weight zero and gradient zero.
        loss, grads = jax.tree.map(lambda x: x / jnp.maximum(total, 1e-9), (loss, grads))
        return (loss, jax.tree.map(join, per_row)), grads

    return accumulated


def update_ema(
    ema: PyTree,
    params: PyTree,
    *,
    decay: float,
    step: Int[Array, ""] | int,
    warmup: float = 10.0,
    fresh: Sequence[str] = (".*",),
) -> PyTree:
    """`ema + (1 - decay_t) (params - ema)` in float32, `decay_t = min(decay, (1+t)/(warmup+t))`.

    The warm-up forgets the random initialization: at t = 0 nine tenths are new. `warmup=1` is none.
    It is for the leaves whose names match a regex of `fresh`; where a trained average was handed
    over there is nothing to forget, and `decay_t = decay`.
    """
    t = jnp.asarray(step, jnp.float32)
    warming = 1 - jnp.minimum(decay, (1 + t) / (warmup + t))

    def update(name: str, average: Array, new: Array) -> Array:
        is_fresh = any(re.search(pattern, name) for pattern in fresh)
        return average + (warming if is_fresh else 1 - decay) * (new.astype(jnp.float32) - average)

    return map_named(update, ema, params)


def _adamw(config: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_kernels,
        mu_dtype=config.mu_dtype,
    )


def _adafactor(config: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Factored second moment with AdamW's learning rate.

    It neither scales by the parameter's size nor clips by itself: both would mix the layers of a
    stacked kernel, which the factored moments keep separate.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8),
        optax.ema(config.b1, debias=False, accumulator_dtype=config.mu_dtype),
        optax.add_decayed_weights(config.weight_decay, mask=_kernels),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(config: Optim, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the kernels of the blocks, AdamW for the rest.

    Each layer of a stacked (layers, in, out) kernel is orthogonalized by itself; updates have an
    RMS of 0.2, about AdamW's, so that both share one learning rate (Liu et al. 2025, section 2.2).
    """

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params
        )

    muon = optax.contrib.muon(
        schedule,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.mu_dtype,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
    )

    def labels(params: PyTree) -> PyTree:
        return map_named(lambda n, _: "muon" if re.search(MUON, n) else "adamw", params)

    return optax.partition({"muon": muon, "adamw": _adamw(config, schedule)}, labels)


def _kernels(params: PyTree) -> PyTree:
    return map_named(lambda name, _: bool(re.search(DECAYED, name)), params)


OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}
assert tuple(OPTIMIZERS) == settings.OPTIMIZERS
