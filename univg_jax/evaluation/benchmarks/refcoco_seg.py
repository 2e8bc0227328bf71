"""RefCOCO, RefCOCO+ and RefCOCOg: the mask of the object that a sentence refers to.

Every sentence is a sample of its own, so an object counts once for each of its sentences, as in
github.com/lichengunc/refer and what has followed it. Metrics and how a picture is read as a mask:
`evaluation.segmentation`. The sets differ in who split them: numbers of the partitions unc or umd
and of google do not compare, nor do testA (people) and testB (other things). Sentences are in lower
case without punctuation (`sent`), as they are evaluated.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines import renderings
from data_pipelines.native import coco, refer
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.evaluation import segmentation
from univg_jax.evaluation.inputs import check_count
from univg_jax.evaluation.metrics import Image, Mask, Ratio
from univg_jax.evaluation.official import Official, Published, Request, requests_of
from univg_jax.evaluation.summaries import Scores, Summary, by_group
from univg_jax.fields import setting

PARTITIONS = ("unc", "umd", "google")
# Sentences of each split, by the release's own count.
SENTENCES = {
    ("refcoco", "unc", "val"): 10834,
    ("refcoco", "unc", "testA"): 5657,
    ("refcoco", "unc", "testB"): 5095,
    ("refcoco+", "unc", "val"): 10758,
    ("refcoco+", "unc", "testA"): 5726,
    ("refcoco+", "unc", "testB"): 4889,
    ("refcocog", "umd", "val"): 4896,
    ("refcocog", "umd", "test"): 9602,
}

# oIoU and mIoU of CARIS, one model a set.
PUBLISHED = {
    ("refcoco", "unc"): {
        "val": (0.7513, 0.7741),
        "testA": (0.7819, 0.7971),
        "testB": (0.7175, 0.7451),
    },
    ("refcoco+", "unc"): {
        "val": (0.6663, 0.7066),
        "testA": (0.7217, 0.7482),
        "testB": (0.5854, 0.6397),
    },
    ("refcocog", "umd"): {"val": (0.6432, 0.6861), "test": (0.6582, 0.6902)},
    ("refcocog", "google"): {"val": (0.6384, 0.6780)},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Sentence `number` of ref `ref`, a place in the release's list; its photograph and object."""

    subset: str
    partition: str
    split: str
    ref: int
    number: int
    sentence: str
    picture: str
    height: int
    width: int
    segmentation: Any = dataclasses.field(repr=False, hash=False)

    @property
    def mask(self) -> Mask:
        """True on the object. Raises UserError for an annotation that is none."""
        try:
            return coco.segment(self.segmentation, self.height, self.width) > 0
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    @property
    def name(self) -> str:
        """What names it in messages and files."""
        return f"{self.subset}_{self.partition}/{self.split}/{self.ref:05}_{self.number}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Whose sentences of which splits; a result stores all but the pictures' place."""

    subset: str = setting("refcoco", "one of the three", names=tuple(refer.PARTITIONS))
    partition: str | None = setting(
        None, "who split it: unc, umd or google", names=PARTITIONS, none="unc, or umd of refcocog"
    )
    splits: tuple[str, ...] = setting((), "such as ['testA']; by default all but train")
    pictures: str = setting(
        "", "the folder of COCO's train2014; by default that beside the sentences", is_path=True
    )

    @property
    def of(self) -> str:
        """The partition."""
        return self.partition or refer.PARTITIONS[self.subset][0]


def read(
    path: str | os.PathLike, settings: Settings = Settings(), *, excerpt: bool = False
) -> tuple[Row, ...]:
    """The sentences of a release below `path`, as `data_pipelines.datasets.refcoco` reads it.

    Raises UserError for what is missing or another file, or, unless it is an `excerpt`, has another
    number of sentences than the release.
    """
    root = os.fspath(path)
    subset = refer.open_subset(root, settings.subset, settings.of)
    if subset is None:
        expected = f"{settings.subset}/refs({settings.of}).p"
        raise NotFoundError(
            f"{root} has no {settings.subset} of {settings.of}: expected {expected} beside "
            "instances.json"
        )
    pictures = settings.pictures or os.path.join(root, "train2014")
    rows = _rows(subset, pictures, settings.splits)
    absent = [name for name in settings.splits if all(row.split != name for row in rows)]
    if absent or not rows:
        which = absent[0] if absent else "val, testA, testB or test"
        raise NotFoundError(f"{root}: {subset.name} has no sentences of {which}")
    if not excerpt:
        _check_counts(root, rows)
    return tuple(rows)


