"""Layers that the transformers share: linear maps, activations, norms, positions.

Parameters are float32 and cast to `dtype` where they are used; norms and angles are computed in
float32. Every linear map flattens its leading axes, so each is one 2-D matmul.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from univg_jax import sharding
from univg_jax.batch import Array
from univg_jax.errors import UserError

Dtype = Any


@jax.custom_vjp
def add_bias(x: Float[Array, "r d"], bias: Float[Array, " d"]) -> Float[Array, "r d"]:
    """x + b in x's dtype; the gradient of b is the sum over all rows in float32.

    In bfloat16 a sum over tens of thousands of rows is off by more than 1%.
    """
    return x + bias.astype(x.dtype)[None]


def _add_bias_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(x, bias), bias


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient, jnp.sum(gradient, axis=0, dtype=jnp.float32).astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


# The scopes name the parts of a step in `planning.traffic` and in profiles.
@jax.custom_vjp
@jax.named_scope("gate")
def add_gated(
    x: Float[Array, "b n d"], gate: Float[Array, "b d"], y: Float[Array, "b n d"]
) -> Float[Array, "b n d"]:
    """x + gate * y, with one gate a row; the gate's gradient is summed over tokens in float32."""
    return x + gate[:, None] * y


def _add_gated_forward(x: Array, gate: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    return add_gated(x, gate, y), (gate, y)


@jax.named_scope("gate")
def _add_gated_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array, Array]:
    gate, y = saved
    products = gradient.astype(jnp.float32) * y.astype(jnp.float32)
    return gradient, jnp.sum(products, axis=1).astype(gate.dtype), gate[:, None] * gradient


add_gated.defvjp(_add_gated_forward, _add_gated_backward)


