"""Damages files: bytes flipped, cut out or doubled, and values of JSON swapped for other types.

Or a file is empty, another dataset's, gone, or a folder.
"""

import contextlib
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

OTHERS = (
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    "a\0b",
    [],
    [[]],
    {},
    {"a": 1},
)
KINDS = (*["bytes"] * 4, *["picture"] * 2, "empty", "other", "gone", "folder")
_PICTURE = re.compile(rb"\xff\xd8\xff.*?\xff\xd9|\x89PNG\r\n.*?IEND", re.DOTALL)


@contextlib.contextmanager
def damaged(path: pathlib.Path, rng: np.random.Generator, others: Sequence[bytes]) -> Iterator[str]:
    """One kind of damage to a file while it lasts; gives its name. `others` are foreign files."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    whole = path.read_bytes()
    if kind == "picture" and (found := damage_picture(whole, rng)) != whole:
        path.write_bytes(found)
    elif kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
    elif kind in ("empty", "other"):
        path.write_bytes(others[int(rng.integers(len(others)))] if kind == "other" else b"")
    else:
        kind = "bytes"
        while (found := damage(whole, rng)) == whole:
            pass
        path.write_bytes(found)
    try:
        yield kind
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)


def damage_picture(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with a stretch of one of its JPEG or PNG pictures overwritten, if it has one."""
    if not (spans := [found.span() for found in _PICTURE.finditer(content)]):
        return content
    start, stop = spans[int(rng.integers(len(spans)))]
    start = int(rng.integers(start, stop))
    stop = min(stop, start + int(rng.integers(1, 60)))
    return content[:start] + rng.bytes(stop - start) + content[stop:]


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """The content with one kind of damage."""
    kind = rng.integers(5)
    if kind == 4:
        return _swap_values(content, rng)
    data = bytearray(content) or bytearray(1)
    for place in rng.integers(len(data), size=rng.integers(1, 8)).tolist():
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place] = int(rng.integers(256))
    if kind == 2:
        del data[int(rng.integers(len(data))) :]
    if kind == 3:
        start, length = rng.integers(len(data)), rng.integers(1, 600)
        piece = data[start : start + length]
        data[start : start + length] = piece * int(rng.integers(0, 3))
    return bytes(data)


def _swap_values(content: bytes, rng: np.random.Generator) -> bytes:
    """JSON, or each of its lines, with one value of another type."""
    try:
        return json.dumps(_swapped(json.loads(content), rng)).encode()
    except ValueError:
        pass
    lines = content.split(b"\n")
    k = int(rng.integers(len(lines)))
    try:
        lines[k] = json.dumps(_swapped(json.loads(lines[k]), rng)).encode()
    except ValueError:
        lines[k] = lines[int(rng.integers(len(lines)))]  # of a csv
    return b"\n".join(lines)


def _swapped(value: Any, rng: np.random.Generator) -> Any:
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[int(rng.integers(len(keys)))]
        value[key] = _swapped(value[key], rng)
        return value
    return OTHERS[int(rng.integers(len(OTHERS)))]
