"""The BERT encoder as MiniLM uses it: post-norm blocks of self-attention and MLP, and masked mean
pooling.

    y = LayerNorm(x + Attention(x)),   x' = LayerNorm(y + W2 gelu(W1 y))

(Devlin et al. 1810.04805, section 3; gelu is exact, x Phi(x).) Tokens are flattened to 2-D before
every matmul: on CPU XLA is then close to the machine's peak.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32

from univg_jax.batch import Array
from univg_jax.models.layers import gelu


class Block(nn.Module):
    """One post-norm transformer block over flattened tokens [b*m, d]."""

    num_heads: int
    mlp_dim: int
    eps: float
    dtype: Any

    def _norm(self, x: Float[Array, "n d"], name: str) -> Float[Array, "n d"]:
        norm = nn.LayerNorm(epsilon=self.eps, dtype=jnp.float32, use_fast_variance=False, name=name)
        # statistics in float32 whatever the compute dtype
        return norm(x.astype(jnp.float32)).astype(self.dtype)

    @nn.compact
    def __call__(self, x: Float[Array, "n d"], bias: Float[Array, "b 1 m"]) -> Float[Array, "n d"]:
        (b, _, m), d = bias.shape, x.shape[-1]
        k, e = self.num_heads, d // self.num_heads

        def heads(y: Float[Array, "n d"]) -> Float[Array, "bk m e"]:
            return y.reshape(b, m, k, e).swapaxes(1, 2).reshape(b * k, m, e)

        q, key, value = (
            heads(nn.Dense(d, dtype=self.dtype, name=n)(x)) for n in ("query", "key", "value")
        )
        scores = jnp.einsum("nqe,nke->nqk", q, key, preferred_element_type=jnp.float32) * e**-0.5
        weights = nn.softmax(scores + jnp.repeat(bias, k, axis=0)).astype(self.dtype)
        y = jnp.einsum("nqk,nke->nqe", weights, value)
        y = y.reshape(b, k, m, e).swapaxes(1, 2).reshape(b * m, d)
        x = self._norm(x + nn.Dense(d, dtype=self.dtype, name="attention_out")(y), "attention_norm")
        y = nn.Dense(d, dtype=self.dtype, name="mlp_out")(
            gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, name="mlp_in")(x))
        )
        return self._norm(x + y, "mlp_norm")


class MiniLM(nn.Module):
    """Token ids -> contextual token embeddings. The defaults are those of all-MiniLM-L6-v2.

    `apply({'params': p}, tokens, text_mask)`; `pool` makes a sentence embedding of the result.
    Positions where `text_mask` is False are not attended to; their own outputs mean nothing. Raises
    ValueError for more tokens than there are positions.
    """

    vocab_size: int = 30522
    hidden_dim: int = 384
    depth: int = 6
    num_heads: int = 12
    mlp_dim: int = 1536
    max_tokens: int = 512
    num_token_types: int = 2  # always type 0 here: one sentence
    eps: float = 1e-12
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"]
    ) -> Float[Array, "b m d"]:
        b, m = tokens.shape
        if m > self.max_tokens:
            raise ValueError(f"{m} text tokens, but MiniLM has {self.max_tokens} positions")

        def table(rows: int, name: str) -> Float[Array, "rows d"]:
            return self.param(name, nn.initializers.normal(0.02), (rows, self.hidden_dim))

        words = jnp.take(table(self.vocab_size, "word_embeddings"), tokens.reshape(-1), axis=0)
        positions = jnp.tile(table(self.max_tokens, "position_embeddings")[:m], (b, 1))
        types = table(self.num_token_types, "token_type_embeddings")[:1]
        norm = nn.LayerNorm(epsilon=self.eps, use_fast_variance=False, name="embeddings_norm")
        x = norm(words + positions + types).astype(self.dtype)
        bias = jnp.where(text_mask[:, None], 0.0, jnp.finfo(jnp.float32).min)
        block = nn.remat(Block) if self.remat else Block
        for i in range(self.depth):
            x = block(self.num_heads, self.mlp_dim, self.eps, self.dtype, name=f"layers_{i}")(
                x, bias
            )
        return x.reshape(b, m, self.hidden_dim)


def pool(text_emb: Float[Array, "b m d"], text_mask: Bool[Array, "b m"]) -> Float[Array, "b d"]:
    """Sentence embedding: the mean over real tokens, L2-normalized (Sentence-BERT 1908.10084,
    section 3).
    """
    weights = text_mask[..., None].astype(jnp.float32)
    mean = (text_emb.astype(jnp.float32) * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-9)
