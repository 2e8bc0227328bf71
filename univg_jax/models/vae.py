"""The KL autoencoder of latent diffusion: images to latents of 1/2^k the size and back.

    encode:          image -> levels of residual blocks -> mid -> (mean, logvar)
    decode:          latent -> mid -> the same levels in reverse order -> image
    mid:             residual block, self-attention over all positions, residual block
    residual block:  x + conv(silu(norm(conv(silu(norm(x))))))

Each level but the last halves the size (in the decoder: doubles it).

Latent Diffusion (arXiv 2112.10752, appendix G); numerically diffusers' `AutoencoderKL`, with the
channels and the shift of Stable Diffusion 1 to 3 and Flux.

The KL term keeps latents near, not at, unit variance. What leaves `encode` and enters `decode` is
normalized,

    z = (raw - shift_factor) * scaling_factor

so that a diffusion model sees about unit variance; `encode_raw` and `decode_raw` work in the
network's own scale.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, Int32

from univg_jax.batch import Array, pytree_dataclass
from univg_jax.errors import UserError
from univg_jax.models.attention import xla_attention
from univg_jax.models.layers import Linear


@pytree_dataclass
class Moments:
    """A diagonal Gaussian over latents, float32."""

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]

    @property
    def mode(self) -> Float[Array, "b h w c"]:
        """The most likely latents."""
        return self.mean

    def sample(self, noise: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """mean + exp(logvar / 2) noise. The caller makes the noise, keyed by sample id."""
        return self.mean + jnp.exp(self.logvar / 2) * noise


class Norm(nn.Module):
    """GroupNorm: over positions and the channels of a group, always in float32."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        y = x.astype(jnp.float32).reshape(b, h, w, self.groups, -1)
        y = y - jnp.mean(y, axis=(1, 2, 4), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=(1, 2, 4), keepdims=True) + 1e-6)
        y = y.reshape(b, h, w, c) * scale[None, None, None] + bias[None, None, None]
        return y.astype(x.dtype)


class ResBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))).

    If the width changes, x goes through a 1x1 convolution.
    """

    features: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        def conv(size: int, name: str) -> nn.Conv:
            return nn.Conv(self.features, (size, size), dtype=self.dtype, name=name)

        y = conv(3, "conv1")(nn.silu(Norm(self.groups, name="norm1")(x)))
        y = conv(3, "conv2")(nn.silu(Norm(self.groups, name="norm2")(y)))
        return (x if x.shape[-1] == self.features else conv(1, "conv_shortcut")(x)) + y


class Attention(nn.Module):
    """x + W softmax(q k^T / sqrt(c)) v over all positions, one head."""

    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = Norm(self.groups, name="norm")(x).reshape(b, h * w, c)
        q, k, v = (Linear(c, self.dtype, name=name)(y)[:, :, None] for name in "qkv")
        y = xla_attention(q, k, v, None).reshape(b, h * w, c)
        return x + Linear(c, self.dtype, name="attn_out")(y).reshape(x.shape)


class Stack(nn.Module):
    """What encoder and decoder share: fields, residual blocks, the middle and the output."""

    widths: tuple[int, ...]  # of the levels, in the order of the encoder
    depth: int  # residual blocks a level
    features: int  # of the output
    groups: int
    attention: bool
    dtype: Any
    remat: bool

    def conv(self, features: int, name: str, **options: Any) -> nn.Conv:
        """A 3x3 convolution."""
        return nn.Conv(features, (3, 3), dtype=self.dtype, name=name, **options)

    def res(self, x: Float[Array, "b h w c"], features: int, name: str) -> Float[Array, "b h w d"]:
        """x after a residual block."""
        block = nn.remat(ResBlock) if self.remat else ResBlock
        return block(features, self.groups, self.dtype, name=name)(x)

    def mid(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """x after the middle, at the lowest resolution."""
        x = self.res(x, x.shape[-1], "mid_res_0")
        if self.attention:
            attention = nn.remat(Attention) if self.remat else Attention
            x = attention(self.groups, self.dtype, name="mid_attn")(x)
        return self.res(x, x.shape[-1], "mid_res_1")

    def out(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """The map to `features` channels that ends either network."""
        return self.conv(self.features, "conv_out")(nn.silu(Norm(self.groups, name="norm_out")(x)))


class Encoder(Stack):
    """Images to twice the latent channels."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = self.conv(self.widths[0], "conv_in")(x)
        for i, width in enumerate(self.widths):
            for j in range(self.depth):
                x = self.res(x, width, f"down_{i}_res_{j}")
            if i < len(self.widths) - 1:
                # Padding below and on the right only, because the weights were trained so.
                x = self.conv(width, f"down_{i}_conv", strides=2, padding=((0, 1), (0, 1)))(x)
        return self.out(self.mid(x))


