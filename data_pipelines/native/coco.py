"""Annotation files in COCO's form: JSON lists streamed, pictures found, segmentations as masks.

A segmentation is a list of polygons, each `[x0, y0, x1, y1, ...]` in continuous pixels, or
run-length encoded by columns: with `counts` as integers (crowds) or as COCO's compressed text.
"""

import dataclasses
import functools
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from data_pipelines.native import archives, tables
from univg_jax import images
from univg_jax.errors import NotFoundError, UserError, needs_extra, quote

PART_ENTRIES = 500
_TRIED_PICTURES = 100
_YEAR_PREFIX = re.compile(r"^COCO_(?:train|val|test)2014_(?=\d{12}\.)")

# What reading a file that is no JSON, or goes on for ever, raises beside ijson's own.
_DAMAGE = (OSError, ValueError, OverflowError, RecursionError, MemoryError)


def read_list(
    path: str | os.PathLike, key: str = "", *, what: str = "annotations"
) -> Iterator[dict[str, Any]]:
    """The objects of a list in a JSON file, streamed: the list `key` of its object, or the file.

    Raises NotFoundError if there is no such file (`what` was expected there), and UserError with
    its name if it is damaged, has no such list, or holds something else than objects in it.
    """
    with needs_extra("data", "reading annotations"):
        import ijson
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise NotFoundError(f"{path} does not exist: expected {what}")
    prefix = f"{key}.item" if key else "item"
    named = f"the list {quote(key)}" if key else "a list"
    number = -1
    try:
        with open(path, "rb") as file:
            for number, item in enumerate(ijson.items(file, prefix, use_float=True)):
                if not isinstance(item, dict):
                    raise UserError(f"{path}: item {number} of {named} is {quote(item)}: no object")
                yield item
        if number < 0 and not _has_list(path, key):
            raise UserError(f"{path} has not {named}: expected {what}")
    except UserError:
        raise
    except (ijson.JSONError, *_DAMAGE) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not JSON that can be read: {reason}") from None


def _has_list(path: str, key: str) -> bool:
    import ijson

    with open(path, "rb") as file:
        return any(
            event == "start_array" and prefix == key for prefix, event, _ in ijson.parse(file)
        )


@dataclasses.dataclass(frozen=True)
class Slice:
    """A part of a dataset: entries in little memory. `name` says which, for messages."""

    name: str
    packed: bytes

    def __str__(self) -> str:
        return self.name

    def rows(self) -> list[Any]:
        """What was packed."""
        return json.loads(zlib.decompress(self.packed))


def slices(name: str, rows: Sequence[Any], size: int = PART_ENTRIES) -> list[Slice]:
    """`rows` of JSON values as parts of at most `size`."""
    try:
        return [
            Slice(
                f"{name} {first}-{min(first + size, len(rows)) - 1}",
                zlib.compress(json.dumps(rows[first : first + size]).encode(), 1),
            )
            for first in range(0, len(rows), size)
        ]
    except RecursionError:
        raise UserError(f"{name} is nested too deeply") from None


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Where the pictures of annotations are: folders, zips or tars. `find` makes it."""

    places: tuple[str, ...]

    @classmethod
    def find(cls, candidates: Sequence[str], names: Sequence[str], *, where: str) -> "Pictures":
        """Those of `candidates` that there are.

        Raises NotFoundError if there is none, or if none of the first of `names` is in them.
        """
        places = tuple(dict.fromkeys(c for c in candidates if os.path.exists(c)))
        looked = ", ".join(candidates)
        if not places:
            raise NotFoundError(f"there are no pictures for {where}: expected one of {looked}")
        found = cls(places)
        tried = names[:_TRIED_PICTURES]
        if tried and not any(found._locate(name) for name in tried):
            raise NotFoundError(
                f"the pictures of {where} are not there: no {quote(tried[0], 200)} in {looked}"
            )
        return found

    def read(self, name: str) -> bytes:
        """The file of a picture. Raises NotFoundError, saying where it was looked for."""
        located = self._locate(name)
        if located is None:
            raise NotFoundError(f"there is no {quote(name, 200)} in {', '.join(self.places)}")
        store, local = located
        return store.read(local)

    def _locate(self, name: str) -> tuple[archives.Store, str] | None:
        base = name.replace("\\", "/").rsplit("/", 1)[-1]
        # The same picture has another name in 2017's release.
        names = dict.fromkeys((name, base, _YEAR_PREFIX.sub("", base)))
        for place in self.places:
            store = open_store(place)
            inside = os.path.basename(place.rstrip("/")).split(".")[0]
            for local in names:
                for candidate in (local, f"{inside}/{local}", f"images/{local}"):
                    if candidate in store:
                        return store, candidate
        return None


def open_store(place: str) -> archives.Store:
    """The files of a folder or an archive, whose list of names is read once a process.

    Raises NotFoundError if it is not there.
    """
    if not os.path.exists(place):
        raise NotFoundError(f"{place} does not exist: expected a folder, a zip or a tar")
    stat = os.stat(place)
    return _opened(place, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)
def _opened(place: str, *state: int) -> archives.Store:
    return archives.Store(place)


def size_of(data: bytes) -> tuple[int, int]:
    """(height, width) of a picture's file as it is shown. Raises UserError for what is none."""
    try:
        return images.size_of(data)
    except UserError as error:
        raise UserError(f"the picture {error}") from None


