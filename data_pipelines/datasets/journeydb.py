"""JourneyDB: pictures by Midjourney with their prompts, and captions by a model.

Pictures are in `imgs/NNN.tgz`, captions of all of them in one file of gigabytes. A part is an
archive (or its unpacked folder). It reads the annotations through once and keeps those of its own
pictures: some 20,000 of 4.2 million. That takes a tenth of what its pictures take, needs no index
on a disk that all machines of a build would share, and memory stays flat.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.native import (
    TEST,
    TRAIN,
    VALIDATION,
    Dataset,
    Entry,
    Native,
    Options,
    archives,
    captioned,
)
from data_pipelines.native.tables import get, text_of
from univg_jax.errors import NotFoundError, UserError

FOLDERS = {TRAIN: ("train",), VALIDATION: ("valid", "val", "validation"), TEST: ("test",)}
MIN_LETTERS = 5  # of a caption: shorter ones are failures of the model that wrote them
_NAMES = r"ar|aspect|v|version|q|quality|s|stylize|style|seed|no|chaos|c|iw|niji|testp?|creative"
# Flags stand at the end. A phone makes a long dash of two hyphens.
_FLAGS = re.compile(
    rf"(\s|^)(--\s?[a-z]|[\u2013\u2014]\s?({_NAMES})\b).*$", re.IGNORECASE | re.DOTALL
)
_ADDRESS = re.compile(r"<?https?://\S*", re.IGNORECASE)
_WEIGHT = re.compile(r"::\s?-?\d*\.?\d*")


def clean_prompt(prompt: Any) -> str:
    """A Midjourney prompt without addresses of pictures, weights (`::2`) and flags (`--ar 3:2`)."""
    prompt = "" if prompt is None else prompt
    if not isinstance(prompt, str):
        raise UserError(f"its prompt is a {type(prompt).__name__}: expected a text")
    words = _FLAGS.sub("", _ADDRESS.sub(" ", " ".join(prompt.split())))
    return text_of(_WEIGHT.sub(" ", words)).strip(" ,")


@dataclasses.dataclass(frozen=True)
class Part:
    """An archive of pictures, or a folder of unpacked ones, and the annotations of its split."""

    pictures: str
    annotations: str

    def __str__(self) -> str:
        return self.pictures


@dataclasses.dataclass(frozen=True)
class JourneyDB:
    """The folder that holds `train`, `valid` and `test`, or `data` with these in it."""

    source: str
    splits: tuple[str, ...]
    fields: tuple[str, ...] = captioned.FIELDS

    def parts(self, split: str) -> Sequence[Part]:
        """One for each archive or unpacked folder of pictures."""
        folder = _folder(self.source, split)
        if folder is None:
            raise NotFoundError(f"{self.source} has no {' or '.join(FOLDERS[split])} of JourneyDB")
        annotations = _annotations(folder)
        pictures = _pictures(folder)
        if not pictures:
            raise NotFoundError(
                f"{folder} has no pictures: expected imgs/000.tgz or imgs/000/*.jpg of JourneyDB"
            )
        return [Part(path, annotations) for path in pictures]

    def entries(self, part: Part) -> Iterator[Entry]:
        """The pictures of an archive, then the annotations that have none there."""
        pictures = archives.members(part.pictures)
        first = next(pictures, None)
        folder, _ = _place(first[0] if first else "")
        folder = folder or os.path.basename(part.pictures).split(".")[0]
        # Those of `test` are few, and in one archive of another name.
        rows = dict(_rows(part.annotations, folder if folder.isdigit() else None))
        if not rows:
            raise UserError(
                f"{part.annotations} has no annotation of {folder}/, the pictures of "
                f"{part.pictures}: expected lines with img_path of JourneyDB"
            )
        for name, data in itertools.chain([first] if first else [], pictures):
            _, stem = _place(name)
            row = rows.pop(stem, None)
            raw = UserError(f"{name} has no annotation in {part.annotations}")
            ids = (os.path.basename(name),)
            yield Entry(key=f"{folder}/{stem}", raw=raw if row is None else (data, row), ids=ids)
        for stem in rows:
            missing = UserError(f"there is no picture of it in {part.pictures}")
            yield Entry(key=f"{folder}/{stem}", raw=missing)

    def make(self, raw: tuple[Any, dict[str, Any]]) -> dict[str, Any]:
        """The picture with its prompt and its caption."""
        picture, row = raw
        caption = text_of(get(row, "Task2", dict, {}).get("Caption"))
        if sum(map(str.isalpha, caption)) < MIN_LETTERS:
            caption = ""
        captions = [("prompt", clean_prompt(row.get("prompt"))), ("synthetic", caption)]
        return captioned.record(picture, captions)


def _folder(source: str, split: str) -> str | None:
    for base in (source, os.path.join(source, "data")):
        for name in FOLDERS[split]:
            if os.path.isdir(path := os.path.join(base, name)):
                return path
    return None


def _annotations(folder: str) -> str:
    """The annotations of a split: the release with corrected paths, where it is there."""
    found = [
        name
        for name in sorted(os.listdir(folder))
        if re.search(r"(anno|questions).*\.jsonl(\.tgz|\.tar\.gz|\.gz)?$", name)
        and not name.startswith("._")
    ]
    if not found:
        raise NotFoundError(
            f"{folder} has no annotations: expected {os.path.basename(folder)}_anno..repath.jsonl "
            "or .jsonl.tgz of JourneyDB"
        )
    return os.path.join(folder, min(found, key=lambda name: ("repath" not in name, len(name))))


def _pictures(folder: str) -> list[str]:
    images = os.path.join(folder, "imgs")
    names = sorted(os.listdir(images)) if os.path.isdir(images) else []
    packed = [name for name in names if archives.is_archive(name) and not name.startswith(".")]
    # What is unpacked beside its archive is read once, from the archive.
    stems = {name.split(".")[0] for name in packed}
    unpacked = [
        name
        for name in names
        if os.path.isdir(os.path.join(images, name)) and name[0] != "." and name not in stems
    ]
    if found := sorted(packed + unpacked):
        return [os.path.join(images, name) for name in found]
    single = os.path.join(folder, "imgs.tgz")
    return [single] if os.path.isfile(single) else []


def _place(path: str) -> tuple[str, str]:
    """Folder and stem: `./017/a_b.png` is 017, b.

    Annotations may have another suffix than the file, and in `valid` another prefix.
    """
    *folders, base = archives.clean_name(path).split("/")
    return folders[-1] if folders else "", os.path.splitext(base)[0].rpartition("_")[2]


def _rows(annotations: str, folder: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The annotations of the pictures in a folder, or of all, by stem."""
    mark = f"{folder}/".encode() if folder else b""  # spares the parsing of the other lines
    for line in archives.lines(annotations, ".jsonl"):
        if mark not in line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # its picture will have no annotation
        path = row.get("img_path") if isinstance(row, dict) else None
        if isinstance(path, str):
            where, stem = _place(path)
            if folder in (None, where):
                yield stem, {name: row.get(name) for name in ("prompt", "Task2")}


