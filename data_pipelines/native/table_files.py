"""The files of a table, by format: which parts they have, and the rows of a part.

`data_pipelines.native.tables` puts several files together and is what readers use.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from univg_jax.errors import NotFoundError, UserError, needs_extra, quote

PART_ROWS = 2000
MAX_JSON_BYTES = 2**30
_BATCH_BYTES = 2**25  # of a parquet file at a time
PEEK_ROWS = 20

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of one file: `count` from `first` of the table, `start` is where the reader finds them.

    That is a byte of a file of lines, and a place in the row group `group` of a parquet file.
    """

    file: str
    first: int
    count: int
    start: int = 0
    group: int = 0

    def __str__(self) -> str:
        return f"{self.file} rows {self.first}-{self.first + self.count - 1}"


@runtime_checkable
class Format(Protocol):
    """One file of a table."""

    def columns(self) -> list[str]:
        """The names of its columns; of JSON, those of the first rows."""
        ...

    def parts(self) -> Iterator[Part]:
        """Its parts, whose `first` is not yet known."""
        ...

    def rows(self, part: Part, columns: Sequence[str] | None) -> Iterator[Row | UserError]:
        """The rows of a part, or more."""
        ...


def suffix_of(file: str) -> str:
    """The suffix of a table's name, in lower case and without that of gzip."""
    return os.path.splitext(file.lower().removesuffix(".gz"))[1]


