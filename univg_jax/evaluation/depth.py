"""Pictures with measured depth, and the affine-invariant protocol that scores predictions on them.

A prediction is scaled and shifted to the depth by least squares over the pixels that count, clipped
to the range of the data set, and compared there (MiDaS, arXiv 1907.01341; Marigold, arXiv
2312.02145). AbsRel and delta1 are means over the pixels of an image, then over images. What counts,
the range and how depth is stored are the benchmark's own: nyuv2, kitti_depth and diode.

A generated picture is read as depth by `renderings.decode_depth`, near is bright. It is of the
whole photograph, whatever its size. AbsRel has no worst value: where a picture is missing,
`strict/` has a delta1 of 0, and no AbsRel. `constant/` are the numbers of one depth everywhere, on
the pictures that are there.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from jaxtyping import Float64

from data_pipelines import renderings
from univg_jax import images
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.evaluation import metrics
from univg_jax.evaluation.judging import is_inside
from univg_jax.evaluation.metrics import Image, Map, Mask, Ratio, merge
from univg_jax.evaluation.official import Official, Published, Request, of_systems, requests_of
from univg_jax.evaluation.summaries import Scores, Summary, column, failure_counts

Row = tuple[str, ...]
_SOURCE = "DINOv3 (arXiv 2508.10104), table 12"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthCase:
    """A picture, its depth in meters, and which of its pixels count."""

    name: str
    image: Image
    depth: Float64[np.ndarray, "h w"]
    valid: Mask
    limits: tuple[float, float]  # meters to which predictions are clipped

    def score(self, prediction: Map) -> dict[str, Ratio]:
        """AbsRel and delta1 of depth up to scale and shift, near small.

        A prediction of another size is of the whole picture, and resized to it bilinearly.
        """
        height, width = self.depth.shape
        if prediction.shape != (height, width):
            prediction = cv2.resize(prediction.astype(float), (width, height))
        return metrics.depth_errors(prediction, self.depth, limits=self.limits, valid=self.valid)


@dataclasses.dataclass(frozen=True)
class DepthCases(Sequence):  # not Sequence[DepthCase]: a check of the type would read a case
    """The cases of a list, each read only when it is indexed.

    Indexing raises UserError, with the row, where a file is missing or is not as expected.
    """

    rows: Sequence[Row]
    read: Callable[[Row], DepthCase]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> DepthCase:
        row = self.rows[index]
        try:
            return self.read(row)
        except UserError as error:
            raise type(error)(f"{row[0]}: {error}") from None


def read_list(path: epath.PathLike, *, columns: int) -> list[Row]:
    """The first `columns` words of each line; further ones (a focal length) are left out.

    Raises NotFoundError if there is no such file, and UserError for a line with fewer words.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: expected a list of pictures and depths")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    rows = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    for number, words in rows:
        if len(words) < columns:
            raise UserError(
                f"{path} line {number} is {quote(' '.join(words))}: expected {columns} names"
            )
    if not rows:
        raise UserError(f"{path} is empty: expected a list of pictures and depths")
    return [tuple(words[:columns]) for _, words in rows]


def open_files(source: str | os.PathLike) -> Callable[[str], bytes]:
    """Reads a file by its name in a folder, a zip or a tar. Raises NotFoundError without one."""
    from data_pipelines.native import coco

    return coco.open_store(os.fspath(source)).read


def make_case(
    row: Row,
    image: np.ndarray,
    depth: np.ndarray,
    valid: np.ndarray,
    limits: tuple[float, float],
) -> DepthCase:
    """A case, if its picture, depth and mask have one size. Raises UserError otherwise."""
    if not image.shape[:2] == depth.shape == valid.shape:
        raise UserError(
            f"the picture is {list(image.shape[:2])}, its depth {list(depth.shape)} and the mask "
            f"{list(valid.shape)}: expected one size"
        )
    return DepthCase(
        name=row[0], image=image, depth=depth.astype(float), valid=valid, limits=limits
    )


def levels_of(data: bytes) -> np.ndarray:
    """The integers [h w] of a 16-bit PNG. Raises UserError for another picture."""
    picture = images.open_picture(data)
    if (levels := images.to_integers(picture)) is None:
        raise UserError(f"its depth has mode {picture.mode}: expected a 16-bit gray PNG")
    return levels


def between(depth: np.ndarray, limits: tuple[float, float]) -> Mask:
    """Where the depth is in the range, without its ends."""
    return (depth > limits[0]) & (depth < limits[1])


