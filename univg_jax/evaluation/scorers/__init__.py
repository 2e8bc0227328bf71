"""The scorers that benchmarks use, each behind a protocol that has a name.

A benchmark lists the names that it needs and is given a `Scorers` with them, so it does not know
which network answers. Each file beside this one implements one or more of the protocols.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import numpy as np
from jaxtyping import Float, UInt8

from univg_jax.evaluation.detection import Detection, Detections

if TYPE_CHECKING:
    from univg_jax.evaluation.scorers.clip import Clip
    from univg_jax.evaluation.scorers.endpoint import Endpoint

# Unit vectors of sentences, and of the faces in pictures of any size.
TextEmbedder = Callable[[list[str]], Float[np.ndarray, "b d"]]
FaceEmbedder = Callable[[UInt8[np.ndarray, "b h w 3"]], Float[np.ndarray, "b e"]]

# Vectors of any length of pictures of any sizes.
PictureEmbedder = Callable[[Sequence[UInt8[np.ndarray, "_ _ 3"]]], Float[np.ndarray, "b d"]]
# The face in a picture as a vector of any length; None where no face is found.
FaceFinder = Callable[[UInt8[np.ndarray, "h w 3"]], Float[np.ndarray, " d"] | None]
# How different two pictures of one size are, 0 if they are the same.
PictureDistance = Callable[[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]], float]


class SceneScorer(Protocol):
    """Names the objects in pictures of scenes, and embeds pictures where captions are."""

    def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> Mapping[str, Float[np.ndarray, "_ 4"]]:
        """Boxes x0 y0 x1 y1 in [0, 1] of every noun that is seen."""
        ...

    def embed(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b d"]:
        """The caption embedding that a picture suggests, to compare with `center`'s."""
        ...

    def center(self, text_embeddings: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d"]:
        """Caption embeddings less their mean over the training captions."""
        ...


class Detector(Protocol):
    """Names the objects in pictures of anything.

    It may have `classes`, the names of all that it can find: benchmarks then refuse one that cannot
    find what they ask for.
    """

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Detections:
        """Boxes in pixels by the name of the class, with scores, and masks if it has them."""
        ...


class Locator(Protocol):
    """Looks for objects that are named to it."""

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], names: Sequence[str]
    ) -> Mapping[str, Float[np.ndarray, "_ 4"]]:
        """Boxes x0 y0 x1 y1 in pixels by name; a name that is not seen may be left out."""
        ...


class ColorNamer(Protocol):
    """Names the colors of objects."""

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], objects: Sequence[Detection], name: str
    ) -> list[str]:
        """The color of each of the objects, which are of the class `name`."""
        ...


class Scorers(TypedDict, total=False):
    """The scorers at hand, by the names of their protocols."""

    text_embed: TextEmbedder
    face_embed: FaceEmbedder
    scene: SceneScorer
    detect: Detector
    locate: Locator
    color: ColorNamer
    clip: "Clip"
    dino: PictureEmbedder
    identify: FaceFinder
    lpips: PictureDistance
    inception: PictureEmbedder
    vqa: "Endpoint"
    judge: "Endpoint"


PROTOCOLS = {  # what to do about one that is missing
    "text_embed": "the run's own text encoder (`scorers.embedders`)",
    "face_embed": "the run has no face encoder, set conditioning.identity, e.g. dict(kind='lda')",
    "scene": "a scene scorer fitted on the data (`scorers.scene`)",
    "detect": "a detector of the benchmark's classes, as an ONNX file with its description "
    "(`scorers.detector`)",
    "locate": "a detector that is told what to look for, or `layout_boxes.of_classes` of one",
    "color": "CLIP ViT-L/14, as a folder of Hugging Face (`scorers.clip`)",
    "clip": "the CLIP that the benchmark names, as a folder of Hugging Face (`scorers.clip`)",
    "dino": "a DINO, such as dino_vits16",
    "identify": "a detector and an encoder of faces",
    "lpips": "LPIPS with its network",
    "inception": "FID's Inception with one of `fid.CONVENTIONS`, of pictures of any sizes",
    "vqa": "a vision-language model that you serve, with log-probabilities (`scorers.endpoint`)",
    "judge": "a vision-language model that you serve (`scorers.endpoint`)",
}


def scorer_digests(scorers: Scorers) -> dict[str, str]:
    """Names in a result the scorers that have weights of their own, by their `digest`."""
    return {name: scorer.digest for name, scorer in scorers.items() if hasattr(scorer, "digest")}


def local_mesh() -> contextlib.AbstractContextManager[Any]:
    """Context with no multi-process mesh: each process scores only its own rows.

    A scorer runs on as many pictures as its process has, which differs between processes, so a
    program over the mesh of all of them would wait for calls that never come.
    """
    import jax  # here, since benchmarks that only name a scorer need none of it

    from univg_jax import sharding

    if jax.process_count() == 1:
        return contextlib.nullcontext()
    return jax.set_mesh(sharding.make_mesh(data=1, devices=jax.local_devices()[:1]))
