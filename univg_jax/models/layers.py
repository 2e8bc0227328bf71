"""Layers shared by the transformers: linear maps, norms, positions, attention.

Parameters are float32 and cast to `dtype` where they are used; norms, angles and softmax are
computed in float32. Every linear map flattens its leading axes, so each is one 2-D matmul.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float

Array = jax.Array | np.ndarray
Dtype = Any


class Linear(nn.Module):
    """y = x W + b over the last axis, W of shape [in, out]; b only where `use_bias`."""

    features: int
    dtype: Dtype = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(self.dtype)[None]
        return y.reshape(*x.shape[:-1], self.features)


class MLP(nn.Module):
    """Two linear maps with an activation between: out(act(in(x)))."""

    hidden_dim: int
    features: int
    activation: Callable = nn.silu
    dtype: Dtype = jnp.float32
    kernel_init: Callable = nn.initializers.xavier_uniform()

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        h = Linear(self.hidden_dim, self.dtype, self.kernel_init, name="in")(x)
        return Linear(self.features, self.dtype, self.kernel_init, name="out")(self.activation(h))


def gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x Phi(x), by erf (arXiv 1606.08415)."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def gelu_tanh(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3): GELU's tanh form (arXiv 1606.08415)."""
    # As a sigmoid: 1 + tanh cancels for negative x.
    return x * jax.nn.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))


def quick_gelu(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """x sigmoid(1.702 x): GELU's sigmoid form (arXiv 1606.08415)."""
    return x * jax.nn.sigmoid(1.702 * x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale.reshape(*(1,) * (x.ndim - 1), -1)).astype(x.dtype)


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


def modulated_norm(
    x: Float[Array, "b n d"], *, scale: Float[Array, "b d"], shift: Float[Array, "b d"], eps: float = 1e-6
) -> Float[Array, "b n d"]:
    """LayerNorm without affine, then scale and shift: (x - mean) / sqrt(var + eps) * (1 + scale) + shift.

    AdaLN of DiT (arXiv 2212.09748, section 3.2).
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * (1 + scale.astype(jnp.float32))[:, None] + shift.astype(jnp.float32)[:, None]).astype(x.dtype)


def time_features(t: Float[Array, " b"], *, dim: int = 256) -> Float[Array, "b {dim}"]:
    """[cos(1000 t w), sin(1000 t w)], w_i = 10000^(-i / (dim / 2)), for t in [0, 1]."""
    # An ulp of a frequency is 1e-4 of an angle of 1000: exponents rounded as PyTorch does, the power exact.
    exponents = -math.log(10000) * np.arange(dim // 2, dtype=np.float32) / np.float32(dim // 2)
    freqs = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (1000 * t.astype(jnp.float32))[:, None] * freqs[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_table(height: int, width: int, *, dim: int, max_size: int, base_size: int) -> Float[np.ndarray, "n {dim}"]:
    """Fixed position features of the central `height x width` crop of a `max_size` square grid of tokens.

    Position i stands at i * base_size / max_size; the first half of the features encodes the
    column, the second the row, each as [sin(p w), cos(p w)] with w_j = 10000^(-j / (dim / 4)).
    SD3 (arXiv 2403.03206, appendix B.3).
    Raises ValueError where the crop is larger than the grid.
    """
    if max(height, width) > max_size:
        raise ValueError(f"{height}x{width} tokens exceed the position table: pos_embed_max_size={max_size}")

    def features(size: int) -> np.ndarray:
        start = (max_size - size) // 2
        position = np.arange(start, start + size, dtype=np.float32) / np.float32(max_size / base_size)
        omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
        angles = np.outer(position.astype(np.float64), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    columns = np.broadcast_to(features(width)[None], (height, width, dim // 2))
    rows = np.broadcast_to(features(height)[:, None], (height, width, dim // 2))
    return np.concatenate([columns, rows], axis=-1).reshape(height * width, dim)


def rotate_2d(x: Float[Array, "b n k c"], *, height: int, width: int) -> Float[Array, "b n k c"]:
    """Rotary position of a `height x width` token grid: the first half of a head turns by row, the second by column.

    A pair (x_j, x_{j + c/4}) of a half turns by p * 10000^(-j / (c / 4)), p counted from the grid's
    center (only differences matter). RoFormer (arXiv 2104.09864), axial form.
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


def xla_attention(
    q: Float[Array, "b n k c"],
    k: Float[Array, "b s k c"],
    v: Float[Array, "b s k c"],
    mask: Bool[Array, "b s"] | None,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Float[Array, "k n s"] | None = None,
) -> Float[Array, "b n k c"]:
    """softmax(scale q k^T + bias) v for each head, `scale` by default 1 / sqrt(c).

    Keys whose mask is False, and `causal` later ones, get no weight.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = jnp.einsum("bnkc,bskc->bkns", q * scale, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[None]
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
    if causal:
        earlier = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(earlier[None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkns,bskc->bnkc", weights, v)


ATTENTION: dict[str, Callable] = {"xla": xla_attention}
