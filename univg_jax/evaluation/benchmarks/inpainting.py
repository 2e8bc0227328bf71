"""In- and outpainting of any folder of pictures: FID, LPIPS, PSNR and SSIM against the pictures.

A picture's middle square at `side` pixels is the truth. The model is given it with a hole, and
paints the whole square. Two pictures are scored, apart, since the second is better by construction:

    raw          what the model painted, also outside the hole
    composited   that inside the hole, and the truth's own pixels outside of it

FID compares all results with all truths. Its features are columns of the rows, so it does not
depend on who scored which picture; each picture takes 96 KB for them. A missing picture is left
out, and in `strict/` has a PSNR and an SSIM of 0 and an LPIPS of 1; FID has no such number. LPIPS
is given pictures of one size, which it maps to [-1, 1].
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from data_pipelines import transforms
from data_pipelines.labels import lay_on
from univg_jax import images as pictures
from univg_jax.errors import NotFoundError, UserError, check_name
from univg_jax.evaluation import fid, metrics, similarity
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Request
from univg_jax.evaluation.summaries import Scores, Summary, column

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
HOLES = ("center", "outside", "box")
KINDS = ("raw", "composited")
WORST = {"psnr": 0.0, "ssim": 0.0, "lpips": 1.0}
_CHUNK = 500  # pictures whose features are added at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which part is to be painted, and how pictures are compared; a result stores it.

    `hole` is the `center` (half of each side), all `outside` of it, a `box` at random by `seed` and
    the picture's name, or a folder of masks, which are white where to paint and named as pictures.
    """

    hole: str = "center"
    side: int = 512
    prompt: str = ""
    convention: str = "pytorch-fid"
    lpips: str = "alex"
    seed: int = 0

    def __post_init__(self):
        check_name(self.convention, fid.CONVENTIONS, what="convention of FID")
        if self.side < 16:
            raise UserError(f"side={self.side}: expected at least 16 pixels")


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture, its mask's file if it has one, and the settings."""

    name: str
    picture: str
    mask: str
    settings: Settings

    def truth(self) -> Image:
        """The middle square. Raises UserError for a picture that cannot be read."""
        return _square(self.picture, "", self.settings.side)[0]

    def hole(self) -> UInt8[np.ndarray, "side side"]:
        """1 where to paint. Raises UserError for a mask that marks nothing or cannot be read."""
        side = self.settings.side
        if self.mask:
            hole = _square(self.picture, self.mask, side)[1]
        else:
            hole = _hole(self.settings.hole, side, (self.settings.seed, *self.name.encode()))
        if not hole.any():
            raise UserError(f"{self.mask} has no white pixel in the middle square")
        return hole


def _square(picture: str, mask: str, side: int) -> tuple[Image, np.ndarray]:
    planes = {"image": similarity.read_rgb(picture, what="a picture to paint in")}
    if mask:
        try:
            content = epath.Path(mask).read_bytes()
            plane = pictures.to_mask(pictures.open_picture(content))
            planes["edit_mask"] = lay_on(plane, planes["image"])
        except FileNotFoundError:
            raise NotFoundError(f"{mask} does not exist: expected the mask of {picture}") from None
        except UserError as error:
            raise UserError(f"{mask} {error}") from None
    made = transforms.resize_and_crop(planes, resolution=side)
    return made["image"], made.get("edit_mask", np.zeros((side, side), np.uint8))


def _hole(kind: str, side: int, key: Sequence[int]) -> UInt8[np.ndarray, "side side"]:
    hole, quarter = np.zeros((side, side), np.uint8), side // 4
    if kind == "box":
        rng = np.random.default_rng(key)
        height, width = rng.integers(side // 4, side // 2 + 1, 2)
        top, left = rng.integers(0, side - height + 1), rng.integers(0, side - width + 1)
        hole[top : top + height, left : left + width] = 1
        return hole
    hole[quarter : side - quarter, quarter : side - quarter] = 1
    return 1 - hole if kind == "outside" else hole


def read(path: epath.PathLike, settings: Settings = Settings()) -> tuple[Row, ...]:
    """The pictures of a folder, in the order of their names.

    Raises UserError for a folder that is not there, has no pictures or two of one name, and for a
    mask that is missing.
    """
    folder = epath.Path(path)
    if not folder.is_dir():
        raise NotFoundError(f"{folder} does not exist: expected a folder of pictures")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder} has no pictures: expected {', '.join(SUFFIXES)}")
    masks: dict[str, epath.Path] = {}
    if settings.hole not in HOLES:
        place = epath.Path(settings.hole)
        if not place.is_dir():
            names = ", ".join(HOLES)
            raise NotFoundError(f"hole={settings.hole}: expected {names}, or a folder of masks")
        masks = {file.stem: file for file in sorted(place.iterdir())}
    stems = [file.stem for file in files]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"{folder} has two pictures called {stem!r}: expected other names")
        if masks and stem not in masks:
            raise NotFoundError(f"{settings.hole} has no mask called {stem!r}")
    return tuple(
        Row(file.stem, os.fspath(file), os.fspath(masks.get(file.stem, "")), settings)
        for file in files
    )


