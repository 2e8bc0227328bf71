"""DINO: a ViT trained by self-distillation.

Its class tokens are alike if two images show the same thing.

    x = norm(run_blocks([class, patches] + P)),   pooled = x at the class token

Caron et al. 2021 (arXiv 2104.14294, section 3), numerically transformers' `ViTModel` without its
pooler. The defaults are those of ViT-S/16.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, UInt8

from univg_jax.batch import Array, pytree_dataclass
from univg_jax.models.layers import LayerNorm
from univg_jax.models.vit import ImageTokens, normalized_crop, run_blocks

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@pytree_dataclass
class DINOOutput:
    """`pooled` is the class token's state."""

    last_hidden: Float[Array, "b n d"]  # class token, then patches by rows
    pooled: Float[Array, "b d"]


class DINO(nn.Module):
    """Images, as `preprocess` gives them, -> states of the patches and of the whole image.

    `apply({'params': p}, pixels)`. Positions are interpolated for other sizes than `image_size`.
    Raises UserError for sides that are not a multiple of `patch_size`.
    """

    image_size: int = 224
    patch_size: int = 16
    hidden_dim: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_dim: int = 1536
    qkv_bias: bool = True
    activation: str = "gelu"  # a name of vit.ACTIVATIONS
    eps: float = 1e-12
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> DINOOutput:
        x = ImageTokens(
            hidden_dim=self.hidden_dim,
            image_size=self.image_size,
            patch_size=self.patch_size,
            dtype=self.dtype,
            name="embed",
        )(pixels)
        last = run_blocks(
            x,
            depth=self.depth,
            remat=self.remat,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            eps=self.eps,
            qkv_bias=self.qkv_bias,
            dtype=self.dtype,
        ).last
        last = LayerNorm(self.eps, name="norm")(last)
        return DINOOutput(last_hidden=last, pooled=last[:, 0])


def preprocess(
    images: UInt8[Array, "b h w 3"], *, size: int = 224, shorter: int | None = None
) -> Float[Array, "b {size} {size} 3"]:
    """(x - mean) / std of the central square; the shorter side is first resized to `shorter`.

    `shorter` is 8/7 of `size` by default: 256 for 224, as in the evaluation code of the paper.
    """
    return normalized_crop(images, shorter=shorter or size * 8 // 7, size=size, mean=MEAN, std=STD)
