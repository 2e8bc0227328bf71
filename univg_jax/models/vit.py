"""The vision transformer, ViT: pre-norm blocks, and the way from images to tokens.

    tokens = [class token, W_p patches] + P
    y = x + W_o attention(norm(x)),   x' = y + W_2 act(W_1 norm(y))

Dosovitskiy et al. (arXiv 2010.11929, section 3.1). CLIP's image tower and DINO are such networks;
CLIP's text tower has the same blocks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Bool, Float, UInt8

from univg_jax.batch import Array, pytree_dataclass
from univg_jax.errors import UserError, check_name
from univg_jax.models.attention import xla_attention
from univg_jax.models.layers import MLP, LayerNorm, Linear, gelu, quick_gelu

ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


class PreNormBlock(nn.Module):
    """One block. With `causal`, tokens attend only to themselves and to those before them."""

    num_heads: int
    mlp_dim: int
    activation: str
    eps: float
    causal: bool = False
    qkv_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None
    ) -> tuple[Float[Array, "b n d"], None]:
        d = x.shape[-1]
        h = LayerNorm(self.eps, name="attn_norm")(x)
        q, k, v = (
            Linear(d, self.dtype, use_bias=self.qkv_bias, name=name)(h).reshape(
                *x.shape[:2], self.num_heads, -1
            )
            for name in "qkv"
        )
        attended = xla_attention(q, k, v, mask, causal=self.causal).reshape(x.shape)
        x = x + Linear(d, self.dtype, name="attn_out")(attended)
        h = LayerNorm(self.eps, name="mlp_norm")(x)
        mlp = MLP(self.mlp_dim, d, ACTIVATIONS[self.activation], self.dtype, name="mlp")
        return x + mlp(h), None


@pytree_dataclass
class HiddenStates:
    """The residual stream after the last block, and before it."""

    last: Float[Array, "b n d"]
    penultimate: Float[Array, "b n d"]


def run_blocks(
    x: Float[Array, "b n d"],
    mask: Bool[Array, "b n"] | None = None,
    *,
    depth: int,
    remat: bool,
    **block: Any,
) -> HiddenStates:
    """`depth` blocks with the fields `block`; keys whose mask is False are not attended to.

    For use inside a module's compact method: that module gets the parameters `blocks`, all blocks
    but the last, stacked along a leading axis, and `last_block`. Raises UserError for an unknown
    activation, or a width that does not divide into the heads.
    """
    check_name(block["activation"], ACTIVATIONS, what="activation")
    if x.shape[-1] % block["num_heads"]:
        raise UserError(
            f"hidden_dim {x.shape[-1]} is not a multiple of num_heads {block['num_heads']}"
        )
    cls = nn.remat(PreNormBlock, prevent_cse=False) if remat else PreNormBlock
    if depth > 1:
        stack = nn.scan(
            cls,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=depth - 1,
        )
        x, _ = stack(**block, name="blocks")(x, mask)
    last, _ = cls(**block, name="last_block")(x, mask)
    return HiddenStates(last=last, penultimate=x)


class ImageTokens(nn.Module):
    """Images -> tokens: a class token, then a linear map of each patch, plus learned positions.

    The positions belong to squares of `image_size` pixels and are interpolated for other sizes.
    Raises UserError for a side that is not a multiple of `patch_size`.
    """

    hidden_dim: int
    image_size: int
    patch_size: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        (b, height, width, _), d, p = pixels.shape, self.hidden_dim, self.patch_size
        if height % p or width % p:
            raise UserError(
                f"image of {height} x {width} px: "
                f"both sides must be a multiple of the patch of {p} px"
            )
        h, w, side = height // p, width // p, self.image_size // p
        small = nn.initializers.normal(0.02)
        class_token = self.param("class_token", small, (d,)).astype(jnp.float32)
        positions = self.param("positions", small, (1 + side**2, d)).astype(jnp.float32)
        patches = pixels.reshape(b, h, p, w, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * w, -1)
        x = Linear(d, self.dtype, use_bias=self.use_bias, name="patch_embed")(patches)
        first = jnp.broadcast_to((class_token + positions[0])[None, None], (b, 1, d))
        grid = resize_positions(positions[1:].reshape(side, side, d), height=h, width=w)
        x = x + grid.reshape(1, h * w, d).astype(self.dtype)
        return jnp.concatenate([first.astype(self.dtype), x], axis=1)


def resize_positions(
    table: Float[Array, "s s2 d"], *, height: int, width: int
) -> Float[Array, "{height} {width} d"]:
    """The table, interpolated at the centers of a `height x width` grid over the same square.

    Bicubic as in PyTorch without antialiasing: the kernel of Keys (1981, equation 4) with
    a = -3/4, clamped at the border.
    """
    if table.shape[:2] == (height, width):
        return table

    def weights(old: int, new: int) -> Float[np.ndarray, "{new} {old}"]:
        # Interpolation is linear in the table: row i has the weights of the old values at the
        # i-th new position, four of them not zero. (jax.image.resize has another kernel, a = -1/2.)
        at = (np.arange(new) + 0.5) * old / new - 0.5
        matrix = np.zeros((new, old), np.float32)
        for offset in (-1, 0, 1, 2):
            source = np.floor(at) + offset
            x, a = np.abs(at - source), -0.75
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            index = np.clip(source, 0, old - 1).astype(int)
            np.add.at(matrix, (np.arange(new), index), np.where(x <= 1, near, far))
        return matrix

    rows, columns = weights(table.shape[0], height), weights(table.shape[1], width)
    return jnp.einsum("hi,wj,ijd->hwd", rows, columns, table, precision=jax.lax.Precision.HIGHEST)


def normalized_crop(
    images: UInt8[Array, "b h w 3"],
    *,
    shorter: int,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "b {size} {size} 3"]:
    """(x - mean) / std of the central square of images x in [0, 1].

    The shorter side is first resized to `shorter` pixels (bicubic, antialiased); then a square of
    `size` pixels is cut out. Raises ValueError if `size` is larger than `shorter`.
    """
    if size > shorter:
        raise ValueError(f"a crop of {size} px does not fit into images of {shorter} px")
    b, *sides, _ = images.shape
    h, w = (shorter * side // min(sides) for side in sides)
    x = images.astype(jnp.float32)
    # The networks were trained on images that Pillow resized: first along rows, then along
    # columns, rounding to 8 bits each time. So this does the same.
    for shape in ((b, x.shape[1], w, 3), (b, h, w, 3)):
        x = jnp.clip(jnp.round(jax.image.resize(x, shape, "cubic")), 0, 255)
    top, left = (h - size) // 2, (w - size) // 2
    x = x[:, top : top + size, left : left + size]
    return (x / 255 - jnp.asarray(mean)[None, None, None]) / jnp.asarray(std)[None, None, None]
