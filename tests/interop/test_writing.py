"""Safetensors files that are written in blocks, as the library reads them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from univg_jax.interop.tensors import TensorFolder
from univg_jax.interop.writing import write_sharded, write_tensors
from univg_jax.streaming import Tensor, boxes

VALUES = {
    "a.kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "b": np.array(1.5, np.float32),
    "c.bias": np.linspace(-3, 3, 5).astype(jnp.bfloat16),
    "d": np.zeros((0, 3), np.float32),
}


def in_blocks(values):
    """A tensor of which each block has 8 bytes."""
    return Tensor(
        shape=values.shape,
        dtype=values.dtype,
        blocks=lambda: [(b, values[b]) for b in boxes(values.shape, values.itemsize, most_bytes=8)],
    )


def test_what_is_written_in_blocks_is_what_the_library_writes(tmp_path):
    write_tensors(tmp_path / "ours", {name: in_blocks(x) for name, x in VALUES.items()})
    found = safetensors.numpy.load_file(tmp_path / "ours")
    assert found.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    start = int.from_bytes((tmp_path / "ours").read_bytes()[:8], "little")
    assert start % 8 == 0, "tensors begin at whole words"


def test_large_tensors_are_in_several_files_with_an_index(tmp_path):
    write_sharded(
        tmp_path,
        "model.safetensors",
        {name: Tensor.of(value) for name, value in VALUES.items()},
        max_file_bytes=100,
    )
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in VALUES.values())
    assert {file.name for file in tmp_path.iterdir()} == {*names, "model.safetensors.index.json"}
    stored = TensorFolder(tmp_path, "model.safetensors")
    for name, value in VALUES.items():
        np.testing.assert_array_equal(stored.read(name), value)


def test_half_a_tensor_is_no_file(tmp_path):
    value = VALUES["a.kernel"]
    half = Tensor(shape=value.shape, dtype=value.dtype, blocks=lambda: [((), value[:1])])
    with pytest.raises(ValueError, match="a has 48 bytes, expected 96"):
        write_tensors(tmp_path / "file", {"a": half})
    assert not list(tmp_path.iterdir())
