"""From noise to image: guidance as a weighted sum of velocities, and an ODE solver as one
`lax.scan`.

With F the model's velocity and P conditions c_1..c_P evaluated in one batched pass,

    v(x, t)   = sum_i w_i F(x, t, c_i)             sum_i w_i = 1
    x_{t+dt}  = x_t + dt v(x_t, t)                 from t = 1 (noise) to t = 0 (data), dt < 0

| guidance | conditions | weights |
|---|---|---|
| none | (I, T) | 1 |
| text, scale s | (I, T), (I, null) | s, 1 - s |
| text and image, scales s_T, s_I | (I, T), (I, null), (null, null) | s_T, s_I - s_T, 1 - s_I |

The last row is v(null, null) + s_I [v(I, null) - v(null, null)] + s_T [v(I, T) - v(I, null)]
(InstructPix2Pix, arXiv 2211.09800, equation 3). The full condition always comes first.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, PyTree, UInt32

from univg_jax.batch import Batch
from univg_jax.conditioning import Conditioner
from univg_jax.flow import sample_noise, shift_times
from univg_jax.models.univg import UniVG
from univg_jax.settings import Guidance, Sampler
from univg_jax.sharding import constrain_rows

# What each guided pass goes without, in the order of the table above.
NULL_CONDITIONS = ("none", "text", "both")

Velocity = Callable[[Float[Array, "b h w c"], Float[Array, ""]], Float[Array, "b h w c"]]
PredictPasses = Callable[[Float[Array, "bp h w c"], Float[Array, " bp"]], Float[Array, "bp h w c"]]


def guidance_weights(scales: Guidance | None = None) -> tuple[float, ...]:
    """The weights w_i of the table above: one, two or three passes."""
    if scales is None or scales.text is None:
        return (1.0,)
    if scales.image is None:
        return (scales.text, 1.0 - scales.text)
    return (scales.text, scales.image - scales.text, 1.0 - scales.image)


def guided_velocity(
    predict: PredictPasses, weights: Float[Array, " p"], sampler: Sampler
) -> Velocity:
    """v(x, t) of the table above, all passes in one call of `predict`.

    The passes of a row are side by side in the batch, so that devices which share the rows exchange
    nothing.
    """
    passes = weights.shape[0]
    only_full = jnp.zeros_like(weights).at[0].set(1.0)

    def v(x: Float[Array, "b h w c"], t: Float[Array, ""]) -> Float[Array, "b h w c"]:
        stacked = jnp.repeat(x, passes, axis=0)
        velocities = predict(stacked, jnp.full(stacked.shape[0], t)).astype(jnp.float32)
        velocities = velocities.reshape(x.shape[0], passes, *x.shape[1:])
        low, high = sampler.interval
        w = jnp.where((t >= low) & (t <= high), weights, only_full)
        guided = jnp.einsum("p,bphwc->bhwc", w, velocities)
        if sampler.rescale:
            axes = (1, 2, 3)
            std = jnp.std(guided, axes, keepdims=True)
            matched = (
                guided * jnp.std(velocities[:, 0], axes, keepdims=True) / jnp.maximum(std, 1e-6)
            )
            guided = sampler.rescale * matched + (1 - sampler.rescale) * guided
        return guided

    return v


def solve(
    v: Velocity,
    noise: Float[Array, "b h w c"],
    sampler: Sampler,
    *,
    listener: Int32[Array, ""] | None = None,
) -> Float[Array, "b h w c"]:
    """Integrates dx/dt = v(x, t) from t = 1 to t = 0 in `sampler.steps` steps; returns x at t = 0.

    After each step the host calls the listener (`listening`), for progress.
    """
    times = shift_times(jnp.linspace(1.0, 0.0, sampler.steps + 1), sampler.shift)

    def step(
        x: Float[Array, "b h w c"], interval: Float[Array, "2"]
    ) -> tuple[Float[Array, "b h w c"], None]:
        t, t_next = interval
        slope = v(x, t)
        if sampler.solver == "heun":
            slope = (slope + v(x + (t_next - t) * slope, t_next)) / 2
        x = x + (t_next - t) * slope
        if listener is not None:
            # An element of x is an argument so that the call does not come before the step is done.
            jax.debug.callback(_notify, listener, x[0, 0, 0, 0])
        return x, None

    x, _ = jax.lax.scan(step, noise, jnp.stack([times[:-1], times[1:]], axis=-1))
    return x


# A compiled program calls back into one function, `_notify`, with the number of a listener as an
# argument. A callback of the caller's own would be a part of the program, and each new one would be
# compiled anew.
_listeners: dict[int, Callable[[], object]] = {}
_listener_numbers = itertools.count()


def _notify(listener: Int32[np.ndarray, ""], _: Float[np.ndarray, ""]) -> None:
    if function := _listeners.get(int(listener)):
        function()


@contextlib.contextmanager
def listening(function: Callable[[], object] | None) -> Iterator[Int32[np.ndarray, ""] | None]:
    """The number by which programs that run inside the block call `function`; None for None."""
    if function is None:
        yield None
        return
    number = next(_listener_numbers)
    _listeners[number] = function
    try:
        yield np.int32(number)
        jax.effects_barrier()  # the last calls may still be on their way
    finally:
        del _listeners[number]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """Batches in, images out: encode the conditions, solve the guided flow, decode."""

    model: UniVG
    conditioner: Conditioner
    sampler: Sampler

    def __call__(
        self,
        params: PyTree,
        frozen: PyTree,
        passes: Sequence[Batch],
        *,
        weights: Sequence[float],
        seeds: UInt32[Array, " b"],
        on_step: Callable[[], object] | None = None,
    ) -> Float[Array, "b h w 3"]:
        """Images in [-1, 1] for the rows of `passes[0]`; `passes` are the table's conditions.

        The noise of a row is a function of (its seed, its sample id), whatever the batch and the
        devices. `on_step` is called after each step of the solver; of several processes all or none
        must have it, since their programs must not differ.
        """
        if len(passes) != len(weights):
            raise ValueError(f"{len(weights)} guidance weights for {len(passes)} passes")
        weights = jnp.asarray(weights, jnp.float32)
        with listening(on_step) as listener:
            return self.generate(params, frozen, tuple(passes), weights, seeds, listener)

    @functools.partial(jax.jit, static_argnums=0)
    def generate(
        self,
        params: PyTree,
        frozen: PyTree,
        passes: tuple[Batch, ...],
        weights: Float[Array, " p"],
        seeds: UInt32[Array, " b"],
        listener: Int32[Array, ""] | None = None,
    ) -> Float[Array, "b h w 3"]:
        """`__call__` as one program, of arrays only."""
        each = constrain_rows([self.conditioner.conditions(frozen, batch) for batch in passes])
        # The passes of a row are neighbors, as `guided_velocity` has them.
        stacked = jax.tree.map(
            lambda *xs: jnp.stack(xs, axis=1).reshape(len(xs) * len(xs[0]), *xs[0].shape[1:]), *each
        )
        shape = each[0].cond_latents.shape[1:]
        noise = jax.vmap(lambda s, i: sample_noise(jax.random.key(s), i[None], shape)[0])(
            seeds, passes[0].sample_id
        )

        def predict(
            x: Float[Array, "bp h w c"], t: Float[Array, " bp"]
        ) -> Float[Array, "bp h w c"]:
            return self.model.apply({"params": params}, *constrain_rows((x, t)), stacked)

        v = guided_velocity(predict, weights, self.sampler)
        x0 = solve(v, noise, self.sampler, listener=listener)
        return jnp.clip(self.conditioner.decode(frozen, x0), -1.0, 1.0)