class Decoder(Stack):
    """Latents to images."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        x = self.mid(self.conv(self.widths[-1], "conv_in")(x))
        for i, width in enumerate(reversed(self.widths)):
            for j in range(self.depth):
                x = self.res(x, width, f"up_{i}_res_{j}")
            if i < len(self.widths) - 1:
                x = self.conv(width, f"up_{i}_conv")(x.repeat(2, axis=1).repeat(2, axis=2))
        return self.out(x)


class AutoencoderKL(nn.Module):
    """Images in [-1, 1] to normalized latents and back; the defaults are those of SD3.

    `apply({'params': p}, images, method='encode')`, `apply({'params': p}, latents,
    method='decode')`. With `tile_size`, larger images (and latents) are processed in overlapping
    tiles and blended linearly, so that memory is bounded by one tile's. Norms and attention then
    see a tile instead of the image, so results differ slightly from the untiled ones. Raises
    UserError for fields that do not fit together, and for images whose sides are not a multiple of
    `downsampling`.
    """

    latent_channels: int = 16
    # channels of each level; a level halves the size of the one before
    widths: tuple[int, ...] = (128, 256, 512, 512)
    depth: int = 2  # residual blocks a level; the decoder has one more
    groups: int = 32  # of the norms
    quant_conv: bool = False  # whether a 1x1 convolution follows the encoder
    post_quant_conv: bool = False  # whether a 1x1 convolution precedes the decoder
    mid_attention: bool = True
    scaling_factor: float = 1.5305
    shift_factor: float = 0.0609
    tile_size: int | None = None  # image pixels a side; None: never tile
    tile_overlap: int = 64  # image pixels that neighboring tiles share, at least
    dtype: Any = jnp.float32  # of the computation; parameters are float32
    remat: bool = False  # recomputes each residual block in a backward pass

    def __post_init__(self) -> None:
        super().__post_init__()
        if bad := [width for width in self.widths if width % self.groups]:
            raise UserError(f"widths {bad} do not divide into {self.groups} groups")
        if self.tile_size is None:
            return
        if self.tile_size % self.downsampling or self.tile_overlap % self.downsampling:
            raise UserError(
                f"tile_size {self.tile_size} and tile_overlap {self.tile_overlap} must be "
                f"multiples of the downsampling {self.downsampling}"
            )
        if not 0 < self.tile_overlap < self.tile_size:
            raise UserError(
                f"tile_overlap {self.tile_overlap} is not between 0 and tile_size {self.tile_size}"
            )

    @property
    def downsampling(self) -> int:
        """Image pixels per latent cell, a side."""
        return 2 ** (len(self.widths) - 1)

    def setup(self) -> None:
        fields = dict(
            widths=self.widths,
            groups=self.groups,
            attention=self.mid_attention,
            dtype=self.dtype,
            remat=self.remat,
        )
        self.encoder = Encoder(depth=self.depth, features=2 * self.latent_channels, **fields)
        self.decoder = Decoder(depth=self.depth + 1, features=3, **fields)
        if self.quant_conv:
            self.quant = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        if self.post_quant_conv:
            self.post_quant = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, images: Float[Array, "b h w 3"]) -> Moments:
        """The distribution of the normalized latents."""
        raw = self.encode_raw(images)
        return Moments(
            mean=self.normalize(raw.mean), logvar=raw.logvar + 2 * math.log(self.scaling_factor)
        )

    def decode(
        self, latents: Float[Array, "b h w {self.latent_channels}"]
    ) -> Float[Array, "b h2 w2 3"]:
        """Images of normalized latents, not clipped."""
        return self.decode_raw(self.denormalize(latents))

    @nn.nowrap
    def normalize(self, latents: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """(raw - shift_factor) * scaling_factor."""
        return (latents - self.shift_factor) * self.scaling_factor

    @nn.nowrap
    def denormalize(self, latents: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        """The inverse of `normalize`."""
        return latents / self.scaling_factor + self.shift_factor

    def encode_raw(self, images: Float[Array, "b h w 3"]) -> Moments:
        """As `encode`, in the network's scale; log variances are clipped to [-30, 20]."""
        _, h, w, _ = images.shape
        if h % self.downsampling or w % self.downsampling:
            raise UserError(
                f"images of {h}x{w} are not divisible into latent cells of "
                f"{self.downsampling} pixels"
            )
        moments = self._tiled("_encode_tile", images, cell_in=self.downsampling, cell_out=1)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return Moments(mean=mean, logvar=jnp.clip(logvar, -30, 20))

    def decode_raw(
        self, latents: Float[Array, "b h w {self.latent_channels}"]
    ) -> Float[Array, "b h2 w2 3"]:
        """As `decode`, of latents in the network's scale."""
        return self._tiled("_decode_tile", latents, cell_in=1, cell_out=self.downsampling)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """decode(encode(images).mode)."""
        return self.decode(self.encode(images).mode)

    def _encode_tile(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        x = self.encoder(images.astype(self.dtype))
        return (self.quant(x) if self.quant_conv else x).astype(jnp.float32)

    def _decode_tile(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        x = latents.astype(self.dtype)
        return self.decoder(self.post_quant(x) if self.post_quant_conv else x).astype(jnp.float32)

    def _tiled(
        self, method: str, x: Float[Array, "b h w c"], *, cell_in: int, cell_out: int
    ) -> Float[Array, "b h2 w2 d"]:
        if self.tile_size is None or self.is_initializing():
            return getattr(self, method)(x)
        # A bound module cannot be called inside lax.scan, which `map_tiles` uses.
        module, variables = self.unbind()
        return map_tiles(
            lambda tile: module.apply(variables, tile, method=method),
            x,
            tile=self.tile_size // self.downsampling,
            overlap=self.tile_overlap // self.downsampling,
            cell_in=cell_in,
            cell_out=cell_out,
        )


def map_tiles(
    f: Callable[[Array], Array],
    x: Float[Array, "b h w c"],
    *,
    tile: int,
    overlap: int,
    cell_in: int,
    cell_out: int,
) -> Float[Array, "b h2 w2 d"]:
    """`f` over overlapping square tiles of x, one at a time, blended linearly where they overlap.

    If one tile contains x, the result is f(x). `f` maps cells of `cell_in` pixels a side to cells
    of `cell_out`; `tile` and `overlap` count cells. Tiles have equal sizes, are spread evenly, and
    share at least `overlap` cells with their neighbors. Let w_i(p) be the distance of pixel p to
    the edge of tile i along rows, times the same along columns. Then

        out(p) = sum_i w_i(p) f_i(p) / sum_i w_i(p)
    """
    cells = [size // cell_in for size in x.shape[1:3]]
    sizes = [min(tile, n) for n in cells]
    if sizes == cells:
        return f(x)
    starts = [_starts(n, tile, overlap) for n in cells]
    rows, columns = (
        _blend_weights(s, size * cell_out, n * cell_out, cell_out)
        for s, size, n in zip(starts, sizes, cells)
    )

    tile_shape = (len(x), *(size * cell_in for size in sizes), x.shape[-1])

    def add_tile(out: Array, place: tuple[Array, ...]) -> tuple[Array, None]:
        row, column, w_row, w_column = place
        y = f(jax.lax.dynamic_slice(x, (0, row * cell_in, column * cell_in, 0), tile_shape))
        y = y * w_row[None, :, None, None] * w_column[None, None, :, None]
        corner = (0, row * cell_out, column * cell_out, 0)
        y = y + jax.lax.dynamic_slice(out, corner, y.shape)
        return jax.lax.dynamic_update_slice(out, y, corner), None

    i, j = np.indices([len(s) for s in starts]).reshape(2, -1)
    y = jax.eval_shape(f, jax.ShapeDtypeStruct(tile_shape, x.dtype))
    out = jnp.zeros((len(x), *(n * cell_out for n in cells), y.shape[-1]), y.dtype)
    out, _ = jax.lax.scan(add_tile, out, (starts[0][i], starts[1][j], rows[i], columns[j]))
    return out


def _starts(cells: int, tile: int, overlap: int) -> Int32[np.ndarray, " t"]:
    """The first cell of each tile along one axis."""
    count = max(math.ceil((cells - overlap) / (tile - overlap)), 1)
    return np.linspace(0, max(cells - tile, 0), count).round().astype(np.int32)


def _blend_weights(
    starts: Int32[np.ndarray, " t"], size: int, total: int, cell: int
) -> Float[np.ndarray, "t p"]:
    """Each tile's weights along one axis; over all tiles they sum to 1 at every pixel."""
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    sums = np.zeros(total)
    for start in starts * cell:
        sums[start : start + size] += distance
    weights = [distance / sums[start : start + size] for start in starts * cell]
    return np.stack(weights).astype(np.float32)
