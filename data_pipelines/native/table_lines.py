"""Tables of lines: csv, tsv and JSON lines. A part begins at a byte of the file."""

import codecs
import contextlib
import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence

from data_pipelines.native.table_files import (
    PART_ROWS,
    PEEK_ROWS,
    Part,
    Row,
    object_of,
    opened,
    parse,
    suffix_of,
)
from univg_jax.errors import UserError, quote

MAX_LINE_BYTES = 2**26  # pictures come in lines, too, as base64
_PEEK_BYTES = 2**20


def is_json_lines(file: str) -> bool:
    """Whether a `.json` holds an object a line: the first line is one, and another one follows."""
    with opened(file) as source:
        source.seek(after_mark(source))
        first = source.readline(_PEEK_BYTES)
        if not first.endswith(b"\n") or not first.lstrip().startswith(b"{"):
            return False
        second = source.read(_PEEK_BYTES).lstrip()
    with contextlib.suppress(ValueError, RecursionError):
        return second.startswith(b"{") and isinstance(json.loads(first), dict)
    return False


class _Lines:
    """A file of lines, some of which are a record together."""

    def __init__(self, file: str, what: str):
        self.file, self.what = file, what

    def parts(self) -> Iterator[Part]:
        count = start = 0
        with opened(self.file) as file:
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
        with opened(self.file) as file:
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


def after_mark(file: io.BufferedIOBase) -> int:
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
        with opened(self.file) as file:
            source = _Source(file, self.file, self._start(file))
            rows = [*map(self._row, itertools.islice(self._records(source), PEEK_ROWS))]
        if not any(isinstance(row, dict) for row in rows):
            why = rows[0] if rows else "it is empty"
            raise UserError(
                f"{self.file} has no lines of JSON objects, expected {self.what}: {why}"
            )
        return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))

    def _start(self, file: io.BufferedIOBase) -> int:
        return after_mark(file)

    def _records(self, source: _Source) -> Iterator[str]:
        return (line for line in source if line.strip())

    def _row(self, line: str) -> Row | UserError:
        try:
            _check_utf8(line)
            return object_of(parse(line))
        except UserError as error:
            return error


class Csv(_Lines):
    def __init__(self, file: str, what: str, header: tuple[str, ...]):
        super().__init__(file, what)
        self._delimiter = "\t" if suffix_of(file) == ".tsv" else ","
        self._given = self._names = header

    def columns(self) -> list[str]:
        with opened(self.file) as file:
            self._start(file)
        return list(self._names)

    def _start(self, file: io.BufferedIOBase) -> int:
        start = after_mark(file)
        if self._given:
            return start
        file.seek(start)
        header = file.readline(_PEEK_BYTES)
        if self._delimiter.encode() not in header:  # a csv of another country, or of pipes
            others = (mark for mark in "\t;|," if mark.encode() in header)
            self._delimiter = next(others, self._delimiter)
        source = _Source(file, self.file, start)
        first = next(self._records(source), None)
        if not first or isinstance(first, UserError):
            raise UserError(f"{self.file} has no header of columns, expected {self.what}")
        self._names = tuple(name.strip() for name in first)
        try:
            _check_utf8("".join(self._names))
        except UserError:
            raise UserError(f"{self.file} is not in UTF-8, expected {self.what}") from None
        if twice := [name for name in self._names if self._names.count(name) > 1]:
            raise UserError(f"{self.file} has the column {quote(twice[0])} twice in its header")
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
