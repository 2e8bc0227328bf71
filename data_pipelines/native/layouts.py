"""What a folder of files of anybody's is: tars, a table, or pictures with texts beside them."""

import dataclasses
import glob
import itertools
import os
import re
from collections.abc import Sequence

from data_pipelines.native import TEST, TRAIN, VALIDATION, archives, tables
from univg_jax.errors import NotFoundError, UserError, quote

PART_FILES = 4000  # pictures and texts
_SPLITS = {
    **{"train": TRAIN, "training": TRAIN, "val": VALIDATION, "valid": VALIDATION},
    **{"validation": VALIDATION, "dev": VALIDATION, "test": TEST},
}
# What tools leave beside the files of a collection.
_ABOUT = ("dataset_infos.json", "info.json", "sizes.json", "shards.json", "state.json")
_TEXTS = (".txt", ".caption", ".json")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The form of a source ("archives", "table" or "files"), and the names in `root` to read."""

    form: str
    root: str
    names: list[str]


def look_at(source: str) -> Layout:
    """What captioned pictures a file, a folder or a pattern has.

    Raises UserError (NotFoundError) where that is nothing that is known, or two things.
    """
    if not os.path.isdir(source):
        found = [source] if os.path.isfile(source) else sorted(glob.glob(source, recursive=True))
        if not found:
            raise NotFoundError(f"{source or 'source'} does not exist: expected captioned pictures")
        root = os.path.dirname(source.split("*")[0])
        form = "archives" if archives.is_archive(found[0]) else "table"
        return Layout(form, root, [os.path.relpath(path, root or ".") for path in found])
    names = [name for name, _ in archives.walk(source, None)]
    packed = [name for name in names if archives.is_archive(name)]
    pictures = [name for name in names if name.lower().endswith(archives.IMAGE_SUFFIXES)]
    described = {stem(name) for name in pictures} | {archives.without_suffix(n) for n in packed}
    folders = {os.path.dirname(name) for name in pictures}
    found = [
        name
        for name in names
        if _is_table(name)
        and stem(name) not in described
        and not (stem(name) in folders and name.endswith(".parquet"))  # img2dataset's
    ]
    if packed and not found:
        return Layout("archives", source, packed)
    if found:
        return Layout("table", source, _of_one_kind(found, source, packed))
    texts = [name for name in names if name.lower().endswith(_TEXTS)]
    if {stem(name) for name in texts} & {stem(name) for name in pictures}:
        return Layout("files", source, sorted(pictures + texts))
    raise NotFoundError(
        f"{source} has no captioned pictures: expected tars, a table (csv, tsv, jsonl, json, "
        f"parquet), or a.txt beside a.jpg; it has {len(pictures)} pictures"
    )


def by_split(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names by the split that their folders, or the words they begin with, tell.

    All are `train` where none is: a folder of one split, or names that say "test" by chance.
    """
    splits: dict[str, list[str]] = {TRAIN: [], VALIDATION: [], TEST: []}
    for name in names:
        *folders, base = name.lower().split("/")
        words = [*folders, re.split(r"[-_.]", base)[0]]
        splits[next((_SPLITS[word] for word in words if word in _SPLITS), TRAIN)].append(name)
    if not splits[TRAIN]:
        return {TRAIN: tuple(names)}
    return {split: tuple(found) for split, found in splits.items() if found}


def slices(names: Sequence[str], most: int = PART_FILES) -> list[tuple[str, ...]]:
    """The sorted names in slices, with those of one stem in one slice."""
    parts: list[list[str]] = [[]]
    for _, group in itertools.groupby(sorted(names, key=stem), key=stem):
        if len(parts[-1]) >= most:
            parts.append([])
        parts[-1] += group
    return [tuple(part) for part in parts if part]


def stem(name: str) -> str:
    """A name without its suffix."""
    return os.path.splitext(name.removesuffix(".gz"))[0]


def _is_table(name: str) -> bool:
    base = os.path.basename(name).lower()
    is_about = base.endswith(("_stats.json", "index.json", "_info.json")) or base in _ABOUT
    return tables.suffix_of(base) in tables.SUFFIXES and not is_about


def _of_one_kind(found: list[str], source: str, packed: list[str]) -> list[str]:
    """The tables of a folder, which must be of one kind and the only thing to read."""
    if metadata := [name for name in found if os.path.basename(name).startswith("metadata.")]:
        return metadata  # Hugging Face's imagefolder
    if len({tables.suffix_of(name) for name in found}) > 1 or packed:
        listed = ", ".join(map(quote, (found + packed)[:6]))
        raise UserError(
            f"{source} has several things to read ({listed}): give one of them as source, and the "
            "pictures as folder="
        )
    return found
