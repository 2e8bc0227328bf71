"""Captioned pictures: their record, and samples of files that belong together by name.

A sample is a picture with its captions beside it: `0001.jpg`, `0001.txt`, `0001.json`. In a tar of
WebDataset the name ends at the first dot, in a folder or zip at the last one.
"""

import collections
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from data_pipelines.native import archives
from data_pipelines.native.tables import text_of
from univg_jax.errors import UserError

FIELDS = ("image", "captions", "caption_kinds")
MAX_PENDING_BYTES = 2**30  # of samples of a compressed tar that are not complete yet

Sample = tuple[str, dict[str, bytes | UserError]]  # its name, and its files by suffix


def record(picture: Any, captions: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The record of a picture's file and its native captions, (kind, text or list of texts) each.

    Texts are cleaned, empty ones left out, and one that is there twice has its first kind. Raises
    UserError if there is no picture or no caption.
    """
    if isinstance(picture, UserError):
        raise picture
    kinds: dict[str, str] = {}
    for kind, value in captions:
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, Mapping) and "raw" in text:  # of Karpathy's sentences
                text = text["raw"]
            if text := text_of(text):
                kinds.setdefault(text, kind)
    if not kinds:
        raise UserError("it has no caption")
    return {"image": picture, "captions": list(kinds), "caption_kinds": list(kinds.values())}


def split_at_first_dot(name: str) -> tuple[str, str]:
    """WebDataset's rule: `a/b.c.jpg` is the file `c.jpg` of the sample `a/b`."""
    folder, base = os.path.split(name)
    key, _, suffix = base.partition(".")
    return os.path.join(folder, key), suffix.lower()


def split_at_last_dot(name: str) -> tuple[str, str]:
    """`a/b.c.jpg` is the file `jpg` of the sample `a/b.c`."""
    key, suffix = os.path.splitext(name)
    return key, suffix[1:].lower()


def samples(path: str) -> Iterator[Sample]:
    """The samples of an archive, in the order of their first files, which may lie apart.

    Raises UserError if it cannot be read, or is compressed and its files lie too far apart.
    """
    if archives.is_compressed(path):
        return _streamed(path)
    store = archives.Store(path)
    is_zip = path.lower().endswith(".zip")
    split = split_at_last_dot if is_zip else split_at_first_dot
    return grouped(store, store.names(), split)


def grouped(
    store: archives.Store,
    names: Iterable[str],
    split: Callable[[str], tuple[str, str]] = split_at_last_dot,
) -> Iterator[Sample]:
    """The samples of these names, each read when it is its turn."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        key, suffix = split(name)
        groups.setdefault(key, []).append((suffix, name))
    for key, files in groups.items():
        yield key, {suffix: _read(store, name) for suffix, name in files}


def _read(store: archives.Store, name: str) -> bytes | UserError:
    try:
        return store.read(name)
    except UserError as error:
        return error


def _streamed(path: str) -> Iterator[Sample]:
    """A first pass counts the files of each sample: then it is known when one is complete."""
    counts = collections.Counter(
        split_at_first_dot(name)[0] for name, _ in archives.members(path, None)
    )
    pending: dict[str, dict[str, bytes | UserError]] = {}
    size = 0
    for name, data in archives.members(path, None):
        key, suffix = split_at_first_dot(name)
        pending.setdefault(key, {})[suffix] = data
        size += _size(data)
        counts[key] -= 1
        if not counts[key]:
            sample = pending.pop(key)
            size -= sum(map(_size, sample.values()))
            yield key, sample
        if size > MAX_PENDING_BYTES:
            raise UserError(f"{path}: files of a sample lie too far apart; unpack it (gunzip)")


def _size(data: bytes | UserError) -> int:
    return len(data) if isinstance(data, bytes) else 0


def row_of(sample: Mapping[str, bytes | UserError]) -> dict[str, Any]:
    """A sample as a row: its files by suffix, and what its JSON holds by name.

    Raises UserError for JSON that is none.
    """
    row: dict[str, Any] = dict(sample)
    for suffix, data in sample.items():
        if suffix.rpartition(".")[2] == "json":
            if isinstance(data, UserError):
                raise data
            try:
                value = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise UserError(f"its .{suffix} is not JSON: {str(error)[:100]}") from None
            if not isinstance(value, dict):
                raise UserError(f"its .{suffix} is a {type(value).__name__}, not an object")
            row = {**value, **{k: v for k, v in row.items() if k != suffix}}
    return row


def picture_suffix(sample: Mapping[str, Any]) -> str | None:
    """The suffix of a sample's picture; None if it has none."""
    plain = (suffix for suffix in sample if f".{suffix}" in archives.IMAGE_SUFFIXES)
    longer = (suffix for suffix in sample if suffix.endswith(archives.IMAGE_SUFFIXES))
    return next(itertools.chain(plain, longer), None)
