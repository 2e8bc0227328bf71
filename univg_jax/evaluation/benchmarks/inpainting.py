"""In- and outpainting of any folder of pictures: FID, LPIPS, PSNR and SSIM against the pictures.

A picture's middle square at `side` pixels is the truth. The model is given it with a hole, and
paints the whole square. Two pictures are scored, apart, since the second is better by construction:

    raw          what the model painted, also outside the hole
    composited   that inside the hole, and the truth's own pixels outside of it

FID compares all results with all truths. A missing picture is left out, and in `strict/` has a
PSNR and an SSIM of 0 and an LPIPS of 1; FID has no such number. LPIPS is given pictures of one
size, which it maps to [-1, 1]. The PSNR of a result that is the truth to the bit is infinite: it is
left out of the mean, which it would be, and counted in `identical`.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from jaxtyping import UInt8

from data_pipelines import transforms
from data_pipelines.labels import lay_on
from univg_jax import images as pictures
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import fid, metrics, similarity
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Columns, Official, Request, requests_of
from univg_jax.evaluation.summaries import Features, Scores, Summary, column
from univg_jax.fields import setting

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
HOLES = ("center", "outside", "box")
KINDS = ("raw", "composited")
WORST = {"psnr": 0.0, "ssim": 0.0, "lpips": 1.0}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which part is to be painted, and how pictures are compared; a result stores it."""

    hole: str = setting(
        "center",
        "`center` (half of each side), all `outside` of it, a `box` at random by `seed` and the "
        "picture's name, or a folder of masks, white where to paint and named as the pictures",
        least=1,
    )
    side: int = setting(512, "pixels a side, of the square that is compared", least=16)
    prompt: str = setting("", "what is painted; without one it is background")
    convention: str = setting("pytorch-fid", "how FID resizes", names=tuple(fid.CONVENTIONS))
    lpips: str = setting("alex", "the network of LPIPS that is given")
    seed: int = setting(0, "of the boxes", least=0)


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
    return requests_of(
        rows,
        image_files,
        task="ip",
        inputs=lambda row: {"prompt": row.settings.prompt, "image": row.truth, "mask": row.hole},
        composite=False,
    )


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> Columns:
    """PSNR, SSIM, LPIPS and features of the raw and the composited square, and the truth's.

    A result of another size is resized to the truth's.
    """
    (image,) = images
    truth = row.truth()
    found: dict[str, Image | None] = dict.fromkeys(KINDS)
    if image is not None:
        raw = similarity.resized(image, like=truth)
        found = {"raw": raw, "composited": np.where(row.hole()[..., None] > 0, raw, truth)}
    columns: dict[str, Ratio | Features] = {}
    for kind, picture in found.items():
        values, is_same = dict.fromkeys(WORST, Ratio.of(0.0, 0.0)), False
        if picture is not None:
            values["ssim"] = metrics.ssim(picture, truth)
            psnr = metrics.psnr(picture, truth)
            is_same = math.isinf(psnr.value)
            values["psnr"] = values["psnr"] if is_same else psnr
            if lpips := scorers.get("lpips"):
                values["lpips"] = Ratio.of(float(lpips(picture, truth)))
        columns |= {f"{kind}/{name}": ratio for name, ratio in values.items()}
        columns[f"{kind}/identical"] = Ratio.of(float(is_same))
    if inception := scorers.get("inception"):
        for name, picture in {"truth": truth, **found}.items():
            vector = None if picture is None else np.asarray(inception([picture]), float)[0]
            columns[name] = Features(vector, row.settings.convention)
    return columns


def _telea(row: Row) -> Image:
    """OpenCV's inpainting by Telea, of the neighbors alone."""
    return cv2.inpaint(row.truth(), row.hole(), 1, cv2.INPAINT_TELEA)


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """Numbers of `raw/` and `composited/`, also `strict/`, and how many pictures are missing."""
    found: Summary = {}
    there = [bool(ratio.count[0]) for ratio in column(scores, "raw/ssim")]
    for kind in KINDS:
        for name, worst in WORST.items():
            ratios = column(scores, f"{kind}/{name}")
            found[f"{kind}/{name}"] = merge(ratios).value
            strict = [r if has else Ratio.of(worst) for r, has in zip(ratios, there, strict=True)]
            found[f"strict/{kind}/{name}"] = merge(strict).value
        same = float(merge(column(scores, f"{kind}/identical")).total[0])
        found[f"{kind}/identical"] = same
        if same == sum(there) > 0:
            found[f"{kind}/psnr"] = math.inf
    return found | {"failures/missing": float(len(rows) - sum(there))}


def distances(sums: Mapping[str, fid.FeatureSums]) -> Summary:
    """FID of both kinds; NaN for fewer than two pictures."""
    return {f"{kind}/fid": fid.distance(sums.get(kind), sums.get("truth")) for kind in KINDS}


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""
    return Official(
        name="inpainting",
        version=2,
        read=lambda path, *, excerpt=False: read(path, settings),
        requests=requests,
        needs={"inception": ("fid",), "lpips": ("lpips",)},
        score=score,
        trivial={"telea": _telea},
        summary=summary,
        distances=distances,
        quality=lambda scores: scores["raw/psnr"].value,
        primary="composited/fid",
        settings=dataclasses.asdict(settings),
        scoring=("convention", "lpips"),
    )


BENCHMARK = benchmark()
