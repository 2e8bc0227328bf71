"""Emu Edit's test set: edits by an instruction, with captions and without pictures to reach.

CLIP-T is of the caption of the edited picture (`output_caption`); CLIP-I, DINO, L1 and L2 compare
with the source, which rewards what changes little, or with what Emu Edit itself made, as AnyEdit's
AnyBench does. Papers differ in this, in the networks, in the split and in which rows they leave
out, and often do not say. So all are `Settings`, which a result stores. Cosines are published times
100.

There are two releases: the set, and Emu Edit's own results on it (`_generations`). The second calls
the test split `validation` and the validation split `test`. Here a split has the name that it has
in the set.
"""

import dataclasses
import functools
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines.native.tables import Table, get, open_table, text_of
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import similarity
from univg_jax.evaluation.inputs import TablePictures, check_count
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Published, Request, of_systems, requests_of
from univg_jax.evaluation.summaries import Scores, Summary, by_group, column, failure_counts, values
from univg_jax.fields import setting

ROWS = {"validation": 2022, "test": 3589}
RELEASES = ("set", "generations")
REFERENCES = ("source", "emu_output")
DROPS = ("equal_captions", "black_results")
_SWAPPED = {"validation": "test", "test": "validation"}
_SOURCES = {
    "set": "the parquet files of huggingface.co/datasets/facebook/emu_edit_test_set",
    "generations": "those of huggingface.co/datasets/facebook/emu_edit_test_set_generations",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What papers differ in; a result stores it.

    `drop` leaves out rows whose two captions are the same, which ask for no change, or results that
    are all black, as AnyBench does (a model that refuses then loses nothing).
    """

    clip: str = setting("ViT-B/32", "the CLIP that is given")
    dino: str = setting("dino_vits16", "the DINO that is given")
    split: str = setting("test", "as the set calls it", names=tuple(ROWS))
    release: str = setting("set", "which of the two releases is read", names=RELEASES)
    reference: str = setting("source", "what results are compared with", names=REFERENCES)
    drop: tuple[str, ...] = setting((), "what is left out, such as ['black_results']", names=DROPS)

    def check(self, where: str) -> None:
        """Raises UserError for a reference that the release does not have."""
        if self.reference == "emu_output" and self.release != "generations":
            raise UserError(f"{where}.reference=emu_output needs release=generations, which has it")

    @property
    def files(self) -> str:
        """The name of the split in this release's files."""
        return self.split if self.release == "set" else _SWAPPED[self.split]


@dataclasses.dataclass(frozen=True)
class Row:
    """An edit; `source` and `reference`, with which its result is compared, read their pictures."""

    idx: int
    task: str
    instruction: str
    caption: str
    source: Callable[[], Image]
    reference: Callable[[], Image]
    drops_black: bool = False


def read(
    path: str | os.PathLike, settings: Settings = Settings(), *, excerpt: bool = False
) -> tuple[Row, ...]:
    """The edits of the split, of a release's folder, in the order of its files.

    Raises UserError if a column is missing or a row is damaged, or, unless it is an `excerpt`, if
    the split has another number of rows, before any are dropped.
    """
    table = _open(path, settings)
    compared = "image" if settings.reference == "source" else "edited_image"
    sources, references = (TablePictures(table, name) for name in ("image", compared))
    rows, count = {}, 0
    names = ("idx", "task", "instruction", "input_caption", "output_caption")
    for part, (number, row) in ((p, r) for p in table.parts() for r in table.rows(p, names)):
        count += 1
        try:
            if isinstance(row, UserError):
                raise row
            idx, task, instruction = get(row, "idx", int), get(row, "task", str), row["instruction"]
            before, after = (text_of(row.get(k)) for k in ("input_caption", "output_caption"))
            if not after:
                raise UserError("it has no output_caption")
            if idx in rows:
                raise UserError(f"the idx {idx} is there twice: files of two uploads?")
        except UserError as error:
            raise UserError(f"{part.file} row {number}: {error}") from None
        rows[idx] = Row(
            idx=idx,
            task=task,
            instruction=text_of(instruction),
            caption=after,
            source=functools.partial(sources, number),
            reference=functools.partial(references, number),
            drops_black="black_results" in settings.drop,
        )
        if "equal_captions" in settings.drop and before == after:
            rows[idx] = None
    official = ROWS[settings.split]
    check_count(
        str(path),
        found=count,
        official=official,
        what=f"rows of {settings.split} ({settings.files}-*.parquet)",
        excerpt=excerpt,
        expected=_SOURCES[settings.release],
    )
    return tuple(row for row in rows.values() if row is not None)


def _open(path: str | os.PathLike, settings: Settings) -> Table:
    name, source = f"{settings.files}-*.parquet", _SOURCES[settings.release]
    places = [os.path.join(os.fspath(path), *inside, name) for inside in ((), ("data",))]
    files = [file for place in places for file in sorted(glob.glob(place))]
    if not files:
        raise NotFoundError(f"{path} has no {name}: expected {source}")
    table = open_table(files, what=source)
    columns = ("idx", "image", "instruction", "task", "input_caption", "output_caption")
    table.require(*columns, *(("edited_image",) if settings.release == "generations" else ()))
    return table


def image_files(row: Row) -> tuple[str, ...]:
    """Where the result lies; there is no official layout."""
    return (f"{row.idx}.png",)


def requests(rows: Sequence[Row]) -> list[Request]:
    """An edit of each source."""
    return requests_of(
        rows,
        image_files,
        task="ie",
        inputs=lambda row: {"prompt": row.instruction, "image": row.source},
        whole=True,
    )


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> dict[str, Ratio]:
    """METRICS of `similarity`, and whether the result is missing or black.

    Raises UserError for a reference that cannot be read.
    """
    (image,) = images
    is_black = image is not None and not image.any()
    values = None
    if image is not None and not (is_black and row.drops_black):
        values = similarity.compare(image, row.reference(), row.caption, scorers)
    return similarity.ratios(values) | {
        "failures/missing": Ratio.of(float(image is None)),
        "failures/black": Ratio.of(float(is_black)),
    }


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`official/` over the results that count, `strict/` over all rows, and each task's.

    In `strict/` a result that is missing or dropped has the worst numbers. `failures/` count
    results.
    """
    found: Summary = {}
    for name in similarity.METRICS:
        ratios, worst = column(scores, name), Ratio.of(similarity.WORST[name])
        found[f"official/{name}"] = merge(ratios).value
        found[f"strict/{name}"] = merge(r if r.count[0] else worst for r in ratios).value
        found |= values(f"official/{name}/", by_group([row.task for row in rows], ratios))
    return found | failure_counts(scores)


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""
    return Official(
        name="emu_edit",
        version=1,
        read=functools.partial(read, settings=settings),
        requests=requests,
        needs=similarity.NEEDS,
        weights=similarity.clip_weights(settings.clip),
        score=score,
        trivial={"copy": lambda row: row.source()},
        summary=summary,
        quality=lambda scores: scores["clip_t"].value,
        primary="official/dino",
        published=PUBLISHED if settings.reference == "source" else PUBLISHED[:1],
        settings=dataclasses.asdict(settings) | similarity.COSINE,
        scoring=("clip", "dino", "clip_score", "release", "reference", "drop"),
    )


# Which split, networks and filter these are of, the papers do not say.
_ICEDIT = "ICEdit (arXiv 2504.20690), table 1"
PUBLISHED = (
    Published("UniVG", "official/clip_t", 0.259, "UniVG (arXiv 2503.12652), 100 x cosine"),
    *of_systems("official/clip_t", _ICEDIT, {"ICEdit": 0.305, "Emu Edit": 0.306}),
    *of_systems("official/clip_i", _ICEDIT, {"ICEdit": 0.907, "Emu Edit": 0.877}),
    *of_systems("official/dino", _ICEDIT, {"ICEdit": 0.866, "Emu Edit": 0.844}),
)
BENCHMARK = benchmark()
