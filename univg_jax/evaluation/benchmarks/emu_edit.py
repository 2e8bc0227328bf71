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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines.native.tables import Table, get, open_table, picture_bytes, text_of
from univg_jax import images
from univg_jax.errors import NotFoundError, UserError, check_name
from univg_jax.evaluation import similarity
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Request
from univg_jax.evaluation.summaries import Scores, Summary, by_group, column, values

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
    """What papers differ in. Raises UserError for what is none of the names.

    `drop` leaves out rows whose two captions are the same, which ask for no change, or results that
    are all black, as AnyBench does (a model that refuses then loses nothing).
    """

    clip: str = "ViT-B/32"
    dino: str = "dino_vits16"
    split: str = "test"
    release: str = "set"
    reference: str = "source"
    drop: tuple[str, ...] = ()

    def __post_init__(self):
        check_name(self.split, ROWS, what="split of Emu Edit's test set")
        check_name(self.release, RELEASES, what="release of Emu Edit's test set")
        check_name(self.reference, REFERENCES, what="reference")
        for name in self.drop:
            check_name(name, DROPS, what="filter of Emu Edit's test set")
        if self.reference == "emu_output" and self.release != "generations":
            raise UserError("reference='emu_output' needs release='generations', which has it")

    @property
    def files(self) -> str:
        """The name of the split in this release's files."""
        return self.split if self.release == "set" else _SWAPPED[self.split]


@dataclasses.dataclass(frozen=True)
class Row:
    """An edit, and the files of its source and of what its result is compared with."""

    idx: int
    task: str
    instruction: str
    caption: str
    source: str
    reference: str
    drops_black: bool = False


def read(
    path: str | os.PathLike,
    settings: Settings = Settings(),
    *,
    pictures: str | os.PathLike = "",
    excerpt: bool = False,
) -> tuple[Row, ...]:
    """The edits of the split, of a release's folder, in the order of its files.

    Pictures are in the files, and `write_pictures` puts them into the folder `pictures` (default:
    `path`/pictures). Raises UserError if a column is missing or a row is damaged, or, unless it is
    an `excerpt`, if the split has another number of rows, before any are dropped.
    """
    table, folder = _open(path, settings), os.fspath(pictures) or os.path.join(path, "pictures")
    rows, count = {}, 0
    names = ("idx", "task", "instruction", "input_caption", "output_caption")
    for where, row in _rows(table, names):
        count += 1
        try:
            idx, task, instruction = get(row, "idx", int), get(row, "task", str), row["instruction"]
            before, after = (text_of(row.get(k)) for k in ("input_caption", "output_caption"))
            if not after:
                raise UserError("it has no output_caption")
            if idx in rows:
                raise UserError(f"the idx {idx} is there twice: files of two uploads?")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        stem = os.path.join(folder, settings.split, f"{idx}")
        source, emu = f"{stem}_source.png", f"{stem}_emu.png"
        rows[idx] = Row(
            idx=idx,
            task=task,
            instruction=text_of(instruction),
            caption=after,
            source=source,
            reference=source if settings.reference == "source" else emu,
            drops_black="black_results" in settings.drop,
        )
        if "equal_captions" in settings.drop and before == after:
            rows[idx] = None
    official = ROWS[settings.split]
    if not count or count > official or (count < official and not excerpt):
        raise UserError(
            f"{path} has {count} rows of {settings.split} ({settings.files}-*.parquet) instead of "
            f"{official}: expected {_SOURCES[settings.release]}"
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


def _rows(table: Table, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for part in table.parts():
        for number, row in table.rows(part, columns=columns):
            where = f"{part.file} row {number}"
            if isinstance(row, UserError):
                raise UserError(f"{where}: {row}")
            yield where, row


def write_pictures(path: str | os.PathLike, rows: Sequence[Row], settings: Settings) -> None:
    """Writes the sources and references of `rows` as PNG, but for those that are there.

    Raises UserError for a picture that cannot be read.
    """
    columns = {"source": "image"}
    if settings.reference == "emu_output":
        columns["reference"] = "edited_image"
    wanted = {
        (row.idx, column): file
        for row in rows
        for name, column in columns.items()
        if not (file := epath.Path(getattr(row, name))).exists()
    }
    if not wanted:
        return
    for where, found in _rows(_open(path, settings), ("idx", *columns.values())):
        for name in columns.values():
            if (file := wanted.get((found["idx"], name))) is not None:
                try:
                    images.write_png(file, images.decode_rgb(picture_bytes(found.get(name))))
                except UserError as error:
                    raise UserError(f"{where}: {name} {error}") from None


def image_files(row: Row) -> tuple[str, ...]:
    """Where the result lies; there is no official layout."""
    return (f"{row.idx}.png",)


def requests(rows: Sequence[Row]) -> list[Request]:
    """An edit of each source."""
    return [
        Request(
            index=index,
            task="ie",
            inputs={"prompt": row.instruction, "image": row.source},
            files=image_files(row),
            whole=True,
        )
        for index, row in enumerate(rows)
    ]


def score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> dict[str, Ratio]:
    """METRICS of `similarity`, and whether the result is missing or black.

    Raises UserError (NotFoundError) for a reference that cannot be read.
    """
    (image,) = images
    is_black = image is not None and not image.any()
    values = None
    if image is not None and not (is_black and row.drops_black):
        reference = similarity.read_rgb(row.reference, what="a picture of Emu Edit's test set")
        values = similarity.compare(image, reference, row.caption, scorers)
    return similarity.ratios(values) | {
        "missing": Ratio.of(float(image is None)),
        "black": Ratio.of(float(is_black)),
    }


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`official/` over the results that count, `strict/` over all rows, and each task's.

    In `strict/` a result that is missing or dropped has the worst numbers. `missing` and `black`
    count results.
    """
    found: Summary = {}
    for name in similarity.METRICS:
        ratios, worst = column(scores, name), Ratio.of(similarity.WORST[name])
        found[f"official/{name}"] = merge(ratios).value
        found[f"strict/{name}"] = merge(r if r.count[0] else worst for r in ratios).value
        found |= values(f"official/{name}/", by_group([row.task for row in rows], ratios))
    counts = {name: merge(column(scores, name)).total[0] for name in ("missing", "black")}
    return found | {name: float(count) for name, count in counts.items()}


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""
    return Official(
        name="emu_edit",
        version=1,
        read=functools.partial(read, settings=settings),
        requests=requests,
        needs=similarity.NEEDS,
        score=score,
        summary=summary,
        primary="official/dino",
        settings=dataclasses.asdict(settings),
    )


BENCHMARK = benchmark()
