"""A network of pictures from files, on one device of each process."""

import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

BATCH_SIZE = 32  # the most inputs that are computed at once

Apply = Callable[[Any, jax.Array], jax.Array]

# Sizes of vision transformers, by width and depth.
_SIZES = {
    **{(384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H"},
    **{(1408, 40): "g", (1664, 48): "bigG"},
}


class PictureNetwork:
    """Vectors of pictures, each of any size: `prepare(picture)` is what the network is given.

    `opened_with` are settings that a benchmark has to have, too (`score_files.check_settings`);
    `backbone` is what papers call the network.
    """

    def __init__(
        self,
        apply: Apply,
        params: Any,
        prepare: Callable[[UInt8[np.ndarray, "h w 3"]], np.ndarray],
        *,
        digest: str,
        opened_with: Mapping[str, str] = MappingProxyType({}),
        backbone: str = "",
    ):
        self._apply, self._params, self._prepare = jax.jit(apply), params, prepare
        self.digest, self.opened_with, self.backbone = digest, opened_with, backbone

    def __call__(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Float[np.ndarray, "n d"]:
        """A vector of each picture, of which there is one at least."""
        return in_batches(self._apply, self._params, images, self._prepare)


def vit_size(*, width: int, depth: int) -> str:
    """The letter of a vision transformer's size, such as "B", or its width and depth."""
    return _SIZES.get((width, depth), f"{width}x{depth}")


def in_batches(
    apply: Apply, params: Any, items: Sequence[Any], prepare: Callable[[Any], np.ndarray]
) -> Float[np.ndarray, "n d"]:
    """`apply(params, x)` of all items, in batches of 1, 2, 4, ... BATCH_SIZE.

    So it is compiled for few shapes, and less than half of a batch is filled up.
    """
    rows = []
    for start in range(0, len(items), BATCH_SIZE):
        batch = [prepare(item) for item in items[start : start + BATCH_SIZE]]
        count = len(batch)
        batch += batch[-1:] * ((1 << (count - 1).bit_length()) - count)
        rows.append(np.asarray(apply(params, np.stack(batch)), np.float32)[:count])
    return np.concatenate(rows)


def digest_of(files: Sequence[pathlib.Path], *settings: str) -> str:
    """16 digits of the SHA-256 of files and of settings that the vectors depend on."""
    digest = hashlib.sha256(" ".join(settings).encode())
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def weights_of(path: pathlib.Path) -> list[pathlib.Path]:
    """The files of a folder that say what a network computes, or the file itself."""
    if not path.is_dir():
        return [path]
    return [*sorted(path.glob("*.safetensors")), *path.glob("config.json")]
