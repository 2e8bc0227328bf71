"""Places365: scenes with their category, for in- and outpainting.

Pictures of train lie in folders of their category, `s/swimming_pool/indoor/00000001.jpg`, two or
three deep, those of val are labeled by a list, those of test not at all. The category is a caption
of the kind "category": "a swimming pool, indoor".
"""

import dataclasses
import functools
import glob
import os
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.native import TEST, TRAIN, VALIDATION, Dataset, Entry, Native, Options, archives
from data_pipelines.native.captioned import FIELDS
from data_pipelines.native.pictures import Archive, Files, Pictures, check, names_of, read
from univg_jax.errors import NotFoundError, UserError, quote

WHAT = (
    "train_256_places365standard.tar, val_256.tar, test_256.tar (or _large, or unpacked: data_256, "
    "val_256, test_256) of Places365"
)
# Names of archives and of folders begin so.
_NAMES = {TRAIN: ("train_", "data_"), VALIDATION: ("val_",), TEST: ("test_",)}
_SIZES = ("large", "256")  # the first there is is read: the same pictures
_LIST, _CATEGORIES = "places365_val.txt", "categories_places365.txt"


@dataclasses.dataclass(frozen=True)
class Places(Pictures):
    """Pictures with their category. `lists` has the paths of the two lists, where they are."""

    fields: tuple[str, ...] = FIELDS
    lists: tuple[str, ...] = ()

    def entries(self, part: Archive | Files) -> Iterator[Entry]:
        """The pictures of a part with their category."""
        for name, data in read(part):
            category = _category(name) or self._labels.get(os.path.basename(name), "")
            yield Entry(key=name, raw=(category, data), ids=names_of(name))

    @property
    def _labels(self) -> Mapping[str, str]:
        return _read_labels(self.lists, *map(os.path.getmtime, self.lists))

    def make(self, raw: tuple[str, Any]) -> dict[str, Any]:
        """The picture, with a caption if its category is known."""
        category, picture = raw
        texts = [caption_of(category)] if category else []
        return {
            "image": check(picture),
            "captions": texts,
            "caption_kinds": ["category"] * len(texts),
        }


def caption_of(category: str) -> str:
    """`swimming_pool/indoor` in words."""
    words = category.replace("_", " ").replace("/", ", ")
    return f"{'an' if words[:1] in 'aeiou' else 'a'} {words}"


def _category(name: str) -> str:
    """The folders below the one of a single letter; its tar may stand for that one."""
    *folders, _ = name.split("/")
    for k, folder in enumerate(folders):
        if len(archives.without_suffix(folder)) == 1:
            inside = folders[k + 1 :]
            if inside and inside[0] == archives.without_suffix(folder):
                inside = inside[1:]
            return "/".join(inside)
    return ""


@functools.lru_cache(maxsize=1)
def _read_labels(lists: tuple[str, ...], *changed: float) -> Mapping[str, str]:
    """The category of each picture of val by its name: 36,500."""
    if len(lists) < 2:
        return {}
    names = {number: path for path, number in _pairs(lists[1])}
    labels: dict[str, str] = {}
    for path, number in _pairs(lists[0]):
        if number not in names:
            raise UserError(f"{lists[0]}: {quote(path)} is of category {number}, not in {lists[1]}")
        labels[os.path.basename(path)] = names[number].partition("/")[2]
    return labels


def _pairs(path: str) -> Iterator[tuple[str, int]]:
    """The lines `/a/airfield/1.jpg 0`, with or without the first slash."""
    for number, line in enumerate(archives.lines(path, ".txt"), 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not words[1].isdigit():
            raise UserError(f"{path}:{number} is {quote(line)}: expected a path and a number")
        yield archives.clean_name(words[0].decode("utf-8", "replace")), int(words[1])


def open_dataset(options: Options) -> dict[str, Native]:
    """The one family. Raises NotFoundError where no split is."""
    source = options.source
    if not os.path.exists(source):
        raise NotFoundError(f"{source or 'source'} does not exist: expected {WHAT}")
    if os.path.isfile(source):
        folder, names = os.path.dirname(source) or ".", [os.path.basename(source)]
    else:
        folder, names = source, sorted(os.listdir(source))
    sources = {split: found for split in _NAMES if (found := _find(folder, names, split))}
    if not sources:  # the folder of one split, such as data_256 itself
        parent, base = os.path.split(os.path.abspath(source))
        sources = {split: found for split in _NAMES if (found := _find(parent, [base], split))}
    if not sources and archives.is_archive(source):
        sources = {TRAIN: (source,)}
    if not sources:
        raise NotFoundError(f"{source} has no pictures: expected {WHAT}")
    lists = tuple(path for name in (_LIST, _CATEGORIES) for path in _lists(folder, name)[:1])
    return {"places365": Places(WHAT, sources, lists=lists)}


def _lists(folder: str, name: str) -> list[str]:
    """The devkit's lists lie beside the archives, or in a folder of their own."""
    inside = (os.path.join(glob.escape(folder), *deeper, name) for deeper in ((), ("*",)))
    return [path for pattern in inside for path in sorted(glob.glob(pattern))]


def _find(folder: str, names: list[str], split: str) -> tuple[str, ...]:
    """The archives of a split of the larger size, or else its unpacked folder."""
    for size in _SIZES:
        mine = [n for n in names if n.lower().startswith(_NAMES[split]) and size in n]
        packed = [name for name in mine if archives.is_archive(name)]
        found = packed or [n for n in mine if os.path.isdir(os.path.join(folder, n))]
        if found:
            return tuple(os.path.join(folder, name) for name in found)
    return ()


DATASET = Dataset(
    name="places365",
    summary="Places365: scenes of 365 categories, for in- and outpainting",
    tasks=("ip",),
    open=open_dataset,
    size="1.8M pictures of train (challenge: 8M), 36,500 of val, 328,500 of test",
    license="research only (MIT-style devkit)",
    where="the Places2 site of MIT CSAIL",
    layout="train_256_places365standard.tar, val_256.tar, test_256.tar, or _large, or unpacked: "
    "data_256 or data_256_standard, val_256, test_256; places365_val.txt, categories_places365.txt",
    quirks=(
        "categories of two or three folders; tars in tars; names with ./ or /; AppleDouble files",
        "the category is a caption of kind category (`a swimming pool, indoor`); none in test",
        "of _large and _256 the large pictures are read; of a tar and its unpacked folder the tar",
    ),
    example="--source=places365 --out=data",
)
