"""From gradients to parameters: schedule, optimizer, clipping, freezing, accumulation, EMA.

A step is: gradients -> mean over micro-batches -> clip by global norm -> moments -> decay of
weights -> learning rate -> parameters -> EMA. Frozen parameters have no optimizer state.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from univg_jax.errors import check_name

DECAYED = r"(^|/)kernel$"  # norms' scales, biases and tables have other names
# hidden matrices; a modulation is six in one
MUON = r"block.*/(q|k|v|attn_out|mlp/in|mlp/out)/kernel$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """What `config.optim` may say. Steps are optimizer updates, whatever `accumulate` is."""

    name: str = "adamw"
    lr: float = 1e-4
    b1: float = 0.9  # decay of the first moment (adamw, adafactor; muon's own is 0.95)
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of kernels only
    clip: float = 1.0  # global norm of the trained parameters' gradient; 0 = off
    warmup: int = 0
    schedule: str = "constant"
    total_steps: int = 0  # where cosine reaches zero
    accumulate: int = 1  # micro-batches a step: see `value_and_grad`
    ema: float = 0.9999
    ema_warmup: float = 10.0  # 1 = none: see `update_ema`
    freeze: tuple[str, ...] = ()  # regexes searched in the parameters' paths
    mu_dtype: str = "float32"  # of the first moment

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "OptimConfig":
        """The typed settings of a config; raises `ValueError` for an unknown key, with the nearest."""
        for key in config:
            check_name(key, [f.name for f in dataclasses.fields(cls)], what="optim key")
        settings = cls(**{**config, "freeze": tuple(config.get("freeze", ()))})
        check_name(settings.name, OPTIMIZERS, what="optim.name")
        check_name(settings.schedule, SCHEDULES, what="optim.schedule")
        if settings.schedule == "cosine" and settings.total_steps <= settings.warmup:
            raise ValueError(
                f"cosine ends at step {settings.total_steps} (train.steps): not after optim.warmup={settings.warmup}"
            )
        return settings


def make_schedule(config: Mapping[str, Any]) -> optax.Schedule:
    """Learning rate of step t = 0, 1, ...: `lr * min(1, (t+1)/warmup) * shape(t)`.

    shape is 1 (constant) or `(1 + cos(pi * (t-warmup)/(total_steps-warmup))) / 2` after the warm-up
    (cosine), zero from `total_steps` on.
    """
    c = OptimConfig.of(config)

    def schedule(step: Any) -> Float[jax.Array, ""]:
        t = jnp.asarray(step, jnp.float32)
        return c.lr * jnp.minimum(1.0, (t + 1) / max(c.warmup, 1)) * SCHEDULES[c.schedule](t, c)

    return schedule


def make_optimizer(config: Mapping[str, Any]) -> optax.GradientTransformation:
    """The optimizer of `config.optim`, for gradients that are already the mean over the step's
    rows.

    Raises `ValueError` for unknown keys and names, and at `init` for a freeze pattern that freezes
    nothing.
    """
    c = OptimConfig.of(config)
    optimizer = optax.chain(
        optax.clip_by_global_norm(c.clip) if c.clip else optax.identity(),
        OPTIMIZERS[c.name](c, make_schedule(config)),
    )
    if not c.freeze:
        return optimizer

    def labels(params: Any) -> Any:
        names = jax.tree.leaves(_by_name(params, str))
        for pattern in c.freeze:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"optim.freeze: {pattern!r} matches no parameter; the first are {names[:3]}"
                )
        return _by_name(
            params,
            lambda name: "frozen" if any(re.search(p, name) for p in c.freeze) else "trained",
        )

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def value_and_grad(
    loss_fn: Callable[[Any, Any], tuple[Any, Any]],
    *,
    accumulate: int = 1,
    weight: Callable[[Any], Any] | None = None,
) -> Callable[[Any, Any], tuple[tuple[Any, Any], Any]]:
    """`(params, rows) -> ((loss, per_row), gradients)`, computed in `accumulate` passes over parts
    of the rows.

    `loss_fn(params, rows) -> (loss, per_row)` gives a mean over the rows and any tree of arrays
    with one entry a row. Loss and gradient are sum_j w_j g_j / sum_j w_j in float32 over the parts
    j, with `weight(rows)` the number of rows that the loss averages over (default: all), so they
    equal those of the whole batch. Part j is rows j, j+accumulate, ...: every device cuts its own
    rows, none moves.

    One compiled step a batch, rather than `optax.MultiSteps`: schedule, EMA, logs and checkpoints
    count batches, no accumulator is stored, and the optimizer runs once.
    """
    one_pass = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        return one_pass

    def accumulated(params: Any, rows: Any) -> tuple[tuple[Any, Any], Any]:
        size = len(jax.tree.leaves(rows)[0])
        if size % accumulate:
            raise ValueError(f"optim.accumulate={accumulate} does not divide the batch of {size}")
        parts = jax.tree.map(
            lambda x: x.reshape(size // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1), rows
        )

        def add(total: Any, part: Any) -> tuple[Any, Any]:
            (loss, per_row), grads = one_pass(params, part)
            w = jnp.float32(1) if weight is None else jnp.asarray(weight(part), jnp.float32)
            term = jax.tree.map(lambda x: w * x.astype(jnp.float32), (loss, grads))
            return jax.tree.map(jnp.add, total, (w, *term)), per_row

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        (total, loss, grads), per_row = jax.lax.scan(
            add, (jnp.float32(0), jnp.float32(0), zeros), parts
        )
        mean = jax.tree.map(lambda x: x / jnp.maximum(total, 1e-9), (loss, grads))
        return (
            mean[0],
            jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(size, *x.shape[2:]), per_row),
        ), mean[1]

    return accumulated


def update_ema(
    ema: Any, params: Any, *, decay: float, step: Int[jax.Array, ""] | int, warmup: float = 10.0
) -> Any:
    """`ema + (1 - decay_t) (params - ema)` in float32, with `decay_t = min(decay,
    (1+t)/(warmup+t))`.

    The warm-up forgets the random initialization: at t = 0 nine tenths are new. `warmup=1` is none.
    """
    t = jnp.asarray(step, jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + t) / (warmup + t))
    return jax.tree.map(lambda e, p: e + rate * (p.astype(jnp.float32) - e), ema, params)


def _adamw(c: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        weight_decay=c.weight_decay,
        mask=_kernels,
        mu_dtype=c.mu_dtype,
    )


def _adafactor(c: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Factored second moment with AdamW's learning rate: no scaling by the parameter, no clipping
    of its own.

    Both would mix the layers of a stacked kernel, which the factored moments keep apart.
    """
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8),
        optax.ema(c.b1, debias=False, accumulator_dtype=c.mu_dtype),
        optax.add_decayed_weights(c.weight_decay, mask=_kernels),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(c: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the kernels of the blocks, AdamW for the rest.

    Each layer of a stacked (layers, in, out) kernel is orthogonalized by itself; updates have an
    RMS of 0.2, about AdamW's, so that both share one learning rate (Liu et al. 2025, section 2.2).
    """

    def matrices(params: Any) -> Any:
        return jax.tree.map(
            lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params
        )

    muon = optax.contrib.muon(
        schedule,
        eps=c.eps,
        weight_decay=c.weight_decay,
        mu_dtype=c.mu_dtype,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=matrices,
    )

    def labels(params: Any) -> Any:
        return _by_name(params, lambda name: "muon" if re.search(MUON, name) else "adamw")

    return optax.partition({"muon": muon, "adamw": _adamw(c, schedule)}, labels)


def _by_name(tree: Any, label: Callable[[str], Any]) -> Any:
    def of(path: tuple, _: Any) -> Any:
        return label(jax.tree_util.keystr(path, simple=True, separator="/"))

    return jax.tree_util.tree_map_with_path(of, tree)


def _kernels(params: Any) -> Any:
    return _by_name(params, lambda name: bool(re.search(DECAYED, name)))


OPTIMIZERS = {"adamw": _adamw, "adafactor": _adafactor, "muon": _muon}
SCHEDULES = {
    "constant": lambda t, c: 1.0,
    "cosine": lambda t, c: (
        0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((t - c.warmup) / (c.total_steps - c.warmup), 0, 1)))
    ),
}