def image_files(row: Row) -> tuple[str, ...]:
    """Where the painted square lies: there is no official layout."""
    return (f"{row.name}.png",)


def requests(rows: Sequence[Row]) -> list[Request]:
    """What the model paints of each square, as it painted it."""
    return [
        Request(
            index=index,
            task="ip",
            inputs={"prompt": row.settings.prompt, "image": row.truth, "mask": row.hole},
            files=image_files(row),
            composite=False,
        )
        for index, row in enumerate(rows)
    ]


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> dict[str, Ratio]:
    """PSNR, SSIM, LPIPS and features of the raw and the composited square, and the truth's.

    A result of another size is resized to the truth's.
    """
    (image,) = images
    truth = row.truth()
    found: dict[str, Image | None] = dict.fromkeys(KINDS)
    if image is not None:
        raw = similarity.resized(image, like=truth)
        found = {"raw": raw, "composited": np.where(row.hole()[..., None] > 0, raw, truth)}
    there = [picture for picture in found.values() if picture is not None]
    of_truth, *of_found = np.asarray(scorers["inception"]([truth, *there]), float)
    scores = {"features/truth": Ratio.of(of_truth)}
    for number, (kind, picture) in enumerate(found.items()):
        features = Ratio.of(np.zeros_like(of_truth), 0.0)
        values = dict.fromkeys(WORST, Ratio.of(0.0, 0.0))
        if picture is not None:
            features = Ratio.of(of_found[number])
            values = {
                "psnr": metrics.psnr(picture, truth),
                "ssim": metrics.ssim(picture, truth),
                "lpips": Ratio.of(float(scorers["lpips"](picture, truth))),
            }
        scores |= {f"features/{kind}": features}
        scores |= {f"{kind}/{name}": ratio for name, ratio in values.items()}
    return scores


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """Numbers of `raw/` and `composited/`, also `strict/`, and how many pictures are missing.

    FID is NaN for fewer than two pictures.
    """
    convention, found = rows[0].settings.convention, {}
    truth = _sums(column(scores, "features/truth"), convention)
    for kind in KINDS:
        results = _sums(column(scores, f"features/{kind}"), convention)
        found[f"{kind}/fid"] = _distance(results, truth)
        for name, worst in WORST.items():
            ratios = column(scores, f"{kind}/{name}")
            found[f"{kind}/{name}"] = merge(ratios).value
            strict = [r if r.count[0] else Ratio.of(worst) for r in ratios]
            found[f"strict/{kind}/{name}"] = merge(strict).value
    there = sum(float(ratio.count[0]) for ratio in column(scores, "raw/psnr"))
    return found | {"missing": len(rows) - there}


def _sums(features: Sequence[Ratio], convention: str) -> fid.FeatureSums:
    there: list[Float[np.ndarray, " d"]] = [r.total for r in features if r.count[0]]
    width = len(features[0].total)
    chunks = [there[k : k + _CHUNK] for k in range(0, len(there), _CHUNK)] or [[]]
    return fid.merge(
        fid.FeatureSums.of(np.array(c, float).reshape(-1, width), convention=convention)
        for c in chunks
    )


def _distance(results: fid.FeatureSums, truth: fid.FeatureSums) -> float:
    if min(results.count, truth.count) < 2:
        return math.nan
    return fid.frechet_distance(results.gaussian(), truth.gaussian())


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""
    return Official(
        name="inpainting",
        version=1,
        read=lambda path: read(path, settings),
        requests=requests,
        needs=("inception", "lpips"),
        score=score,
        summary=summary,
        primary="composited/fid",
        settings=dataclasses.asdict(settings),
    )


BENCHMARK = benchmark()
