"""A segmentation network for scenes: a small U-Net, trained in half a minute on exact masks.

3x3 convolutions stand between space-to-depth and its inverse, so that no stage loses pixels and
none works at full resolution. The input is `RESOLUTION` pixels a side; the logits have half of it,
and probabilities are interpolated back.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Int, PyTree, UInt8

from univg_jax.batch import Array
from univg_jax.images import to_float
from univg_jax.progress import Bar

RESOLUTION = 48  # pixels a side
WIDTHS = (16, 48, 96)  # channels at 1/2, 1/4, 1/8 of the resolution
SEED = 0
BATCH_SIZE = 32  # of a step of the fit
CHUNK = 128  # images that are segmented at once

Params = dict[str, Float[Array, "..."]]


def probabilities(
    params: Params, images: UInt8[np.ndarray, "b h w 3"]
) -> Float[np.ndarray, "b h w k"]:
    """The probability of each class at every pixel."""
    chunks = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
    return np.concatenate([np.asarray(_probabilities(params, chunk)) for chunk in chunks])


def fit(
    images: UInt8[np.ndarray, "n r r 3"],
    labels: Int[np.ndarray, "n r r"],
    *,
    classes: int,
    steps: int,
) -> Params:
    """The network's parameters, fitted to the class of every pixel; deterministic.

    Cross-entropy against the share of each class in every 2x2 block, with Adam and a one-cycle
    cosine learning rate.
    """
    tx = optax.adam(optax.cosine_onecycle_schedule(steps, 4e-3))
    params = _init_params(classes)
    opt_state = tx.init(params)

    def loss_fn(params: Params, x: Array, shares: Array) -> Array:
        return optax.softmax_cross_entropy(_logits(params, x), shares).mean()

    @jax.jit
    def step(
        params: Params, opt_state: PyTree, key: Array, x: Array, y: Array
    ) -> tuple[Params, PyTree, Array]:
        x = _degraded(key, to_float(x))
        b, h, w = y.shape
        shares = jax.nn.one_hot(y, classes).reshape(b, h // 2, 2, w // 2, 2, classes).mean((2, 4))
        loss, grads = jax.value_and_grad(loss_fn)(params, x, shares)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    rng, key = np.random.default_rng(SEED), jax.random.key(SEED)
    bar = Bar(range(steps), "scorer: learning to segment")
    for i in bar:
        rows = rng.integers(len(images), size=BATCH_SIZE)
        flip = -1 if rng.random() < 0.5 else 1
        batch = images[rows][:, :, ::flip], labels[rows][:, :, ::flip]
        params, opt_state, loss = step(params, opt_state, jax.random.fold_in(key, i), *batch)
        if i % 50 == 49:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return {name: np.asarray(value) for name, value in params.items()}


def _init_params(classes: int) -> Params:
    a, b, c = WIDTHS
    shapes = {  # (channels in, channels out) of each convolution
        **{"down2": (12, a), "down4": (4 * a, b), "down8": (4 * b, c), "middle": (c, c)},
        **{"up4": (b + c // 4, b), "up2": (a + b // 4, a), "logits": (a, classes)},
    }
    rng = np.random.default_rng(SEED)
    params: Params = {}
    for name, (fan_in, fan_out) in shapes.items():
        scale = (2 / (9 * fan_in)) ** 0.5  # He: keeps the variance through ReLUs
        params[f"{name}.kernel"] = rng.normal(0, scale, (3, 3, fan_in, fan_out)).astype(np.float32)
        params[f"{name}.bias"] = np.zeros(fan_out, np.float32)
    return params


def _logits(params: Params, x: Float[Array, "b h w 3"]) -> Float[Array, "b h//2 w//2 k"]:
    """The U-Net: class logits of each 2x2 block of pixels."""

    def conv(name: str, x: Array) -> Array:
        y = jax.lax.conv_general_dilated(
            x, params[f"{name}.kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + params[f"{name}.bias"].reshape(1, 1, 1, -1)

    def down(x: Array) -> Array:  # space to depth
        b, h, w, c = x.shape
        blocks = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
        return blocks.reshape(b, h // 2, w // 2, 4 * c)

    def up(x: Array) -> Array:  # depth to space
        b, h, w, c = x.shape
        blocks = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
        return blocks.reshape(b, 2 * h, 2 * w, c // 4)

    half = jax.nn.relu(conv("down2", down(x)))
    quarter = jax.nn.relu(conv("down4", down(half)))
    eighth = jax.nn.relu(conv("down8", down(quarter)))
    eighth = eighth + jax.nn.relu(conv("middle", eighth))
    quarter = jax.nn.relu(conv("up4", jnp.concatenate([quarter, up(eighth)], -1)))
    half = jax.nn.relu(conv("up2", jnp.concatenate([half, up(quarter)], -1)))
    return conv("logits", half)


@jax.jit
def _probabilities(params: Params, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w k"]:
    logits = _logits(params, to_float(images))
    b, h, w, k = logits.shape
    return jax.nn.softmax(jax.image.resize(logits, (b, 2 * h, 2 * w, k), "linear"))


def _degraded(key: Array, x: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """The images with random blur and noise.

    Half-trained generators make such pictures, and a person can still name what is in them.
    """
    blur_key, noise_key, level_key = jax.random.split(key, 3)
    window = (1, 3, 3, 1)
    blurred = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME") / 9
    amount = jax.random.uniform(blur_key, (x.shape[0], 1, 1, 1))
    level = 0.2 * jax.random.uniform(level_key, (x.shape[0], 1, 1, 1)) ** 2
    return x + amount * (blurred - x) + level * jax.random.normal(noise_key, x.shape)
