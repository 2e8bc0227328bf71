"""Tensors on their way from one file to another, in blocks, so that none need fit into memory."""

import ctypes
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Shaped

BLOCK_BYTES = 2**22
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h: larger blocks are mapped, each by itself

Box = tuple[slice, ...]
Block = tuple[Box, Shaped[np.ndarray, "..."]]  # where it lies in its tensor, and what is there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor to be written as `dtype`: its `blocks()` follow each other in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterable[Block]]

    @classmethod
    def of(cls, value: jax.Array | np.ndarray) -> "Tensor":
        """An array that is in memory, of the host or of devices."""
        shape, dtype = tuple(value.shape), np.dtype(value.dtype)
        return cls(
            shape=shape, dtype=dtype, blocks=lambda: [(everything(shape), np.asarray(value))]
        )

    def astype(self, dtype: np.dtype) -> "Tensor":
        """The same tensor, each block cast as it comes."""
        if self.dtype == dtype:
            return self
        return dataclasses.replace(
            self,
            dtype=np.dtype(dtype),
            blocks=lambda: ((box, block.astype(dtype)) for box, block in self.blocks()),
        )

    def read(self) -> Shaped[np.ndarray, "..."]:
        """The whole of it, in memory."""
        values = np.empty(self.shape, self.dtype)
        for box, block in self.blocks():
            values[box] = block
        return values

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in a file."""
        return self.size * self.dtype.itemsize


def return_freed_blocks() -> None:
    """From now on this process gives a block's memory back to the system as soon as it is freed.

    By default glibc keeps up to 32 MB for each thread that ever freed a block. It is no fault if
    another C library has no such setting.
    """
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(_M_MMAP_THRESHOLD, 2**17)


def everything(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple(slice(0, size) for size in shape)


def boxes(
    shape: Sequence[int],
    itemsize: int,
    *,
    most_bytes: int = BLOCK_BYTES,
    chunks: Sequence[int] | None = None,
) -> Iterator[Box]:
    """Cuts an array into runs of consecutive elements, each of about `most_bytes`.

    With `chunks`, the shape of what its file stores as one piece, no piece is in two of them.
    """
    shape = tuple(shape)
    if not math.prod(shape):
        return
    if not shape:
        yield ()
        return
    chunks = [1] * len(shape) if chunks is None else list(chunks)
    # The axis to cut: the first whose single entries are small enough, or that a piece has more
    # than one entry of.
    inner = [itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    axis = next(
        a for a, size in enumerate(inner) if size <= max(most_bytes, itemsize) or chunks[a] > 1
    )
    count = max(1, most_bytes // inner[axis] // chunks[axis]) * chunks[axis]
    outer = [[slice(i, i + 1) for i in range(size)] for size in shape[:axis]]
    cuts = [slice(i, min(i + count, shape[axis])) for i in range(0, shape[axis], count)]
    rest = [[slice(0, size)] for size in shape[axis + 1 :]]
    yield from itertools.product(*outer, cuts, *rest)
