"""Pictures with measured depth, and the affine-invariant protocol that scores predictions on them.

A prediction is scaled and shifted to the depth by least squares over the pixels that count, clipped
to the range of the data set, and compared there (MiDaS, arXiv 1907.01341; Marigold, arXiv
2312.02145). AbsRel and delta1 are means over the pixels of an image, then over images. What counts,
the range and how depth is stored are the benchmark's own: nyuv2, kitti_depth and diode.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from etils import epath
from jaxtyping import Float64

from univg_jax import images
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.evaluation import metrics
from univg_jax.evaluation.metrics import Image, Map, Mask, Ratio

Row = tuple[str, ...]


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