def _rows(subset: refer.Subset, pictures: str, splits: Sequence[str]) -> list[Row]:
    images, segmentations = subset.read_instances()
    rows = []
    for k, ref in enumerate(subset.refs):
        if ref.split == "train" if not splits else ref.split not in splits:
            continue
        image, shape = images.get(ref.image_id), segmentations.get(ref.ann_id)
        if image is None or shape is None:
            raise UserError(
                f"{subset.instances} has not picture {quote(ref.image_id)} with annotation "
                f"{quote(ref.ann_id)}, of {subset.name} ({subset.partition}): it is of other refs"
            )
        height, width = coco.image_size(image)
        file = str(image["file_name"])
        if not re.fullmatch(r"[\w.-]+", file, re.ASCII):
            raise UserError(f"{subset.instances}: {quote(file)} is the name of no picture")
        place = os.path.join(pictures, file)
        for number, sentence in enumerate(ref.sentences):
            names = (subset.name, subset.partition, ref.split)
            rows.append(Row(*names, k, number, sentence, place, height, width, shape))
    return rows


def _check_counts(root: str, rows: Sequence[Row]) -> None:
    sets = [(row.subset, row.partition, row.split) for row in rows]
    for name, ratio in by_group(sets, [Ratio.of(1.0)] * len(rows)).items():
        found, official = int(ratio.count[0]), SENTENCES.get(name)
        check_count(
            root,
            found=found,
            official=official or found,
            what=f"sentences of {' '.join(name)}",
            excerpt=False,
            expected="the release of github.com/lichengunc/refer",
        )


def image_files(row: Row) -> tuple[str, ...]:
    """Where the generated mask lies; there is no official layout."""
    return (f"{row.name}.png",)


def requests(rows: Sequence[Row]) -> list[Request]:
    """The mask of each sentence, of the whole photograph."""
    # A sentence may be empty, or a word that is read as none, and is a sample all the same.
    return requests_of(
        rows,
        image_files,
        task="seg",
        inputs=lambda row: {"prompt": row.sentence or "-", "image": row.picture},
        whole=True,
    )


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> dict[str, Ratio]:
    """oIoU, mIoU and precision of one sentence; no scorer is needed."""
    (image,) = images
    return segmentation.score(image, row.mask)


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """The numbers of each split, such as `testA/official/oiou`; splits are not mixed."""
    return segmentation.summary([row.split for row in rows], scores)


def published(settings: Settings) -> tuple[Published, ...]:
    """Numbers of a network that segments, of each split that is asked for."""
    splits = PUBLISHED.get((settings.subset, settings.of), {})
    return tuple(
        Published("CARIS", f"{split}/official/{name}", value, "model card of CARIS (standard)")
        for split, values in splits.items()
        if not settings.splits or split in settings.splits
        for name, value in zip(("oiou", "miou"), values, strict=True)
    )


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""

    def read_rows(path: str | os.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
        return read(path, settings, excerpt=excerpt)

    return Official(
        name="refcoco_seg",
        version=1,
        read=read_rows,
        requests=requests,
        score=score,
        trivial={"everything": lambda row: segmentation.EVERYTHING},
        summary=summary,
        quality=lambda scores: scores["official/miou"].value,
        published=published(settings),
        primary=f"{(*settings.splits, 'val')[0]}/official/oiou",
        settings={
            "subset": settings.subset,
            "partition": settings.of,
            "splits": settings.splits,
            "mask_threshold": renderings.MASK_THRESHOLD,
        },
    )


BENCHMARK = benchmark()
