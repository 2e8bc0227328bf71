"""DINO as a scorer: the class token of a picture, whose cosines benchmarks of edits compare."""

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from univg_jax.evaluation.scorers.network import (
    PictureNetwork,
    digest_of,
    vit_size,
    weights_of,
)
from univg_jax.interop.transformers import load_dino
from univg_jax.models.dino import MEAN, STD
from univg_jax.pretrained import local_path


def pixels(
    image: UInt8[np.ndarray, "h w 3"], *, size: int
) -> Float32[np.ndarray, "{size} {size} 3"]:
    """The shorter side at 8/7 of `size` by Pillow's bicubic filter, and the central square of it.

    It is torchvision's square: half a pixel is rounded to an even number.
    """
    shorter, sides = size * 8 // 7, image.shape[:2]
    h, w = (shorter * side // min(sides) for side in sides)
    resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    top, left = round((h - size) / 2), round((w - size) / 2)
    square = resized[top : top + size, left : left + size].astype(np.float32) / 255
    return (square - np.float32(MEAN)) / np.float32(STD)


def open_dino(folder: str) -> PictureNetwork:
    """The `ViTModel` of a folder of Hugging Face, in float32. Raises what `load_dino` raises."""
    module, params = load_dino(folder)
    size = vit_size(width=module.hidden_dim, depth=module.depth)
    return PictureNetwork(
        lambda p, x: module.apply({"params": p}, x).pooled,
        params,
        lambda image: pixels(image, size=module.image_size),
        digest=digest_of(weights_of(local_path(folder))),
        backbone=f"dino_vit{size.lower()}{module.patch_size}",
    )
