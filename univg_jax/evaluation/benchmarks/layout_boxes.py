"""Pictures of a layout: whether a detector finds in each box what was to be there.

The boxes are COCO's, with its captions, or Flickr30k Entities', with the phrases of theirs. A model
is given a caption and where its things are; `requests` draws this as the canvas of blocks of task
`lg`, and a picture by anybody in the same place is scored the same. For each box the detection of
its name with the largest IoU counts:

    miou = mean IoU over boxes            success = share of boxes with IoU >= 0.5

and for COCO also the means over classes of both. A detector of classes finds COCO's categories; one
that is told what to look for also Flickr30k's phrases. So COCO takes the scorer `detect` or
`locate`, and Flickr30k `locate` alone. Which detector, from which score on, how small boxes may be
and which caption is taken moves numbers, and is stored (`Settings`).
"""

import dataclasses
import functools
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Float

from data_pipelines import examples, renderings
from data_pipelines.datasets import boxes as coco_boxes
from data_pipelines.datasets import flickr30k_entities
from data_pipelines.examples import Example
from data_pipelines.native import SPLITS, coco
from univg_jax.errors import UserError, check_name
from univg_jax.evaluation import metrics
from univg_jax.evaluation.detection import Detections
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Request, requests_of
from univg_jax.evaluation.summaries import Scores, Summary, column, failure_counts
from univg_jax.fields import setting

DATA = {"coco": coco_boxes.DATASET, "flickr30k": flickr30k_entities.DATASET}
MOST = len(renderings.PALETTE)  # boxes of a picture: each has a color of its own
SCORERS = ("detect", "locate")
Boxes = Float[np.ndarray, "_ 4"]
_SIDE = 512  # pixels of a canvas


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which boxes are asked for, and by what they are found; a result stores it.

    Of more than MOST boxes the smallest are left out.
    """

    data: str = setting("coco", "whose boxes", names=tuple(DATA))
    split: str = setting("validation", "of the data", names=tuple(SPLITS))
    min_area: float = setting(0.02, "of the picture's; smaller boxes are left out", least=0)
    scorer: str = setting(
        "detect", "a detector of classes, or one that is told what to look for", names=SCORERS
    )
    detector: str = setting("", "the name of the one that is given")
    above: float = setting(0.5, "the least score of what `detect` finds", least=0, most=1)
    seed: int = setting(0, "of the colors of blocks", least=0)

    def check(self, where: str) -> None:
        """Raises UserError for a detector that does not know the phrases of the data."""
        if self.data == "flickr30k" and self.scorer == "detect":
            raise UserError(
                f"{where}: flickr30k's boxes have phrases and no classes: give scorer=locate"
            )


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture's caption, its boxes as fractions x0 y0 x1 y1, their phrases in the caption, and
    what a detector calls them.
    """

    key: str
    caption: str
    boxes: tuple[tuple[float, float, float, float], ...]
    phrases: tuple[str, ...]
    names: tuple[str, ...]
    classes: tuple[str, ...] = ()


def read(path: str | os.PathLike, settings: Settings = Settings()) -> tuple[Row, ...]:
    """The layouts of a data set's folder, as `data_pipelines.datasets` reads it; with its pictures.

    Of a picture the first caption counts that names a box. Pictures without one are left out, and
    how many is logged. Raises UserError for a folder without the data or the split.
    """
    dataset = DATA[settings.data]
    (native,) = dataset.open(dataset.make_options(dict(source=os.fspath(path)))).values()
    if settings.split not in native.splits:
        splits = ", ".join(native.splits)
        raise UserError(f"{path} has no split {settings.split} of {settings.data}, but {splits}")
    classes: tuple[str, ...] = ()
    if settings.data == "coco":
        categories = coco.read_list(native.files[settings.split][0], "categories")
        classes = tuple(sorted({str(c.get("name")).replace("_", " ") for c in categories}))
    rows, left_out = [], 0
    for key, record in _records(native, settings.split):
        row = None if record is None else _row(key, record, classes, settings)
        left_out += row is None
        rows += [] if row is None else [row]
    if left_out:
        logging.info("%s: %d pictures have no box that counts", settings.data, left_out)
    if not rows:
        raise UserError(f"{path} has no picture with a box of at least {settings.min_area:g} of it")
    return tuple(rows)


def _records(native: Any, split: str) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    for part in native.parts(split):
        for entry in native.entries(part):
            try:
                if isinstance(entry.raw, UserError):
                    raise entry.raw
                yield entry.key, native.make(entry.raw)
            except UserError:  # no box, no caption
                yield entry.key, None


def _row(
    key: str, record: Mapping[str, Any], classes: tuple[str, ...], settings: Settings
) -> Row | None:
    for k, caption in enumerate(record["captions"]):
        of_caption = np.flatnonzero(record["phrase_captions"] == k)
        sides = record["boxes"][:, 2:] - record["boxes"][:, :2]
        areas = np.where((sides * _SIDE >= 1).all(axis=1), sides.prod(axis=1), 0)
        least = max(settings.min_area, 1e-9)
        large = sorted((i for i in of_caption if areas[i] >= least), key=lambda i: -areas[i])
        # A box with several phrases ("a girl", "her") is one block.
        blocks = list(dict.fromkeys(tuple(map(float, record["boxes"][i])) for i in large))[:MOST]
        kept = [i for i in of_caption if tuple(map(float, record["boxes"][i])) in blocks]
        phrases = [record["phrases"][i] for i in kept]
        if kept and None not in examples.places(caption, phrases):
            return Row(
                key=key,
                caption=caption,
                boxes=tuple(tuple(map(float, record["boxes"][i])) for i in kept),
                phrases=tuple(phrases),
                names=tuple(_class_of(p, classes) if classes else p for p in phrases),
                classes=classes,
            )
    return None