def open_dataset(options: Options) -> dict[str, Native]:
    """The one family."""
    splits = tuple(split for split in FOLDERS if _folder(options.source, split))
    if not splits:
        raise NotFoundError(
            f"{options.source} has no folder train, valid or test (or data with these): expected "
            "the files of JourneyDB"
        )
    return {"journeydb": JourneyDB(options.source, splits)}


DATASET = Dataset(
    name="journeydb",
    summary="JourneyDB: generated pictures with their prompts and captions of a model",
    tasks=("t2i", "ip"),
    open=open_dataset,
    size="4.2M pictures of train, 234,156 of valid, 5,402 of test; 3.1 TB",
    license="non-commercial research only; no part may be copied or passed on",
    where="Hugging Face: JourneyDB/JourneyDB (terms to be accepted)",
    layout="data/{train,valid,test}/imgs/NNN.tgz (or unpacked), and beside imgs "
    "train_anno_realease_repath.jsonl.tgz (or .jsonl), valid_anno_repath.jsonl.tgz",
    quirks=(
        "the annotations with corrected paths (repath) are taken where they are there",
        "prompts (kind prompt) without --flags, weights and addresses; Task2.Caption (synthetic) "
        "where it is there and has 5 letters",
        "names match without suffix (.png in the annotation, .jpg on the disk) and prefix",
        "pictures without annotation, and annotations without picture, are left out by name",
    ),
    example="--source=JourneyDB --out=data",
)
