"""Rows of the tables that datasets come in: csv, tsv, JSON, JSON lines and parquet.

    table = open_table("data/train-*.parquet", what="rows of captions")
    for part in table.parts():
        for number, row in table.rows(part, columns=("text", "image")):
            ...

A table may be several files, which are then one after another, and `number` counts through all of
them from 0. Memory is flat: a part is read as a stream, but for `.json`, which is held whole. A
damaged row is a UserError in its place; a damaged file ends the reading.
"""

import contextlib
import dataclasses
import functools
import glob
import html
import itertools
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import archives
from data_pipelines.native.table_files import Format, Json, Parquet, Part, Row, suffix_of
from data_pipelines.native.table_lines import Csv, JsonLines, is_json_lines
from univg_jax.errors import NotFoundError, UserError, quote, suggestion

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json")  # the first there are wins
_NOTHING = {"", "none", "null", "nan", "n/a", "<na>"}
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>|<!--.*?-->", re.DOTALL)
_NOT_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u200b\ufeff\ufffe\uffff\ud800-\udfff]")


def open_table(
    path: str | os.PathLike | Sequence[str],
    *,
    what: str = "a table",
    columns: Sequence[str] = (),
    key: str = "",
) -> "Table":
    """A table of a file, a folder, a pattern such as `data/*.parquet`, or a list of files.

    Of a folder, all files (also deeper ones) of the first of SUFFIXES that there are. `what` is
    expected there, for messages. `columns` names those of a csv or tsv without a header, and
    `key` the list to take of a JSON object that has several. Raises NotFoundError where no file is,
    and UserError for one of another kind.
    """
    found = _find(path, what)
    for file in found:
        if suffix_of(file) not in SUFFIXES:
            raise UserError(
                f"{file} is no table that can be read: expected {what}, as {', '.join(SUFFIXES)}"
            )
    return Table(files=tuple(found), what=what, header=tuple(columns), key=key)


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one or more files. Picklable. `open_table` makes it."""

    files: tuple[str, ...]
    what: str = "a table"
    header: tuple[str, ...] = ()
    key: str = ""

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns, in order of appearance; of JSON, those of the first rows."""
        names: dict[str, None] = {}
        for file in self.files:
            names |= dict.fromkeys(self._format(file).columns())
        return tuple(names)

    def require(self, *columns: str) -> None:
        """Raises UserError with the nearest name if a column is not there."""
        for column in columns:
            if column not in self.columns:
                raise UserError(
                    f"{self.files[0]} has no column {quote(column)}, expected of {self.what}"
                    f"{suggestion(column, [_word(name) for name in self.columns])}"
                )

    def parts(self) -> list[Part]:
        """What one process reads on its own: at most PART_ROWS rows, in order.

        Files of lines are read through once, for where the parts begin.
        """
        parts: list[Part] = []
        for file in self.files:
            for part in self._format(file).parts():
                before = parts[-1].first + parts[-1].count if parts else 0
                parts.append(dataclasses.replace(part, first=before))
        return parts

    def rows(
        self, part: Part, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[int, Row | UserError]]:
        """The numbered rows of a part: their values by column, of `columns` alone if given.

        What a row does not have is not in it: a column that only other files have, or that has no
        type in parquet. Raises UserError for a file that cannot be read.
        """
        rows = self._format(part.file).rows(part, columns)
        for number, row in enumerate(itertools.islice(rows, part.count), part.first):
            if columns is not None and isinstance(row, dict):
                row = {name: row[name] for name in columns if name in row}
            yield number, row

    def _format(self, file: str) -> Format:
        suffix = suffix_of(file)
        if suffix == ".parquet":
            return Parquet(file, self.what)
        if suffix in (".csv", ".tsv"):
            return Csv(file, self.what, self.header)
        if suffix == ".json" and not is_json_lines(file):
            return Json(file, self.what, self.key)
        return JsonLines(file, self.what)


def get(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
    """`row[key]` as a str, int, float, bool, list or dict; `default`, if given, for None or none.

    Numbers may be text, as in a csv, and a whole float is an int. Raises UserError with the key,
    what is there and what was expected.
    """
    value = row.get(key)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if value is None or (value == "" and str not in kinds):
        if default is not ...:
            return default
        if key in row:
            raise UserError(f"{quote(key)} is {'empty' if value == '' else 'null'}")
        raise UserError(f"there is no {quote(key)}{suggestion(key, [_word(name) for name in row])}")
    for one in kinds:
        if one in (int, float) and isinstance(value, int | float | str):
            with contextlib.suppress(ValueError, OverflowError):
                number = float(value)
                is_one = not isinstance(value, bool) and math.isfinite(number)
                if one is int and is_one and number == int(number):
                    return int(value) if not isinstance(value, str) else int(number)
                if one is float and is_one:
                    return number
        elif isinstance(value, one):
            return value
    names = " or ".join(one.__name__ for one in kinds)
    raise UserError(f"{quote(key)} is {quote(value)}, a {type(value).__name__}: expected {names}")


def listed(names: Iterable[Any], most: int = 20) -> str:
    """Names of anybody's, for a message: in one line, and not too many."""
    words = [_word(name) for name in itertools.islice(names, most + 1)]
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "") or "nothing"


def _word(name: Any) -> str:
    word = " ".join(str(name)[:60].split())
    return word if word.isprintable() else repr(word)


def text_of(value: Any) -> str:
    """A native text as one line: "" for none, without HTML, in NFC, white space collapsed.

    None, NaN and the words for them ("None", "null") are none. Raises UserError for what is no
    text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise UserError(f"{quote(value)} is not in UTF-8: expected a text") from None
    if isinstance(value, UserError):
        raise value
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise UserError(f"{quote(value)} is a {type(value).__name__}: expected a text")
    text = _TAG.sub(" ", html.unescape(value))
    text = " ".join(_NOT_TEXT.sub(" ", unicodedata.normalize("NFC", text)).split())
    return "" if text.lower() in _NOTHING else text


def picture_bytes(value: Any, store: archives.Store | None = None) -> bytes:
    """The file of a picture: of its bytes, its name in `store`, or a struct of `bytes` and `path`.

    Raises UserError (NotFoundError) where there is none.
    """
    if isinstance(value, Mapping):
        content = value.get("bytes")
        value = value.get("path") if content is None else content
    if isinstance(value, bytes | bytearray | memoryview):
        if not len(value):
            raise UserError("the picture is empty")
        return bytes(value)
    if isinstance(value, UserError):
        raise value
    if not isinstance(value, str) or not value:
        raise UserError(f"there is no picture, but {quote(value)}")
    if re.match(r"[a-z0-9+]{2,}://", value, re.IGNORECASE):
        raise UserError(f"the picture {quote(value)} is an address: expected its file or bytes")
    if store is None:
        raise UserError(f"the picture {quote(value)} is a name, and no folder is given for it")
    return store.read(value)


# Files


def _find(path: str | os.PathLike | Sequence[str], what: str) -> list[str]:
    if not isinstance(path, str | os.PathLike):
        return [file for one in path for file in _find(one, what)]
    path = os.fspath(path)
    if os.path.isdir(path):
        files = [file for _, file in archives.walk(path, None)]
        for suffix in SUFFIXES:
            if chosen := [file for file in files if suffix_of(file) == suffix]:
                return chosen
        raise NotFoundError(f"{path} has no {', '.join(SUFFIXES)}: expected {what}")
    if os.path.exists(path):
        return [path]
    if files := sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file)):
        return files
    raise NotFoundError(f"{path} does not exist: expected {what}")
