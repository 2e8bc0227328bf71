"""The tensors of safetensors files, read by name, whole or in part."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.files import MAX_JSON_BYTES, parse_json, read_json
from univg_jax.interop.fingerprint import file_sha256
from univg_jax.pretrained import local_path
from univg_jax.streaming import Block, Tensor, boxes

PathLike = str | os.PathLike

MAX_SHOWN = 160  # letters of a name in a message

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What is read and written, by its name in a file.
DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
}
FLOATS = ("F32", "F16", "BF16")
# Earlier versions read so many samples of so many bytes from each file.
NUM_SAMPLES, SAMPLE_BYTES = 64, 2**16


class TensorFolder:
    """The tensors of a folder's file, or of the several files that its index lists.

    Tensors that the regex `ignored` matches whole are left out. Raises NotFoundError for a missing
    file, and UserError for a broken one or a bucket.
    """

    def __init__(self, folder: PathLike, file: str, *, ignored: str = "(?!)"):
        self.folder, self.file = local_path(folder), file
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.files = self._files()
        for path in self.files:
            for name, entry in _header(path).items():
                if re.fullmatch(ignored, name):
                    continue
                if name in self.file_of:
                    raise UserError(f"{path}: {_shown(name)} is in {self.file_of[name].name} too")
                self.file_of[name] = path
                self.shapes[name] = tuple(entry["shape"])
                self.dtypes[name] = entry["dtype"]

    def _files(self) -> list[Path]:
        """The whole file, or those that its index lists."""
        index = self.folder / f"{self.file}.index.json"
        if not index.exists():
            if not (self.folder / self.file).is_file():
                raise NotFoundError(
                    f"{self.folder} has neither {self.file} nor {index.name}{self._instead()}"
                )
            return [self.folder / self.file]
        named = read_json(index).get("weight_map")
        names = list(named.values()) if isinstance(named, dict) else []
        # A file's plain name: an index of anybody's must not lead out of its folder.
        if not names or any(not re.fullmatch(r"[\w.-]{1,240}\.safetensors", str(n)) for n in names):
            raise UserError(f"{index} is no index of safetensors files in its folder")
        names = sorted(set(names))
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise NotFoundError(f"{self.folder} lacks {_listed(missing)}, which {index.name} names")
        return [self.folder / name for name in names]

    def _instead(self) -> str:
        """What a folder has that lacks the file: the end of a message."""
        stem, suffix = self.file.rsplit(".", 1)
        for variant in sorted(self.folder.glob(f"{stem}.*.{suffix}")):
            return f"; {_shown(variant.name)} is a variant: rename it to {self.file} to read it"
        for pickled in sorted(f for f in self.folder.glob("*") if f.suffix in PICKLES):
            return f"; {_shown(pickled.name)} is a pickle, which can run code and is never read"
        return ""

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def read(self, name: str, box: Sequence[slice] | None = None) -> Shaped[np.ndarray, "..."]:
        """The tensor, or the part of it in `box`. The file is mapped only while it is read."""
        with _opened(self.file_of[name]) as handle:
            return handle.get_tensor(name) if box is None else handle.get_slice(name)[tuple(box)]

    def stream(self, name: str) -> Tensor:
        """The tensor as it is stored, read in blocks when it is written elsewhere."""
        shape, dtype = self.shapes[name], DTYPES[self.dtypes[name]]

        def blocks() -> Iterator[Block]:
            for box in boxes(shape, dtype.itemsize):
                yield box, self.read(name, box)

        return Tensor(shape=shape, dtype=dtype, blocks=blocks)

    def fingerprint(self) -> str:
        """A hash of all that the network is made of: of every file, and of its configuration."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name} {file_sha256(file)};".encode())
        if (config := self.folder / "config.json").is_file():
            digest.update(json.dumps(read_json(config), sort_keys=True).encode())
        return digest.hexdigest()

    def sampled_fingerprint(self) -> str:
        """What earlier versions recorded as `fingerprint`: of every file its size and samples."""
        digest = hashlib.sha256()
        for file in sorted(set(self.file_of.values())):
            size = file.stat().st_size
            digest.update(f"{file.name} {size};".encode())
            last = max(size - SAMPLE_BYTES, 0)
            with file.open("rb") as opened:
                for start in sorted({i * last // (NUM_SAMPLES - 1) for i in range(NUM_SAMPLES)}):
                    opened.seek(start)
                    digest.update(opened.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def check(
        self, expected: Mapping[str, tuple[int, ...]], *, unread: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Raises UserError unless the headers are as `expected`, and as `unread` where present."""
        present = {name: shape for name, shape in unread.items() if name in self.shapes}
        where = str(self.folder / self.file)
        check_shapes({**expected, **present}, self.shapes, where=where)
        if wrong := [f"{n} ({dtype})" for n, dtype in self.dtypes.items() if dtype not in FLOATS]:
            raise UserError(
                f"{where}: expected tensors of {', '.join(FLOATS)}, got {_listed(wrong)}"
            )


def _opened(file: Path) -> Any:
    """An open safetensors file, a context manager."""
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from None


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"dtype", "shape"} of a file's tensors. Raises UserError for a broken file."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            content = opened.read(size) if size <= MAX_JSON_BYTES else None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if content is None:
        raise UserError(f"{file} is not a readable safetensors file: its header of {size} bytes")
    with _opened(file):  # checks that the tensors' bytes are all of the file, each used once
        pass
    # The library reads this too, but takes the last of two entries of one name.
    header = parse_json(content, where=f"{file}: its header")
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Raises UserError that lists missing, extra and misshaped names."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "misshaped": [
            f"{_shown(name)} (expected {list(expected[name])}, got {list(found[name])})"
            for name in sorted(expected.keys() & found.keys())
            if tuple(expected[name]) != tuple(found[name])
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{where}: tensors do not fit the network: {listed}")


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_shown, names[:most])) + more


def _shown(name: str) -> str:
    """A name of a file of anybody's, fit for a message: printable, and of bounded length."""
    return name if name.isprintable() and len(name) <= MAX_SHOWN else quote(name, MAX_SHOWN)
