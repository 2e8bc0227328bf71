"""PyTorch's files without PyTorch: those since 1.6, which are archives, and those before."""

import dataclasses
import io
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

NAMES = {
    "float32": "torch FloatStorage",
    "float16": "torch HalfStorage",
    "int64": "torch LongStorage",
}


@dataclasses.dataclass(frozen=True)
class Global:
    """Something that is imported, `module name`."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Called:
    function: Global
    args: tuple


@dataclasses.dataclass(frozen=True)
class _Stored:
    entry: tuple


class _Pickler(pickle._Pickler):
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Global):
            self.write(b"c" + "\n".join([*obj.name.split(" "), ""]).encode())
        elif isinstance(obj, _Called):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
        elif isinstance(obj, _Stored):
            self.save(obj.entry)
            self.write(pickle.BINPERSID)
        else:
            super().save(obj, save_persistent_id)


def _pickled(value: Any) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def _state(tensors: Mapping[str, Any], *more: Any, start: int, stride: int) -> dict[str, Any]:
    """The dict of a file, in which a tensor is a call with a storage."""
    state = {}
    for name, array in tensors.items():
        if not isinstance(array, np.ndarray):
            state[name] = array
            continue
        strides = tuple(stride * n // array.itemsize for n in array.strides)
        kind = Global(NAMES[str(array.dtype)])
        storage = _Stored(("storage", kind, name, "cpu", array.size, *more))
        args = (storage, start, array.shape, strides, False, {})
        state[name] = _Called(Global("torch._utils _rebuild_tensor_v2"), args)
    return state


def torch_zip(
    tensors: Mapping[str, Any],
    *,
    start: int = 0,
    stride: int = 1,
    compression: int = zipfile.ZIP_STORED,
    byteorder: bytes = b"little",
) -> bytes:
    """A file as `torch.save` writes a dict of tensors."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("a/data.pkl", _pickled(_state(tensors, start=start, stride=stride)))
        archive.writestr("a/byteorder", byteorder)
        for name, array in tensors.items():
            if isinstance(array, np.ndarray):
                archive.writestr(f"a/data/{name}", array.tobytes())
    return file.getvalue()


def torch_pickle(tensors: Mapping[str, Any]) -> bytes:
    """The same as it was written before PyTorch 1.6."""
    arrays = {name: x for name, x in tensors.items() if isinstance(x, np.ndarray)}
    parts = [0x1950A86A20F9469CFC6C, 1001, dict(protocol_version=1001, little_endian=True)]
    parts += [_state(tensors, None, start=0, stride=1), list(arrays)]
    blocks = (x.size.to_bytes(8, "little") + x.tobytes() for x in arrays.values())
    return b"".join([*map(_pickled, parts), *blocks])
