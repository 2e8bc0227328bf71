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

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt32

from univg_jax.batch import Batch, Conditions
from univg_jax.conditioning import Conditioner
from univg_jax.flow import sample_noise, shift_times
from univg_jax.models.univg import UniVG
from univg_jax.settings import Guidance, Sampler
from univg_jax.sharding import constrain_rows

# What each guided pass goes without, in the order of the table above.
NULL_CONDITIONS: tuple[Literal["none", "text", "both"], ...] = ("none", "text", "both")

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


def solver_times(sampler: Sampler) -> Float[Array, " n"]:
    """The times of the solver, from t = 1 down to t = 0: one more than its steps."""
    return shift_times(jnp.linspace(1.0, 0.0, sampler.steps + 1), sampler.shift)


def intervals(times: Float[Array, " n"]) -> Float[Array, "s 2"]:
    """(t, next t) of each step."""
    return jnp.stack([times[:-1], times[1:]], axis=-1)


def solver_step(
    v: Velocity, x: Float[Array, "b h w c"], interval: Float[Array, "2"], sampler: Sampler
) -> Float[Array, "b h w c"]:
    """x at the end of an interval of time, by one step of Euler's or Heun's method."""
    t, t_next = interval
    slope = v(x, t)
    if sampler.solver == "heun":
        slope = (slope + v(x + (t_next - t) * slope, t_next)) / 2
    return x + (t_next - t) * slope


def solve(
    v: Velocity,
    noise: Float[Array, "b h w c"],
    sampler: Sampler,
    *,
    times: Float[Array, " n"] | None = None,
) -> Float[Array, "b h w c"]:
    """Integrates dx/dt = v(x, t) from t = 1 to t = 0; returns x there.

    It stops at `times`, by default those of the sampler.
    """
    x, _ = jax.lax.scan(
        lambda x, interval: (solver_step(v, x, interval, sampler), None),
        noise,
        intervals(solver_times(sampler) if times is None else times),
    )
    return x


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
        on_step: Callable[[int], object] | None = None,
    ) -> Float[Array, "b h w 3"]:
        """Images in [-1, 1] for the rows of `passes[0]`; `passes` are the table's conditions.

        The noise of a row is a function of (its seed, its sample id), whatever the batch and the
        devices. `on_step(n)` is called when n steps of the solver are done; of several processes
        all or none must have it, since it makes one program a step of what is one program in all.
        """
        if len(passes) != len(weights):
            raise ValueError(f"{len(weights)} guidance weights for {len(passes)} passes")
        weights, passes = jnp.asarray(weights, jnp.float32), tuple(passes)
        if on_step is None:
            return self.generate(params, frozen, passes, weights, seeds)
        # A callback from inside the one program would keep it out of the cache of compiled
        # programs, and can stop the devices of a CPU, which wait for each other.
        x, conditions = self.begin(frozen, passes, seeds)
        for done, interval in enumerate(intervals(solver_times(self.sampler)), 1):
            x = self.advance(params, conditions, weights, x, interval)
            jax.block_until_ready(x)
            on_step(done)
        return self.decode(frozen, x)

    def compile(
        self,
        params: PyTree,
        frozen: PyTree,
        passes: Sequence[Batch],
        *,
        weights: Sequence[float],
        seeds: UInt32[Array, " b"],
        stepwise: bool,
    ) -> None:
        """Compiles what a call with such arguments runs; without it, the first call does.

        `stepwise`: for a call with `on_step`.
        """
        weights, passes = jnp.asarray(weights, jnp.float32), tuple(passes)
        functions = type(self)  # a jitted method is lowered with its object as the first argument
        if not stepwise:
            functions.generate.lower(self, params, frozen, passes, weights, seeds).compile()
            return
        x, conditions = self.begin(frozen, passes, seeds)
        interval = intervals(solver_times(self.sampler))[0]
        functions.advance.lower(self, params, conditions, weights, x, interval).compile()
        functions.decode.lower(self, frozen, x).compile()

    @functools.partial(jax.jit, static_argnums=0)
    def generate(
        self,
        params: PyTree,
        frozen: PyTree,
        passes: tuple[Batch, ...],
        weights: Float[Array, " p"],
        seeds: UInt32[Array, " b"],
    ) -> Float[Array, "b h w 3"]:
        """`__call__` as one program, of arrays only."""
        noise, conditions = self.begin(frozen, passes, seeds)
        v = self.velocity(params, conditions, weights)
        return self.decode(frozen, solve(v, noise, self.sampler))

    @functools.partial(jax.jit, static_argnums=0)
    def begin(
        self, frozen: PyTree, passes: tuple[Batch, ...], seeds: UInt32[Array, " b"]
    ) -> tuple[Float[Array, "b h w c"], Conditions]:
        """The noise at t = 1, and the conditions of all passes, those of a row as neighbors."""
        each = constrain_rows([self.conditioner.conditions(frozen, batch) for batch in passes])
        rows = len(passes) * passes[0].sample_id.shape[0]
        stacked = jax.tree.map(
            lambda *xs: jnp.stack(xs, axis=1).reshape(rows, *xs[0].shape[1:]), *each
        )
        shape = each[0].cond_latents.shape[1:]
        noise = jax.vmap(lambda s, i: sample_noise(jax.random.key(s), i[None], shape)[0])(
            seeds, passes[0].sample_id
        )
        return noise, stacked

    @functools.partial(jax.jit, static_argnums=0)
    def advance(
        self,
        params: PyTree,
        conditions: Conditions,
        weights: Float[Array, " p"],
        x: Float[Array, "b h w c"],
        interval: Float[Array, "2"],
    ) -> Float[Array, "b h w c"]:
        """One step of the solver."""
        return solver_step(self.velocity(params, conditions, weights), x, interval, self.sampler)

    @functools.partial(jax.jit, static_argnums=0)
    def decode(self, frozen: PyTree, x0: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Latents to images in [-1, 1]."""
        return jnp.clip(self.conditioner.decode(frozen, x0), -1.0, 1.0)

    def velocity(
        self, params: PyTree, conditions: Conditions, weights: Float[Array, " p"]
    ) -> Velocity:
        """The guided velocity of the model under these conditions."""

        def predict(
            x: Float[Array, "bp h w c"], t: Float[Array, " bp"]
        ) -> Float[Array, "bp h w c"]:
            return self.model.apply({"params": params}, *constrain_rows((x, t)), conditions)

        return guided_velocity(predict, weights, self.sampler)
