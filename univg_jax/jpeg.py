"""Plain JPEG files, most of what training reads, by OpenCV. Loads without JAX.

OpenCV and Pillow have the same decoder (libjpeg-turbo) and give the same pixels, bit for bit.
OpenCV needs a fourth less time, as it makes an array at once. Both refuse a file that is cut
anywhere. What is not plain (CMYK, 12 bits, arithmetic, odd headers) is for Pillow: see
`univg_jax.images`.
"""

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

_START_OF_SCAN, _EXIF_OR_XMP = 0xDA, 0xE1
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all with Huffman codes
# Huffman and quantization tables, restart interval, comment, and what applications write.
_OTHERS = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
# OpenCV's flags for a half, a quarter and an eighth of the sides. All of the file is read then, but
# fewer frequencies of its blocks are transformed.
_REDUCED = {8: cv2.IMREAD_REDUCED_GRAYSCALE_8, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4}
_REDUCED |= {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 1: 0}
# What it refuses, Pillow tells.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class Header(NamedTuple):
    """The stored size, and whether EXIF or XMP data may say how to turn the picture."""

    height: int
    width: int
    may_turn: bool


def plain_header(data: bytes) -> Header | None:
    """The header of a JPEG of one or three components of 8 bits; None for any other file."""
    if data[:2] != b"\xff\xd8":
        return None
    place, frame, may_turn = 2, b"", False
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        code, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if code == _START_OF_SCAN:
            break
        if length < 2 or not (code in _OTHERS or (code in _FRAMES and not frame)):
            return None
        if code in _FRAMES:
            frame = data[place + 4 : place + 10]  # bits, height, width, components
        may_turn |= code == _EXIF_OR_XMP
        place += 2 + length
    else:
        return None
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3):
        return None
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    return Header(height, width, may_turn) if height and width else None


def decode(
    data: bytes, height: int, width: int, *, least: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "h w 3"] | None:
    """The stored pixels in RGB, not turned; None where OpenCV refuses the file.

    With `least`, the smallest of a half, a quarter and an eighth of the sides, rounded up, that
    has at least this height and width.
    """
    factor = 1
    while least and factor < 8 and _has(_reduced(height, width, 2 * factor), least):
        factor *= 2
    pixels = _imdecode(data, cv2.IMREAD_COLOR_RGB | _REDUCED[factor])
    is_as_told = pixels is not None and pixels.shape[:2] == _reduced(height, width, factor)
    return pixels if is_as_told else None


def is_whole(data: bytes) -> bool:
    """Whether OpenCV can decode the file to its end; it makes of each block only the mean."""
    return _imdecode(data, _REDUCED[8]) is not None


def _reduced(height: int, width: int, factor: int) -> tuple[int, int]:
    return -(-height // factor), -(-width // factor)


def _has(size: tuple[int, int], least: tuple[int, int]) -> bool:
    return size[0] >= least[0] and size[1] >= least[1]


def _imdecode(data: bytes, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
