"""In-domain scorers: what a generated picture shows, judged by models fitted on the data's own
exact labels.

No public detector or CLIP knows a 48-pixel emoji scene, so the embedded data brings its judge
along:

* a small convolutional network names every pixel, trained for half a minute on the train split's
  masks;
* a ridge regression W = (X'X + lambda I)^-1 X'Y, in closed form, maps the picture's features X
  (what is named where, and coarse colors) to the sentence embedding Y of its caption.

Both are deterministic and cached beside the dataset. They are judges of this data only, and
imperfect: their score on the real held-out pictures is reported beside every number as its ceiling.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from etils import epath
from jaxtyping import Float, UInt8
from tqdm import tqdm

from data_pipelines.mixture import Source
from univg_jax.batch import Array
from univg_jax.conditioning import Conditioner

RESOLUTION = 48  # pixels: every picture is judged at this size, whatever size it was generated at
VERSION = 1  # of the fit below: part of the cache's key
WIDTHS = (16, 48, 96)  # channels at 1/2, 1/4, 1/8 of the resolution

EmbedText = Callable[[list[str]], Float[np.ndarray, "b d"]]
EmbedFace = Callable[[UInt8[np.ndarray, "b h w 3"]], Float[np.ndarray, "b e"]]
Params = dict[str, Float[Array, "..."]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorers:
    """The judges that the benchmarks may ask; a benchmark whose judge is absent says so."""

    scene: "SceneScorer | None" = None
    embed_text: EmbedText | None = None
    embed_face: EmbedFace | None = None

    @property
    def digest(self) -> str:
        """Names the scorers in a result: the scene scorer's digest, or `none`."""
        return self.scene.digest if self.scene else "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneScorer:
    """Names the pixels of scenes and embeds pictures where captions live."""

    nouns: tuple[str, ...]  # class i + 1; class 0 is background
    noun_of: Callable[[str], str]  # "two red apples" -> "apple"
    segmenter: Params
    ridge: Params  # feature_mean, feature_scale, weights, text_mean

    def segment(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b r r k"]:
        """Class probabilities of every pixel at `RESOLUTION`; class 0 is background, class i + 1 is
        `nouns[i]`.
        """
        return np.concatenate(
            [_probabilities(self.segmenter, part) for part in _batches(_resized(images))]
        )

    def detect(
        self, image: UInt8[np.ndarray, "h w 3"], *, min_area: float = 0.004
    ) -> dict[str, np.ndarray]:
        """Boxes [j 4] in [0, 1] of every noun seen: connected regions of its class above `min_area`
        of the image.

        Small gaps of one pixel within an object do not split it.
        """
        labels = self.segment(image[None])[0].argmax(-1)
        return {
            noun: boxes
            for index, noun in enumerate(self.nouns, start=1)
            if len(boxes := _components(labels == index, min_area * labels.size))
        }

    def embed(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b d"]:
        """The predicted caption embedding, less the mean caption's: compare with
        `center(embed_text(captions))`.
        """
        features = _features(_resized(images), self.segment(images))
        return (
            (features - self.ridge["feature_mean"])
            / self.ridge["feature_scale"]
            @ self.ridge["weights"]
        )

    def center(self, text_embeddings: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d"]:
        """Caption embeddings less the mean of the train captions, which all captions share and no
        picture decides.
        """
        return text_embeddings - self.ridge["text_mean"]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 (12 digits) of the nouns and every weight."""
        return hashlib.sha256(
            safetensors.numpy.save(self._tensors(), self._metadata())
        ).hexdigest()[:12]

    def save(self, path: epath.PathLike) -> None:
        path = epath.Path(path)
        # processes may fit the same one at once
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(safetensors.numpy.save(self._tensors(), self._metadata()))
        partial.replace(path)

    @classmethod
    def load(cls, path: epath.PathLike, *, noun_of: Callable[[str], str]) -> "SceneScorer":
        raw = epath.Path(path).read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        groups: dict[str, Params] = {"segmenter": {}, "ridge": {}}
        for name, value in safetensors.numpy.load(raw).items():
            group, _, leaf = name.partition("/")
            groups[group][leaf] = value
        return cls(
            nouns=tuple(json.loads(header["__metadata__"]["nouns"])), noun_of=noun_of, **groups
        )

    def _tensors(self) -> dict[str, np.ndarray]:
        groups = {"segmenter": self.segmenter, "ridge": self.ridge}
        return {
            f"{g}/{k}": np.asarray(v) for g, tree in groups.items() for k, v in sorted(tree.items())
        }

    def _metadata(self) -> dict[str, str]:
        return {"nouns": json.dumps(self.nouns)}


def scene_scorer(
    source: Source,
    *,
    noun_of: Callable[[str], str],
    embed_text: EmbedText,
    cache_dir: epath.PathLike | None = None,
    key: str = "",
    steps: int = 300,
    batch_size: int = 32,
    max_records: int = 3000,
    seed: int = 0,
    progress: bool = True,
) -> SceneScorer:
    """The scorer fitted on `source` (image, caption, phrases, masks), or read from `cache_dir` if
    fitted before.

    The cache's name is a hash of `key` (say what the data is: the text of its build.json) and of
    the settings, so data or settings that changed never meet an old scorer.
    """
    settings = [VERSION, RESOLUTION, WIDTHS, steps, batch_size, max_records, seed, key]
    name = (
        f"scene_scorer-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]}.safetensors"
    )
    cache = epath.Path(cache_dir) / name if cache_dir is not None else None
    if cache is not None and cache.exists():
        return SceneScorer.load(cache, noun_of=noun_of)

    chosen = np.random.default_rng(seed).permutation(len(source))[:max_records]
    fields = ("image", "caption", "phrases", "masks")
    rows = [
        source.read(int(i), fields)
        for i in tqdm(chosen, "scorer: reading scenes", disable=not progress)
    ]
    nouns = tuple(sorted({noun_of(phrase) for row in rows for phrase in row["phrases"]}))
    index = {noun: i + 1 for i, noun in enumerate(nouns)}
    images = np.concatenate([_resized(row["image"][None]) for row in rows])
    labels = np.stack(
        [_label_map(row["masks"], [index[noun_of(p)] for p in row["phrases"]]) for row in rows]
    )
    segmenter = _fit_segmenter(images, labels, len(nouns) + 1, steps, batch_size, seed, progress)
    blank = SceneScorer(nouns=nouns, noun_of=noun_of, segmenter=segmenter, ridge={})
    features = _features(images, blank.segment(images))
    captions, which = np.unique([row["caption"] for row in rows], return_inverse=True)
    ridge = _fit_ridge(features, np.asarray(embed_text(captions.tolist()), float)[which])
    scorer = dataclasses.replace(blank, ridge=ridge)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        scorer.save(cache)
    return scorer


def text_embedder(
    conditioner: Conditioner,
    frozen: Mapping[str, Any],
    tokenizer: Any,
    *,
    num_tokens: int,
    batch_size: int = 64,
) -> EmbedText:
    """Sentence embeddings by the run's own text encoder: its pooled embedding, at unit length."""
    embed = jax.jit(lambda *args: conditioner.embed_text(*args).pooled)

    def embed_text(texts: list[str]) -> Float[np.ndarray, "b d"]:
        rows = []
        for start in range(0, len(texts), batch_size):
            part = [tokenizer(text, num_tokens) for text in texts[start : start + batch_size]]
            part += [part[-1]] * (batch_size - len(part))  # one shape, one compilation
            mask = np.stack([row.text_mask for row in part])
            pooled = np.asarray(embed(frozen, np.stack([row.tokens for row in part]), mask))
            rows.append(pooled / np.linalg.norm(pooled, axis=-1, keepdims=True))
        return np.concatenate(rows)[: len(texts)]

    return embed_text


def face_embedder(conditioner: Conditioner, frozen: Mapping[str, Any]) -> EmbedFace:
    """Face embeddings by the run's own identity encoder."""
    identify = jax.jit(conditioner.identify)
    return lambda images: np.asarray(identify(frozen, images))


def emoji_noun(phrase: str) -> str:
    """The noun of an `emoji_scenes` phrase: "two red apples" -> "apple". Raises ValueError if it
    ends in none.
    """
    # its artwork is an optional dependency
    from data_pipelines.datasets.emoji_scenes.sprites import WHITELIST

    ending = [n.name for n in WHITELIST if f" {phrase}".endswith((f" {n.name}", f" {n.plural}"))]
    if not ending:
        raise ValueError(f"phrase {phrase!r} ends in no noun of emoji_scenes")
    return max(ending, key=len)  # "a teddy bear" is no bear


def _components(mask: np.ndarray, min_area: float) -> np.ndarray:
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    count, regions = cv2.connectedComponents(closed, connectivity=8)
    h, w = mask.shape
    boxes = []
    for region in range(1, count):  # 0 is the rest of the image
        ys, xs = np.nonzero((regions == region) & mask)
        if len(ys) >= max(min_area, 1):
            boxes.append([xs.min() / w, ys.min() / h, (xs.max() + 1) / w, (ys.max() + 1) / h])
    return np.array(boxes, float).reshape(-1, 4)


def _resized(images: np.ndarray) -> np.ndarray:
    if images.shape[1:3] == (RESOLUTION, RESOLUTION):
        return images
    mode = cv2.INTER_AREA if images.shape[1] > RESOLUTION else cv2.INTER_LINEAR
    return np.stack(
        [cv2.resize(image, (RESOLUTION, RESOLUTION), interpolation=mode) for image in images]
    )


def _label_map(masks: np.ndarray, classes: list[int]) -> np.ndarray:
    """Class of every pixel at `RESOLUTION`; an object smaller than one that covers it wins the
    pixel.
    """
    labels = np.zeros((RESOLUTION, RESOLUTION), np.int32)
    for i in sorted(range(len(masks)), key=lambda i: -int(masks[i].sum())):
        mask = cv2.resize(
            masks[i].astype(np.float32), (RESOLUTION, RESOLUTION), interpolation=cv2.INTER_AREA
        )
        labels[mask >= 0.5] = classes[i]
    return labels


def _batches(images: np.ndarray, size: int = 128) -> list[np.ndarray]:
    return [images[i : i + size] for i in range(0, len(images), size)]


# --- the segmentation network: a U-Net of 3x3 convolutions between space-to-depth and its inverse
# ---


def _init_segmenter(classes: int, seed: int) -> Params:
    a, b, c = WIDTHS
    shapes = {
        "down2": (12, a),
        "down4": (4 * a, b),
        "down8": (4 * b, c),
        "middle": (c, c),
        "up4": (b + c // 4, b),
        "up2": (a + b // 4, a),
        "logits": (a, classes),
    }
    rng = np.random.default_rng(seed)
    params: Params = {}
    for name, (fan_in, fan_out) in shapes.items():
        scale = (2 / (9 * fan_in)) ** 0.5  # He: keeps the variance through ReLUs
        params[f"{name}.kernel"] = rng.normal(0, scale, (3, 3, fan_in, fan_out)).astype(np.float32)
        params[f"{name}.bias"] = np.zeros(fan_out, np.float32)
    return params


def _logits(params: Params, x: Float[Array, "b h w 3"]) -> Float[Array, "b h//2 w//2 k"]:
    def conv(name: str, x: Array) -> Array:
        y = jax.lax.conv_general_dilated(
            x, params[f"{name}.kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + params[f"{name}.bias"].reshape(1, 1, 1, -1)

    def down(x: Array) -> Array:  # space to depth
        b, h, w, c = x.shape
        return (
            x.reshape(b, h // 2, 2, w // 2, 2, c)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(b, h // 2, w // 2, 4 * c)
        )

    def up(x: Array) -> Array:  # depth to space
        b, h, w, c = x.shape
        return (
            x.reshape(b, h, w, 2, 2, c // 4)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(b, 2 * h, 2 * w, c // 4)
        )

    half = jax.nn.relu(conv("down2", down(x)))
    quarter = jax.nn.relu(conv("down4", down(half)))
    eighth = jax.nn.relu(conv("down8", down(quarter)))
    eighth = eighth + jax.nn.relu(conv("middle", eighth))
    quarter = jax.nn.relu(conv("up4", jnp.concatenate([quarter, up(eighth)], -1)))
    half = jax.nn.relu(conv("up2", jnp.concatenate([half, up(quarter)], -1)))
    return conv("logits", half)


@jax.jit
def _probabilities_jit(params: Params, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w k"]:
    logits = _logits(params, images.astype(jnp.float32) / 127.5 - 1)
    b, h, w, k = logits.shape
    return jax.nn.softmax(jax.image.resize(logits, (b, 2 * h, 2 * w, k), "linear"))


def _probabilities(params: Params, images: np.ndarray) -> np.ndarray:
    return np.asarray(_probabilities_jit(params, images))


def _degraded(key: Array, x: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Random blur and noise, as half-trained generators show: the scorer must name what people
    would.
    """
    blur_key, noise_key, level_key = jax.random.split(key, 3)
    window = (1, 3, 3, 1)
    blurred = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, (1, 1, 1, 1), "SAME") / 9
    amount = jax.random.uniform(blur_key, (x.shape[0], 1, 1, 1))
    level = 0.2 * jax.random.uniform(level_key, (x.shape[0], 1, 1, 1)) ** 2
    return x + amount * (blurred - x) + level * jax.random.normal(noise_key, x.shape)


def _fit_segmenter(
    images: np.ndarray,
    labels: np.ndarray,
    classes: int,
    steps: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Params:
    """Cross-entropy against the share of each class in every 2x2 block, Adam with a one-cycle
    cosine rate.
    """
    tx = optax.adam(optax.cosine_onecycle_schedule(steps, 4e-3))
    params = _init_segmenter(classes, seed)
    opt_state = tx.init(params)

    def loss_fn(params: Params, x: Array, shares: Array) -> Array:
        return optax.softmax_cross_entropy(_logits(params, x), shares).mean()

    @jax.jit
    def step(
        params: Params, opt_state: Any, key: Array, x: Array, y: Array
    ) -> tuple[Params, Any, Array]:
        x = _degraded(key, x.astype(jnp.float32) / 127.5 - 1)
        b, h, w = y.shape
        shares = jax.nn.one_hot(y, classes).reshape(b, h // 2, 2, w // 2, 2, classes).mean((2, 4))
        loss, grads = jax.value_and_grad(loss_fn)(params, x, shares)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    bar = tqdm(range(steps), "scorer: learning to segment", disable=not progress)
    for i in bar:
        rows = rng.integers(len(images), size=batch_size)
        flip = -1 if rng.random() < 0.5 else 1
        batch = images[rows][:, :, ::flip], labels[rows][:, :, ::flip]
        params, opt_state, loss = step(params, opt_state, jax.random.fold_in(key, i), *batch)
        if progress and i % 50 == 49:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    return {name: np.asarray(value) for name, value in params.items()}


# --- the retrieval embedding ---


def _features(
    images: UInt8[np.ndarray, "b r r 3"], probabilities: Float[np.ndarray, "b r r k"]
) -> Float[np.ndarray, "b f"]:
    """What is named (area, peak, on a 3x3 grid) and the colors on a 6x6 grid and of each named
    thing.
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
    parts = [np.sqrt(area), peaks, grid, np.sign(named) * np.sqrt(np.abs(named)), coarse]
    return np.concatenate([part.reshape(b, -1) for part in parts], axis=1)


def _fit_ridge(features: Float[np.ndarray, "n f"], text: Float[np.ndarray, "n d"]) -> Params:
    """Ridge regression of centered text on standardized features; lambda by generalized
    cross-validation.

    GCV(lambda) = |Y - H Y|² / (n - tr H)², H = X (X'X + lambda I)^-1 X', from one
    eigendecomposition.
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
        residual = (
            np.sum(y**2) - 2 * np.sum(projected * solution) + np.sum(values[:, None] * solution**2)
        )
        return residual / (n - np.sum(values / (values + penalty))) ** 2

    penalty = min((n * 10.0**e for e in (-4, -3, -2, -1, 0, 1)), key=gcv)
    weights = vectors @ (projected / (values + penalty)[:, None])
    tree = {
        "feature_mean": mean,
        "feature_scale": scale,
        "weights": weights,
        "text_mean": text_mean,
    }
    return {name: value.astype(np.float32) for name, value in tree.items()}
