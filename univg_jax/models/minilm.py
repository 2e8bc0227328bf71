"""The BERT encoder as MiniLM uses it: post-norm blocks, then a masked mean over the tokens.

    y = LayerNorm(x + W_o attention(x)),   x' = LayerNorm(y + W_2 gelu(W_1 y))

Devlin et al. (arXiv 1810.04805, section 3), numerically transformers' `BertModel` without its
pooler; gelu is exact, x Phi(x).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int32

from univg_jax.batch import Array
from univg_jax.errors import UserError
from univg_jax.models.attention import xla_attention
from univg_jax.models.layers import MLP, LayerNorm, Linear, gelu, unit_vectors


class PostNormBlock(nn.Module):
    """One block: each norm follows the sum that it normalizes."""

    num_heads: int
    mlp_dim: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m d"], text_mask: Bool[Array, "b m"]
    ) -> tuple[Float[Array, "b m d"], None]:
        b, m, d = x.shape
        q, k, v = (
            Linear(d, self.dtype, name=name)(x).reshape(b, m, self.num_heads, -1) for name in "qkv"
        )
        attended = xla_attention(q, k, v, text_mask).reshape(b, m, d)
        x = x + Linear(d, self.dtype, name="attn_out")(attended)
        x = LayerNorm(self.eps, name="attn_norm")(x)
        x = x + MLP(self.mlp_dim, d, gelu, self.dtype, name="mlp")(x)
        return LayerNorm(self.eps, name="mlp_norm")(x), None


class MiniLM(nn.Module):
    """Token ids -> contextual token embeddings. The defaults are those of all-MiniLM-L6-v2.

    `apply({'params': p}, tokens, text_mask)`; `pool` makes a sentence embedding of the result.
    Positions where `text_mask` is False are not attended to; their own outputs mean nothing. Raises
    UserError for more tokens than there are positions.
    """

    vocab_size: int = 30522
    hidden_dim: int = 384
    depth: int = 6
    num_heads: int = 12
    mlp_dim: int = 1536
    max_tokens: int = 512
    num_token_types: int = 2  # always type 0 here: one sentence
    eps: float = 1e-12
    remat: bool = False  # recomputes the blocks in a backward pass
    dtype: Any = jnp.float32  # of the computation

    @nn.compact
    def __call__(
        self, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"]
    ) -> Float[Array, "b m d"]:
        m = tokens.shape[1]
        if m > self.max_tokens:
            raise UserError(f"{m} text tokens, but MiniLM has {self.max_tokens} positions")

        def table(rows: int, name: str) -> Float[Array, "rows d"]:
            init = nn.initializers.normal(0.02)
            return self.param(name, init, (rows, self.hidden_dim)).astype(jnp.float32)

        words = jnp.take(table(self.vocab_size, "word_embeddings"), tokens, axis=0)
        positions = table(self.max_tokens, "position_embeddings")[None, :m]
        types = table(self.num_token_types, "token_type_embeddings")[None, :1]
        x = LayerNorm(self.eps, name="embeddings_norm")(words + positions + types)
        stack = nn.scan(
            nn.remat(PostNormBlock, prevent_cse=False) if self.remat else PostNormBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        fields = (self.num_heads, self.mlp_dim, self.eps, self.dtype)
        x, _ = stack(*fields, name="blocks")(x.astype(self.dtype), text_mask)
        return x


def pool(text_emb: Float[Array, "b m d"], text_mask: Bool[Array, "b m"]) -> Float[Array, "b d"]:
    """Sentence embeddings: the mean over real tokens, L2-normalized.

    Sentence-BERT (arXiv 1908.10084, section 3). Without any real token it is zero.
    """
    weights = text_mask[..., None].astype(jnp.float32)
    mean = (text_emb.astype(jnp.float32) * weights).sum(1) / jnp.maximum(weights.sum(1), 1)
    return unit_vectors(mean)
