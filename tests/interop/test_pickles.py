"""Tensors of pickles: PyTorch's files, old and new, NumPy's arrays; and nothing is run."""

import collections
import contextlib
import os
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from tests.interop.torch_file import NAMES, Global, torch_pickle, torch_zip
from univg_jax.errors import NotFoundError, UserError
from univg_jax.interop.pickles import read_pickle

TENSORS = {
    "features.0.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "features.0.bias": np.arange(2, dtype=np.float16),
    "steps": np.array(7),
}


@pytest.fixture
def read(tmp_path):
    def write_and_read(content):
        (tmp_path / "weights.pth").write_bytes(content)
        return read_pickle(tmp_path / "weights.pth")

    return write_and_read


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("write", [torch_zip, torch_pickle], ids=["zip", "legacy"])
def test_pytorchs_files(read, write):
    check(read(write(TENSORS)), TENSORS)


def test_a_file_is_converted_to_safetensors(read, tmp_path):
    save_file(read(torch_pickle(TENSORS)), tmp_path / "weights.safetensors")
    check(load_file(tmp_path / "weights.safetensors"), TENSORS)


def test_numpys_arrays_in_nested_dicts(read):
    by_columns = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    nested = {"net": {"conv": {"kernel": by_columns}, "bias": TENSORS["features.0.bias"]}}
    expected = {"net/conv/kernel": by_columns, "net/bias": TENSORS["features.0.bias"]}
    for protocol in (3, 4):
        check(read(pickle.dumps(nested, protocol=protocol)), expected)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("write", [torch_zip, torch_pickle], ids=["zip", "legacy"])
def test_nothing_is_run(read, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (write({"a": Evil()}), pickle.dumps({"a": Evil()})):
        with pytest.raises(UserError, match=r"weights.pth wants '\w+.mkdir', and is refused"):
            read(content)
    assert not (tmp_path / "harm").exists()


def test_what_may_be_called_cannot_be_changed(read):
    changed = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}(U\x0c__defaults__K\x01u\x86b."
    with pytest.raises(UserError, match="changes what it is read by, and is refused"):
        read(changed)
    check(read(torch_zip(TENSORS)), TENSORS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"epoch": 3}), "has 'epoch' of int: expected tensors alone"),
        (pickle.dumps({"a": np.array([{}])}, 4), "has an array of 'O8': expected numbers"),
        (pickle.dumps({"a": np.arange(3, dtype=">f4")}, 4), "has numbers of the other byte order"),
        (pickle.dumps(collections.Counter("a")), "wants 'collections.Counter', and is refused"),
        (b"", "is no file of tensors that can be read"),
        (b"\x80\x05\x96" + b"\xff" * 6 + b"\0\0.", "is no file of tensors that can be read"),
        (torch_zip(TENSORS)[:-30], "is no file of tensors that can be read"),
        (torch_pickle(TENSORS)[:-30], "is no file of tensors that can be read"),
        (torch_zip(TENSORS, compression=zipfile.ZIP_DEFLATED), "is compressed"),
        (torch_zip(TENSORS, byteorder=b"big"), "has numbers of the other byte order"),
        (torch_zip({"a": Global(NAMES["float32"])}), "has 'a' of str: expected tensors alone"),
        (torch_zip(TENSORS, stride=3), r"has a tensor \[2, 3, 2, 2\] with gaps"),
        (torch_zip(TENSORS, start=-1), r"has a tensor \[2, 3, 2, 2\] from -1"),
        (torch_zip(TENSORS, start=9), "is no file of tensors that can be read"),
    ],
    ids=[
        *("number", "objects", "byte-order", "class", "empty", "too-long", "torn-zip", "torn"),
        *("compressed", "big-endian", "global", "gaps", "before", "beyond"),
    ],
)
def test_what_cannot_be_read_is_one_line(read, content, message):
    with pytest.raises(UserError, match=f"weights.pth {message}"):
        read(content)


def test_dicts_that_repeat_each_other_end_soon(read):
    nested = {}
    for _ in range(60):
        nested = {"a": nested, "b": nested}
    with pytest.raises(UserError, match="has more than 10000 names"):
        read(pickle.dumps(nested))


def test_a_missing_file(tmp_path):
    with pytest.raises(NotFoundError, match=r"nothing.pth cannot be read: No such file"):
        read_pickle(tmp_path / "nothing.pth")


FILES = [torch_zip(TENSORS), torch_pickle(TENSORS), pickle.dumps({"a": TENSORS["steps"]}, 4)]


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from(FILES), st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_byte_is_one_line_or_nothing(read, content, place, byte):
    damaged = bytearray(content)
    damaged[place % len(damaged)] = byte
    found = {}
    with contextlib.suppress(UserError):
        found = read(bytes(damaged))
    assert all(isinstance(value, np.ndarray) for value in found.values())