@contextlib.contextmanager
def opened(file: str) -> Iterator[io.BufferedIOBase]:
    """A file, unpacked if it is gzip. What is wrong with it is a UserError with its name."""
    if not os.path.isfile(file):
        raise NotFoundError(f"{file} is not a file")
    try:
        with open(file, "rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**18) if is_gzip else raw
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read: {error}") from error


def parse(text: str) -> Any:
    """What JSON says. Raises UserError, which names no file."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"it is not JSON: {error}") from None


def object_of(value: Any) -> Row:
    """The value as a row. Raises UserError if it is no object."""
    if not isinstance(value, dict):
        raise UserError(f"the row is a {type(value).__name__}: expected a JSON object")
    return value


@functools.lru_cache(maxsize=1)
def _load_json(file: str, key: str, what: str, changed: tuple[int, int]) -> list[Any] | Row:
    """The rows of a JSON file: a list, or a dict of lists that are its columns."""
    with opened(file) as source:
        content = source.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise UserError(
            f"{file} has more than {MAX_JSON_BYTES} bytes of JSON: write an object a line (.jsonl)"
        )
    try:
        value = parse(content.decode("utf-8-sig"))
    except UserError as error:
        raise UserError(f"{file}: {error}; expected {what}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not in UTF-8; expected {what}") from None
    if isinstance(value, dict):
        value = _rows_within(value, file, what) if not key else value.get(key)
        value = None if key and isinstance(value, dict) else value
    if not isinstance(value, list | dict):
        named = f" named {quote(key)}" if key else ""
        raise UserError(f"{file} has no list{named} of rows; expected {what}")
    return value


def _rows_within(value: Row, file: str, what: str) -> list[Any] | Row | None:
    """The rows of an object: its one list, what COCO's two say together, columns, or by name."""
    lists = {name: one for name, one in value.items() if isinstance(one, list)}
    rows = {name: one for name, one in lists.items() if one and isinstance(one[0], dict)}
    if {"images", "annotations"} <= rows.keys() and "caption" in rows["annotations"][0]:
        return _with_captions(rows["images"], rows["annotations"])
    if len(rows) == 1:
        return next(iter(rows.values()))
    if rows:
        raise UserError(f"{file} has the lists {', '.join(map(quote, rows))}; expected {what}")
    if lists and len(lists) == len(value):
        lengths = {name: len(one) for name, one in lists.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{file} has columns of different lengths: {quote(lengths, 200)}")
        return lists
    if value and all(isinstance(one, dict) for one in value.values()):
        return [{"file_name": name, **one} for name, one in value.items()]
    return None


def _with_captions(images: list[Any], annotations: list[Any]) -> list[Any]:
    """The rows of COCO's pictures, each with its `captions`."""
    captions: dict[Any, list[Any]] = {}
    for one in annotations:
        if isinstance(one, dict) and isinstance(one.get("image_id"), int | str):
            captions.setdefault(one["image_id"], []).append(one.get("caption"))
    return [
        {**one, "captions": captions.get(one.get("id"), [])}
        if isinstance(one, dict) and isinstance(one.get("id"), int | str)
        else one
        for one in images
    ]


class Json:
    def __init__(self, file: str, what: str, key: str):
        with opened(file) as source:
            stat = os.fstat(source.fileno())
        self.file = file
        self._value = _load_json(file, key, what, (stat.st_mtime_ns, stat.st_size))

    def columns(self) -> list[str]:
        if isinstance(self._value, dict):
            return list(self._value)
        rows = [row for row in self._value[:PEEK_ROWS] if isinstance(row, dict)]
        return list(dict.fromkeys(name for row in rows for name in row))

    def parts(self) -> Iterator[Part]:
        value = self._value
        total = len(next(iter(value.values()))) if isinstance(value, dict) else len(value)
        for start in range(0, total, PART_ROWS):
            yield Part(self.file, 0, min(PART_ROWS, total - start), start)

    def rows(self, part: Part, columns: Sequence[str] | None) -> Iterator[Row | UserError]:
        for k in range(part.start, part.start + part.count):
            if isinstance(self._value, dict):
                yield {name: values[k] for name, values in self._value.items()}
                continue
            try:
                yield object_of(self._value[k])
            except UserError as error:
                yield error


class Parquet:
    def __init__(self, file: str, what: str):
        self.file, self.what = file, what

    def columns(self) -> list[str]:
        with self._open() as file:
            return self._named(file, None)

    def parts(self) -> Iterator[Part]:
        with self._open() as file:
            counts = [
                file.metadata.row_group(group).num_rows
                for group in range(file.metadata.num_row_groups)
            ]
        for group, count in enumerate(counts):
            for start in range(0, count, PART_ROWS):
                yield Part(self.file, 0, min(PART_ROWS, count - start), start, group)

    def rows(self, part: Part, columns: Sequence[str] | None) -> Iterator[Row | UserError]:
        with self._open() as file:
            names = self._named(file, columns)
            if not names:
                yield from ({} for _ in range(part.count))
                return
            group = file.metadata.row_group(part.group)
            size = max(group.total_byte_size // max(group.num_rows, 1), 1)
            batches = file.iter_batches(
                min(max(_BATCH_BYTES // size, 1), PART_ROWS),
                row_groups=[part.group],
                columns=names,
                use_threads=False,
            )
            skip, left = part.start, part.count
            for batch in batches:
                if skip < batch.num_rows:
                    batch = batch.slice(skip, left)
                    yield from _rows_of(batch)
                    left -= batch.num_rows
                    skip = 0
                else:
                    skip -= batch.num_rows
                if left <= 0:
                    return
            raise UserError(f"{self.file} is damaged: row group {part.group} has too few rows")

    def _named(self, file: Any, columns: Sequence[str] | None) -> list[str]:
        """The columns that the file has, in its order. Those of no type have no values."""
        schema = file.schema_arrow
        names = [field.name for field in schema if str(field.type) != "null"]
        return [name for name in names if columns is None or name in columns]

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        with needs_extra("data", f"reading {self.file}"):
            import pyarrow as pa
            import pyarrow.parquet as pq
        if not os.path.isfile(self.file):
            raise NotFoundError(f"{self.file} is not a file: expected {self.what}")
        try:
            # With a buffer a row group of pictures is not held whole, but a page: 1,024 rows of
            # pyarrow's default, fewer where Hugging Face writes.
            with pq.ParquetFile(self.file, buffer_size=2**22, pre_buffer=False) as file:
                yield file
        except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
            if isinstance(error, UserError):
                raise
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{self.file} is not whole parquet, of {self.what}: {why}") from error


def _rows_of(batch: Any) -> Iterator[Row | UserError]:
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):  # such as text that is not UTF-8, or a date too far away
        for k in range(batch.num_rows):
            try:
                yield {name: batch.column(name)[k].as_py() for name in batch.schema.names}
            except (ValueError, OverflowError) as error:
                yield UserError(f"the row cannot be read: {quote(str(error))}")
