"""Weights in 8 bits: a kernel W [in, out] as whole numbers q and a scale for each output.

    s[o] = max_i |W[i, o]| / 127,    q[i, o] = round(W[i, o] / s[o]),    W ~ q s

Only kernels are quantized. They are most of the bytes, and a product takes the scale out of its
sum. Stacked kernels [layers, in, out] have a scale for each layer and output.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jaxtyping import Array, Float, Int8

from univg_jax.streaming import Block, Box, Tensor

SCALE = "_scale"  # the end of the name of a kernel's scales
LEVELS = 127


def is_quantized(name: str) -> bool:
    """Whether a parameter is one that `quantize` takes."""
    return name.endswith("/kernel")


def quantize(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A parameter as it is stored: a kernel as int8, and its scales; another one as it is.

    The tensor is read twice.
    """
    if not is_quantized(name):
        return {name: tensor}
    largest = np.zeros(_scale_box_shape(tensor.shape), np.float32)
    for box, block in tensor.blocks():
        at = _scale_box(box)
        np.maximum(largest[at], np.abs(block).max(axis=-2, keepdims=True), out=largest[at])
    scale = np.maximum(largest / LEVELS, np.finfo(np.float32).tiny)  # zeros need a scale, too

    def blocks() -> Iterator[Block]:
        for box, block in tensor.blocks():
            yield box, np.rint(block / scale[_scale_box(box)]).astype(np.int8)

    stored = Tensor(shape=tensor.shape, dtype=np.dtype(np.int8), blocks=blocks)
    return {name: stored, name + SCALE: Tensor.of(scale)}


def restore(name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """A parameter as it was, of what `quantize` or another cast made of it; kernels in float32."""
    tensor = stored[name]
    if name + SCALE not in stored:
        return tensor
    scale = stored[name + SCALE].read()
    return dataclasses.replace(
        tensor,
        dtype=np.dtype(np.float32),
        blocks=lambda: (
            (box, block.astype(np.float32) * scale[_scale_box(box)])
            for box, block in tensor.blocks()
        ),
    )


def dequantize_array(
    stored: Int8[Array, "... i o"], scale: Float[Array, "... 1 o"], *, like: jax.ShapeDtypeStruct
) -> Float[Array, "... i o"]:
    """A stored kernel with the dtype and the sharding of `like`."""
    product = jax.jit(lambda q, s: (q * s).astype(like.dtype), out_shardings=like.sharding)
    return product(stored, scale)


def _scale_box(box: Box) -> Box:
    """Where the scales lie of what is in a box."""
    return (*box[:-2], slice(0, 1), box[-1])


def _scale_box_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], 1, shape[-1])