# The benchmark that cases are


@dataclasses.dataclass(frozen=True)
class Asked:
    """A row of a benchmark: one of the cases, which is read where it is needed."""

    cases: DepthCases
    number: int

    @property
    def name(self) -> str:
        """The photograph's name in the list."""
        return self.cases.rows[self.number][0]

    def case(self) -> DepthCase:
        """Raises UserError for files that are missing or not as expected."""
        return self.cases[self.number]

    def image(self) -> Image:
        """The photograph, or the benchmark's part of it. Raises what `case` raises."""
        return self.case().image


def asked(cases: DepthCases, *, counts: Sequence[int], excerpt: bool) -> tuple[Asked, ...]:
    """The rows of a benchmark that has one of `counts` pictures, or fewer in an `excerpt`.

    Raises UserError for another number, and for a name that would lie in another folder.
    """
    found = len(cases)
    if found > max(counts) or not (found in counts or excerpt):
        official = " or ".join(map(str, counts))
        hint = " (--excerpt takes fewer)" if found < max(counts) else ""
        raise UserError(f"the list has {found} pictures with depth: expected {official}{hint}")
    rows = tuple(Asked(cases, number) for number in range(found))
    for row in rows:
        if not is_inside(row.name):
            raise UserError(f"the list has the picture {quote(row.name)}: expected one in a folder")
    return rows


def image_files(row: Asked) -> tuple[str, ...]:
    """Where the generated depth lies: there is no official layout of pictures."""
    return (os.fspath(pathlib.PurePosixPath(row.name).with_suffix(".png")),)


def _requests(rows: Sequence[Asked]) -> list[Request]:
    return requests_of(
        rows,
        image_files,
        task="depth",
        inputs=lambda row: {"image": row.image},
        whole=True,
    )


def score(
    row: Asked, images: Sequence[Image | None], scorers: Mapping[str, Any]
) -> dict[str, Ratio]:
    """AbsRel and delta1 of a generated picture, and of one depth everywhere; no scorer is needed.

    Raises what `Asked.case` raises.
    """
    (image,) = images
    nothing = dict.fromkeys(("abs_rel", "delta1"), Ratio.of(0.0, 0.0))
    found, constant, strict = nothing, nothing, Ratio.of(0.0)
    if image is not None:
        case = row.case()
        found = case.score(renderings.decode_depth(image))
        constant = case.score(np.ones_like(case.depth))
        strict = found["delta1"]
    return {
        **{f"official/{name}": ratio for name, ratio in found.items()},
        **{f"constant/{name}": ratio for name, ratio in constant.items()},
        "strict/delta1": strict,
        "failures/missing": Ratio.of(float(image is None)),
    }


def summary(rows: Sequence[Asked], scores: Sequence[Scores]) -> Summary:
    """Means over pictures, and how many are missing."""
    found = {name: merge(column(scores, name)).value for name in scores[0]}
    return found | failure_counts(scores)


def published(marigold: tuple[float, float], dinov3: tuple[float, float]) -> tuple[Published, ...]:
    """AbsRel and delta1 of a generator of pictures that was tuned for depth, and of a network of
    depth, by one protocol.
    """
    return tuple(
        entry
        for k, name in enumerate(("abs_rel", "delta1"))
        for entry in of_systems(
            f"official/{name}", _SOURCE, {"Marigold": marigold[k], "DINOv3": dinov3[k]}
        )
    )


def benchmark_of(
    name: str,
    open_cases: Callable[[epath.PathLike], DepthCases],
    *,
    counts: Sequence[int],
    settings: Mapping[str, Any],
    published: tuple[Published, ...],
) -> Official:
    """The benchmark of the cases that `open_cases(path)` reads."""

    def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Asked, ...]:
        return asked(open_cases(path), counts=counts, excerpt=excerpt)

    return Official(
        name=name,
        version=1,
        read=read,
        requests=_requests,
        score=score,
        summary=summary,
        quality=lambda scores: scores["official/delta1"].value,
        primary="official/abs_rel",
        published=published,
        settings=settings,
    )


def list_digest(path: str) -> str:
    """The SHA-256 of a list, which results store; nothing without a list."""
    if not path:
        return ""
    if not os.path.isfile(path):
        raise NotFoundError(f"{path} does not exist: expected a list of pictures and depths")
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
