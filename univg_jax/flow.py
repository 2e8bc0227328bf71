"""Rectified flow: the straight path between data and noise, and the loss that learns its velocity.

Time runs from data to noise, t = 0 is data and t = 1 is noise; everything else follows:

    x_t      = (1 - t) x0 + t noise          noise ~ N(0, I)
    velocity = d x_t / d t = noise - x0
    loss     = E_{t, noise} || F(x_t, t, condition) - velocity ||^2

(UniVG, arXiv 2503.12652, training objective; rectified flow, arXiv 2209.03003.) Sampling solves
dx/dt = F from t = 1 down to t = 0 (`univg_jax.sampling`).

Times are drawn logit-normal, t = sigmoid(mean + std z) (SD3, arXiv 2403.03206, section 3.1), or
uniform, then shifted towards noise: t' = a t / (1 + (a - 1) t). At m pixels, a model whose times
suited n pixels needs a = sqrt(m / n) (SD3, section 5.3.2).

Time and noise of a row are a function of (key, sample id) alone: they do not depend on the
row's place in the batch, nor on devices, hosts or workers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8, UInt32

from univg_jax.settings import Flow

# Levels of 255 by which a channel of a pixel must differ to be an edit and not a trace of the
# compression of two files. Our choice: a JPEG of quality 95 stays below it but for a few pixels.
CHANGED = 8

PredictVelocity = Callable[[Float[Array, "b h w c"], Float[Array, " b"]], Float[Array, "b h w c"]]


def shift_times(t: Float[Array, "..."], shift: float) -> Float[Array, "..."]:
    """t' = a t / (1 + (a - 1) t): keeps 0 and 1, moves the rest towards noise for a > 1."""
    return shift * t / (1 + (shift - 1) * t)


def interpolate(
    x0: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], t: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """x_t = (1 - t) x0 + t noise."""
    t = t[:, None, None, None]
    return (1 - t) * x0 + t * noise


def velocity(
    x0: Float[Array, "b h w c"], noise: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """d x_t / d t = noise - x0, the same at every t."""
    return noise - x0


def sample_noise(
    key: PRNGKeyArray, sample_id: UInt32[Array, " b"], shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Standard normal noise of each row, a function of (key, sample id)."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(sample_id)


def sample_times(
    key: PRNGKeyArray, sample_id: UInt32[Array, " b"], times: Flow
) -> Float[Array, " b"]:
    """A time in (0, 1) for each row, a function of (key, sample id)."""

    def draw(i: UInt32[Array, ""]) -> Float[Array, ""]:
        row_key = jax.random.fold_in(key, i)
        if times.distribution == "uniform":
            return jax.random.uniform(row_key)
        return jax.nn.sigmoid(times.mean + times.std * jax.random.normal(row_key))

    return shift_times(jax.vmap(draw)(sample_id), times.shift)


def changed_cells(
    target: UInt8[Array, "b h w 3"], source: UInt8[Array, "b h w 3"], *, cell: int
) -> Bool[Array, "b h2 w2 1"]:
    """Which latent cells of `cell x cell` pixels have a pixel that differs by more than CHANGED.

    Pixels decide and not latents: a convolutional encoder has layers that see the whole picture, so
    that any edit moves every latent a little.
    """
    difference = jnp.abs(target.astype(jnp.int16) - source.astype(jnp.int16))
    b, h, w, _ = target.shape
    cells = difference.reshape(b, h // cell, cell, w // cell, cell, 3)
    return (jnp.max(cells, axis=(2, 4, 5)) > CHANGED)[..., None]


def change_weights(
    x0: Float[Array, "b h w c"],
    source: Float[Array, "b h w c"],
    changed: Bool[Array, "b h w 1"],
) -> Float[Array, "b h w 1"]:
    """Weights that make small edits count: 1 / ||x - x'||^2 in the changed cells, 1 elsewhere.

    OmniGen (arXiv 2409.11340, section 2.3). The norm is the mean square over the whole latent, so a
    change of everything (mean square 1 or more for unit-variance latents) is never weighted below
    1.
    """
    mean_square = jnp.mean(jnp.square(x0 - source), axis=(1, 2, 3), keepdims=True)
    return jnp.where(changed, jnp.maximum(1 / jnp.maximum(mean_square, 1e-3), 1.0), 1.0)


def valid_weights(loss_mask: UInt8[Array, "b h w 1"], *, cell: int) -> Float[Array, "b h2 w2 1"]:
    """Weights of latent cells of `cell x cell` pixels: the share of a cell's pixels that count.

    They are divided by their mean over the row, so that the mean of weighted errors is the weighted
    mean: a row with few pixels that count has as much weight as one where all do, whose weights are
    1. A row without any has the weights 0.
    """
    b, h, w, _ = loss_mask.shape
    cells = loss_mask.astype(jnp.float32).reshape(b, h // cell, cell, w // cell, cell, 1)
    counts = jnp.sum(cells, axis=(2, 4))
    total = jnp.sum(counts, axis=(1, 2, 3), keepdims=True)
    # Whole numbers, so that the quotient is exactly 1 where all pixels count.
    return counts * (counts[0].size / jnp.maximum(total, 1))


def loss_at(
    predict: PredictVelocity,
    x0: Float[Array, "b h w c"],
    *,
    noise: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    weight: Float[Array, "b h w 1"] | None = None,
) -> Float[Array, " b"]:
    """|| F(x_t, t) - velocity ||^2 of each row: the mean over the latent, in float32."""
    predicted = predict(interpolate(x0, noise, t), t)
    error = jnp.square(predicted.astype(jnp.float32) - velocity(x0, noise))
    return jnp.mean(error if weight is None else weight * error, axis=(1, 2, 3))


def loss(
    predict: PredictVelocity,
    x0: Float[Array, "b h w c"],
    *,
    key: PRNGKeyArray,
    sample_id: UInt32[Array, " b"],
    times: Flow,
    weight: Float[Array, "b h w 1"] | None = None,
) -> Float[Array, " b"]:
    """The training loss of each row, at a random time and noise."""
    time_key, noise_key = jax.random.split(key)
    t = sample_times(time_key, sample_id, times)
    noise = sample_noise(noise_key, sample_id, x0.shape[1:])
    return loss_at(predict, x0, noise=noise, t=t, weight=weight)
