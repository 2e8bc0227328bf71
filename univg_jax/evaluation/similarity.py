"""How alike pictures are, and how well they fit a text: what benchmarks of edits share.

    clip_t   cosine of CLIP's embeddings of the picture and of a caption
    clip_i   cosine of CLIP's embeddings of two pictures
    dino     cosine of DINO's embeddings of two pictures
    l1, l2   mean |a - b| and mean (a - b)², of RGB in [0, 1]

For l1 and l2 a picture is resized to the size of the other one. The networks are the user's; which
ones they are is stored beside the numbers (`Backbones`), since numbers of others do not compare.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image as Pillow

from univg_jax import images
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import metrics
from univg_jax.evaluation.metrics import Image, Ratio
from univg_jax.fields import setting

METRICS = ("clip_t", "clip_i", "dino", "l1", "l2")
WORST = {"clip_t": 0.0, "clip_i": 0.0, "dino": 0.0, "l1": 1.0, "l2": 1.0}  # of a missing picture
NEEDS = {"clip": ("clip_t", "clip_i"), "dino": ("dino",)}

CLIPS = {  # Hugging Face's folders, by what papers call the network
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336": "openai/clip-vit-large-patch14-336",
    "ViT-H/14": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-bigG/14": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
# How `clip_cosine` and `compare` score with it; a result says so, since papers differ.
COSINE = {"clip_score": "cosine"}


@dataclasses.dataclass(frozen=True)
class Backbones:
    """The networks that are given, by what papers call them; a result stores it."""

    clip: str = setting("ViT-B/32", "the CLIP that is given", least=1)
    dino: str = setting("dino_vits16", "the DINO that is given", least=1)


def clip_weights(clip: str) -> dict[str, str]:
    """What to give for the scorer `clip` (`Official.weights`)."""
    folder = f" as a folder of {CLIPS[clip]}" if clip in CLIPS else ""
    return {"clip": f"--scorer=clip=DIR, CLIP {clip}{folder}"}


def read_rgb(path: epath.PathLike, *, what: str, drop_alpha: bool = False) -> Image:
    """A picture that the benchmark needs, as the model sees it or, with `drop_alpha`, as official
    code does (`images.to_rgb`). Raises UserError (NotFoundError) with its file.
    """
    try:
        data = epath.Path(path).read_bytes()
        if drop_alpha:
            return images.to_rgb(images.open_picture(data), drop_alpha=True)
        return images.decode_rgb(data)
    except (FileNotFoundError, IsADirectoryError):
        raise NotFoundError(f"{path} does not exist: expected {what}") from None
    except UserError as error:
        raise UserError(f"{path} {error}") from None


def check_file(path: epath.PathLike, *, what: str) -> None:
    """Raises NotFoundError for a picture that is not there, before others are made."""
    if not epath.Path(path).exists():
        raise NotFoundError(f"{path} does not exist: expected {what}")


def resized(image: UInt8[np.ndarray, "_ _ 3"], *, like: UInt8[np.ndarray, "_ _ 3"]) -> Image:
    """The picture at the size of another one, by Pillow's bicubic filter."""
    if image.shape == like.shape:
        return image
    height, width = like.shape[:2]
    return np.asarray(Pillow.fromarray(image).resize((width, height), Pillow.Resampling.BICUBIC))


def distances(image: UInt8[np.ndarray, "_ _ 3"], other: UInt8[np.ndarray, "_ _ 3"]) -> dict:
    """l1 and l2 at the size of `other`. l2 is the mean square, without a root."""
    difference = (resized(image, like=other).astype(float) - other) / 255
    return {"l1": float(np.abs(difference).mean()), "l2": float(np.square(difference).mean())}


def clip_cosine(clip: Any, image: Image, text: str) -> float:
    """The cosine of a picture and a text by a CLIP (`scorers.clip`)."""
    (own,), (its,) = clip.image_embed([image]), clip.text_embed([text])
    return metrics.cosine(own, its).value


def compare(
    image: UInt8[np.ndarray, "_ _ 3"],
    other: UInt8[np.ndarray, "_ _ 3"],
    caption: str,
    scorers: Mapping[str, Any],
) -> dict[str, float]:
    """METRICS of a picture against another one and a caption, by the scorers NEEDS.

    Without a scorer its metrics are not there.
    """
    found = distances(image, other)
    if clip := scorers.get("clip"):
        (own, its), (text,) = clip.image_embed([image, other]), clip.text_embed([caption])
        found["clip_t"] = metrics.cosine(own, text).value
        found["clip_i"] = metrics.cosine(own, its).value
    if dino := scorers.get("dino"):
        found["dino"] = metrics.cosine(*dino([image, other])).value
    return found


def ratios(values: Mapping[str, float] | None, prefix: str = "") -> dict[str, Ratio]:
    """The columns of an item's METRICS; those that are not in `values` count nothing."""
    nothing = Ratio.of(0.0, 0.0)
    return {
        prefix + name: Ratio.of(values[name]) if values and name in values else nothing
        for name in METRICS
    }
