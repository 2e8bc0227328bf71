"""Any collection of captioned pictures, in any usual form.

What `source` is, is found by looking:

* tars of WebDataset or img2dataset: `NAME.jpg`, `NAME.txt`, `NAME.json`; a zip of such files
* a folder of pictures with texts beside them: `a.jpg`, `a.txt` (or .caption, .json)
* a table (csv, tsv, jsonl, json, parquet) with pictures in it or their names, such as Hugging
  Face's imagefolder with its `metadata.csv`, and SBU's dict of columns

Which columns are the picture and the captions is told by their usual names, or by the options.
"""

import base64
import binascii
import dataclasses
import functools
import itertools
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import Dataset, Entry, Native, archives, captioned, layouts, tables
from data_pipelines.native import Options as BaseOptions
from data_pipelines.native.pictures import Files
from data_pipelines.native.tables import Table, open_table
from univg_jax.errors import UserError, quote
from univg_jax.fields import setting

# In the order in which they are looked for. Upper and lower case are the same.
PICTURES = (
    *("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "image_base64"),
    *("b64_bytes", "bytes", "file_name", "filename", "image_path", "img_path", "path"),
    *("file_path", "filepath", "file", "image_file", "image_file_name", "image_name", "img_name"),
    *("image_filename", "image_id", "image_urls", "image_url", "url"),
)
ADDRESSES = ("url", "image_url", "image_urls")
KINDS = {
    **dict.fromkeys(("caption", "text", "captions", "txt", "sentence"), "original"),
    **dict.fromkeys(("sentences", "comment"), "original"),
    **dict.fromkeys(("description", "raw_caption", "raw_text"), "original"),
    "caption_reference_description": "original",
    "caption_attribution_description": "attribution",
    **dict.fromkeys(("alt", "alt_text", "caption_alt_text_description"), "alt"),
    **dict.fromkeys(("prompt", "original_prompt"), "prompt"),
    **dict.fromkeys(("short_caption", "caption_short", "short_caption2"), "short"),
    **dict.fromkeys(("long_caption", "caption_long", "long_caption2", "dense_caption"), "long"),
    **dict.fromkeys(
        ("synthetic_caption", "generated_caption", "recaption", "re_caption"), "synthetic"
    ),
    **dict.fromkeys(
        ("blip_caption", "llava_caption", "cogvlm_caption", "vlm_caption"), "synthetic"
    ),
}
NAMES = ("key", "id", "uid", "image_id", "md5", "sha256", "url", "image_url")  # to exclude by
_DONE = "success"  # img2dataset's status of a picture that could be downloaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """Which columns or suffixes are the picture and its captions, and where pictures lie."""

    image: str = setting("", "column or suffix of the picture; none: found by its usual names")
    captions: tuple[str, ...] = setting(
        (), "columns or suffixes of captions, each NAME or NAME=KIND; none: by their usual names"
    )
    columns: tuple[str, ...] = setting((), "names of the columns of a csv or tsv without a header")
    folder: str = setting(
        "", "folder, zip or tar of the pictures that a table names; none: beside it", is_path=True
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """A part of a table, and its column of pictures."""

    picture: str
    part: tables.Part

    def __str__(self) -> str:
        return str(self.part)


@dataclasses.dataclass(frozen=True)
class Captions:
    """A collection whose form is known. `files` has the archives or tables of each split."""

    form: str  # "archives", "table" or "files"
    root: str
    files: Mapping[str, tuple[str, ...]]
    image: str = ""
    captions: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    folder: str = ""
    fields: tuple[str, ...] = captioned.FIELDS

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that the names of the files tell; all of it is `train` where they tell none."""
        return tuple(self.files)

    def parts(self, split: str) -> Sequence[Any]:
        """Archives, slices of tables, or slices of folders."""
        if self.form == "files":  # their names are too many to be sent to every process
            names = layouts.by_split(layouts.look_at(self.root).names)[split]
            return [Files(self.root, part) for part in layouts.slices(names)]
        files = self.files[split]
        if self.form == "archives":
            return files
        what = "rows with a picture and its captions"
        table = open_table(files, what=what, columns=self.columns)
        picture = self._picture_column(table)
        rows = table.parts()
        self._check_first_rows(table, picture, rows)
        return [Rows(picture, part) for part in rows]

    def entries(self, part: Any) -> Iterator[Entry]:
        """The samples of an archive or folder, or the rows of a table with their pictures."""
        if isinstance(part, Rows):
            yield from self._rows(part.picture, part.part)
            return
        if isinstance(part, Files):
            samples = captioned.grouped(archives.Store(part.root), part.names)
            prefix = ""
        else:
            samples = captioned.samples(part)
            prefix = archives.without_suffix(os.path.relpath(part, self.root or ".")) + "/"
        has_pictures, others = False, ""
        for key, sample in samples:
            has_pictures = has_pictures or captioned.picture_suffix(sample) is not None
            others = others or f"{key}.{next(iter(sample))}"
            yield Entry(key=prefix + key, raw=sample, ids=(key, os.path.basename(key)))
        if not has_pictures:
            raise UserError(
                f"{part} has no pictures in it, but {quote(others)}: expected samples such as "
                "1.jpg and 1.txt; a table in an archive must be unpacked"
            )

    def make(self, raw: Any) -> dict[str, Any]:
        """The picture with its captions. Raises UserError where either is missing."""
        if self.form == "table":
            picture, rows = raw
        else:
            picture, rows = None, [captioned.row_of(raw)]
        for row in rows:
            if (status := row.get("status")) not in (_DONE, None, ""):
                raise UserError(f"its status is {quote(status)}: it was not downloaded")
        if self.form != "table":
            picture = self._picture_of(raw)
        found = [pair for row in rows for pair in self._captions_of(row)]
        return captioned.record(picture, found)

    # Tables

    def _rows(self, picture: str, part: tables.Part) -> Iterator[Entry]:
        table = open_table(part.file, columns=self.columns)
        columns = None
        if part.file.endswith(".parquet"):  # the others need not be read
            named = {item.partition("=")[0].partition(".")[0] for item in self.captions}
            wanted = {picture, *named, *NAMES, "status", *(() if named else KINDS)}
            columns = [name for name in table.columns if {name, name.lower()} & wanted]
        store = self._store(part.file)
        for name, group in itertools.groupby(
            table.rows(part, columns), key=functools.partial(_name_of, picture)
        ):
            # Rows of one picture that follow one another are its captions.
            numbers, rows = zip(*group, strict=True)
            key = f"{numbers[0]:09d}"
            if isinstance(rows[0], UserError):
                yield Entry(key=key, raw=rows[0])
                continue
            names = {n: value for n, value in rows[0].items() if n.lower() in NAMES}
            ids = [str(value) for value in names.values() if isinstance(value, str | int)]
            if isinstance(name, str):
                ids += [name, os.path.basename(name)]
            found = _picture(rows[0].get(picture), picture, store, numbers[0])
            others = [{n: row[n] for n in row if n != picture} for row in rows]
            yield Entry(key=key, raw=(found, others), ids=tuple(ids))

    def _store(self, file: str) -> archives.Store:
        path = self.folder or os.path.dirname(file) or "."
        return _open_store(path, os.stat(path).st_mtime_ns if os.path.isfile(path) else 0)

    def _picture_column(self, table: Table) -> str:
        """The column of pictures. Raises UserError if that, or one of captions, is not there."""
        names = {name.lower(): name for name in reversed(table.columns)}
        has = f"(it has {tables.listed(table.columns)})"
        for item in self.captions:
            table.require(item.partition("=")[0].partition(".")[0])
        if not self.captions and not KINDS.keys() & names.keys():
            raise UserError(
                f"{table.files[0]} has no column of captions that is known {has}: name it by "
                "captions="
            )
        if self.image:
            table.require(self.image)
            return self.image
        found = next((names[name] for name in PICTURES if name in names), None)
        if found is None:
            raise UserError(
                f"{table.files[0]} has no column of pictures that is known {has}: name it by image="
            )
        if found.lower() in ADDRESSES and not self.folder:
            raise UserError(
                f"{table.files[0]} has no column of pictures, but their addresses {has}: download "
                "them and give folder="
            )
        return found

    def _check_first_rows(self, table: Table, picture: str, parts: list[tables.Part]) -> None:
        """One line for a folder that is not the pictures', rather than one a row."""
        part = next(iter(parts), None)
        if part is None:
            raise UserError(f"{table.files[0]} has no rows: expected {table.what}")
        why: UserError | None = None
        for number, row in itertools.islice(table.rows(part), 50):
            if isinstance(row, dict):
                found = _picture(row.get(picture), picture, self._store(part.file), number)
                if isinstance(found, bytes):
                    return
                why = why or found
            else:
                why = why or row
        raise UserError(
            f"{part.file} has no picture in column {picture!r} of its first rows: {why}"
        )

    # Samples

    def _picture_of(self, sample: Mapping[str, bytes | UserError]) -> bytes | UserError:
        suffix = self.image.lower().lstrip(".") or captioned.picture_suffix(sample)
        if suffix not in sample:
            raise UserError(
                f"it has no picture{f' .{suffix}' if suffix else ''}, but {tables.listed(sample)}"
            )
        return sample[suffix]

    def _captions_of(self, row: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """(kind, text) of a row, of a table or a sample."""
        if not self.captions:
            short = {name: name.rpartition(".")[2].lower() for name in row}
            found = [(KINDS[short[name]], row[name]) for name in row if short[name] in KINDS]
            if not found:
                raise UserError(f"it has no caption, but {tables.listed(row)}")
            return found
        found = []
        for item in self.captions:
            name, _, kind = item.partition("=")
            kind = kind or KINDS.get(name.lower().rpartition(".")[2], "original")
            found.append((kind, _within(row, name.lstrip("."))))
        return found


def _name_of(picture: str, numbered: tuple[int, Any]) -> Any:
    """The name of a row's picture; for what has none, something that no other row has."""
    number, row = numbered
    value = row.get(picture) if isinstance(row, dict) else None
    value = value.get("path") if isinstance(value, Mapping) and not value.get("bytes") else value
    return value if isinstance(value, str) and 0 < len(value) < 1000 else number


def _within(row: Mapping[str, Any], name: str) -> Any:
    """`row[name]`; `Task2.Caption` is the one in the other."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    value = row.get(outer)
    return _within(value, inner) if isinstance(value, Mapping) else None


def _picture(value: Any, column: str, store: archives.Store, number: int) -> bytes | UserError:
    """The picture that a table's value is or names."""
    try:
        if isinstance(value, str) and value.startswith("data:image"):
            value = value.partition(",")[2]
            column = "base64"
        if isinstance(value, str) and re.search(r"base64|b64", column):
            return base64.b64decode(value, validate=True)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value:
            value = next((n for n in _file_names(value, number) if n in store), value)
        return tables.picture_bytes(value, store)
    except UserError as error:
        return error
    except (binascii.Error, ValueError) as error:
        return UserError(f"the picture is not base64: {error}")


def _file_names(value: str, number: int) -> Iterator[str]:
    """How the file of a value may be named.

    That of an address is named by the end of the address, or by the row's number, as img2dataset
    and loaders of SBU do.
    """
    suffixes = (".jpg", ".jpeg", ".png", ".webp")
    if "://" not in value:
        yield value
        if not value.lower().endswith(archives.IMAGE_SUFFIXES):
            yield from (value + suffix for suffix in suffixes)
            yield from (value.zfill(12) + suffix for suffix in suffixes)  # COCO's
        return
    path = urllib.parse.urlsplit(value).path if "[" not in value else value
    base = path.rpartition("/")[2]
    yield from dict.fromkeys((base, urllib.parse.unquote(base)))
    for stem in (f"{number}", f"{number:09d}", f"{number:08d}", f"{number:07d}", f"{number:06d}"):
        yield from (stem + suffix for suffix in suffixes)


@functools.lru_cache(maxsize=4)
def _open_store(path: str, changed: int) -> archives.Store:
    """Kept open, since the names of a large archive take seconds to read."""
    return archives.Store(path)


def open_dataset(options: Options) -> dict[str, Native]:
    """Finds what the source is. Raises UserError where that is nothing known, or two things."""
    found = layouts.look_at(options.source)
    files = layouts.by_split(found.names)
    is_files = found.form == "files"
    files = {
        split: () if is_files else tuple(os.path.join(found.root, name) for name in names)
        for split, names in files.items()
    }
    native = Captions(
        form=found.form,
        root=found.root,
        files=files,
        image=options.image,
        captions=options.captions,
        columns=options.columns,
        folder=options.folder,
    )
    return {"captions": native}


DATASET = Dataset(
    name="captions",
    summary="any collection of captioned pictures: tars, tables, folders",
    tasks=("t2i", "ip"),
    options=Options,
    open=open_dataset,
    size="any: 2 billion pairs are 200,000 tars",
    license="that of the collection",
    where="LAION, CC12M, DataComp (downloaded by img2dataset), SBU, WIT, or your own",
    layout="WebDataset or img2dataset tars; a csv, tsv, jsonl, json or parquet with pictures or "
    "their names (folder=); Hugging Face imagefolder (metadata.csv or .jsonl); a.jpg + a.txt",
    quirks=(
        "the form is found by looking; columns by their usual names, or image= and captions=",
        "several captions a picture with their kinds (text: original, alt: alt, ...)",
        "files of a sample need not lie side by side in a tar; AppleDouble files are left out",
        "img2dataset: rows whose status is not success are left out",
        "SBU: pictures named by the end of their address or by number, in folder=",
        "null, empty and `None` captions are none; HTML in alt texts is removed",
        "splits are told by names (train-00000.parquet, val/...), else all is train: use hold_out",
    ),
    example="--source=laion --out=data",
)
