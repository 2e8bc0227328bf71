"""PhraseCut: the mask of all regions that a phrase speaks of, in Visual Genome's pictures.

The rules are those of github.com/ChenyunWu/PhraseCutDataset, utils/evaluator.py. Every phrase is a
sample. The truth is the union of all polygons of all instances, drawn at the size that Visual
Genome states. Metrics are those of `evaluation.segmentation`, with two differences from RefCOCO's
protocol: accuracy asks the IoU to exceed a number and not only to reach it, and a phrase without a
prediction, which is left out of all means, is also given as an empty mask (`strict`; the official
code prints that mean, too).
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines import renderings
from data_pipelines.datasets import phrasecut
from data_pipelines.native import coco, tables
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import segmentation
from univg_jax.evaluation.metrics import Image, Mask, Ratio
from univg_jax.evaluation.official import Official, Request, requests_of
from univg_jax.evaluation.summaries import Scores, Summary
from univg_jax.fields import setting

SPLITS = ("val", "test", "miniv")
SIZES_FILES = ("image_data_split3000.json", "image_data_split.json")
_WHAT = "PhraseCut's: github.com/ChenyunWu/PhraseCutDataset, download_dataset.py"


@dataclasses.dataclass(frozen=True)
class Row:
    """Phrase `number` of a split, its photograph, the size that it is annotated at, and regions."""

    split: str
    number: int
    image_id: int
    phrase: str
    picture: str
    height: int
    width: int
    polygons: Any = dataclasses.field(repr=False, hash=False)

    @property
    def mask(self) -> Mask:
        """True where any polygon is. Raises UserError for what is none."""
        try:
            return phrasecut.union(self.polygons, self.height, self.width) > 0
        except UserError as error:
            raise UserError(f"phrase {self.number} of {self.split}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which phrases; a result stores the split."""

    split: str = setting("test", "of refer_SPLIT.json", names=SPLITS)
    pictures: str = setting(
        "", "the folder of IMAGE_ID.jpg; by default `images` beside the phrases", is_path=True
    )


def read(path: str | os.PathLike, settings: Settings = Settings()) -> tuple[Row, ...]:
    """The phrases of refer_SPLIT.json in the folder `path`, in the file's order.

    Raises UserError for a file that is missing or another one.
    """
    root, split = os.fspath(path), settings.split
    pictures = settings.pictures or os.path.join(root, "images")
    file = os.path.join(root, f"refer_{split}.json")
    tasks = list(coco.read_list(file, what=_WHAT))
    sizes = _sizes(root)
    rows = []
    for number, task in enumerate(tasks):
        try:
            image_id, phrase = tables.get(task, "image_id", int), tables.get(task, "phrase", str)
            polygons = tables.get(task, "Polygons", list)
            if image_id not in sizes:
                raise UserError(f"{' or '.join(SIZES_FILES)} has no picture {image_id}")
            height, width = coco.image_size(sizes[image_id])
        except UserError as error:
            raise UserError(f"{file}: task {number}: {error}") from None
        place = os.path.join(pictures, f"{image_id}.jpg")
        rows.append(Row(split, number, image_id, phrase, place, height, width, polygons))
    if not rows:
        raise UserError(f"{file} has no phrases: expected {_WHAT}")
    return tuple(rows)


def _sizes(root: str) -> dict[Any, Mapping[str, Any]]:
    for name in SIZES_FILES:
        file = os.path.join(root, name)
        if os.path.isfile(file):
            return {image.get("image_id"): image for image in coco.read_list(file, what=_WHAT)}
    raise NotFoundError(f"{root} has no {' or '.join(SIZES_FILES)}: expected {_WHAT}")


def image_files(row: Row) -> tuple[str, ...]:
    """Where the generated mask lies; there is no official layout."""
    return (f"{row.split}/{row.number:06}.png",)


def requests(rows: Sequence[Row]) -> list[Request]:
    """The mask of each phrase, of the whole photograph."""
    return requests_of(
        rows,
        image_files,
        task="seg",
        inputs=lambda row: {"prompt": row.phrase, "image": row.picture},
        whole=True,
    )


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> dict[str, Ratio]:
    """cIoU (`oiou`), mIoU and accuracy of one phrase; no scorer is needed."""
    (image,) = images
    return segmentation.score(image, row.mask, exceed=True)


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """The numbers of each split, such as `test/official/miou`."""
    return segmentation.summary([row.split for row in rows], scores)


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""
    return Official(
        name="phrasecut_seg",
        version=1,
        read=lambda path, *, excerpt=False: read(path, settings),
        requests=requests,
        score=score,
        trivial={"everything": lambda row: segmentation.EVERYTHING},
        summary=summary,
        quality=lambda scores: scores["official/miou"].value,
        primary=f"{settings.split}/official/miou",
        settings={"split": settings.split, "mask_threshold": renderings.MASK_THRESHOLD},
    )


BENCHMARK = benchmark()
