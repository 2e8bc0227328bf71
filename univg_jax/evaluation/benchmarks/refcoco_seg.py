"""RefCOCO, RefCOCO+ and RefCOCOg: the mask of the object that a sentence refers to.

Every sentence is a sample of its own, so an object counts once for each of its sentences, as in
github.com/lichengunc/refer and what has followed it. Metrics and how a picture is read as a mask:
`evaluation.segmentation`. The sets differ in who split them: numbers of the partitions unc or umd
and of google do not compare, nor do testA (people) and testB (other things). Sentences are in lower
case without punctuation (`sent`), as they are evaluated.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines import renderings
from data_pipelines.native import coco, refer
from univg_jax.errors import NotFoundError, UserError, check_name, quote
from univg_jax.evaluation import segmentation
from univg_jax.evaluation.metrics import Image, Mask, Ratio
from univg_jax.evaluation.official import Official, Request
from univg_jax.evaluation.summaries import Scores, Summary, by_group

SPLITS = {"refcoco": ("val", "testA", "testB"), "refcoco+": ("val", "testA", "testB")}
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


def read(
    path: str | os.PathLike,
    *,
    pictures: str | os.PathLike = "",
    subsets: Sequence[str] = (),
    partition: str = "",
    splits: Sequence[str] = (),
    excerpt: bool = False,
) -> tuple[Row, ...]:
    """The sentences of a release below `path`, as `data_pipelines.datasets.refcoco` reads it.

    `pictures` is the folder of COCO's train2014 (default: `path`/train2014). Without names all
    subsets and all splits but train are taken. Raises UserError for what is missing or another
    file, or, unless it is an `excerpt`, has another number of sentences than the release.
    """
    root = os.fspath(path)
    pictures = os.fspath(pictures) or os.path.join(root, "train2014")
    rows: list[Row] = []
    for name in subsets or refer.PARTITIONS:
        check_name(name, refer.PARTITIONS, what="subset")
        subset = refer.open_subset(root, name, partition)
        if subset is not None:
            rows += _rows(subset, pictures, splits)
        elif subsets:
            expected = f"refs({partition or refer.PARTITIONS[name][0]}).p"
            raise NotFoundError(f"{root} has no {name}: expected {name}/{expected}")
    if not rows:
        which = ", ".join(splits) or "val, testA, testB or test"
        raise NotFoundError(
            f"{root} has no sentences of {which}: expected refcoco/refs(unc).p beside "
            "instances.json, or the same of refcoco+ or refcocog"
        )
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
        if official is not None and found != official:
            raise UserError(
                f"{root} has {found} sentences of {' '.join(name)} instead of {official}: expected "
                "the release of github.com/lichengunc/refer"
            )


def image_files(row: Row) -> tuple[str, ...]:
    """Where the generated mask lies; there is no official layout."""
    return (f"{row.name}.png",)


def requests(rows: Sequence[Row]) -> list[Request]:
    """The mask of each sentence, of the whole photograph."""
    return [
        Request(
            index=index,
            task="seg",
            # A sentence may be empty, or a word that is read as none, and is a sample all the same.
            inputs={"prompt": row.sentence or "-", "image": row.picture},
            files=image_files(row),
            whole=True,
        )
        for index, row in enumerate(rows)
    ]


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> dict[str, Ratio]:
    """oIoU, mIoU and precision of one sentence; no scorer is needed."""
    (image,) = images
    return segmentation.score(image, row.mask)


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """The numbers of each set, such as `refcoco_unc/testA/official/oiou`; sets are not mixed."""
    return by_set([row.name.rsplit("/", 1)[0] for row in rows], scores)


def by_set(names: Sequence[str], scores: Sequence[Scores]) -> Summary:
    """The numbers of the samples of each name, in the order in which names first come."""
    found: Summary = {}
    for name in dict.fromkeys(names):
        chosen = [entry for other, entry in zip(names, scores, strict=True) if other == name]
        found |= segmentation.summary(chosen, prefix=f"{name}/")
    return found


BENCHMARK = Official(
    name="refcoco_seg",
    version=1,
    read=functools.partial(read, subsets=("refcoco",), partition="unc"),
    requests=requests,
    score=score,
    summary=summary,
    primary="refcoco_unc/val/official/oiou",
    settings={"mask_threshold": renderings.MASK_THRESHOLD},
)
