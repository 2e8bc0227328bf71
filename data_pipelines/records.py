"""The fields of a stored example: each has one TFDS feature and one decoded form.

A record is a dict of fields. A dataset stores the fields that it has. A task names the fields that
it needs (`data_pipelines.tasks`), and any dataset that has them serves it. Images are stored as
encoded bytes (PNG or JPEG), and `decode` makes numpy arrays of them:

| field | stored as | decoded |
|---|---|---|
| image, source | RGB, 8 bit | uint8 [h w 3] |
| caption, instruction | text | str |
| edit_mask | PNG, 8 bit, 255 = changed by the edit | uint8 [h w], 0 or 1 |
| depth | PNG, 16 bit, millimeters | float32 [h w], meters |
| boxes | [k, 4] | float32 [k 4]: x0 y0 x1 y1 in [0, 1] of width and height |
| phrases | [k] text | list[str]: the noun phrase of each box, a substring of `caption` |
| masks | [k] PNG, 8 bit, 255 = object | uint8 [k h w], 0 or 1 |
| expressions | [k] text | list[str]: refers to mask k alone; empty if none is unambiguous |
| joints | [17, 3] | float32 [17 3]: COCO-17 x, y in [0, 1], visibility 0 or 1 |
| face | RGB, 8 bit | uint8 [f f 3]: another picture of the person in `image` |
| person | int64 | int |
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from tensorflow_datasets import features

from univg_jax import images
from univg_jax.errors import UserError, check_name


@dataclasses.dataclass(frozen=True)
class Field:
    """A field's TFDS feature, and `decode(stored, name)`, which makes its decoded form."""

    feature: features.FeatureConnector
    decode: Callable[[Any, str], Any]


def decode(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Decodes a stored record: encoded bytes, as TFDS reads it with image decoding skipped.

    Raises UserError, with the field's name, if it is unknown, unreadable or of the wrong shape.
    """
    return {
        name: FIELDS[check_name(name, FIELDS, what="record field")].decode(stored, name)
        for name, stored in raw.items()
    }


def family_features(names: Iterable[str]) -> features.FeaturesDict:
    """The features of a dataset that stores these fields. Raises UserError for an unknown one."""
    return features.FeaturesDict(
        {name: FIELDS[check_name(name, FIELDS, what="record field")].feature for name in names}
    )


def _rgb(data: Any, name: str) -> UInt8[np.ndarray, "h w 3"]:
    return _read(data, name, images.to_rgb)


def _mask(data: Any, name: str) -> UInt8[np.ndarray, "h w"]:
    return _read(data, name, images.to_mask)


def _read(data: Any, name: str, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    try:
        if not isinstance(data, bytes):
            raise UserError(f"is not a readable image: {type(data).__name__}, not bytes")
        return convert(images.open_picture(data))
    except UserError as error:
        raise UserError(f"record field {name!r} {error}") from error


def _masks(data: Any, name: str) -> UInt8[np.ndarray, "k h w"]:
    masks = [_mask(item, name) for item in data]
    shapes = [mask.shape for mask in masks]
    if len(set(shapes)) > 1:
        raise UserError(f"record field {name!r} has masks of different sizes: {shapes}")
    return np.stack(masks) if masks else np.zeros((0, 0, 0), np.uint8)


def _depth(data: Any, name: str) -> Float32[np.ndarray, "h w"]:
    return _read(data, name, _meters)


def _meters(picture: Image.Image) -> Float32[np.ndarray, "h w"]:
    if (millimeters := images.to_integers(picture)) is None:
        raise UserError(f"has mode {picture.mode}; expected a 16-bit gray PNG, millimeters")
    return np.divide(millimeters, 1000, dtype=np.float32)


def _text(data: Any, name: str) -> str:
    try:
        return data.decode("utf-8") if isinstance(data, bytes) else str(data)
    except UnicodeDecodeError as error:
        raise UserError(f"record field {name!r} is not UTF-8: {error}") from error


def _texts(data: Any, name: str) -> list[str]:
    return [_text(item, name) for item in data]


def _numbers(
    data: Any, name: str, *, rows: int | None = None, columns: int
) -> Float32[np.ndarray, "rows columns"]:
    values = np.asarray(data, np.float32)
    if values.ndim != 2 or values.shape[1] != columns or rows not in (None, values.shape[0]):
        raise UserError(
            f"record field {name!r} has shape {values.shape}; expected ({rows or 'k'}, {columns})"
        )
    if not np.isfinite(values).all():
        raise UserError(f"record field {name!r} has a value that is not finite")
    return values


_IMAGE = features.Image(shape=(None, None, 3))
_PNG_MASK = features.Image(shape=(None, None, 1), encoding_format="png")
_PNG_DEPTH = features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
_TEXTS = features.Sequence(features.Text())
# TFDS cannot skip the decoding of a sequence of images, so for TFDS the masks are plain bytes.
_PNG_MASKS = features.Tensor(shape=(None,), dtype=np.bytes_)

FIELDS: dict[str, Field] = {
    "image": Field(_IMAGE, _rgb),
    "source": Field(_IMAGE, _rgb),
    "caption": Field(features.Text(), _text),
    "instruction": Field(features.Text(), _text),
    "edit_mask": Field(_PNG_MASK, _mask),
    "depth": Field(_PNG_DEPTH, _depth),
    "boxes": Field(
        features.Tensor(shape=(None, 4), dtype=np.float32), functools.partial(_numbers, columns=4)
    ),
    "phrases": Field(_TEXTS, _texts),
    "masks": Field(_PNG_MASKS, _masks),
    "expressions": Field(_TEXTS, _texts),
    "joints": Field(
        features.Tensor(shape=(17, 3), dtype=np.float32),
        functools.partial(_numbers, rows=17, columns=3),
    ),
    "face": Field(_IMAGE, _rgb),
    "person": Field(features.Tensor(shape=(), dtype=np.int64), lambda data, name: int(data)),
}
