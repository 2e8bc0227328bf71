"""LPIPS 0.1: how different two images look, by the features of a network for classes.

    d(a, b) = sum over layers l of mean over pixels of w_l . (n(f_l(a)) - n(f_l(b)))^2
    n(x) = x / (|x| + 1e-10) over channels

Inference only. The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv
1801.03924): f_l are outputs of AlexNet or VGG-16 after a relu, w_l are learned and not negative.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float

from univg_jax.batch import Array

# Of ImageNet's images in [-1, 1].
MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)


@dataclasses.dataclass(frozen=True)
class Layer:
    """Convolutions, each with a relu, after a maximum pool of stride 2. LPIPS compares the last."""

    convs: tuple[tuple[int, int, int, int], ...]  # channels, kernel, stride, padding
    pool: int = 0  # pixels a side; 0 is none


BACKBONES = {
    "alex": (
        Layer(((64, 11, 4, 2),)),
        Layer(((192, 5, 1, 2),), pool=3),
        Layer(((384, 3, 1, 1),), pool=3),
        Layer(((256, 3, 1, 1),)),
        Layer(((256, 3, 1, 1),)),
    ),
    "vgg": (
        Layer(((64, 3, 1, 1),) * 2),
        Layer(((128, 3, 1, 1),) * 2, pool=2),
        Layer(((256, 3, 1, 1),) * 3, pool=2),
        Layer(((512, 3, 1, 1),) * 3, pool=2),
        Layer(((512, 3, 1, 1),) * 3, pool=2),
    ),
}
SMALLEST = {"alex": 31, "vgg": 16}  # pixels of a side that leave the last layer one


class LPIPS(nn.Module):
    """Pairs of images in [-1, 1] -> their distances: `apply({'params': p}, a, b)`.

    `network` is a name in BACKBONES. Images have at least SMALLEST pixels a side.
    """

    network: str = "alex"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]
    ) -> Float[Array, " b"]:
        mean, std = (jnp.array(values)[None, None, None] for values in (MEAN, STD))
        x = ((jnp.concatenate([a, b]) - mean) / std).astype(self.dtype)
        number, distance = 0, jnp.zeros(len(a))
        for k, layer in enumerate(BACKBONES[self.network]):
            if layer.pool:
                x = nn.max_pool(x, (layer.pool, layer.pool), (2, 2))
            for channels, kernel, stride, padding in layer.convs:
                size = (kernel, kernel)
                conv = nn.Conv(
                    channels, size, stride, padding, dtype=self.dtype, name=f"conv{number}"
                )
                x, number = nn.relu(conv(x)), number + 1
            weights = self.param(f"weights{k}", nn.initializers.ones, (x.shape[-1],))
            features = x.astype(jnp.float32)
            norms = jnp.sqrt(jnp.square(features).sum(-1, keepdims=True))
            first, second = jnp.split(features / (norms + 1e-10), 2)
            squares = jnp.square(first - second).mean((1, 2))
            distance += (squares * weights[None]).sum(-1)
        return distance
