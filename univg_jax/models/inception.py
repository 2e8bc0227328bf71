"""Inception-v3 for FID: 2048 features of an image, numerically the TensorFlow graph of 2015-12-05.

    y = relu((W * x - mean) / sqrt(var + 0.001) * scale + bias)       for every convolution

Inference only. Rethinking the Inception Architecture (arXiv 1512.00567), features of the last
average pool; FID (arXiv 1706.08500). That graph differs from the paper's and torchvision's network:
average pools do not count the padding, the last block pools by maximum, there are 1008 classes, and
images are resized without half-pixel centers. Modules have the graph's names.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float, UInt8

from univg_jax.batch import Array
from univg_jax.models.layers import Linear

SIZE = 299  # pixels a side that FID is defined on
NUM_FEATURES = 2048
NUM_CLASSES = 1008


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + 0.001) * scale + bias with stored moments, in float32."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        mean, var, scale, bias = (
            self.param(name, init, (x.shape[-1],))[None, None, None]
            for name, init in (("mean", zeros), ("var", ones), ("scale", ones), ("bias", zeros))
        )
        y = (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + 1e-3) * scale) + bias
        return y.astype(x.dtype)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, relu."""

    features: int
    size: tuple[int, int]
    dtype: Any
    strides: int
    padding: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        conv = nn.Conv(
            self.features, self.size, self.strides, self.padding,
            use_bias=False, dtype=self.dtype, name="conv",
        )  # fmt: skip
        return nn.relu(BatchNorm(name="bn")(conv(x)))


class Net(nn.Module):
    """A module with a shorthand for its named convolutions, in the compute dtype."""

    dtype: Any = jnp.float32

    def conv(
        self,
        x: Float[Array, "b h w c"],
        name: str,
        features: int,
        height: int = 1,
        width: int = 1,
        *,
        strides: int = 1,
        pad: bool = True,
    ) -> Float[Array, "b h2 w2 d"]:
        """x after a `ConvNorm` of that name; `pad` keeps the size, if there are no strides."""
        padding = "SAME" if pad and strides == 1 else "VALID"
        return ConvNorm(features, (height, width), self.dtype, strides, padding, name=name)(x)


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """The mean of each 3x3 neighborhood; at the edges, of those pixels that exist."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """3x3 maximum pooling with stride 2."""
    return nn.max_pool(x, (3, 3), (2, 2))


class BlockA(Net):
    """At 35x35; branches: 1x1, 5x5, two 3x3, pool."""

    pool_features: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        a = self.conv(x, "branch1x1", 64)
        b = self.conv(x, "branch5x5_1", 48)
        b = self.conv(b, "branch5x5_2", 64, 5, 5)
        c = self.conv(x, "branch3x3dbl_1", 64)
        c = self.conv(c, "branch3x3dbl_2", 96, 3, 3)
        c = self.conv(c, "branch3x3dbl_3", 96, 3, 3)
        d = self.conv(average_pool(x), "branch_pool", self.pool_features)
        return jnp.concatenate([a, b, c, d], axis=-1)


class BlockB(Net):
    """From 35x35 to 17x17; branches: 3x3, two 3x3, pool."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        a = self.conv(x, "branch3x3", 384, 3, 3, strides=2)
        b = self.conv(x, "branch3x3dbl_1", 64)
        b = self.conv(b, "branch3x3dbl_2", 96, 3, 3)
        b = self.conv(b, "branch3x3dbl_3", 96, 3, 3, strides=2)
        return jnp.concatenate([a, b, halve(x)], axis=-1)


class BlockC(Net):
    """At 17x17; branches: 1x1, one 7x7 as 1x7 and 7x1, two such 7x7, pool."""

    inner: int = 128

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        a = self.conv(x, "branch1x1", 192)
        b = self.conv(x, "branch7x7_1", self.inner)
        b = self.conv(b, "branch7x7_2", self.inner, 1, 7)
        b = self.conv(b, "branch7x7_3", 192, 7, 1)
        c = self.conv(x, "branch7x7dbl_1", self.inner)
        c = self.conv(c, "branch7x7dbl_2", self.inner, 7, 1)
        c = self.conv(c, "branch7x7dbl_3", self.inner, 1, 7)
        c = self.conv(c, "branch7x7dbl_4", self.inner, 7, 1)
        c = self.conv(c, "branch7x7dbl_5", 192, 1, 7)
        d = self.conv(average_pool(x), "branch_pool", 192)
        return jnp.concatenate([a, b, c, d], axis=-1)


