"""Tensors of PyTorch's files and of pickled NumPy arrays, without running what a pickle asks for.

A pickle is a program that may import anything and call it. Here it may make dicts, tensors and
arrays, by stand-ins of our own; whatever else it names is refused. For files that exist in no other
form: networks are read from safetensors files.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Shaped

from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.interop.tensors import PathLike

Array = Shaped[np.ndarray, "..."]

_ZIP = b"PK\x03\x04"  # PyTorch's files since 1.6
_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # its files before
_DTYPES = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "DoubleStorage": "<f8",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
}
_MAX_NAMES = 10_000

_Storage = collections.namedtuple("_Storage", "key dtype count")
_Tensor = collections.namedtuple("_Tensor", "storage start shape strides")


def read_pickle(path: PathLike, *, under: str | None = None) -> dict[str, Array]:
    """The tensors of a file by name; those of dicts in dicts are named `outer/inner`.

    With `under` only the dict of that name counts, such as a checkpoint's "state_dict", if the file
    has one: beside it there may be other things, which are left.

    Raises NotFoundError for a file that is missing, and UserError for one that is torn or has
    anything but tensors.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}") from None
    try:
        stored, read = _parts(content)
        if isinstance(stored, dict) and isinstance(stored.get(under), dict):
            stored = stored[under]
        return dict(_named(stored, read))
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is no file of tensors that can be read: {reason}") from None


def _parts(content: bytes) -> tuple[Any, Callable[[str], bytes]]:
    """What the pickle holds, and the bytes of a storage by its key."""
    if content.startswith(_ZIP):
        archive = zipfile.ZipFile(io.BytesIO(content))
        (main,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        if any(item.compress_type != zipfile.ZIP_STORED for item in archive.infolist()):
            raise UserError("is compressed: expected a file as PyTorch writes it")
        root = main.removesuffix("data.pkl")
        order = f"{root}byteorder"
        _check_order(order not in archive.namelist() or archive.read(order) == b"little")
        stored = _Unpickler(io.BytesIO(archive.read(main))).load()
        return stored, lambda key: archive.read(f"{root}data/{key}")
    file = io.BytesIO(content)
    if not content.startswith(_MAGIC):
        return _Unpickler(file).load(), {}.__getitem__
    _, _, machine, stored, keys = (_Unpickler(file).load() for _ in range(5))
    _check_order(machine["little_endian"])
    sizes = {storage.key: np.dtype(storage.dtype).itemsize for storage in _storages(stored)}
    return stored, {key: _block(file, sizes[key]) for key in keys}.__getitem__


def _check_order(is_little: object) -> None:
    if not is_little:
        raise UserError("has numbers of the other byte order")


def _block(file: io.BytesIO, size: int) -> bytes:
    return file.read(size * int.from_bytes(file.read(8), "little"))


def _storages(stored: Any) -> Iterator[_Storage]:
    return (value.storage for _, value in _leaves(stored) if isinstance(value, _Tensor))


def _named(stored: Any, read: Callable[[str], bytes]) -> Iterator[tuple[str, Array]]:
    for name, value in _leaves(stored):
        if isinstance(value, _Tensor):
            yield name, _array(value, read)
        elif isinstance(value, _Array):
            yield name, value.array
        else:
            raise UserError(f"has {quote(name)} of {type(value).__name__}: expected tensors alone")


def _leaves(stored: Any) -> Iterator[tuple[str, Any]]:
    """All that is in nested dicts."""
    waiting, count = [("", stored)], 0
    while waiting:
        name, value = waiting.pop()
        count += 1
        if count > _MAX_NAMES:
            raise UserError(f"has more than {_MAX_NAMES} names")
        if isinstance(value, dict):
            prefix = name and f"{name}/"
            waiting += [(f"{prefix}{key}", inner) for key, inner in reversed(value.items())]
        else:
            yield name, value


def _array(tensor: _Tensor, read: Callable[[str], bytes]) -> Array:
    storage, start, shape, strides = tensor
    whole = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    if any(n > 1 and s != w for n, s, w in zip(shape, strides, whole, strict=True)):
        raise UserError(f"has a tensor {list(shape)} with gaps: save its contiguous copy")
    values = np.frombuffer(read(storage.key), storage.dtype, storage.count)
    if min(start, *shape, 0) < 0:
        raise UserError(f"has a tensor {list(shape)} from {start}")
    return values[start : start + math.prod(shape)].reshape(shape)


class _Names(dict):
    """Instead of an OrderedDict."""

    def __setstate__(self, state: Any) -> None:
        """PyTorch's notes on versions are of no use here."""


class _DType:
    """Instead of NumPy's dtype."""

    def __init__(self, code: str, *_: Any):
        if code not in ("f2", "f4", "f8", "i4", "i8"):
            raise UserError(f"has an array of {quote(code)}: expected numbers")
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Instead of NumPy's array."""

    array: Array

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, by_columns, data = state
        _check_order(dtype.order == "<")
        values = np.frombuffer(data, f"<{dtype.code}")
        self.array = values.reshape(shape, order="F" if by_columns else "C")


class _Allowed:
    """What a pickle may call. It has no attributes that a pickle could set."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]):
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise UserError("changes what it is read by, and is refused")


def _tensor(storage: Any, start: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise UserError("has a tensor without numbers")
    return _Tensor(storage, start, shape, strides)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Names,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
}


# In Python, not in C: that one believes a number of memo slots, and takes gigabytes for them.
class _Unpickler(pickle._Unpickler):
    # This one believes a number of bytes.
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]

    def __init__(self, file: io.BytesIO):
        super().__init__(file, encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _ALLOWED:
            wanted = quote(f"{module}.{name}")
            raise UserError(f"wants {wanted}, and is refused: expected tensors alone")
        return _Allowed(_ALLOWED[module, name])

    def get_extension(self, code: int) -> Any:
        raise UserError("wants an extension, and is refused: expected tensors alone")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count, *view = pid
        if kind != "storage" or dtype not in _DTYPES.values() or any(view):
            raise UserError("has numbers of an unknown kind")
        return _Storage(key, dtype, count)
