"""Which records of a source are in which bucket, from the sizes of their pictures."""

import hashlib
from collections.abc import Sequence

import numpy as np

from data_pipelines.order import Bucket
from data_pipelines.sources import Source
from univg_jax.buckets import Shape, nearest

_CHUNK = 1 << 20  # records whose shapes are found at a time: beside their sizes little is in memory


def split(source: Source, shapes: Sequence[Shape]) -> tuple[Bucket, ...]:
    """The records of a source that are nearest to each shape.

    They are held as 4 bytes a record. Raises UserError as `Source.sizes` does.
    """
    count = len(source)
    if len(shapes) == 1:
        return (Bucket(range(count)),)
    numbers = numbers_of(source.sizes(), shapes)
    return tuple(_bucket(np.flatnonzero(numbers == b), count) for b in range(len(shapes)))


def numbers_of(sizes: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """The index of the nearest shape of each size (height, width)."""
    numbers = np.empty(len(sizes), np.uint16)
    for start in range(0, len(sizes), _CHUNK):
        chunk = np.asarray(sizes[start : start + _CHUNK])
        numbers[start : start + _CHUNK] = nearest(shapes, chunk[:, 0], chunk[:, 1])
    return numbers


def _bucket(records: np.ndarray, count: int) -> Bucket:
    if len(records) == count:
        return Bucket(range(count))
    small = records.astype(np.uint32 if count <= 2**32 else np.int64)
    name = hashlib.blake2b(records.astype("<i8").tobytes(), digest_size=8).hexdigest()
    return Bucket(small, name)
