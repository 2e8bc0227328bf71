"""Which pictures are of which person, and where their faces are, in the usual layouts.

* folders: one for each person, as LFW and VGGFace2 have them, in a folder or a zip; a picture may
  have its caption beside it in a text file of its name;
* celeba: lists of CelebA (`identity_CelebA.txt` and others) beside its pictures;
* table: csv, tsv, jsonl or parquet with a picture, a person and more in each row, or a text file of
  `picture person` in each line.
"""

import csv
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import SPLITS, TEST, TRAIN, VALIDATION, archives, coco, tables
from univg_jax.errors import NotFoundError, UserError, quote

_SPLIT_FOLDERS = {"train": TRAIN, "val": VALIDATION, "validation": VALIDATION, "test": TEST}
_CELEBA_FOLDERS = ("", "Anno", "Eval", "Img", "celeba", "CelebA", "CelebA/Anno", "CelebA/Eval")
# Pictures of CelebA, and the list of where the faces are in these: aligned and in the wild.
_CELEBA_PICTURES = {
    "img_align_celeba": "list_landmarks_align_celeba.txt",
    "img_align_celeba_png": "list_landmarks_align_celeba.txt",
    "img_celeba": "list_bbox_celeba.txt",
}


@dataclasses.dataclass(frozen=True)
class Photo:
    """A picture of a person: its name, or the number of its row; what is known of it."""

    name: str
    caption: str = ""
    face: tuple[float, ...] = ()  # x, y, width, height or five landmarks, in pixels
    row: int = -1
    broken: str = ""  # why it cannot be read

    @classmethod
    def of(cls, name: str, caption: str, face: Sequence[float], row: int, broken: str) -> "Photo":
        """One whose numbers went through JSON."""
        return cls(name, caption, tuple(map(float, face)), row, broken)


Person = tuple[str, list[Photo]]


def share_of(person: str) -> float:
    """A number in [0, 1) that is the same for a person in every dataset and version."""
    digest = hashlib.blake2b(person.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def number_of(person: str) -> int:
    """A person's number: of one that is named by a number, that, and else a hash of the name."""
    if re.fullmatch(r"[0-9]{1,15}", person):
        return int(person)
    digest = hashlib.blake2b(person.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# Where faces are


class Regions:
    """Lists of boxes or landmarks by picture, in little memory: VGGFace2 has three million."""

    def __init__(self, files: Sequence[str]):
        self._lines: dict[str, bytearray] = {}
        self._group: tuple[str, dict[str, tuple[float, ...]]] = ("\0", {})
        for file in files:
            self._add(file)

    def of(self, name: str) -> tuple[float, ...]:
        """The numbers for a picture, with or without its suffix; () where there are none."""
        stem = name.rsplit(".", 1)[0]
        group = stem.rpartition("/")[0]
        if self._group[0] != group:
            self._group = (group, _numbers(self._lines.get(group, b"").decode().splitlines()))
        found = self._group[1]
        return found.get(name) or found.get(stem) or ()

    def _add(self, file: str) -> None:
        if not os.path.isfile(file):
            raise NotFoundError(f"{file} does not exist: expected boxes or landmarks of faces")
        try:
            with open(file, encoding="utf-8-sig", newline=None) as opened:
                for line in opened:
                    words = _words(line)
                    if len(words) not in (5, 11) or not _is_number(words[1]):
                        continue  # a count, a header
                    group = words[0].rpartition("/")[0]
                    kept = self._lines.setdefault(group, bytearray())
                    kept += ",".join(words).encode() + b"\n"
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file} cannot be read: {error}") from None
        if not self._lines:
            raise UserError(f"{file} has no `name x y width height` and no name with 5 points")


def _words(line: str) -> list[str]:
    """The words of a line of a csv or of a list, which may have several spaces between them."""
    line = line.strip()
    return next(csv.reader([line]), []) if "," in line else line.split()


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"\s*-?\d+(\.\d*)?([eE][-+]?\d+)?\s*", text))


def _numbers(lines: Sequence[str]) -> dict[str, tuple[float, ...]]:
    found: dict[str, tuple[float, ...]] = {}
    for line in lines:
        name, *values = _words(line)
        # A box says more than landmarks.
        if all(map(_is_number, values)) and (name not in found or len(values) == 4):
            found[name] = tuple(map(float, values))
    return found


# Folders


