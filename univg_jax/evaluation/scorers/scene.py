"""The scene scorer: what a generated scene shows, by models fitted on the data's own exact labels.

No public detector or CLIP knows a 48-pixel emoji scene, so this data brings its own scorer:

* a small network names every pixel (`segmenter`), trained on the masks of the train split;
* a ridge regression W = (X'X + lambda I)^-1 X'Y, in closed form, maps the picture's features X
  (what is where, and coarse colors) to the sentence embedding Y of its caption.

Both are deterministic and are cached beside the dataset. They know this data only and make
mistakes, so their score on the real held-out pictures stands beside every number as its ceiling.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable

import cv2
import jax
import numpy as np
import safetensors.numpy
from absl import logging
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8

from data_pipelines.quarantine import usable_records
from data_pipelines.reader import Reader
from univg_jax import trees
from univg_jax.errors import UserError
from univg_jax.evaluation.scorers import TextEmbedder, local_mesh, segmenter
from univg_jax.evaluation.scorers.segmenter import RESOLUTION, Params
from univg_jax.files import write_whole
from univg_jax.progress import Bar
from univg_jax.together import together

STEPS = 300
MAX_RECORDS = 3000  # scenes that it is fitted on
MIN_AREA = 0.004  # of a picture: what is smaller is not detected

Images = UInt8[np.ndarray, "b h w 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedSceneScorer:
    """The `SceneScorer` of a network and a ridge regression. It scores pictures at `RESOLUTION`."""

    nouns: tuple[str, ...]  # noun i is class i + 1; class 0 is background
    segmenter: Params
    ridge: Params  # feature_mean, feature_scale, weights, text_mean

    def segment(self, images: Images) -> Float[np.ndarray, "b r r k"]:
        """The probability of each class at every pixel."""
        return segmenter.probabilities(self.segmenter, _resize(images))

    def detect(self, image: UInt8[np.ndarray, "h w 3"]) -> dict[str, Float[np.ndarray, "_ 4"]]:
        """Boxes in [0, 1] of every noun: its connected regions of at least `MIN_AREA`.

        Gaps of one pixel within an object do not split it.
        """
        labels = self.segment(image[None])[0].argmax(-1)
        return {
            noun: boxes
            for index, noun in enumerate(self.nouns, start=1)
            if len(boxes := _component_boxes(labels == index))
        }

    def embed(self, images: Images) -> Float[np.ndarray, "b d"]:
        """The predicted caption embedding less the mean caption's, to compare with `center`'s."""
        ridge, features = self.ridge, _features(_resize(images), self.segment(images))
        return (features - ridge["feature_mean"]) / ridge["feature_scale"] @ ridge["weights"]

    def center(self, text_embeddings: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d"]:
        """Caption embeddings less the mean of the training captions.

        All captions share that mean, so it would only hide the differences that pictures show.
        """
        return text_embeddings - self.ridge["text_mean"]

    @functools.cached_property
    def digest(self) -> str:
        """16 digits of the SHA-256 of the nouns and every weight."""
        return hashlib.sha256(self._to_bytes({})).hexdigest()[:16]

    def save(self, path: epath.PathLike) -> None:
        """Writes the nouns and the weights as safetensors, with their digest."""
        write_whole(path, self._to_bytes({"digest": self.digest}))

    @classmethod
    def load(cls, path: epath.PathLike) -> "FittedSceneScorer":
        """The scorer that `save` wrote. Raises UserError naming the file if it has changed."""
        raw = epath.Path(path).read_bytes()
        try:
            # safetensors: eight bytes with the header's length, the header as JSON, the tensors.
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
            nouns = tuple(json.loads(header["nouns"]))
            scorer = cls(nouns=nouns, **trees.nest(safetensors.numpy.load(raw)))
            is_whole = scorer.digest == header["digest"]
        except Exception as error:  # whatever the parsers raise for a damaged file
            raise UserError(f"{path} is no scene scorer: {error}") from None
        if not is_whole:
            raise UserError(f"{path} is not the scene scorer that was written")
        return scorer

    def _to_bytes(self, metadata: dict[str, str]) -> bytes:
        tensors = trees.named_leaves({"segmenter": self.segmenter, "ridge": self.ridge})
        return safetensors.numpy.save(tensors, {"nouns": json.dumps(self.nouns), **metadata})


def open_scene_scorer(
    scenes: Reader,
    *,
    noun_of: Callable[[str], str],
    embed_text: TextEmbedder,
    cache_dir: epath.PathLike,
    data: str,
    text_encoder: str,
    steps: int = STEPS,
) -> FittedSceneScorer:
    """The scorer fitted on `scenes`, or read from `cache_dir` if it was fitted before.

    `data` names what `scenes` reads, and `text_encoder` all that `embed_text` depends on. The
    name of the cached file is a hash of both, and of the code and the settings of the fit: what
    changed never meets an old scorer. A damaged file is made anew. All processes call it; process 0
    fits.
    """
    code = [inspect.getsource(inspect.getmodule(part)) for part in (FittedSceneScorer, segmenter)]
    key = json.dumps([code, steps, data, text_encoder])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    cache = epath.Path(cache_dir) / f"scene_scorer-{digest}.safetensors"

    def fitted() -> FittedSceneScorer:
        if cache.exists():
            try:
                return FittedSceneScorer.load(cache)
            except UserError as error:
                logging.warning("%s: it is fitted again", error)
        with local_mesh():
            scorer = fit_scene_scorer(scenes, noun_of=noun_of, embed_text=embed_text, steps=steps)
        scorer.save(cache)
        return scorer

    with together():
        if jax.process_index() == 0:
            fitted()
    # The others read what process 0 wrote, or fit the same where they do not share its disk.
    return fitted()


def fit_scene_scorer(
    scenes: Reader, *, noun_of: Callable[[str], str], embed_text: TextEmbedder, steps: int = STEPS
) -> FittedSceneScorer:
    """The scorer of records with an image, a caption, phrases and their masks; deterministic.

    Damaged records are left out. `noun_of` takes a phrase: "two red apples" -> "apple".
    """
    chosen = np.random.default_rng(segmenter.SEED).permutation(len(scenes.source))[:MAX_RECORDS]
    places = Bar(chosen.tolist(), "scorer: reading scenes")
    records = list(usable_records(scenes, places))
    nouns = tuple(sorted({noun_of(phrase) for r in records for phrase in r["phrases"]}))
    classes = {noun: i for i, noun in enumerate(nouns, start=1)}
    images = np.concatenate([_resize(r["image"][None]) for r in records])
    labels = np.stack(
        [_label_map(r["masks"], [classes[noun_of(p)] for p in r["phrases"]]) for r in records]
    )
    params = segmenter.fit(images, labels, classes=len(nouns) + 1, steps=steps)
    scorer = FittedSceneScorer(nouns=nouns, segmenter=params, ridge={})
    features = _features(images, scorer.segment(images))
    captions, caption_of = np.unique([r["caption"] for r in records], return_inverse=True)
    text = np.asarray(embed_text(captions.tolist()), float)[caption_of]
    return dataclasses.replace(scorer, ridge=_fit_ridge(features, text))


def _component_boxes(mask: Bool[np.ndarray, "r r"]) -> Float[np.ndarray, "_ 4"]:
    """Boxes of the connected regions that cover at least `MIN_AREA` of the picture."""
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    count, regions = cv2.connectedComponents(closed, connectivity=8)
    h, w = mask.shape
    boxes = []
    for region in range(1, count):  # 0 is the rest of the image
        ys, xs = np.nonzero((regions == region) & mask)
        if len(ys) >= max(MIN_AREA * mask.size, 1):
            boxes.append([xs.min() / w, ys.min() / h, (xs.max() + 1) / w, (ys.max() + 1) / h])
    return np.array(boxes, float).reshape(-1, 4)


def _resize(images: Images) -> UInt8[np.ndarray, "b r r 3"]:
    mode = cv2.INTER_AREA if images.shape[1] > RESOLUTION else cv2.INTER_LINEAR
    size = (RESOLUTION, RESOLUTION)
    return np.stack([cv2.resize(image, size, interpolation=mode) for image in images])


def _label_map(masks: UInt8[np.ndarray, "n h w"], classes: list[int]) -> Int[np.ndarray, "r r"]:
    """The class of every pixel at `RESOLUTION`. Where objects overlap, the smallest one counts."""
    labels = np.zeros((RESOLUTION, RESOLUTION), np.int32)
    for i in sorted(range(len(masks)), key=lambda i: -int(masks[i].sum())):
        mask, size = masks[i].astype(np.float32), (RESOLUTION, RESOLUTION)
        labels[cv2.resize(mask, size, interpolation=cv2.INTER_AREA) >= 0.5] = classes[i]
    return labels


def _features(
    images: UInt8[np.ndarray, "b r r 3"], probabilities: Float[np.ndarray, "b r r k"]
) -> Float[np.ndarray, "b f"]:
    """Features of pictures: what is in them, roughly where, and in which colors.

    Of each class its area, its highest probability and its area on a 3x3 grid; the mean color of
    each noun; the colors of the picture on a 6x6 grid.
    """
    b, r, _, k = probabilities.shape
    p = probabilities.astype(float)
    colors = images.astype(float) / 255
    area = p.mean((1, 2))
    grid = np.sqrt(p.reshape(b, 3, r // 3, 3, r // 3, k).mean((2, 4)))
    # The square root spreads the small areas: presence matters more than size.
    named = np.einsum("bhwk,bhwc->bkc", p[..., 1:], colors - 0.5) / r**2
    coarse = colors.reshape(b, 6, r // 6, 6, r // 6, 3).mean((2, 4))
    peaks = p.reshape(b, -1, k).max(1)
    groups = [np.sqrt(area), peaks, grid, np.sign(named) * np.sqrt(np.abs(named)), coarse]
    return np.concatenate([group.reshape(b, -1) for group in groups], axis=1)


def _fit_ridge(features: Float[np.ndarray, "n f"], text: Float[np.ndarray, "n d"]) -> Params:
    """Ridge regression of centered text Y on standardized features X, with the best penalty lambda.

    That is the one of least generalized cross-validation error, from one eigendecomposition:

        GCV(lambda) = |Y - H Y|² / (n - tr H)²,   H = X (X'X + lambda I)^-1 X'
    """
    mean, scale, text_mean = features.mean(0), features.std(0) + 1e-3, text.mean(0)
    x, y = (features - mean) / scale, text - text_mean
    n = len(x)
    values, vectors = np.linalg.eigh(x.T @ x)
    values = np.maximum(values, 0)
    projected = vectors.T @ (x.T @ y)

    def gcv(penalty: float) -> float:
        solution = projected / (values + penalty)[:, None]
        # |Y - XW|² = |Y|² - 2 <X'Y, W> + <W, X'X W>, all in the eigenbasis.
        residual = np.sum(y**2) - 2 * np.sum(projected * solution)
        residual += np.sum(values[:, None] * solution**2)
        return residual / (n - np.sum(values / (values + penalty))) ** 2

    penalty = min((n * 10.0**e for e in (-4, -3, -2, -1, 0, 1)), key=gcv)
    weights = vectors @ (projected / (values + penalty)[:, None])
    ridge = dict(feature_mean=mean, feature_scale=scale, weights=weights, text_mean=text_mean)
    return {name: value.astype(np.float32) for name, value in ridge.items()}
