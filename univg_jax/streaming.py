"""Tensors on their way from one file to another, in blocks, so that none need fit into memory."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Shaped

BLOCK_BYTES = 2**26

Box = tuple[slice, ...]
Block = tuple[Box, Shaped[np.ndarray, "..."]]  # where it lies in its tensor, and what is there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor to be written as `dtype`: its `blocks()` follow each other in C order."""

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Callable[[], Iterable[Block]]

    @classmethod
    def of(cls, value: Shaped[np.ndarray, "..."]) -> "Tensor":
        """An array that is in memory."""
        whole = tuple(slice(0, size) for size in value.shape)
        return cls(shape=value.shape, dtype=value.dtype, blocks=lambda: [(whole, value)])

    def astype(self, dtype: np.dtype) -> "Tensor":
        """The same tensor, each block cast as it comes."""
        return dataclasses.replace(
            self,
            dtype=np.dtype(dtype),
            blocks=lambda: ((box, block.astype(dtype)) for box, block in self.blocks()),
        )

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in a file."""
        return self.size * self.dtype.itemsize


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
