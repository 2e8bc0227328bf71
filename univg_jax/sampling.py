"""From noise to image: guidance as a weighted sum of velocities, and an ODE solver as one
`lax.scan`.

With F the model's velocity and P conditions c_1..c_P evaluated in one batched pass,

    v(x, t)   = sum_i w_i F(x, t, c_i)             sum_i w_i = 1
    x_{t+dt}  = x_t + dt v(x_t, t)                 from t = 1 (noise) to t = 0 (data), dt < 0

| guidance | conditions | weights |
|---|---|---|
| none | (I, T) | 1 |
| text, scale s | (T), (null) | s, 1 - s |
| text and image, scales s_T, s_I | (I, T), (I, null), (null, null) | s_T, s_I - s_T, 1 - s_I |

The last row is v(null, null) + s_I [v(I, null) - v(null, null)] + s_T [v(I, T) - v(I, null)]
(InstructPix2Pix, arXiv 2211.09800, equation 3). The full condition always comes first.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from univg_jax.batch import Batch
from univg_jax.conditioning import Conditioner
from univg_jax.errors import check_name
from univg_jax.flow import sample_noise, shift_times
from univg_jax.models.univg import UniVG
from univg_jax.sharding import constrain_rows

SOLVERS = ("euler", "heun")

Velocity = Callable[[Float[Array, "b h w c"], Float[Array, ""]], Float[Array, "b h w c"]]
PredictPasses = Callable[[Float[Array, "bp h w c"], Float[Array, " bp"]], Float[Array, "bp h w c"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the flow is solved.

    `shift` spaces the times as in training (SD3). `rescale` in [0, 1] pulls the guided velocity's
    standard deviation back to the conditional one's (arXiv 2305.08891, section 3.4). Guidance acts
    for `interval[0] <= t <= interval[1]` only (arXiv 2404.07724); outside, the full condition
    alone.
    """

    solver: str = "euler"
    steps: int = 50
    shift: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_name(self.solver, SOLVERS, what="sampling.solver")
        if self.steps < 1:
            raise ValueError(f"sampling.steps must be at least 1, got {self.steps}")


def guidance_weights(*, text: float | None = None, image: float | None = None) -> tuple[float, ...]:
    """The weights w_i of the table above: one, two or three passes. Raises ValueError for image
    without text.
    """
    if text is None and image is None:
        return (1.0,)
    if text is None:
        raise ValueError("guidance needs a text scale when it has an image scale")
    if image is None:
        return (text, 1.0 - text)
    return (text, image - text, 1.0 - image)


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
    on_step: Callable[[], None] | None = None,
) -> Float[Array, "b h w c"]:
    """Integrates dx/dt = v(x, t) from t = 1 to t = 0 in `sampler.steps` steps; returns x at t = 0.

    `on_step` is called on the host after each step, for progress.
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
        if on_step is not None:
            # depends on x: not before the step is done
            jax.debug.callback(lambda _: on_step(), x[0, 0, 0, 0])
        return x, None

    x, _ = jax.lax.scan(step, noise, jnp.stack([times[:-1], times[1:]], axis=-1))
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generator:
    """Batches in, images out: encode the conditions, solve the guided flow, decode."""

    model: UniVG
    conditioner: Conditioner
    sampler: Sampler
    on_step: Callable[[], None] | None = None

    def __call__(
        self,
        params: PyTree,
        frozen: PyTree,
        passes: Sequence[Batch],
        *,
        weights: Sequence[float],
        seed: int = 0,
    ) -> Float[Array, "b h w 3"]:
        """Images in [-1, 1] for the rows of `passes[0]`; `passes` are the conditions of the
        guidance table.

        The noise of a row is a function of (seed, sample id), whatever the batch and the devices.
        """
        if len(passes) != len(weights):
            raise ValueError(f"{len(weights)} guidance weights for {len(passes)} passes")
        key = jax.random.key(seed)
        return self.generate(params, frozen, tuple(passes), jnp.asarray(weights, jnp.float32), key)

    @functools.partial(jax.jit, static_argnums=0)
    def generate(
        self,
        params: PyTree,
        frozen: PyTree,
        passes: tuple[Batch, ...],
        weights: Float[Array, " p"],
        key: Array,
    ) -> Float[Array, "b h w 3"]:
        """`__call__` as one program, of arrays only."""
        each = constrain_rows([self.conditioner.conditions(frozen, batch) for batch in passes])
        stacked = jax.tree.map(
            lambda *xs: jnp.stack(xs, axis=1).reshape(len(xs) * len(xs[0]), *xs[0].shape[1:]), *each
        )
        noise = sample_noise(key, passes[0].sample_id, each[0].cond_latents.shape[1:])

        def predict(
            x: Float[Array, "bp h w c"], t: Float[Array, " bp"]
        ) -> Float[Array, "bp h w c"]:
            return self.model.apply({"params": params}, *constrain_rows((x, t)), stacked)

        x0 = solve(
            guided_velocity(predict, weights, self.sampler),
            noise,
            self.sampler,
            on_step=self.on_step,
        )
        return jnp.clip(self.conditioner.decode(frozen, x0), -1.0, 1.0)