class Linear(nn.Module):
    """y = x W + b over the last axis, W of shape [in, out]; b only where `use_bias`.

    `sum_dtype` is that of the sum of W's gradient over devices: see `sharding.matmul`.
    """

    features: int
    dtype: Dtype = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()
    use_bias: bool = True
    sum_dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        name = "/".join((*self.path, "kernel"))
        y = sharding.matmul(rows, kernel, name, sum_dtype=self.sum_dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = add_bias(y, bias)
        return y.reshape(*x.shape[:-1], self.features)


class MLP(nn.Module):
    """Two linear maps with an activation between: out(act(in(x)))."""

    hidden_dim: int
    features: int
    activation: Callable = nn.silu
    dtype: Dtype = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()
    sum_dtype: Dtype = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        linear = functools.partial(
            Linear, dtype=self.dtype, kernel_init=self.kernel_init, sum_dtype=self.sum_dtype
        )
        h = linear(self.hidden_dim, name="in")(x)
        return linear(self.features, name="out")(self.activation(h))


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x Phi(x), by erf (arXiv 1606.08415)."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


@jax.custom_vjp
def gelu_tanh(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """GELU's tanh form: x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) (arXiv 1606.08415).

    The gradient is s + x s (1 - s) 2u' with s = sigmoid(2u), computed from x alone, so that no
    intermediate value is kept for the backward pass.
    """
    # The equal 0.5 x (1 + tanh(u)) would cancel digits for negative x.
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def _gelu_tanh_forward(x: Array) -> tuple[Array, Array]:
    return gelu_tanh(x), x


def _gelu_tanh_backward(x: Array, gradient: Array) -> tuple[Array]:
    factor = 2 * math.sqrt(2 / math.pi)
    s = jax.nn.sigmoid(factor * (x + 0.044715 * x * x * x))
    return (gradient * (s + x * s * (1 - s) * factor * (1 + 3 * 0.044715 * x * x)),)


gelu_tanh.defvjp(_gelu_tanh_forward, _gelu_tanh_backward)


def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x sigmoid(1.702 x): GELU's sigmoid form (arXiv 1606.08415)."""
    return x * jax.nn.sigmoid(1.702 * x)


def unit_vectors(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x / |x| over the last axis; zero stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*b d"], scale: Float[Array, " d"], eps: float
) -> Float[Array, "*b d"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned as x's dtype.

    The gradient is computed from x in its own dtype, so that no float32 array is kept for the
    backward pass.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.reshape(*(1,) * (x.ndim - 1), -1)).astype(x.dtype)


def _rms_norm_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return rms_norm(x, scale, eps), (x, scale)


def _rms_norm_backward(
    eps: float, saved: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, scale = saved
    x32, g = x.astype(jnp.float32), gradient.astype(jnp.float32)
    r = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    y = x32 * r
    dy = g * scale.reshape(*(1,) * (x.ndim - 1), -1)
    dx = r * (dy - y * jnp.mean(dy * y, axis=-1, keepdims=True))
    return dx.astype(x.dtype), jnp.sum(g * y, axis=tuple(range(x.ndim - 1)))


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


NORM_EPS = 1e-6


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale."""

    eps: float = NORM_EPS

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class Scale(nn.Module):
    """The learned scale of a norm that is computed elsewhere: the parameter of `RMSNorm`."""

    dim: int

    @nn.compact
    def __call__(self) -> Float[Array, " {self.dim}"]:
        return self.param("scale", nn.initializers.ones, (self.dim,))


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        affine = (1,) * (x.ndim - 1) + (-1,)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale.reshape(affine) + bias.reshape(affine)).astype(x.dtype)


@jax.custom_vjp
@jax.named_scope("norm")
def modulated_norm(
    x: Float[Array, "b n d"], scale: Float[Array, "b d"], shift: Float[Array, "b d"]
) -> Float[Array, "b n d"]:
    """(x - mean) / sqrt(var + 1e-6) * (1 + scale) + shift: LayerNorm with given scale and shift.

    AdaLN of DiT (arXiv 2212.09748, section 3.2). In float32, returned as x's dtype; the gradient is
    computed as in `rms_norm`.
    """
    y, _ = _normalize(x)
    y = y * (1 + scale.astype(jnp.float32))[:, None] + shift.astype(jnp.float32)[:, None]
    return y.astype(x.dtype)


def _normalize(x: Array) -> tuple[Array, Array]:
    """x with mean 0 and variance 1 over the last axis, and the factor 1 / sqrt(var + 1e-6)."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    r = jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return y * r, r


def _modulated_norm_forward(
    x: Array, scale: Array, shift: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return modulated_norm(x, scale, shift), (x, scale, shift)


@jax.named_scope("norm")
def _modulated_norm_backward(
    saved: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array, Array]:
    x, scale, shift = saved
    y, r = _normalize(x)
    # Without the barrier a TPU's compiler multiplies by 1 + scale where it ends the product before,
    # for which it writes 1 + scale, broadcast over all tokens, to memory.
    g = jax.lax.optimization_barrier(gradient).astype(jnp.float32)
    dy = g * (1 + scale.astype(jnp.float32))[:, None]
    dx = r * (
        dy - jnp.mean(dy, axis=-1, keepdims=True) - y * jnp.mean(dy * y, axis=-1, keepdims=True)
    )
    return (
        dx.astype(x.dtype),
        jnp.sum(g * y, axis=1).astype(scale.dtype),
        jnp.sum(g, axis=1).astype(shift.dtype),
    )


modulated_norm.defvjp(_modulated_norm_forward, _modulated_norm_backward)


def time_features(t: Float[Array, " b"], *, dim: int = 256) -> Float[Array, "b {dim}"]:
    """[cos(1000 t w), sin(1000 t w)], w_i = 10000^(-i / (dim / 2)), for t in [0, 1]."""
    # Angles go up to 1000, where one ulp of a frequency changes them by 1e-4. So the exponents are
    # rounded as in PyTorch, and the power is computed exactly.
    exponents = -math.log(10000) * np.arange(dim // 2, dtype=np.float32) / np.float32(dim // 2)
    freqs = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (1000 * t.astype(jnp.float32))[:, None] * freqs[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_table(
    height: int, width: int, *, dim: int, max_size: int, base_size: int
) -> Float[Array, "n {dim}"]:
    """Fixed position features for the central `height x width` crop of a grid of `max_size` tokens.

    Token i of the grid has position p = i * base_size / max_size. The first half of the features
    encodes the column, the second the row, each as [sin(p w), cos(p w)] with
    w_j = 10000^(-j / (dim / 4)). SD3 (arXiv 2403.03206, appendix B.3). Raises UserError if the crop
    is larger than the grid.
    """
    if max(height, width) > max_size:
        raise UserError(
            f"{height}x{width} tokens exceed the position table: pos_embed_max_size={max_size}"
        )

    def features(size: int) -> np.ndarray:
        start = (max_size - size) // 2
        spacing = np.float32(max_size / base_size)
        position = np.arange(start, start + size, dtype=np.float32) / spacing
        omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
        angles = np.outer(position.astype(np.float64), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    # By JAX, so that a compiled program holds the features of one row and one column only.
    columns = jnp.broadcast_to(features(width)[None], (height, width, dim // 2))
    rows = jnp.broadcast_to(features(height)[:, None], (height, width, dim // 2))
    return jnp.concatenate([columns, rows], axis=-1).reshape(height * width, dim)


def rotate_2d(x: Float[Array, "b n k c"], *, height: int, width: int) -> Float[Array, "b n k c"]:
    """Rotary positions of a `height x width` grid: half of each head turns by row, half by column.

    A pair (x_j, x_{j + c/4}) in a half is rotated by the angle p * 10000^(-j / (c / 4)) at row or
    column p. RoFormer (arXiv 2104.09864), axial form.
    """
    quarter = x.shape[-1] // 4
    omega = 10000.0 ** (-np.arange(quarter) / quarter)

    def turn(half: Array, position: np.ndarray) -> Array:
        angles = np.outer(position, omega).astype(np.float32)[None, :, None]
        cos, sin = np.cos(angles), np.sin(angles)
        a, b = half[..., :quarter].astype(jnp.float32), half[..., quarter:].astype(jnp.float32)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    row, column = np.divmod(np.arange(height * width), width)
    halves = [turn(x[..., : 2 * quarter], row), turn(x[..., 2 * quarter :], column)]
    return jnp.concatenate(halves, axis=-1).astype(x.dtype)
