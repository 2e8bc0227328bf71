"""The fields of a stored example: each has one TFDS feature and one decoded form.

A record is a dict of fields. A dataset stores the fields that it has. A task names the fields that
it needs (`data_pipelines.tasks`), and any dataset that has them serves it. Images are stored as
encoded bytes (PNG, JPEG and others), and `decode` makes numpy arrays of them:

| field | stored as | decoded |
|---|---|---|
| image, source | a picture's file, its EXIF data too | uint8 [h w 3] |
| caption, instruction | text | str |
| captions | [n] text, in place of `caption` | list[str] |
| caption_kinds | [n] text | list[str]: what kind of caption each is, such as "short" |
| edit_mask | PNG, 8 bit, 255 = changed by the edit | uint8 [h w], 0 or 1 |
| depth | PNG, 16 bit, levels; 0 = unknown | float32 [h w], meters; 0 = unknown |
| depth_scale | float32: meters of a level; 0.001 without it | - (it is in `depth`) |
| boxes | [k, 4] | float32 [k 4]: x0 y0 x1 y1 in [0, 1] of width and height |
| phrases | [k] text | list[str]: the noun phrase of each box, a substring of its caption |
| phrase_captions | [k] int64 | int64 [k]: in which of `captions` each phrase stands |
| masks | [k] PNG, 8 bit, 255 = object | uint8 [k h w], 0 or 1 |
| expressions | [n] text | list[str]: refers to its mask alone; empty if it is ambiguous |
| expression_masks | [n] int64 | int64 [n]: mask of each expression; without it, k's is mask k |
| joints | [p, 17, 3] | float32 [p 17 3]: COCO-17 x, y in [0, 1] and visibility of p people |
| ignore_mask | PNG, 8 bit, 255 = no label, or outside the picture | uint8 [h w], 0 or 1 |
| face | a picture's file | uint8 [f f 3]: another picture of the person in `image` |
| person | int64 | int |

Visibility is 0 (no label, x = y = 0), 1 (labeled but hidden) or 2. Older builds have the joints of
one person, [17, 3], which decode to [1 17 3].

All records of a family have the same fields; what one of them lacks is an empty list or text.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64, Integer, UInt8, UInt16
from tensorflow_datasets import features

from univg_jax import images
from univg_jax.errors import UserError, check_name

MILLIMETER, MAX_LEVEL = 0.001, 2**16 - 1
# Farther than any camera measures: a stray pixel must not make the levels of all others coarse.
MAX_METERS = 1000.0


@dataclasses.dataclass(frozen=True)
class Field:
    """A field's TFDS feature, and `decode(stored, name)`, which makes its decoded form."""

    feature: features.FeatureConnector
    decode: Callable[[Any, str], Any]


def decode(raw: Mapping[str, Any], *, least: tuple[int, int] | None = None) -> dict[str, Any]:
    """Decodes a stored record: encoded bytes, as TFDS reads it with image decoding skipped.

    `depth_scale` goes into `depth`: the decoded record has no field of that name. With `least`, a
    height and width that are enough of `image`, a JPEG may be decoded smaller, as
    `images.decode_rgb` does it: where no other field lies on the picture.

    Raises UserError, with the field's name, if it is unknown, unreadable or of the wrong shape.
    """
    record = {}
    for name, stored in raw.items():
        field = FIELDS[check_name(name, FIELDS, what="record field")]
        try:
            if name == "image" and least is not None:
                smaller = functools.partial(images.decode_rgb, least=least)
                record[name] = _read(stored, name, smaller)
            else:
                record[name] = field.decode(stored, name)
        except UserError:
            raise
        except (TypeError, ValueError, OverflowError) as error:  # of Python's and numpy's types
            raise UserError(f"record field {name!r} is of the wrong type: {error}") from None
    scale = record.pop("depth_scale", None)
    if "depth" in record:
        record["depth"] = _meters(record["depth"], scale)
    return record


def encode_depth(meters: Float[np.ndarray, "h w"]) -> dict[str, Any]:
    """Depth in meters as the stored fields `depth` and `depth_scale`.

    What is not finite or not above 0 is unknown. A level is a millimeter where all fits into 16
    bits, below 65.5 m, and else as small as it can be. Beyond MAX_METERS all is MAX_METERS.
    """
    meters = np.asarray(meters, np.float64)
    is_known = np.isfinite(meters) & (meters > 0)
    meters = np.where(is_known, np.minimum(meters, MAX_METERS), 0)
    scale = np.float32(max(MILLIMETER, meters.max(initial=0) / MAX_LEVEL))
    # At least 1: what is known to be very near is not unknown.
    levels = np.clip(np.rint(meters / scale), is_known, MAX_LEVEL)
    return encode_levels(levels.astype(np.uint16), scale)


def encode_levels(levels: UInt16[np.ndarray, "h w"], scale: float | np.floating) -> dict[str, Any]:
    """Depth in levels of `scale` meters (0 = unknown), exactly, as `depth` and `depth_scale`."""
    return {"depth": images.png_bytes(levels), "depth_scale": np.float32(scale)}