def folder_splits(root: str) -> dict[str, str]:
    """The folders (or zips) of each split: {"": root} where there are none of their names."""
    if not os.path.isdir(root):
        return {"": root}
    found = {}
    for name, split in _SPLIT_FOLDERS.items():
        for path in (os.path.join(root, name), os.path.join(root, f"{name}.zip")):
            if os.path.exists(path) and split not in found:
                found[split] = path
    if found:
        return found
    # LFW's archive has a folder `lfw` around those of the persons.
    inside = [entry for entry in sorted(os.scandir(root), key=lambda e: e.name) if _shows(entry)]
    if len(inside) == 1 and inside[0].is_dir():
        deeper = [entry for entry in os.scandir(inside[0].path) if _shows(entry)]
        if any(entry.is_dir() for entry in deeper):
            return {"": inside[0].path}
    return {"": root}


def _shows(entry: os.DirEntry) -> bool:
    return not entry.name.startswith(".") and (entry.is_dir() or archives.is_archive(entry.name))


def folder_regions(root: str, place: str) -> list[str]:
    """VGGFace2's boxes, or else landmarks, of the pictures in `place`."""
    split = os.path.basename(place).split(".")[0]
    for kind in ("bb", "landmark"):
        path = os.path.join(root, "bb_landmark", f"loose_{kind}_{split}.csv")
        if os.path.isfile(path):
            return [path]
    return []


def of_folders(place: str, regions: Regions | None) -> Iterator[Person]:
    """The persons of a folder of folders, or of a zip of them."""
    persons = _folders(place) if os.path.isdir(place) else _zipped(place)
    for person, names in persons:
        photos = [n for n in names if n.lower().endswith(archives.IMAGE_SUFFIXES)]
        beside = {n[:-4] for n in names if n.endswith(".txt")}
        yield (
            person,
            [
                Photo(
                    name,
                    caption=stem + ".txt" if (stem := name.rsplit(".", 1)[0]) in beside else "",
                    face=regions.of(name[name.rindex(f"{person}/") :]) if regions else (),
                )
                for name in photos
            ],
        )


def _folders(root: str) -> Iterator[tuple[str, list[str]]]:
    for entry in sorted(os.scandir(root), key=lambda e: e.name):
        if entry.is_dir() and not entry.name.startswith("."):
            names = [f"{entry.name}/{name}" for name, _ in archives.walk(entry.path, None)]
            if names:
                yield entry.name, names


def _zipped(path: str) -> Iterator[tuple[str, list[str]]]:
    store = coco.open_store(path)
    pictures, prefix = store.names(archives.IMAGE_SUFFIXES), ""
    # The folder around those of the persons.
    while pictures and len({name.split("/")[0] for name in pictures}) == 1:
        if min(name.count("/") for name in pictures) < 2:
            break
        prefix += pictures[0].split("/")[0] + "/"
        pictures = [name.split("/", 1)[1] for name in pictures]
    names = [name for name in store.names() if name.startswith(prefix)]
    persons: dict[str, list[str]] = {}
    for name in names:
        person, is_inside, _ = name[len(prefix) :].partition("/")
        if is_inside:
            persons.setdefault(person, []).append(name)
    for person in sorted(persons):
        yield person, sorted(persons[person])


# CelebA


@dataclasses.dataclass(frozen=True)
class Celeba:
    """The files of CelebA that there are."""

    identities: str
    partition: str
    pictures: str
    regions: str

    @classmethod
    def find(cls, root: str, pictures: str) -> "Celeba | None":
        """None without its list of identities. Raises NotFoundError without pictures."""

        def path(name: str) -> str:
            looked = (os.path.join(root, folder, name) for folder in _CELEBA_FOLDERS)
            return next((p for p in looked if os.path.exists(p)), "")

        if not os.path.isdir(root) or not (identities := path("identity_CelebA.txt")):
            return None
        kind = os.path.basename(pictures).split(".")[0]
        if not pictures:
            for kind in _CELEBA_PICTURES:
                if pictures := path(kind) or path(f"{kind}.zip"):
                    break
        if not pictures:
            expected = os.path.join(root, "img_align_celeba")
            raise NotFoundError(f"there are no pictures of CelebA: expected {expected} or .zip")
        regions = path(_CELEBA_PICTURES[kind]) if kind in _CELEBA_PICTURES else ""
        return cls(identities, path("list_eval_partition.txt"), pictures, regions)

    def persons(self, split: str) -> Iterator[Person]:
        """The persons of a split. One who is in several is of the last of them alone."""
        regions = Regions([self.regions]) if self.regions else None
        partition = dict(_pairs(self.partition)) if self.partition else {}
        persons: dict[str, list[str]] = {}
        for name, person in _pairs(self.identities):
            persons.setdefault(person, []).append(name)
        for person in sorted(persons, key=lambda p: (len(p), p)):
            names = persons[person]
            numbers = [_partition_of(partition.get(name, "0"), self.partition) for name in names]
            last = max(numbers)
            if SPLITS[last] == split:
                yield (
                    person,
                    [
                        Photo(name, face=regions.of(name) if regions else ())
                        for name, number in zip(names, numbers, strict=True)
                        if number == last
                    ],
                )


