"""The tensors of safetensors files, read by name, whole or in part."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from univg_jax.errors import NotFoundError, UserError
from univg_jax.pretrained import local_path

PathLike = str | os.PathLike

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F32", "F16", "BF16")
# A fingerprint reads so many samples of so many bytes from each file.
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
        for path in self._files():
            with _opened(path) as handle:
                for name in handle.keys():  # noqa: SIM118 - no mapping
                    if re.fullmatch(ignored, name):
                        continue
                    header = handle.get_slice(name)
                    self.file_of[name] = path
                    self.shapes[name] = tuple(header.get_shape())
                    self.dtypes[name] = header.get_dtype()

    def _files(self) -> list[Path]:
        """The whole file, or those that its index lists."""
        index = self.folder / f"{self.file}.index.json"
        if not index.exists():
            if not (self.folder / self.file).is_file():
                pickles = sorted(f.name for f in self.folder.glob("*") if f.suffix in PICKLES)
                hint = "; {} is a pickle, which can run code and is never read"
                raise NotFoundError(
                    f"{self.folder} has neither {self.file} nor {index.name}"
                    + (hint.format(pickles[0]) if pickles else "")
                )
            return [self.folder / self.file]
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of safetensors files: {error!r}") from None
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise NotFoundError(f"{self.folder} lacks {_listed(missing)}, which {index.name} names")
        return [self.folder / name for name in names]

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def read(self, name: str, box: Sequence[slice] | None = None) -> Shaped[np.ndarray, "..."]:
        """The tensor, or the part of it in `box`. The file is mapped only while it is read."""
        with _opened(self.file_of[name]) as handle:
            return handle.get_tensor(name) if box is None else handle.get_slice(name)[tuple(box)]

    def fingerprint(self) -> str:
        """A hash that distinguishes these weights from others without reading gigabytes.

        Of every file it covers the size and evenly spaced samples, of which the first one has the
        header's names and shapes.
        """
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
        check_shapes({**expected, **present}, self.shapes, where=str(self.folder))
        if wrong := [f"{n} ({dtype})" for n, dtype in self.dtypes.items() if dtype not in FLOATS]:
            raise UserError(
                f"{self.folder}: expected tensors of {', '.join(FLOATS)}, got {_listed(wrong)}"
            )


def _opened(file: Path) -> Any:
    """An open safetensors file, a context manager."""
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from None


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, where: str
) -> None:
    """Raises UserError that lists missing, extra and misshaped names."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "misshaped": [
            f"{name} (expected {list(expected[name])}, got {list(found[name])})"
            for name in sorted(expected.keys() & found.keys())
            if tuple(expected[name]) != tuple(found[name])
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{where}: tensors do not fit the network: {listed}")


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
