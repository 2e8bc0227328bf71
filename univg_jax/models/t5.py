"""The T5 v1.1 encoder: pre-norm blocks of self-attention with relative positions, and a gated MLP.

    (q, k, v) = norm(x) (W_q, W_k, W_v),   bias[i, j] = table[bucket(j - i)]
    y  = x + W_o softmax(q k^T + bias) v
    x' = y + W_out (gelu(norm(y) W_gate) * norm(y) W_in)

Raffel et al. (arXiv 1910.10683, section 2.1): the logits are not divided by sqrt(c), no linear map
has a bias, and all layers share one table of positions. The MLP is Shazeer's GEGLU (arXiv
2002.05202); gelu is the tanh form.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, Int, Int32

from univg_jax.batch import Array
from univg_jax.models.attention import xla_attention
from univg_jax.models.layers import Linear, RMSNorm, gelu_tanh


def position_buckets(
    offsets: Int[np.ndarray, "*n"], *, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "*n"]:
    """The row of the position table for each offset (key minus query).

    The second half of the rows is for keys after the query. In each half of h rows, the first h/2
    stand for one distance each; the others stand for ranges that grow geometrically up to
    `max_distance`, and the last one includes all larger distances.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offsets)
    # float32 and this order of operations are PyTorch's: if the exact quotient is an integer, the
    # rounding error decides which row is taken.
    logs = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    far = exact + (
        logs / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    ).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (offsets > 0)


class GatedMLP(nn.Module):
    """out(gelu(gate(x)) * in(x)), without biases."""

    hidden_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b m d"]) -> Float[Array, "b m d"]:
        gate = Linear(self.hidden_dim, self.dtype, use_bias=False, name="gate")(x)
        h = Linear(self.hidden_dim, self.dtype, use_bias=False, name="in")(x)
        return Linear(x.shape[-1], self.dtype, use_bias=False, name="out")(gelu_tanh(gate) * h)


class T5Block(nn.Module):
    """One pre-norm block; x stays in float32, its updates are computed in `dtype`."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b m d"],
        bias: Float[Array, "k m m"],
        text_mask: Bool[Array, "b m"] | None,
    ) -> tuple[Float[Array, "b m d"], None]:
        b, m, d = x.shape
        h = RMSNorm(self.eps, name="attn_norm")(x)
        q, k, v = (
            Linear(self.num_heads * self.head_dim, self.dtype, use_bias=False, name=name)(
                h
            ).reshape(b, m, self.num_heads, self.head_dim)
            for name in ("q", "k", "v")
        )
        attended = xla_attention(q, k, v, text_mask, scale=1.0, bias=bias).reshape(b, m, -1)
        x = x + Linear(d, self.dtype, use_bias=False, name="attn_out")(attended)
        h = RMSNorm(self.eps, name="mlp_norm")(x)
        return x + GatedMLP(self.mlp_dim, self.dtype, name="mlp")(h), None


class T5Encoder(nn.Module):
    """Token ids -> contextual token embeddings. The defaults are those of T5 v1.1 XXL (4.8B).

    `apply({'params': p}, tokens, text_mask)`. Positions where `text_mask` is False are not attended
    to, and their own outputs mean nothing; None attends to all. The result has the dtype `dtype`;
    the residual sum, norms and softmax are float32 in any case. Use bfloat16 or float32: in float16
    the MLP of T5 XXL overflows (values beyond 65504), which transformers avoids by computing `wo`
    in float32.
    """

    vocab_size: int = 32128
    hidden_dim: int = 4096
    depth: int = 24
    num_heads: int = 64
    head_dim: int = 64
    mlp_dim: int = 10240
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    remat: bool = False  # recomputes the blocks in a backward pass
    dtype: Any = jnp.float32  # of the computation

    @nn.compact
    def __call__(
        self, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"] | None = None
    ) -> Float[Array, "b m {self.hidden_dim}"]:
        m = tokens.shape[1]
        words = self.param(
            "word_embeddings", nn.initializers.normal(1.0), (self.vocab_size, self.hidden_dim)
        )
        table = self.param(
            "relative_bias", nn.initializers.normal(0.02), (self.num_buckets, self.num_heads)
        )
        offsets = np.arange(m)[None] - np.arange(m)[:, None]
        buckets = position_buckets(
            offsets, num_buckets=self.num_buckets, max_distance=self.max_distance
        )
        bias = jnp.take(table, buckets, axis=0).transpose(2, 0, 1).astype(jnp.float32)

        x = jnp.take(words, tokens, axis=0).astype(jnp.float32)
        stack = nn.scan(
            nn.remat(T5Block, prevent_cse=False) if self.remat else T5Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        fields = (self.num_heads, self.head_dim, self.mlp_dim, self.eps, self.dtype)
        x, _ = stack(*fields, name="blocks")(x, bias, text_mask)
        return RMSNorm(self.eps, name="final_norm")(x).astype(self.dtype)