def _class_of(phrase: str, classes: Sequence[str]) -> str:
    """The category whose name the phrase is, also in the plural."""
    return next(
        c for c in classes if re.fullmatch(rf"{re.escape(c)}(s|es)?", phrase, re.IGNORECASE)
    )


def image_files(row: Row) -> tuple[str, ...]:
    """Where the picture lies; there is no official layout."""
    return (f"{row.key}.png",)


def draw(row: Row, *, seed: int = 0) -> Example:
    """The canvas of blocks (`source`), and the caption that names them (`text`).

    Colors depend on the seed and the picture alone.
    """
    record = {
        "caption": row.caption,
        "boxes": np.array(row.boxes, np.float32),
        "phrases": list(row.phrases),
        "image": np.zeros((_SIDE, _SIDE, 3), np.uint8),
    }
    return examples.make_layout(record, np.random.default_rng((seed, zlib.crc32(row.key.encode()))))


def requests(rows: Sequence[Row], *, seed: int = 0) -> list[Request]:
    """A picture of each layout."""

    def canvas(row: Row) -> Image:
        return draw(row, seed=seed).source

    # A canvas is drawn when it is due: all of them together would be gigabytes.
    return requests_of(
        rows,
        image_files,
        task="lg",
        inputs=lambda row: {
            "prompt": draw(row, seed=seed).text,
            "image": functools.partial(canvas, row),
        },
    )


def of_classes(
    detect: Callable[[Image], Detections], *, above: float
) -> Callable[[Image, Sequence[str]], dict[str, Boxes]]:
    """A detector of classes (`scorers.Detector`) as one that is told what to look for."""

    def locate(image: Image, names: Sequence[str]) -> dict[str, Boxes]:
        seen = detect(image)
        boxes = {n: [d[:4] for d in seen.get(n, ()) if d[4] >= above] for n in names}
        return {n: np.array(found, float).reshape(-1, 4) for n, found in boxes.items()}

    return locate


def score(
    row: Row,
    images: Sequence[Image | None],
    scorers: Mapping[str, Any],
    *,
    settings: Settings = Settings(),
) -> dict[str, Ratio]:
    """Sums over a picture's boxes, and counts; strictly, a missing one has no detection."""
    (image,) = images
    detections: Mapping[str, Any] = {}
    if image is not None:
        height, width = image.shape[:2]
        names = tuple(dict.fromkeys(row.names))
        found = _locator(scorers, settings)(image, names)
        # An IoU is that of the pixels: both axes are scaled for all boxes alike.
        detections = {n: boxes / np.array([width, height] * 2) for n, boxes in found.items()}
    strict = metrics.layout(np.array(row.boxes), row.names, detections, classes=row.classes)
    is_there = float(image is not None)
    official = {n: Ratio(r.total * is_there, r.count * is_there) for n, r in strict.items()}
    not_found = sum(not len(detections.get(name, ())) for name in row.names)
    failed = len(row.names) - strict["layout_success"].total[0]
    return {f"official/{n}": r for n, r in official.items()} | {
        **{f"strict/{n}": r for n, r in strict.items()},
        "failures/missing": Ratio.of(1 - is_there),
        "failures/box_not_found": Ratio.of(is_there * not_found),
        "failures/box_elsewhere": Ratio.of(is_there * (failed - not_found)),
    }


def _locator(scorers: Mapping[str, Any], settings: Settings) -> Any:
    if settings.scorer == "locate":
        return scorers["locate"]
    return of_classes(scorers["detect"], above=settings.above)


def check_scoring(rows: Sequence[Row], scorers: Mapping[str, Any]) -> None:
    """Raises UserError for a detector that lacks a class of the boxes: one by another name would
    just never be found.
    """
    if (classes := getattr(scorers.get("detect"), "classes", None)) is not None:
        for name in dict.fromkeys(name for row in rows for name in row.names):
            check_name(name, sorted(classes), what="class of the detector")


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`official/` over the pictures that are there, `strict/` over all, and each class.

    `failures/` count pictures that are missing, and boxes of those that are there.
    """
    found: Summary = {}
    for name in scores[0]:
        total = merge(column(scores, name))
        found[name] = total.value
        if name.endswith("_by_class") and name.startswith("official/"):
            short = name.removesuffix("_by_class")
            parts = zip(rows[0].classes, total.total, total.count, strict=True)
            found |= {f"{short}/{c}": float(t / n) for c, t, n in parts if n}
    return found | failure_counts(scores)


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""
    return Official(
        name="layout_boxes",
        version=1,
        read=lambda path, *, excerpt=False: read(path, settings),
        requests=functools.partial(requests, seed=settings.seed),
        needs={settings.scorer: ()},
        check_scoring=check_scoring,
        score=functools.partial(score, settings=settings),
        summary=summary,
        quality=lambda scores: scores["official/layout_miou"].value,
        primary="official/layout_success",
        settings=dataclasses.asdict(settings),
        scoring=("scorer", "detector", "above"),
    )


BENCHMARK = benchmark()