def _partition_of(text: str, file: str) -> int:
    if text not in ("0", "1", "2"):
        raise UserError(f"{file} has the partition {quote(text)}: expected 0, 1 or 2")
    return int(text)


def _pairs(file: str) -> list[tuple[str, str]]:
    """The rows of a list of two words: the last is a person or a number, the first a picture."""
    if not os.path.isfile(file):
        raise NotFoundError(f"{file} does not exist: expected lines of `picture person`")
    try:
        with open(file, encoding="utf-8-sig") as opened:
            lines = opened.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        words = line.rsplit(maxsplit=1)
        if len(words) == 1 and number == 1 and words[0].isdigit():
            continue  # a count
        if len(words) == 2:
            pairs.append((words[0].strip(), words[1]))
        elif words:
            raise UserError(f"{file} line {number} is {quote(line)}: expected `picture person`")
    if not pairs:
        raise UserError(f"{file} is empty: expected lines of `picture person`")
    return pairs


# Tables


@dataclasses.dataclass(frozen=True)
class Columns:
    """The names of a table's columns; "" for one that it does not have."""

    image: str
    person: str
    caption: str = ""
    face: str = ""


_USUAL = {
    "image": ("image", "file_name", "filename", "file", "path", "image_path", "img", "jpg"),
    "person": ("person", "identity", "person_id", "identity_id", "id", "celeb_id", "label", "name"),
    "caption": ("caption", "text", "description", "prompt"),
    "face": ("face", "bbox", "box", "face_box", "landmarks"),
}


def find_columns(table: tables.Table, given: Mapping[str, str]) -> Columns:
    """The columns by the names given, or else by usual ones. Raises UserError for a missing one."""
    found = {}
    for use, usual in _USUAL.items():
        if given.get(use):
            table.require(given[use])
        found[use] = given.get(use) or next((n for n in usual if n in table.columns), "")
        if not found[use] and use in ("image", "person"):
            raise UserError(
                f"{table.files[0]} has no column of the {use}: name it by {use}_column (it has "
                f"{', '.join(table.columns)})"
            )
    return Columns(**found)


def of_table(table: tables.Table, columns: Columns) -> Iterator[Person]:
    """The persons of a table. Rows without one are persons of their own, of a broken photo."""
    wanted = [name for name in (columns.person, columns.caption, columns.face) if name]
    persons: dict[str, list[Photo]] = {}
    for part in table.parts():
        for number, row in table.rows(part, wanted):
            photo = Photo(f"row {number}", row=number)
            try:
                person, photo = _of_row(row, columns, photo)
            except UserError as error:
                person, photo = f"row {number}", dataclasses.replace(photo, broken=str(error))
            persons.setdefault(person, []).append(photo)
    for person in sorted(persons):
        yield person, persons[person]


def _of_row(row: Any, columns: Columns, photo: Photo) -> tuple[str, Photo]:
    if isinstance(row, UserError):
        raise row
    person = row.get(columns.person)
    if person == "" or isinstance(person, bool) or not isinstance(person, int | str):
        raise UserError(f"its person is {quote(person)}: expected a name or a number")
    return str(person), dataclasses.replace(
        photo,
        caption=tables.text_of(row.get(columns.caption)) if columns.caption else "",
        face=_face(row.get(columns.face)) if columns.face else (),
    )


def of_list(file: str) -> Iterator[Person]:
    """The persons of a text file of `picture person`."""
    persons: dict[str, list[Photo]] = {}
    for name, person in _pairs(file):
        persons.setdefault(person, []).append(Photo(name))
    for person in sorted(persons):
        yield person, persons[person]


def _face(value: Any) -> tuple[float, ...]:
    """The numbers of a face, which may be text as in a csv; () for none."""
    if isinstance(value, str):
        value = re.split(r"[\s,;]+", value.strip(" []()"))
    if not isinstance(value, list | tuple):
        return ()
    numbers = [float(v) for v in value if _is_number(str(v))]
    return tuple(numbers) if len(numbers) == len(value) else ()
