"""Tensors in blocks: all of them, in order, and none larger than asked for."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from univg_jax.streaming import Tensor, boxes

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@given(shapes, st.integers(1, 64))
def test_blocks_follow_each_other_in_c_order(shape, most):
    values = np.arange(math.prod(shape)).reshape(shape)
    found = [values[box] for box in boxes(shape, 1, most_bytes=most)]
    np.testing.assert_array_equal(np.concatenate([x.ravel() for x in found]), values.ravel())
    assert all(x.size <= most for x in found)


@given(shapes.flatmap(lambda s: st.tuples(st.just(s), st.tuples(*[st.integers(1, n) for n in s]))))
def test_no_piece_of_a_file_is_in_two_blocks(shape_and_chunks):
    shape, chunks = shape_and_chunks
    seen, in_order = {}, []
    for i, box in enumerate(boxes(shape, 1, most_bytes=2, chunks=chunks)):
        index = np.stack(np.meshgrid(*[np.arange(c.start, c.stop) for c in box], indexing="ij"), -1)
        in_order += index.reshape(-1, len(shape)).tolist()
        for piece in {tuple(p) for p in (index // np.array(chunks, int)).reshape(-1, len(shape))}:
            assert seen.setdefault(piece, i) == i
    assert in_order == sorted(in_order)
    assert len(in_order) == math.prod(shape)


def test_nothing_has_no_blocks_and_a_number_one():
    assert list(boxes((3, 0), 4)) == []
    assert list(boxes((), 4)) == [()]


def test_a_tensor_is_cast_block_by_block():
    values = np.linspace(0, 1, 7, dtype=np.float32)
    tensor = Tensor.of(values).astype(np.dtype(np.float16))
    ((_, block),) = tensor.blocks()
    np.testing.assert_array_equal(block, values.astype(np.float16))
    assert (tensor.size, tensor.num_bytes) == (7, 14)
