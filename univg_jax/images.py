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


def to_uint8(images: Float[Any, "..."]) -> UInt8[np.ndarray, "..."]:
    """Floats in [-1, 1] -> the nearest of 0..255; `check_finite` first what may be no number."""
    return np.rint((np.asarray(images) + 1) * 127.5).astype(np.uint8)


def check_finite(rows: Float[np.ndarray, "b ..."], names: Sequence[str], *, what: str) -> None:
    """Raises UserError with the first one's name if a row has a NaN or an infinity.

    Nothing that is no number leaves the program as data: a NaN would be written as black.
    """
    finite = np.isfinite(rows)
    if not finite.all():
        bad = np.flatnonzero(~finite.reshape(len(rows), -1).all(axis=1))
        raise UserError(
            f"{names[bad[0]]} is not finite, as {len(bad)} of {len(rows)} {what}s: a product is "
            "beyond the range of its dtype (conditioning.*.dtype), or weights are damaged"
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
