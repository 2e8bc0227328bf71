"""CLIP's two towers: a causal transformer over text and a ViT over images.

    text:   x = run_blocks(E[tokens] + P),               pooled = norm(x) at the end token
    image:  x = run_blocks(norm([class, patches] + P)),  pooled = norm(x at the class token)
    both:   projected = W pooled, in a common space

Radford et al. 2021 (arXiv 2103.00020, section 2.4), numerically transformers' `CLIPTextModel` and
`CLIPVisionModel`. The defaults are those of ViT-L/14.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int32, UInt8

from univg_jax.batch import Array, pytree_dataclass
from univg_jax.errors import UserError
from univg_jax.models.layers import LayerNorm, Linear
from univg_jax.models.vit import ImageTokens, normalized_crop, run_blocks

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@pytree_dataclass
class CLIPTextOutput:
    """`projected` is None for a model without a projection."""

    last_hidden: Float[Array, "b m d"]  # after the final norm
    # before the last block, not normalized: what SDXL and SD3 condition on
    penultimate: Float[Array, "b m d"]
    pooled: Float[Array, "b d"]
    projected: Float[Array, "b e"] | None


class CLIPText(nn.Module):
    """Token ids -> states of the tokens and of the whole text.

    `apply({'params': p}, tokens, text_mask)`: tokens whose mask is False are not attended to, and
    their own states mean nothing; None attends to all. Raises UserError for more tokens than there
    are positions.
    """

    vocab_size: int = 49408
    hidden_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    max_tokens: int = 77
    projection_dim: int | None = 768
    eos_token_id: int = 49407
    activation: str = "quick_gelu"  # a name of vit.ACTIVATIONS
    eps: float = 1e-5
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"] | None = None
    ) -> CLIPTextOutput:
        b, m = tokens.shape
        if m > self.max_tokens:
            raise UserError(f"{m} text tokens, but CLIP has {self.max_tokens} positions")

        def table(rows: int, name: str) -> Float[Array, "rows d"]:
            init = nn.initializers.normal(0.02)
            return self.param(name, init, (rows, self.hidden_dim)).astype(jnp.float32)

        words = jnp.take(table(self.vocab_size, "token_embeddings"), tokens, axis=0)
        x = (words + table(self.max_tokens, "position_embeddings")[None, :m]).astype(self.dtype)
        hidden = run_blocks(
            x,
            text_mask,
            depth=self.depth,
            remat=self.remat,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            eps=self.eps,
            causal=True,
            dtype=self.dtype,
        )
        last = LayerNorm(self.eps, name="final_norm")(hidden.last)
        # Early configs have the wrong value 2. transformers then takes the largest id, because
        # CLIP's end token has the largest one.
        end = tokens if self.eos_token_id == 2 else tokens == self.eos_token_id
        pooled = last[jnp.arange(b), jnp.argmax(end, axis=-1)]
        projected = _project(pooled, self.projection_dim, self.dtype)
        return CLIPTextOutput(
            last_hidden=last, penultimate=hidden.penultimate, pooled=pooled, projected=projected
        )


@pytree_dataclass
class CLIPVisionOutput:
    """`projected` is None for a model without a projection."""

    last_hidden: Float[Array, "b n d"]  # not normalized: class token, then patches by rows
    pooled: Float[Array, "b d"]
    projected: Float[Array, "b e"] | None


class CLIPVision(nn.Module):
    """Images, as `preprocess` gives them, -> states of the patches and of the whole image.

    `apply({'params': p}, pixels)`. Positions are interpolated for other sizes than `image_size`.
    Raises UserError for sides that are not a multiple of `patch_size`.
    """

    image_size: int = 224
    patch_size: int = 14
    hidden_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    projection_dim: int | None = 768
    activation: str = "quick_gelu"  # a name of vit.ACTIVATIONS
    eps: float = 1e-5
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> CLIPVisionOutput:
        x = ImageTokens(
            hidden_dim=self.hidden_dim,
            image_size=self.image_size,
            patch_size=self.patch_size,
            use_bias=False,
            dtype=self.dtype,
            name="embed",
        )(pixels)
        x = LayerNorm(self.eps, name="pre_norm")(x)
        last = run_blocks(
            x,
            depth=self.depth,
            remat=self.remat,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            eps=self.eps,
            dtype=self.dtype,
        ).last
        pooled = LayerNorm(self.eps, name="post_norm")(last[:, 0])
        projected = _project(pooled, self.projection_dim, self.dtype)
        return CLIPVisionOutput(last_hidden=last, pooled=pooled, projected=projected)


def _project(
    pooled: Float[Array, "b d"], dim: int | None, dtype: Any
) -> Float[Array, "b e"] | None:
    return None if dim is None else Linear(dim, dtype, use_bias=False, name="projection")(pooled)


def preprocess(
    images: UInt8[Array, "b h w 3"], *, size: int = 224
) -> Float[Array, "b {size} {size} 3"]:
    """(x - mean) / std of the central square; the shorter side is resized to `size` pixels."""
    return normalized_crop(images, shorter=size, size=size, mean=MEAN, std=STD)
