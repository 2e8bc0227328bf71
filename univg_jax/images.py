"""Pictures: between 0..255 and [-1, 1], and to PNG. Loads without JAX."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image

from univg_jax.errors import UserError
from univg_jax.files import write_whole


def to_float(images: Any) -> Any:
    """uint8 in 0..255 -> float32 in [-1, 1], of numpy or JAX; floats stay as they are."""
    return images.astype(np.float32) / 127.5 - 1 if images.dtype == np.uint8 else images


def to_uint8(images: Float[Any, "..."], *, names: Sequence[str] = ()) -> UInt8[np.ndarray, "..."]:
    """Floats in [-1, 1] -> the nearest of 0..255.

    Raises UserError for a picture with a value that is not finite: it would be written as black.
    `names` says which picture each row is.
    """
    images = np.asarray(images)
    check_finite(images, names, what="picture")
    return np.rint((images + 1) * 127.5).astype(np.uint8)


def check_finite(rows: Float[np.ndarray, "..."], names: Sequence[str], *, what: str) -> None:
    """Raises UserError, naming the first, if a row of an array has a NaN or an infinity."""
    finite = np.isfinite(rows)
    if not finite.all():
        bad = np.flatnonzero(~finite.reshape(len(rows), -1).all(axis=1))
        name = names[bad[0]] if len(names) else f"{what} {bad[0]}"
        raise UserError(
            f"{name} is not finite, as {len(bad)} of {len(rows)} {what}s: a product is beyond the "
            "range of its dtype (the encoders' in conditioning), or weights are damaged"
        )


def png_bytes(pixels: np.ndarray, *, optimize: bool = False) -> bytes:
    """The PNG of uint8 [h w 3] or [h w], or uint16 [h w]. `optimize`: smaller, in more time."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=optimize)
    return buffer.getvalue()


def write_png(path: epath.PathLike, pixels: np.ndarray) -> None:
    """Writes `png_bytes` to a local path or a bucket, whole or not at all; makes its folder."""
    write_whole(path, png_bytes(pixels))


def data_uri(png: bytes) -> str:
    """A PNG as an address that a page carries in itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
