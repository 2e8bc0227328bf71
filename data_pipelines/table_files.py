"""The files of a table, by format: which parts they have, and the rows of a part.

`data_pipelines.tables` puts several files together and is what readers use.
"""

import codecs
import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from univg_jax.errors import NotFoundError, UserError, needs_extra, quote

PART_ROWS = 2000
MAX_LINE_BYTES = 2**26  # pictures come in lines, too, as base64
MAX_JSON_BYTES = 2**30
_BATCH_BYTES = 2**25  # of a parquet file at a time
_PEEK_ROWS, _PEEK_BYTES = 20, 2**20

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
    return os.path.splitext(file.lower().removesuffix(".gz"))[1]


@contextlib.contextmanager
def _opened(file: str) -> Iterator[io.BufferedIOBase]:
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


class _Lines:
    """A file of lines, some of which are a record together."""

    def __init__(self, file: str, what: str):
        self.file, self.what = file, what

    def parts(self) -> Iterator[Part]:
        count = start = 0
        with _opened(self.file) as file:
            source = _Source(file, self.file, self._start(file))
            start = source.position
            for _ in self._records(source):
                count += 1
                if count == PART_ROWS:
                    yield Part(self.file, 0, count, start)
                    count, start = 0, source.position
        if count:
            yield Part(self.file, 0, count, start)

    def rows(self, part: Part, columns: Sequence[str] | None) -> Iterator[Row | UserError]:
        with _opened(self.file) as file:
            self._start(file)  # also checks a file that has changed
            file.seek(part.start)
            yield from map(self._row, self._records(_Source(file, self.file, part.start)))


class _Source:
    """Lines as text, and the byte where the next one begins. What is not UTF-8 is surrogates."""

    def __init__(self, file: io.BufferedIOBase, name: str, start: int = 0):
        self._file, self._name, self.position = file, name, start
        file.seek(start)

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{self._name} has a line of more than {MAX_LINE_BYTES} bytes")
            self.position += len(line)
            yield line.decode("utf-8", "surrogateescape")


def _after_mark(file: io.BufferedIOBase) -> int:
    """Where the text begins: after a byte order mark."""
    file.seek(0)
    start = file.read(3)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{file.name} is in UTF-16: expected UTF-8")
    return 3 if start == codecs.BOM_UTF8 else 0


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError("the row is not in UTF-8") from None


class JsonLines(_Lines):
    def columns(self) -> list[str]:
        with _opened(self.file) as file:
            source = _Source(file, self.file, self._start(file))
            rows = [*map(self._row, itertools.islice(self._records(source), _PEEK_ROWS))]
        if not any(isinstance(row, dict) for row in rows):
            why = rows[0] if rows else "it is empty"
            raise UserError(
                f"{self.file} has no lines of JSON objects, expected {self.what}: {why}"
            )
        return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))

    def _start(self, file: io.BufferedIOBase) -> int:
        return _after_mark(file)

    def _records(self, source: _Source) -> Iterator[str]:
        return (line for line in source if line.strip())

    def _row(self, line: str) -> Row | UserError:
        try:
            _check_utf8(line)
            return _object(_parse(line))
        except UserError as error:
            return error


class Csv(_Lines):
    def __init__(self, file: str, what: str, header: tuple[str, ...]):
        super().__init__(file, what)
        self._delimiter = "\t" if suffix_of(file) == ".tsv" else ","
        self._given = self._names = header

    def columns(self) -> list[str]:
        with _opened(self.file) as file:
            self._start(file)
        return list(self._names)

    def _start(self, file: io.BufferedIOBase) -> int:
        start = _after_mark(file)
        if self._given:
            return start
        source = _Source(file, self.file, start)
        first = next(self._records(source), None)
        if not first or isinstance(first, UserError):
            raise UserError(f"{self.file} has no header of columns, expected {self.what}")
        self._names = tuple(name.strip() for name in first)
        with_twice = [name for name in self._names if self._names.count(name) > 1]
        try:
            _check_utf8("".join(self._names))
        except UserError:
            with_twice = ["that is not in UTF-8"]
        if with_twice:
            raise UserError(
                f"{self.file} has the column {quote(with_twice[0])} twice in its header"
            )
        return source.position

    def _records(self, source: _Source) -> Iterator[list[str] | UserError]:
        csv.field_size_limit(MAX_LINE_BYTES)
        reader = csv.reader(iter(source), delimiter=self._delimiter)
        while True:
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                record = UserError(f"the row is not csv: {error}")
            if record:  # not a blank line
                yield record

    def _row(self, record: list[str] | UserError) -> Row | UserError:
        if isinstance(record, UserError):
            return record
        names = self._names
        if len(record) != len(names):
            return UserError(f"the row has {len(record)} fields, the header {len(names)}")
        try:
            _check_utf8("".join(record))
        except UserError as error:
            return error
        return dict(zip(names, record, strict=True))


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError("the JSON is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"it is not JSON: {error}") from None


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"the row is a {type(value).__name__}: expected a JSON object")
    return value


def is_json_lines(file: str) -> bool:
    """Whether a `.json` holds an object a line: the first line is one, and another one follows."""
    with _opened(file) as opened:
        opened.seek(_after_mark(opened))
        first = opened.readline(_PEEK_BYTES)
        if not first.endswith(b"\n") or not first.lstrip().startswith(b"{"):
            return False
        second = opened.read(_PEEK_BYTES).lstrip()
    with contextlib.suppress(ValueError, RecursionError):
        return second.startswith(b"{") and isinstance(json.loads(first), dict)
    return False


@functools.lru_cache(maxsize=1)
def _load_json(file: str, key: str, what: str, changed: tuple[int, int]) -> list[Any] | Row:
    """The rows of a JSON file: a list, or a dict of lists that are its columns."""
    with _opened(file) as opened:
        content = opened.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise UserError(
            f"{file} has more than {MAX_JSON_BYTES} bytes of JSON: write an object a line (.jsonl)"
        )
    try:
        value = _parse(content.decode("utf-8-sig"))
    except UserError as error:
        raise UserError(f"{file}: {error}; expected {what}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not in UTF-8; expected {what}") from None
    if isinstance(value, dict):
        value = value.get(key) if key else _rows_within(value, file, what)
    if not isinstance(value, list | dict):
        named = f" named {quote(key)}" if key else ""
        raise UserError(f"{file} has no list{named} of rows; expected {what}")
    return value


def _rows_within(value: Row, file: str, what: str) -> list[Any] | Row | None:
    lists = {name: one for name, one in value.items() if isinstance(one, list)}
    rows = {name: one for name, one in lists.items() if one and isinstance(one[0], dict)}
    if len(rows) == 1:
        return next(iter(rows.values()))
    if rows:
        raise UserError(f"{file} has the lists {', '.join(map(quote, rows))}; expected {what}")
    if lists and len(lists) == len(value):
        lengths = {name: len(one) for name, one in lists.items()}
        if len(set(lengths.values())) > 1:
            raise UserError(f"{file} has columns of different lengths: {quote(lengths, 200)}")
        return lists
    return None


class Json:
    def __init__(self, file: str, what: str, key: str):
        with _opened(file) as opened:
            stat = os.fstat(opened.fileno())
        self.file = file
        self._value = _load_json(file, key, what, (stat.st_mtime_ns, stat.st_size))

    def columns(self) -> list[str]:
        if isinstance(self._value, dict):
            return list(self._value)
        rows = [row for row in self._value[:_PEEK_ROWS] if isinstance(row, dict)]
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
                yield _object(self._value[k])
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
                yield UserError(f"the row cannot be read: {error}")