def check_size(data: bytes, height: int, width: int) -> None:
    """Raises UserError if a picture has another size than its annotations were made for."""
    found = size_of(data)
    if found != (height, width):
        turned = found == (width, height)
        raise UserError(
            f"the picture has {found[1]} x {found[0]} pixels and its annotations are for "
            f"{width} x {height}" + (": its EXIF data turn it" if turned else "")
        )


def image_size(image: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) as an entry of `images` states them. Raises UserError."""
    height, width = tables.get(image, "height", int), tables.get(image, "width", int)
    if height < 1 or width < 1 or height * width > images.MAX_PIXELS:
        raise UserError(f"a picture of {width} x {height} pixels cannot be")
    return height, width


def segment(segmentation: Any, height: int, width: int) -> UInt8[np.ndarray, "h w"]:
    """1 inside a segmentation, else 0; what several polygons cover is 1, too.

    Polygons of less than three points cover nothing. Raises UserError for what is none of the
    three forms, of another size, or far outside the picture.
    """
    with needs_extra("data", "reading segmentations"):
        from pycocotools import mask as rle
    if isinstance(segmentation, Mapping):
        encoded = _runs(segmentation, height, width)
    elif isinstance(segmentation, list):
        encoded = _polygons(segmentation, height, width)
        if not encoded:
            return np.zeros((height, width), np.uint8)
    else:
        raise UserError(f"a segmentation is {quote(segmentation)}: expected polygons or RLE")
    if not isinstance(encoded, dict):
        encoded = rle.merge(rle.frPyObjects(encoded, height, width))
    try:
        with warnings.catch_warnings():  # pycocotools 2.0.11 is not made for NumPy 2
            warnings.simplefilter("ignore", DeprecationWarning)
            return np.ascontiguousarray(rle.decode(encoded))
    except ValueError as error:
        raise UserError(f"a segmentation is no RLE: {error}") from None


def _polygons(segmentation: list, height: int, width: int) -> list[list[float]]:
    polygons, far = [], 2 * max(height, width)
    for polygon in segmentation:
        if not isinstance(polygon, list) or not all(_is_number(v) for v in polygon):
            raise UserError(f"a polygon is {quote(polygon)}: expected numbers x, y, x, y, ...")
        if len(polygon) % 2:
            raise UserError(f"a polygon has {len(polygon)} numbers: expected pairs of x and y")
        # Each pixel of an edge takes memory.
        if any(not -far <= v <= far for v in polygon):
            raise UserError(f"a polygon is far outside its picture of {width} x {height}")
        # Four numbers would be taken for a box.
        if len(polygon) >= 6:
            polygons.append([float(v) for v in polygon])
    return polygons


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _runs(segmentation: Mapping, height: int, width: int) -> dict[str, Any]:
    """Compressed RLE, checked: pycocotools believes what it is given."""
    from pycocotools import mask as rle

    counts, size = segmentation.get("counts"), segmentation.get("size")
    if size != [height, width]:
        raise UserError(f"an RLE is of size {quote(size)}: expected [{height}, {width}]")
    if isinstance(counts, list):
        if not all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in counts):
            raise UserError(f"an RLE has counts {quote(counts)}: expected whole numbers")
        if sum(counts) != height * width:
            raise UserError(f"an RLE covers {sum(counts)} pixels of {height * width}")
        return rle.frPyObjects({"counts": counts, "size": size}, height, width)
    if isinstance(counts, str):
        total = _total(counts)
        if total != height * width:
            raise UserError(f"an RLE covers {total} pixels of {height * width}")
        return {"counts": counts.encode(), "size": size}
    raise UserError(f"an RLE has counts {quote(counts)}: expected a list or a text")


def _total(counts: str) -> int:
    """The pixels that a compressed RLE covers: 5 bits a character, from the third run as
    differences from the run before the last. -1 for what is none."""
    runs: list[int] = []
    value = shift = 0
    for char in counts:
        bits = ord(char) - 48
        if not 0 <= bits < 64 or shift > 30:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        if runs[-1] < 0:
            return -1
        value = shift = 0
    return -1 if shift else sum(runs)


def png_mask(mask: np.ndarray) -> bytes:
    """The stored form of a mask of 0 and 1."""
    return images.png_bytes(mask.astype(np.uint8) * np.uint8(255))
