"""Edits: a picture before and after, the instruction between them, and where it changed.

`record` makes the record of one, and `PairTable` reads those that come as rows of a table.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines import transforms
from data_pipelines.native import Entry, archives, layouts, tables
from data_pipelines.native.pictures import check
from univg_jax import images
from univg_jax.errors import UserError, quote

FIELDS = ("image", "source", "instruction", "caption")
MASKED = (*FIELDS, "edit_mask")
# What a mask is where the picture changes. "colored" is any color but black; of a palette, any
# index but 0.
MaskIs = Literal["white", "black", "transparent", "opaque", "colored"]


def record(
    before: Any,
    after: Any,
    instruction: Any,
    *,
    caption: Any = None,
    mask: Any = None,
    mask_is: MaskIs | None = None,
) -> dict[str, Any]:
    """The record of an edit; with `mask_is` it has a mask, all white where `mask` is None.

    A source of another scale gets the target's size. Raises UserError if a picture or the
    instruction is missing, and if the pictures have different shapes: whether one was cropped or
    stretched, nobody says.
    """
    made = {
        "image": check(after),
        "source": check(before),
        "instruction": tables.text_of(instruction),
        "caption": tables.text_of(caption),
    }
    if not made["instruction"]:
        raise UserError("it has no instruction")
    sizes = [images.size_of(made[name]) for name in ("source", "image")]
    if sizes[0] != sizes[1]:
        if not _is_scaled(*sizes):
            raise UserError(
                "the picture has {1}x{0} pixels before and {3}x{2} after".format(
                    *sizes[0], *sizes[1]
                )
            )
        made["source"] = _resized(made["source"], *sizes[1])
    if mask_is is None:
        return made
    changed = np.ones(sizes[1], np.uint8)
    if mask is not None:
        changed = _read_mask(mask, mask_is)
        if changed.shape != sizes[1]:
            changed = _fit(changed, *sizes[1])
        if not changed.any():
            raise UserError(f"the mask marks nothing: it is {mask_is} nowhere")
    return {**made, "edit_mask": images.png_bytes(changed * np.uint8(255))}


def _read_mask(data: bytes, mask_is: MaskIs) -> UInt8[np.ndarray, "h w"]:
    """1 where it marks; its soft edges belong to it from the middle on."""
    picture = images.open_picture(check(data))
    has_alpha = {"A", "a"} & set(picture.getbands()) or "transparency" in picture.info
    if mask_is in ("transparent", "opaque"):
        if not has_alpha:
            raise UserError(f"the mask has mode {picture.mode}: expected one with transparency")
        clear = np.asarray(picture.convert("RGBA"))[..., 3] < 128
        return (clear == (mask_is == "transparent")).astype(np.uint8)
    if mask_is == "colored" and picture.mode == "P":
        return (np.asarray(picture) > 0).astype(np.uint8)
    # What cannot be seen is not marked, whatever color hides there.
    behind = "white" if mask_is == "black" else "black"
    if has_alpha:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, behind), picture)
    if mask_is == "colored":
        return (np.asarray(picture.convert("RGB")).max(axis=-1) > 0).astype(np.uint8)
    gray = np.asarray(picture.convert("L"))
    if gray.max() == 1:  # 0 and 1
        gray = gray * np.uint8(255)
    return ((gray > 127) == (mask_is == "white")).astype(np.uint8)


def _is_scaled(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether (height, width) are those of `other` at another scale, rounded to whole pixels."""
    (h, w), (height, width) = size, other
    return abs(h * width - w * height) <= max(h, w, height, width)


def _resized(data: bytes, height: int, width: int) -> bytes:
    pixels = transforms.resize_image(images.decode_rgb(data), height=height, width=width)
    return images.png_bytes(pixels)