class BlockD(Net):
    """From 17x17 to 8x8; branches: 3x3, 7x7 and 3x3, pool."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        a = self.conv(x, "branch3x3_1", 192)
        a = self.conv(a, "branch3x3_2", 320, 3, 3, strides=2)
        b = self.conv(x, "branch7x7x3_1", 192)
        b = self.conv(b, "branch7x7x3_2", 192, 1, 7)
        b = self.conv(b, "branch7x7x3_3", 192, 7, 1)
        b = self.conv(b, "branch7x7x3_4", 192, 3, 3, strides=2)
        return jnp.concatenate([a, b, halve(x)], axis=-1)


class BlockE(Net):
    """At 8x8; branches: 1x1, 1x3 beside 3x1, the same after a 3x3, pool."""

    last: bool = False  # whether it is the last block, which pools by maximum

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w 2048"]:
        a = self.conv(x, "branch1x1", 320)
        b = self.conv(x, "branch3x3_1", 384)
        b = [self.conv(b, "branch3x3_2a", 384, 1, 3), self.conv(b, "branch3x3_2b", 384, 3, 1)]
        c = self.conv(x, "branch3x3dbl_1", 448)
        c = self.conv(c, "branch3x3dbl_2", 384, 3, 3)
        c = [self.conv(c, "branch3x3dbl_3a", 384, 1, 3), self.conv(c, "branch3x3dbl_3b", 384, 3, 1)]
        pooled = nn.max_pool(x, (3, 3), padding="SAME") if self.last else average_pool(x)
        return jnp.concatenate([a, *b, *c, self.conv(pooled, "branch_pool", 192)], axis=-1)


class InceptionV3(Net):
    """Preprocessed images -> FID's features: `apply({'params': p}, preprocess(images))`.

    `apply({'params': p}, features, method='logits')` are the classifier's. Images of another size
    than 299x299 have features too, but FID is not defined on them. Raises ValueError for images
    below 75x75.
    """

    remat: bool = False  # recomputes each block in a backward pass

    def setup(self) -> None:
        self.fc = Linear(NUM_CLASSES, self.dtype)

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b 2048"]:
        if min(x.shape[1:3]) < 75:
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]}: Inception-v3 needs 75x75 or more "
                "(preprocess)"
            )
        x = self.conv(x.astype(self.dtype), "Conv2d_1a_3x3", 32, 3, 3, strides=2)
        x = self.conv(x, "Conv2d_2a_3x3", 32, 3, 3, pad=False)
        x = halve(self.conv(x, "Conv2d_2b_3x3", 64, 3, 3))
        x = self.conv(x, "Conv2d_3b_1x1", 80)
        x = halve(self.conv(x, "Conv2d_4a_3x3", 192, 3, 3, pad=False))
        a, b, c, d, e = (
            nn.remat(block) if self.remat else block
            for block in (BlockA, BlockB, BlockC, BlockD, BlockE)
        )
        for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = a(self.dtype, pool_features, name=name)(x)
        x = b(self.dtype, name="Mixed_6a")(x)
        for name, inner in (
            ("Mixed_6b", 128),
            ("Mixed_6c", 160),
            ("Mixed_6d", 160),
            ("Mixed_6e", 192),
        ):
            x = c(self.dtype, inner, name=name)(x)
        x = d(self.dtype, name="Mixed_7a")(x)
        x = e(self.dtype, name="Mixed_7b")(x)
        x = e(self.dtype, last=True, name="Mixed_7c")(x)
        features = x.astype(jnp.float32).mean((1, 2))
        if self.is_initializing():
            self.logits(features)  # so that `init` makes its parameters
        return features

    def logits(self, features: Float[Array, "b 2048"]) -> Float[Array, "b 1008"]:
        """The logits of the 1008 classes, with bias (the Inception Score takes them without)."""
        return self.fc(features).astype(jnp.float32)


def preprocess(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b 299 299 3"]:
    """(resized - 128) / 128 at 299x299.

    Bilinear as in TensorFlow 1, without antialiasing and half-pixel centers: output pixel i is at
    p = i * size / 299 and has the value (1 - f) x[floor p] + f x[floor p + 1] with f = p - floor p;
    the last pixel is repeated.
    """
    x = jnp.asarray(images).astype(jnp.float32)
    for axis in (2, 1):
        low, high, fraction = _neighbors(x.shape[axis])
        fraction = jnp.expand_dims(fraction, [a for a in range(4) if a != axis])
        start = jnp.take(x, low, axis=axis)
        x = start + (jnp.take(x, high, axis=axis) - start) * fraction
    return (x - 128) / 128


def _neighbors(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each output pixel the two input pixels around it, and its distance to the first."""
    # in float32, because the graph computes it so
    place = np.arange(SIZE, dtype=np.float32) * np.float32(size / SIZE)
    low = place.astype(np.int32)
    return low, np.minimum(low + 1, size - 1), place - low.astype(np.float32)
