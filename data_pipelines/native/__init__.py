"""Native datasets: from files as they were published to records.

A `Native` lists the parts of a split, reads the entries of a part, and makes a record of an entry.
A build calls these in any process, in any order and again after a kill, so each is a function of
its arguments and of the files alone:

    parts(split)  -> what one process reads on its own: an archive, a slice of a list
    entries(part) -> its `Entry`s in order, cheaply: bytes and rows, nothing decoded
    make(raw)     -> the record, in stored form (`data_pipelines.records`)

What is wrong with a file of the dataset (missing, truncated, of another dataset) is a UserError of
`parts` or `entries`: one line that says which file was expected where, and ends the build. What is
wrong with one entry is a UserError of `make`: the entry is left out, by name.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from etils import epath

from univg_jax import fields
from univg_jax.errors import UserError
from univg_jax.fields import setting

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")

Part = Any  # picklable; its str() is part of messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing to make a record of.

    `key` names it, once in a split, whatever else is built. `raw` is picklable, and what `make`
    takes; a UserError in its place says why there is no record. `ids` are other names by which an
    entry may be excluded, such as the id of its COCO picture.
    """

    key: str
    raw: Any
    ids: tuple[str, ...] = ()


@runtime_checkable
class Native(Protocol):
    """An opened native dataset. Picklable: it goes to other processes."""

    fields: tuple[str, ...]  # of every record
    splits: tuple[str, ...]  # of SPLITS, those that the files have

    def parts(self, split: str) -> Sequence[Part]:
        """The parts of a split, in order. Raises UserError (NotFoundError) for a missing file."""
        ...

    def entries(self, part: Part) -> Iterator[Entry]:
        """The entries of a part, in order. Raises UserError for a file that cannot be read."""
        ...

    def make(self, raw: Any) -> Mapping[str, Any]:
        """The record of an entry. Raises UserError, whose message says what is wrong with it."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What every dataset of native files can be told; a dataset's own options extend it."""

    source: str = setting("", "folder or file with the native files", is_path=True)
    split: tuple[str, ...] = setting(
        (), "splits to build; none: all that the files have", names=SPLITS
    )
    limit: int | None = setting(
        None, "records of a split, at most", least=1, none="all", unit="records"
    )
    exclude_ids: str = setting("", "file of keys or ids, one a line, to leave out", is_path=True)
    hold_out: float = setting(
        0.0,
        "share of the training split that becomes the validation split, where the files have none",
        least=0,
        below=1,
        unit="fraction",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoOptions(Options):
    """The options of a dataset of COCO's pictures, whose entries have the ids of these."""

    exclude: str = setting(
        "",
        "pictures of benchmarks to leave out, NAME:PATH with commas: refcoco:DIR, coco_val:FILE, "
        "karpathy:FILE, magicbrush:DIR",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset that can be built: `DATASETS` has one of each module in `data_pipelines/datasets`.

    `open(options)` gives its families by name: each is a folder of records of the same fields. It
    imports what only a build needs, so that this object loads quickly. It raises UserError for
    options that cannot be.
    """

    name: str
    summary: str
    tasks: tuple[str, ...]  # names in `tasks.TASKS` that its records serve
    options: type = Options
    families: tuple[str, ...] = ()  # () is one family of the dataset's name
    open: Callable[[Any], Mapping[str, Native]]
    version: str = "1.0.0"  # of the records: any change of what an entry gives moves it
    # For docs/datasets.md.
    size: str = ""  # such as "4.2M pictures, 3.1 TB"
    license: str = ""  # also stored beside the records
    where: str = ""  # where to get it, as a publisher's name and not an address
    layout: str = ""  # what `source` is, file by file
    quirks: tuple[str, ...] = ()  # what the reader takes care of
    example: str = ""  # flags after `univg data build --dataset=NAME`

    def make_options(self, values: Mapping[str, Any], *, where: str = "data.build") -> Any:
        """`values` as `options`, with the defaults of those left out.

        `where` they were given is part of messages. Raises UserError for an unknown name, with the
        nearest one, and for a value of another type or out of range.
        """
        return fields.make(self.options, values, where)

    @staticmethod
    def excluded(options: Any) -> frozenset[str]:
        """The keys and ids that `options` leave out. Raises UserError for a file without any."""
        leaks = frozenset()
        if spec := getattr(options, "exclude", ""):
            from data_pipelines.native import exclusions  # which reads native files

            leaks = exclusions.ids(spec)
        if not (path := getattr(options, "exclude_ids", "")):
            return leaks
        try:
            text = epath.Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise UserError(f"exclude_ids={path}: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise UserError(f"exclude_ids={path}: expected a text, an id in each line") from None
        found = frozenset(line.strip() for line in text.splitlines()) - {""}
        if not found:
            raise UserError(f"exclude_ids={path} has no ids: expected one in each line")
        return found | leaks