def _fit(mask: UInt8[np.ndarray, "h w"], height: int, width: int) -> UInt8[np.ndarray, "h2 w2"]:
    """The mask at its picture's size. Raises UserError if it has another shape."""
    if abs(mask.shape[0] * width / (mask.shape[1] * height) - 1) > 0.02:
        raise UserError(
            "the mask has {1}x{0} pixels and the picture {3}x{2}".format(*mask.shape, height, width)
        )
    return transforms.resize({"edit_mask": mask}, height=height, width=width)["edit_mask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The names that a column may have, the first that is there; those of `ids` are all taken."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    instruction: tuple[str, ...]
    mask: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairTable:
    """Edits in the rows of tables; `folder` has the pictures that rows only name."""

    what: str
    files: Mapping[str, tuple[str, ...]]  # of each split
    columns: Columns
    mask_is: MaskIs | None = None
    folder: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """With a mask where the dataset can have one."""
        return FIELDS if self.mask_is is None else MASKED

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that have files."""
        return tuple(self.files)

    def parts(self, split: str) -> Sequence[tables.Part]:
        """Slices of the tables. Raises UserError if a column is missing, or there is no row."""
        table = tables.open_table(self.files[split], what=self.what)
        self._names(table.columns, table.files[0])
        if not (parts := table.parts()):
            raise UserError(f"{table.files[0]} has no rows: expected {self.what}")
        return parts

    def entries(self, part: tables.Part) -> Iterator[Entry]:
        """The rows with their pictures."""
        table = tables.open_table(part.file, what=self.what)
        names = self._names(table.columns, part.file)
        ids = [name for name in self.columns.ids if name in table.columns]
        store = _store(self.folder or os.path.dirname(part.file) or ".")
        for number, row in table.rows(part, [*filter(None, names.values()), *ids]):
            key = f"{number:09d}"
            if isinstance(row, UserError):
                yield Entry(key=key, raw=row)
                continue
            raw = {role: row.get(name) for role, name in names.items() if name}
            for role in ("source", "target", "mask"):
                raw[role] = _picture(raw.get(role), store, needed=role != "mask")
            yield Entry(key=key, raw=raw, ids=tuple(str(row[name]) for name in ids if name in row))

    def make(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The edit of a row."""
        mask = raw["mask"]
        if isinstance(mask, UserError):
            raise mask
        return record(
            raw["source"],
            raw["target"],
            raw.get("instruction"),
            caption=raw.get("caption"),
            mask=mask,
            mask_is=self.mask_is,
        )

    def _names(self, columns: Sequence[str], file: str) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for field in ("source", "target", "instruction", "mask", "caption"):
            known = getattr(self.columns, field)
            found[field] = next((name for name in known if name in columns), None)
            if found[field] is None and field in ("source", "target", "instruction"):
                raise UserError(
                    f"{file} has no column {' or '.join(map(quote, known))}, expected of "
                    f"{self.what} (it has {tables.listed(columns)})"
                )
        return found


def tables_of(source: str, *, what: str) -> dict[str, tuple[str, ...]]:
    """The tables of a file, folder or pattern, by the splits that their names tell."""
    files = tables.open_table(source, what=what).files
    root = source if os.path.isdir(source) else os.path.dirname(source.split("*")[0])
    named = {os.path.relpath(file, root or "."): file for file in files}
    splits = layouts.by_split(list(named))
    return {split: tuple(named[name] for name in names) for split, names in splits.items()}


def _picture(value: Any, store: archives.Store, *, needed: bool) -> bytes | UserError | None:
    try:
        if isinstance(value, Mapping) and value.get("bytes") is None and not value.get("path"):
            value = None
        if not needed and (value is None or (isinstance(value, str) and not tables.text_of(value))):
            return None  # null, or the word NONE
        return tables.picture_bytes(value, store)
    except UserError as error:
        return error


@functools.lru_cache(maxsize=4)
def _store(path: str) -> archives.Store:
    """Kept open, since the names of a large archive take seconds to read."""
    return archives.Store(path)
