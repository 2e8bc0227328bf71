"""Latent codecs: images in [-1, 1] <-> latents of about unit variance.

`KLCodec` is a KL autoencoder; it takes the modes of its posteriors. `PatchCodec` is linear, the
principal components of small image patches:

    z_i = basis_i . (patch - mean) / scale_i        patch' = mean + sum_i scale_i z_i basis_i
    scale_i = g std_i^whiten,   g so that the latents' mean variance is 1

`whiten` chooses what is learned first under an equal loss on every channel: 0 keeps the components'
natural proportions (shape before texture), 1 gives every component the same variance.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from univg_jax.batch import Array
from univg_jax.errors import UserError
from univg_jax.models.vae import AutoencoderKL


class KLCodec(nn.Module):
    """`AutoencoderKL` as a codec.

    Latents are the posterior's mode, not a sample, so that an image always has the same latent.
    """

    vae: AutoencoderKL

    @property
    def latent_channels(self) -> int:
        return self.vae.latent_channels

    @property
    def downsampling(self) -> int:
        return self.vae.downsampling

    def encode(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        return self.vae.encode(images).mode

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        return self.vae.decode(latents)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """The images as the latents keep them."""
        return self.decode(self.encode(images))


class PatchCodec(nn.Module):
    """The linear codec; `fit_patch_codec` makes its parameters.

    `apply({'params': p}, images, method='encode')`, `apply({'params': p}, latents,
    method='decode')`. Raises UserError for images whose sides are not a multiple of `patch`.
    """

    patch: int = 4
    channels: int = 16
    dtype: Any = jnp.float32

    @property
    def latent_channels(self) -> int:
        return self.channels

    @property
    def downsampling(self) -> int:
        """Image pixels per latent cell, a side."""
        return self.patch

    def setup(self) -> None:
        size = 3 * self.patch**2
        self.mean = self.param("mean", nn.initializers.zeros, (size,))
        self.basis = self.param("basis", nn.initializers.orthogonal(), (size, self.channels))
        self.scale = self.param("scale", nn.initializers.ones, (self.channels,))

    def encode(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 c"]:
        """z of each patch, float32."""
        patches = to_patches(images, self.patch)
        b, h, w, _ = patches.shape
        centered = patches.reshape(b * h * w, -1) - self.mean[None]
        latents = centered.astype(self.dtype) @ (self.basis / self.scale[None]).astype(self.dtype)
        return latents.reshape(b, h, w, self.channels).astype(jnp.float32)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """The patches of each z, float32."""
        b, h, w, c = latents.shape
        f = self.patch
        rows = (self.basis * self.scale[None]).T.astype(self.dtype)
        patches = latents.reshape(-1, c).astype(self.dtype) @ rows
        patches = (patches.astype(jnp.float32) + self.mean[None]).reshape(b, h, w, f, f, 3)
        return patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * f, w * f, 3)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """The images as the latents keep them."""
        return self.decode(self.encode(images))


def to_patches(images: Float[Array, "b h w 3"], patch: int) -> Float[Array, "b h2 w2 p"]:
    """Non-overlapping patch x patch x 3 blocks, flattened in the order (row, column, color)."""
    b, h, w, _ = images.shape
    if h % patch or w % patch:
        raise UserError(
            f"image of {h} x {w} px: "
            f"both sides must be a multiple of the codec's patch of {patch} px"
        )
    blocks = images.reshape(b, h // patch, patch, w // patch, patch, 3)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, 3 * patch**2)


def fit_patch_codec(
    images: Iterable[UInt8[np.ndarray, "h w 3"]], *, patch: int, channels: int, whiten: float
) -> dict[str, Float[np.ndarray, "..."]]:
    """Parameters of `PatchCodec` by PCA in float64, from images that may come one by one.

    The result is deterministic: each component's largest entry is positive. Components without
    variance (flat artwork) get 1e-3 of the strongest one's std, so that whitening does not amplify
    their noise. Raises UserError for no images, too many channels or `whiten` outside [0, 1].
    """
    size = 3 * patch**2
    if not 1 <= channels <= size:
        raise UserError(
            f"codec.channels={channels}: a patch of {patch} px has 1 to {size} components"
        )
    if not 0 <= whiten <= 1:
        raise UserError(f"codec.whiten={whiten}: expected 0 to 1")
    count, total, outer = 0, np.zeros(size), np.zeros((size, size))
    for image in images:
        # not to_float: it is float32, and PCA is done in float64
        x = to_patches(image[None].astype(np.float64) / 127.5 - 1, patch).reshape(-1, size)
        count, total, outer = count + len(x), total + x.sum(0), outer + x.T @ x
    if not count:
        raise UserError("the latent codec needs images to be fitted on; got none")
    mean = total / count
    variances, basis = np.linalg.eigh(outer / count - np.outer(mean, mean))
    variances, basis = variances[::-1][:channels], basis[:, ::-1][:, :channels]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(channels)])
    std = np.sqrt(np.maximum(variances, 0))
    std = np.maximum(std, max(1e-3 * std[0], 1e-6))
    scale = std**whiten
    scale = scale * np.sqrt(np.mean((std / scale) ** 2))
    return {
        k: np.ascontiguousarray(v, np.float32)
        for k, v in dict(mean=mean, basis=basis, scale=scale).items()
    }
