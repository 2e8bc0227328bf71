"""Pictures before and after, for the fixtures of edits."""

import io
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.native.drawing import pixels

CENTER = (slice(10, 30), slice(15, 35))  # rows and columns that every edit changes


def png(array: np.ndarray) -> bytes:
    """The PNG of RGB, RGBA or gray."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def jpg(array: np.ndarray) -> bytes:
    """The JPEG of RGB."""
    return cv2.imencode(".jpg", array[:, :, ::-1])[1].tobytes()


def before(number: int) -> np.ndarray:
    """RGB of any of a few shapes."""
    return pixels(number)


def after(number: int, turn: int = 1) -> np.ndarray:
    """The same with another center, darker with each turn."""
    changed = pixels(number).copy()
    changed[CENTER] = 200 // turn
    return changed


def white_mask(number: int) -> np.ndarray:
    """White in the center, with gray edges that lie outside of the half."""
    mask = np.zeros(pixels(number).shape[:2], np.uint8)
    rows, columns = CENTER
    mask[rows.start - 2 : rows.stop + 2, columns.start - 2 : columns.stop + 2] = 90
    mask[CENTER] = 255
    return mask


def struct(data: bytes | None) -> dict | None:
    """Hugging Face's picture in a parquet column."""
    return None if data is None else {"bytes": data, "path": None}


def write_parquet(path: pathlib.Path, rows: Sequence[dict], nulls: Sequence[str] = ()) -> None:
    """Row groups of two; `nulls` are columns without a type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(list(rows))
    for name in nulls:
        table = table.append_column(name, pa.nulls(len(rows), pa.null()))
    pq.write_table(table, path, row_group_size=2)