def encodable(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as its features take it: joints [17, 3] become [1, 17, 3]."""
    record = dict(record)
    if "joints" in record and np.ndim(record["joints"]) == 2:
        record["joints"] = np.asarray(record["joints"], np.float32)[None]
    return record


def stored_fields(names: Iterable[str]) -> tuple[str, ...]:
    """The stored fields that `decode` needs for these decoded ones."""
    names = tuple(names)
    return (*names, "depth_scale") if "depth" in names else names


def family_features(names: Iterable[str]) -> features.FeaturesDict:
    """The features of a dataset that stores these fields. Raises UserError for an unknown one."""
    return features.FeaturesDict(
        {name: FIELDS[check_name(name, FIELDS, what="record field")].feature for name in names}
    )


def _rgb(data: Any, name: str) -> UInt8[np.ndarray, "h w 3"]:
    return _read(data, name, images.decode_rgb)


def _mask(data: Any, name: str) -> UInt8[np.ndarray, "h w"]:
    return _read(data, name, lambda data: images.to_mask(images.open_picture(data)))


def _read(data: Any, name: str, convert: Callable[[bytes], np.ndarray]) -> np.ndarray:
    try:
        if not isinstance(data, bytes):
            raise UserError(f"is not a readable image: {type(data).__name__}, not bytes")
        return convert(data)
    except UserError as error:
        raise UserError(f"record field {name!r} {error}") from error


def _masks(data: Any, name: str) -> UInt8[np.ndarray, "k h w"]:
    masks = [_mask(item, name) for item in data]
    shapes = [mask.shape for mask in masks]
    if len(set(shapes)) > 1:
        raise UserError(f"record field {name!r} has masks of different sizes: {shapes}")
    return np.stack(masks) if masks else np.zeros((0, 0, 0), np.uint8)


def _levels(data: Any, name: str) -> Integer[np.ndarray, "h w"]:
    return _read(data, name, _integers)


def _integers(data: bytes) -> Integer[np.ndarray, "h w"]:
    picture = images.open_picture(data)
    if (levels := images.to_integers(picture)) is None:
        raise UserError(f"has mode {picture.mode}; expected a 16-bit gray PNG")
    return levels


def _meters(
    levels: Integer[np.ndarray, "h w"], scale: np.float32 | None
) -> Float32[np.ndarray, "h w"]:
    if scale is None:
        return np.divide(levels, 1000, dtype=np.float32)
    return np.multiply(levels, scale, dtype=np.float32)


def _scale(data: Any, name: str) -> np.float32:
    scale = _float32(data)
    if scale.shape != () or not 0 < scale < np.inf:
        found = f"{scale:g}" if scale.shape == () else f"of shape {scale.shape}"
        raise UserError(f"record field {name!r} is {found}; expected the meters of a level")
    return scale[()]


def _text(data: Any, name: str) -> str:
    try:
        return data.decode("utf-8") if isinstance(data, bytes) else str(data)
    except UnicodeDecodeError as error:
        raise UserError(f"record field {name!r} is not UTF-8: {error}") from error


def _texts(data: Any, name: str) -> list[str]:
    if isinstance(data, str | bytes):
        raise UserError(f"record field {name!r} is one text; expected a list of them")
    return [_text(item, name) for item in data]


def _boxes(data: Any, name: str) -> Float32[np.ndarray, "k 4"]:
    return _numbers(data, name, shape=(4,))


def _joints(data: Any, name: str) -> Float32[np.ndarray, "p 17 3"]:
    values = _float32(data)
    return _numbers(values[None] if values.ndim == 2 else values, name, shape=(17, 3))


def _numbers(data: Any, name: str, *, shape: tuple[int, ...]) -> Float32[np.ndarray, "k ..."]:
    """Any number of arrays of a shape."""
    values = _float32(data)
    if values.shape == (0,):
        values = values.reshape(0, *shape)
    if values.shape[1:] != shape or not values.ndim:
        expected = f"(any number, {', '.join(map(str, shape))})"
        raise UserError(f"record field {name!r} has shape {values.shape}; expected {expected}")
    if not np.isfinite(values).all():
        raise UserError(f"record field {name!r} has a value that is not finite")
    return values


def _float32(data: Any) -> Float32[np.ndarray, "..."]:
    """What is beyond float32 is infinite, and for the caller to refuse."""
    with np.errstate(over="ignore"):
        return np.asarray(data, np.float32)


def _indices(data: Any, name: str) -> Int64[np.ndarray, " k"]:
    values = np.asarray(data)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise UserError(
            f"record field {name!r} is {values.dtype} {values.shape}; expected a list of indices"
        )
    return values.astype(np.int64)


_IMAGE = features.Image(shape=(None, None, 3))
_PNG_MASK = features.Image(shape=(None, None, 1), encoding_format="png")
_PNG_DEPTH = features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png")
_INDICES = features.Tensor(shape=(None,), dtype=np.int64)
_TEXTS = features.Sequence(features.Text())
# TFDS cannot skip the decoding of a sequence of images, so for TFDS the masks are plain bytes.
_PNG_MASKS = features.Tensor(shape=(None,), dtype=np.bytes_)

FIELDS: dict[str, Field] = {
    "image": Field(_IMAGE, _rgb),
    "source": Field(_IMAGE, _rgb),
    "caption": Field(features.Text(), _text),
    "captions": Field(_TEXTS, _texts),
    "caption_kinds": Field(_TEXTS, _texts),
    "instruction": Field(features.Text(), _text),
    "edit_mask": Field(_PNG_MASK, _mask),
    "depth": Field(_PNG_DEPTH, _levels),
    "depth_scale": Field(features.Tensor(shape=(), dtype=np.float32), _scale),
    "boxes": Field(features.Tensor(shape=(None, 4), dtype=np.float32), _boxes),
    "phrases": Field(_TEXTS, _texts),
    "phrase_captions": Field(_INDICES, _indices),
    "masks": Field(_PNG_MASKS, _masks),
    "expressions": Field(_TEXTS, _texts),
    "expression_masks": Field(_INDICES, _indices),
    "joints": Field(features.Tensor(shape=(None, 17, 3), dtype=np.float32), _joints),
    "ignore_mask": Field(_PNG_MASK, _mask),
    "face": Field(_IMAGE, _rgb),
    "person": Field(features.Tensor(shape=(), dtype=np.int64), lambda data, name: int(data)),
}
