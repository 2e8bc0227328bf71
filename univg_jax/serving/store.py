"""Files of all visitors, in memory, by names that are made of their content."""

import base64
import binascii
import collections
import hashlib
import threading

import numpy as np
from jaxtyping import UInt8

from data_pipelines.transforms import resize_image
from univg_jax import images
from univg_jax.errors import NotFoundError, UserError, quote

MAX_UPLOAD = 2**26  # bytes of a file
LEAST_SIDE = 8  # of a picture, in pixels
MOST_SIDE = 2048  # of a picture that is kept; larger ones are shrunk

RGB = UInt8[np.ndarray, "h w 3"]


class Store:
    """The latest files, of `capacity` bytes at most; those that are `kept` stay.

    Equal files have one name, which also another process gives them. Threads may share a store.
    """

    def __init__(self, *, capacity: int = 2**28):
        self._capacity = capacity
        self._kept: dict[str, bytes] = {}
        self._files: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def add(self, data: bytes, suffix: str, *, keep: bool = False) -> str:
        """Keeps a file; returns its name, which ends in `suffix`."""
        name = hashlib.blake2b(data, digest_size=12).hexdigest() + suffix
        with self._lock:
            if keep:
                self._kept[name] = data
            elif name not in self._kept:
                self._bytes += len(data) - len(self._files.pop(name, b""))
                self._files[name] = data
            while self._bytes > self._capacity and len(self._files) > 1:
                self._bytes -= len(self._files.popitem(last=False)[1])
        return name

    def add_picture(self, pixels: RGB | UInt8[np.ndarray, "h w"], *, keep: bool = False) -> str:
        """Keeps a picture as PNG; returns its name."""
        return self.add(images.png_bytes(pixels), ".png", keep=keep)

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._kept or name in self._files

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises NotFoundError for one that is not, or no longer, there."""
        with self._lock:
            if name in self._kept:
                return self._kept[name]
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        raise NotFoundError(f"the picture {quote(name)} is not here any more: choose it again")


def check_upload(name: str, size: int) -> None:
    """Raises UserError for a file of more than MAX_UPLOAD bytes."""
    if size > MAX_UPLOAD:
        where = quote(name, most=60)[1:-1]
        raise UserError(f"{where} is too large: it has more than {MAX_UPLOAD / 2**20:.0f} MB")


def read_upload(name: str, data: bytes) -> RGB:
    """The picture in a file that a visitor sent, at most MOST_SIDE pixels a side.

    Raises UserError, with the file's name, for what is no picture, a bomb, or too small.
    """
    check_upload(name, len(data))
    where = quote(name, most=60)[1:-1]
    try:
        pixels = images.decode_rgb(data)
    except UserError as error:
        raise UserError(f"{where} {error}") from None
    height, width = pixels.shape[:2]
    if min(height, width) < LEAST_SIDE:
        raise UserError(
            f"{where} has {width} x {height} pixels: expected at least {LEAST_SIDE} x {LEAST_SIDE}"
        )
    scale = min(1.0, MOST_SIDE / max(height, width))
    return resize_image(pixels, height=round(height * scale), width=round(width * scale))


def read_mask(address: str) -> UInt8[np.ndarray, "h w"]:
    """The mask in a PNG's data URL, 255 where it is white. Raises UserError for what is none."""
    try:
        data = base64.b64decode(address.partition(",")[2], validate=True)
        return images.to_mask(images.open_picture(data)) * np.uint8(255)
    except UserError as error:
        raise UserError(f"the mask {error}") from None
    except binascii.Error:
        raise UserError("the mask is not a readable image: it is no base64") from None
