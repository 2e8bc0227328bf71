"""The official input files of benchmarks, which the user supplies.

A file is read whole. What is missing, torn or another file is one line, which says what was
expected where. An excerpt is a file of the official format with fewer rows, as tests have them.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from data_pipelines.native.table_files import Part
from data_pipelines.native.tables import Table, picture_bytes
from univg_jax import images
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.evaluation.metrics import Image


def check_count(
    where: str, *, found: int, official: int, what: str, excerpt: bool, expected: str
) -> None:
    """Raises UserError unless `where` has as many `what` as published, or fewer in an `excerpt`."""
    if not 0 < found <= official or (found < official and not excerpt):
        hint = " (--excerpt takes fewer)" if 0 < found < official else ""
        raise UserError(
            f"{where} has {found} {what} instead of {official}{hint}: expected {expected}"
        )


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file by its official name; `source` says in messages what it is and who publishes it."""

    name: str
    source: str

    def at(self, path: epath.PathLike) -> epath.Path:
        """The file at `path`, which is the file or its folder. Raises NotFoundError."""
        path = epath.Path(path)
        file = path / self.name if path.is_dir() else path
        if not file.exists() or file.is_dir():
            raise NotFoundError(f"{file} does not exist: expected {self.name}, {self.source}")
        return file

    def error(self, path: epath.PathLike, reason: str) -> UserError:
        """The error that says why the file at `path` is not this one."""
        return UserError(f"{os.fspath(path)} {reason}: expected {self.name}, {self.source}")

    def text(self, path: epath.PathLike) -> str:
        """The content, with "\\n" at the end of lines. Raises UserError unless it is UTF-8."""
        file = self.at(path)
        try:
            text = file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise self.error(file, "is not text in UTF-8") from None
        except OSError as error:
            raise self.error(file, f"cannot be read ({error.strerror or error})") from None
        return text.replace("\r\n", "\n")

    def sha256(self, path: epath.PathLike) -> str:
        """The hash of the file, which results store of what moves numbers."""
        return hashlib.sha256(self.at(path).read_bytes()).hexdigest()

    def lines(self, path: epath.PathLike) -> list[str]:
        """The lines, without those that are blank at the end."""
        lines = self.text(path).split("\n")
        while len(lines) > 1 and not lines[-1].strip():
            lines.pop()
        return lines

    def objects(self, path: epath.PathLike, fields: Sequence[str]) -> list[dict[str, Any]]:
        """The JSON objects of a file with one a line. Each must have all `fields`."""
        found = []
        for number, line in enumerate(self.lines(path), 1):
            value = self._json(path, line, where=f"line {number}")
            if not isinstance(value, dict):
                raise self.error(self.at(path), f"has no object in line {number}")
            if missing := [name for name in fields if name not in value]:
                raise self.error(self.at(path), f"has no {quote(missing[0])} in line {number}")
            found.append(value)
        return found

    def json(self, path: epath.PathLike) -> Any:
        """The JSON value that the file is."""
        return self._json(path, self.text(path), where="the file")

    def table(
        self, path: epath.PathLike, columns: Sequence[str], *, separator: str = ","
    ) -> list[dict[str, str]]:
        """The rows of a table with these columns, which may have others.

        Quotes are part of the format where the separator is a comma.
        """
        file, text = self.at(path), "\n".join(self.lines(path))
        quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
        reader = csv.DictReader(
            io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True
        )
        try:
            rows = list(reader)
        except csv.Error as error:
            raise self.error(file, f"is torn at line {reader.line_num} ({error})") from None
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise self.error(file, f"has no column {missing[0]!r}")
        for number, row in enumerate(rows, 1):
            if None in row or None in row.values():
                raise self.error(file, f"is torn at row {number}, which lacks or exceeds columns")
        return rows

    def check_count(
        self, path: epath.PathLike, *, found: int, official: int, what: str, excerpt: bool
    ) -> None:
        """Raises UserError unless there are as many `what` as in the official file, or fewer in an
        `excerpt`.
        """
        check_count(
            str(self.at(path)),
            found=found,
            official=official,
            what=what,
            excerpt=excerpt,
            expected=f"{self.name}, {self.source}",
        )

    def _json(self, path: epath.PathLike, text: str, *, where: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(self.at(path), f"is torn, {where} is not JSON ({error})") from None


class TablePictures:
    """The pictures of a table's column, by the numbers of their rows, read as a stream.

    Any number of threads ask for rows in about their order. The last pictures are kept as files;
    for a row from before them its part of the table is read again.
    """

    KEPT = 256

    def __init__(self, table: Table, column: str):
        self._table, self._column = table, column
        self._kept: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._parts = table.parts()
        self._part: Part | None = None
        self._rows: Iterator[tuple[int, Any]] = iter(())
        self._next = 0

    def __call__(self, number: int) -> Image:
        """The picture of a row. Raises UserError, with its file, where there is none."""
        with self._lock:
            part, row = self._row(number)
        try:
            if isinstance(row, UserError):
                raise row
            return images.decode_rgb(picture_bytes(row.get(self._column)))
        except UserError as error:
            where = f"{part.file} row {number}: {self._column}"
            raise UserError(f"{where} {error}") from None

    def _row(self, number: int) -> tuple[Part, Any]:
        part = next(p for p in self._parts if p.first <= number < p.first + p.count)
        if number in self._kept:
            return part, self._kept[number]
        if part != self._part or number < self._next:
            self._part, self._next = part, part.first
            self._rows = iter(self._table.rows(part, columns=(self._column,)))
        while self._next <= number:
            self._next, row = next(self._rows)
            self._kept[self._next] = row
            self._next += 1
            if len(self._kept) > self.KEPT:
                del self._kept[next(iter(self._kept))]
        return part, self._kept[number]
