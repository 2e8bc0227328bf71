"""Safetensors files, written as their tensors come.

A file is 8 bytes with the size of its header, the header as JSON (name, dtype, shape and place of
every tensor), and the tensors' bytes one after the other
(https://huggingface.co/docs/safetensors, "Format").
"""

import json
import os
from collections.abc import Collection, Mapping
from typing import BinaryIO

import numpy as np

from univg_jax.files import write_streamed, write_whole
from univg_jax.interop.tensors import DTYPES
from univg_jax.streaming import Tensor

MAX_FILE_BYTES = 5 * 10**9
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_sharded(
    folder: str | os.PathLike,
    file: str,
    tensors: Mapping[str, Tensor],
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    apart: Collection[str] = (),
) -> None:
    """Writes tensors as Hugging Face does, in the order in which they come.

    If `file` would exceed `max_file_bytes`, there are several, such as
    `model-00001-of-00002.safetensors`, and an index. Those named in `apart`, which come first, have
    a file of their own. The host holds one block of one tensor. Raises UserError where the system
    refuses.
    """
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        is_full = _size(files[-1]) + tensor.num_bytes > max_file_bytes
        if files[-1] and (is_full or (name in apart) != (next(iter(files[-1])) in apart)):
            files.append({})
        files[-1][name] = tensor
    stem, suffix = file.rsplit(".", 1)
    weight_map = {}
    for i, part in enumerate(files):
        one = file if len(files) == 1 else f"{stem}-{i + 1:05d}-of-{len(files):05d}.{suffix}"
        write_tensors(os.path.join(folder, one), part)
        weight_map |= dict.fromkeys(part, one)
    if len(files) > 1:
        index = {"metadata": {"total_size": _size(tensors)}, "weight_map": weight_map}
        write_whole(os.path.join(folder, f"{file}.index.json"), json.dumps(index, indent=2))


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor]) -> None:
    """Writes one file, whole or not at all. Raises UserError where the system refuses."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # readers may map the tensors, which then lie at whole words

    def write(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            written = 0
            for _, block in tensor.blocks():
                block = np.ascontiguousarray(block, tensor.dtype)
                written += file.write(block.reshape(-1).view(np.uint8))
                del block  # or it stays while the next one is read
            if written != tensor.num_bytes:
                raise ValueError(f"{name} has {written} bytes, expected {tensor.num_bytes}")

    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_streamed(path, write)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.num_bytes for tensor in tensors.values())
