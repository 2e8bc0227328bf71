"""CLIP from a folder of Hugging Face: unit vectors of pictures and texts, and GenEval's colors.

It runs on one device of each process, since each process scores only its own rows
(`scorers.local_mesh`). Pictures are made ready on the host, where any size costs the same.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from data_pipelines.tokenizer import load_tokenizer
from univg_jax.errors import UserError, check_name
from univg_jax.evaluation.benchmarks import geneval
from univg_jax.evaluation.detection import Detection
from univg_jax.evaluation.metrics import unit_vectors
from univg_jax.evaluation.scorers.network import digest_of, in_batches, vit_size, weights_of
from univg_jax.interop.transformers import load_clip_text, load_clip_vision
from univg_jax.models.clip import MEAN, STD
from univg_jax.pretrained import local_path

Pixels = Float32[np.ndarray, "{size} {size} 3"]


def openai_pixels(image: UInt8[np.ndarray, "h w 3"], *, size: int) -> Pixels:
    """OpenAI's and open_clip's: the shorter side by Pillow's bicubic filter, the central square.

    Where a side has an odd number of pixels too many, the square is that of torchvision, which
    rounds half of them to an even number; transformers rounds down.
    """
    sides = image.shape[:2]
    h, w = (size * side // min(sides) for side in sides)
    resized = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC))
    top, left = round((h - size) / 2), round((w - size) / 2)
    return _normalized(resized[top : top + size, left : left + size].astype(np.float32) / 255)


def hpsv2_pixels(image: UInt8[np.ndarray, "h w 3"], *, size: int, antialias: bool = True) -> Pixels:
    """HPSv2's: the longer side by a bicubic filter, black around it, and nothing rounded.

    The filter is that of torchvision's resize of tensors: antialiased since version 0.17, and
    before that PyTorch's bicubic interpolation.
    """
    x = image.astype(np.float32) / 255
    scale = size / max(x.shape[:2])
    h, w = (max(1, round(side * scale)) for side in x.shape[:2])
    if scale == 1:
        pass
    elif antialias:
        planes = (Image.fromarray(np.ascontiguousarray(x[..., c])) for c in range(3))
        resized = [plane.resize((w, h), Image.Resampling.BICUBIC) for plane in planes]
        x = np.stack([np.asarray(plane) for plane in resized], axis=-1)
    else:
        x = cv2.resize(x, (w, h), interpolation=cv2.INTER_CUBIC)
    canvas = np.zeros((size, size, 3), np.float32)
    top, left = (size - h) // 2, (size - w) // 2
    canvas[top : top + h, left : left + w] = x
    return _normalized(canvas)


def _normalized(x: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w 3"]:
    return (x - np.float32(MEAN)) / np.float32(STD)


# How a picture becomes the network's input.
PREPROCESSING: dict[str, Callable[..., Pixels]] = {
    "openai": openai_pixels,
    "hpsv2": hpsv2_pixels,
    "hpsv2_not_antialiased": functools.partial(hpsv2_pixels, antialias=False),
}


class Clip:
    """Both towers of a CLIP and its tokenizer, from one folder of Hugging Face.

    `preprocessing` is a name in PREPROCESSING, which a benchmark's setting may have to be, too
    (`score_files.check_settings`). Raises UserError for a folder without both towers
    and their projections, and NotFoundError for one without a tokenizer.
    """

    def __init__(self, folder: str, *, preprocessing: str = "openai", dtype: Any = jnp.float32):
        self._preprocessing = check_name(preprocessing, PREPROCESSING, what="preprocessing")
        self.opened_with = {"preprocessing": preprocessing}
        self._folder, self._dtype = local_path(folder), np.dtype(dtype).name
        self._vision, self._vision_params = load_clip_vision(self._folder, dtype=dtype)
        self._text, self._text_params = load_clip_text(self._folder, dtype=dtype)
        dims = self._vision.projection_dim, self._text.projection_dim
        if None in dims or len(set(dims)) > 1:
            raise UserError(
                f"{self._folder} has towers with projections to {dims[0]} and {dims[1]}: "
                "expected a whole CLIP, in which both have one to the same space"
            )
        self._tokenizer = load_tokenizer(str(self._folder))
        self._embed_pixels = jax.jit(lambda p, x: self._vision.apply({"params": p}, x).projected)
        self._embed_tokens = jax.jit(lambda p, x: self._text.apply({"params": p}, x).projected)

    def image_embed(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "n d"]:
        """Unit vectors of pictures, each of any size."""
        make, size = PREPROCESSING[self._preprocessing], self._vision.image_size
        return self._embed(
            self._embed_pixels, self._vision_params, images, lambda image: make(image, size=size)
        )

    def text_embed(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Unit vectors of texts; what does not fit into the network's positions is cut off."""
        length = self._text.max_tokens
        return self._embed(
            self._embed_tokens,
            self._text_params,
            texts,
            lambda text: self._tokenizer(text, length).tokens,
        )

    @property
    def backbone(self) -> str:
        """What papers call its picture's tower, such as "ViT-B/32" or "ViT-L/14@336"."""
        tower = self._vision
        size = vit_size(width=tower.hidden_dim, depth=tower.depth)
        side = "" if tower.image_size == 224 else f"@{tower.image_size}"
        return f"ViT-{size}/{tower.patch_size}{side}"

    @functools.cached_property
    def digest(self) -> str:
        """16 digits of the SHA-256 of the folder's weights and all that the vectors depend on."""
        settings = [self._preprocessing, self._dtype, self._tokenizer.fingerprint]
        return digest_of(weights_of(self._folder), *settings)

    def _embed(
        self,
        embed: Callable[[Any, np.ndarray], jax.Array],
        params: Any,
        items: Sequence[Any],
        prepare: Callable[[Any], np.ndarray],
    ) -> Float[np.ndarray, "n d"]:
        if not items:
            return np.zeros((0, self._text.projection_dim), np.float32)
        return unit_vectors(in_batches(embed, params, items, prepare))


class ClipColors:
    """GenEval's `color`: which of ten colors a CLIP sees in the crop of each object."""

    def __init__(self, clip: Clip):
        self._clip = clip
        self._texts: dict[str, Float[np.ndarray, "10 3 d"]] = {}

    @property
    def digest(self) -> str:
        """That of the CLIP."""
        return self._clip.digest

    @property
    def backbone(self) -> str:
        """That of the CLIP."""
        return self._clip.backbone

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], objects: Sequence[Detection], name: str
    ) -> list[str]:
        """The color of each of the objects, which are of the class `name`."""
        if not objects:
            return []
        crops = [geneval.color_crop(image, item) for item in objects]
        return geneval.nearest_colors(self._clip.image_embed(crops), self._embedded(name))

    def _embedded(self, name: str) -> Float[np.ndarray, "10 3 d"]:
        """The texts of a class, in the order of the colors; embedded once."""
        if name not in self._texts:
            texts = geneval.color_texts(name)
            flat = [text for color in geneval.COLORS for text in texts[color]]
            vectors = self._clip.text_embed(flat)
            self._texts[name] = vectors.reshape(len(texts), -1, vectors.shape[-1])
        return self._texts[name]
