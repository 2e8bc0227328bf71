"""Arrays on disk by the hash of what they were computed from: how a cache is written and read.

A cache is a folder, local or in a bucket, that may hold caches of several kinds. The record of a
kind (`cache.json`, `latents.json`) says whose arrays these are (`identity`: the encoder, the hash
of its weights) and which files hold them. A safetensors file has rows: `keys`, one tensor for each
of the kind's fields, and `sums`. The record is written last, so what has none is not finished, and
a build that was killed goes on behind the files that are whole.

What is on disk is checked when it is read. Each row has a CRC-32, made and compared at about
4 GB/s. The rows' keys and CRCs have a checksum in the record, which has one of itself.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from etils import epath
from jaxtyping import Shaped, UInt8, UInt32
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from univg_jax.errors import AlreadyExistsError, NotFoundError, UserError
from univg_jax.files import read_sealed, write_sealed, write_whole

FILE_BYTES = 2**30  # a file is serialized in memory, so it should not be much larger
KEY_BYTES = 16

Item = TypeVar("Item")
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What a cache holds, and how its files are called."""

    what: str  # of whom its arrays are, in messages: "the embeddings of another text encoder"
    record: str
    prefix: str  # of its files' names
    fields: tuple[str, ...]
    unit: str  # what is counted in the record

    def name(self, number: int) -> str:
        """The name of a file."""
        return f"{self.prefix}{number:05d}.safetensors"

    def number(self, name: str) -> int | None:
        """The number in a file's name; None if it is none of the kind's files."""
        match = re.fullmatch(rf"{self.prefix}(\d{{5,}})\.safetensors", name)
        return match and int(match[1])

    def files(self, folder: epath.Path) -> dict[int, epath.Path]:
        """The files of this kind in a folder, by their number."""
        found = {self.number(path.name): path for path in folder.glob("*.safetensors")}
        return {number: found[number] for number in sorted(found.keys() - {None})}


class Cache:
    """The finished cache of a kind in a folder; `find` gives the arrays of a key.

    A host holds 24 bytes a row. Raises NotFoundError if there is none, UserError if it is damaged.
    """

    def __init__(self, folder: epath.PathLike, kind: Kind):
        self.folder, self.kind = epath.Path(folder), kind
        record = self.folder / kind.record
        if not record.exists():
            raise NotFoundError(
                f"{folder} has no {kind.record}: not a finished cache (univg data cache)"
            )
        stored = read_sealed(record)
        if isinstance(stored.get("files"), list):
            raise UserError(
                f"{folder} has no checksums: an earlier version made it; make it anew "
                "(univg data cache)"
            )
        files, identity = stored.get("files"), stored.get("identity")
        if not (isinstance(files, dict) and isinstance(identity, dict)):
            raise UserError(f"{record} is damaged: it has no files, or no identity")
        self.identity: dict[str, Any] = identity
        self._copies: epath.Path | None = None
        self._files: list[tuple[str, Any]] = []  # names, and open files
        empty = np.zeros((0, KEY_BYTES), np.uint8)
        keys = [empty, *(self._open(name, expected) for name, expected in files.items())]
        counts = [len(k) for k in keys[1:]]
        # As texts of a fixed length, which numpy can sort and search. It takes the zeros at their
        # ends away, from a text that is looked at alone, too: `find` compares bytes.
        texts = np.concatenate(keys).reshape(-1).view(f"S{KEY_BYTES}")
        order = np.argsort(texts, kind="stable")
        self._keys = texts[order]
        self._file_of = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)[order]
        self._row_of = np.concatenate(
            [np.zeros(0, np.uint32), *(np.arange(count, dtype=np.uint32) for count in counts)]
        )[order]

    def __len__(self) -> int:
        return len(self._keys)

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raises UserError if these are arrays of another encoder."""
        for key in {**self.identity, **identity}:
            found, expected = self.identity.get(key), identity.get(key)
            if found != expected:
                raise UserError(
                    f"{self.folder} has {self.kind.what}: {key} is {found!r}, this run's "
                    f"{expected!r}; make it anew (univg data cache)"
                )

    def find(self, key: bytes) -> tuple[Shaped[np.ndarray, "1 ..."], ...] | None:
        """The arrays of a key, in the order of the kind's fields; None if it is not there.

        Raises UserError if they are damaged.
        """
        place = int(np.searchsorted(self._keys, np.bytes_(key)))
        if self._keys[place : place + 1].tobytes() != key:
            return None
        row = int(self._row_of[place])
        name, file = self._files[self._file_of[place]]
        try:
            *arrays, written = (
                file.get_slice(field)[row : row + 1] for field in (*self.kind.fields, "sums")
            )
            is_sound = sum_of_row(*arrays) == written[0]
        except SafetensorError:
            is_sound = False
        if not is_sound:
            raise UserError(f"{self.folder / name} is damaged at row {row}; make the cache anew")
        return tuple(arrays)

    def _open(self, name: str, expected: str) -> UInt8[np.ndarray, "n k"]:
        """Opens a file; returns the keys of its rows."""
        path = self.folder / name
        try:
            if self.kind.number(name) is None:
                raise OSError("it is none of its files")
            file, keys, sums = _open_file(self._local(path))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable part of the cache: {error}") from None
        if _sum_of_index(keys, sums) != expected:
            raise UserError(f"{path} is damaged; make the cache anew")
        self._files.append((name, file))
        return keys

    def _local(self, path: epath.Path) -> str:
        """The path of a local file with this content."""
        if "://" not in os.fspath(path):
            return os.fspath(path)
        # Rows are read one at a time from a file that is mapped into memory, which only a local
        # file can be. So a bucket's files are copied, for as long as this cache lives.
        if self._copies is None:
            self._copies = epath.Path(tempfile.mkdtemp(prefix="univg_cache_"))
            weakref.finalize(self, shutil.rmtree, self._copies, ignore_errors=True)
        copy = self._copies / path.name
        path.copy(copy)
        return os.fspath(copy)


class Writer(Generic[Item]):
    """Computes the arrays of items and writes the cache of a kind, one of several processes.

    `encode(items)` gives arrays with a row for each item. It gets as many items of one group as
    `batch_size(group)` says, at the end fewer. A file of about `file_bytes` is written as soon as
    its rows are there. Each group has its own files: rows of a file have one shape.

    `done` are the keys of the files that an earlier build, which was killed, has left. Given the
    same items, the files are then byte for byte those of a build that was not.

    Raises AlreadyExistsError if the folder has a finished cache of the kind, and UserError if it
    has files of another identity.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        kind: Kind,
        *,
        identity: Mapping[str, Any],
        encode: Callable[[Sequence[Item]], Arrays],
        batch_size: Callable[[Hashable], int],
        file_bytes: int = FILE_BYTES,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.kind = kind
        self._folder, self._identity, self._encode = epath.Path(folder), dict(identity), encode
        self._batch_size, self._file_bytes = batch_size, file_bytes
        check_unfinished(folder, kind)
        existing = kind.files(self._folder)
        self._numbers = (
            number
            for number in itertools.count(process_index, process_count)
            if number not in existing
        )
        self.done = {bytes(key) for path in existing.values() for key in self._index_of(path)[0]}
        self._waiting: dict[Hashable, list[tuple[bytes, Item]]] = {}
        self._encoded: dict[Hashable, list[Arrays]] = {}

    def add(self, key: bytes, item: Item, *, group: Hashable = None) -> None:
        """Takes an item whose key no process has added before."""
        waiting = self._waiting.setdefault(group, [])
        waiting.append((key, item))
        if len(waiting) == self._batch_size(group):
            self._encode_waiting(group)
            if sum(x.nbytes for a in self._encoded[group] for x in a.values()) >= self._file_bytes:
                self._write(group)

    def flush(self) -> None:
        """Writes what this process still has."""
        # In an order that does not depend on what an earlier build has left to do.
        for group in sorted(self._waiting.keys() | self._encoded.keys(), key=str):
            self._encode_waiting(group)
            self._write(group)

    def finish(self) -> int:
        """Writes the record, once every process has flushed; one of them calls it.

        Returns the number of rows.
        """
        indices = {
            path.name: self._index_of(path) for path in self.kind.files(self._folder).values()
        }
        files = {name: _sum_of_index(*index) for name, index in indices.items()}
        count = len({bytes(key) for keys, _ in indices.values() for key in keys})
        record = dict(identity=self._identity, files=files) | {self.kind.unit: count}
        write_sealed(self._folder / self.kind.record, record)
        return count

    def _encode_waiting(self, group: Hashable) -> None:
        if not (waiting := self._waiting.pop(group, [])):
            return
        arrays = self._encode([item for _, item in waiting])
        rows = zip(
            *(np.split(arrays[name], len(waiting)) for name in self.kind.fields), strict=True
        )
        keys = np.stack([np.frombuffer(key, np.uint8) for key, _ in waiting])
        sums = np.array([sum_of_row(*row) for row in rows], np.uint32)
        self._encoded.setdefault(group, []).append({**arrays, "keys": keys, "sums": sums})

    def _write(self, group: Hashable) -> None:
        if parts := self._encoded.pop(group, []):
            arrays = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
            content = save(arrays, metadata={"identity": _digest(self._identity)})
            write_whole(self._folder / self.kind.name(next(self._numbers)), content)

    def _index_of(
        self, path: epath.Path
    ) -> tuple[UInt8[np.ndarray, "n k"], UInt32[np.ndarray, " n"]]:
        """Keys and sums of a file that this or an earlier build wrote."""
        with _local_copy(path) as local:
            try:
                file, keys, sums = _open_file(local)
                identity = (file.metadata() or {}).get("identity")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is not a readable part of a cache ({error}): delete it"
                ) from None
        if identity != _digest(self._identity):
            raise UserError(
                f"{path} is left of an unfinished cache with {self.kind.what}; delete it, or "
                "choose another folder"
            )
        return keys, sums


def check_unfinished(folder: epath.PathLike, kind: Kind) -> None:
    """Raises AlreadyExistsError if a folder has a finished cache of a kind."""
    if (epath.Path(folder) / kind.record).exists():
        raise AlreadyExistsError(
            f"{folder} has a cache; choose another folder or delete it ({kind.record})"
        )


def sum_of_row(*arrays: Shaped[np.ndarray, "1 ..."]) -> int:
    """CRC-32 of a row's arrays, with their shapes and dtypes."""
    total = 0
    for array in arrays:
        total = zlib.crc32(f"{array.dtype.name}{array.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(array).view(np.uint8), total)
    return total


def _open_file(path: str) -> tuple[Any, np.ndarray, np.ndarray]:
    """An open file, the keys and the sums of its rows. Raises SafetensorError, OSError."""
    file = safe_open(path, framework="np")
    keys, sums = file.get_tensor("keys"), file.get_tensor("sums")
    is_index = keys.dtype == np.uint8 and keys.shape == (len(sums), KEY_BYTES)
    if not is_index:
        raise OSError("it has no keys")
    return file, keys, sums


@contextlib.contextmanager
def _local_copy(path: epath.Path) -> Iterator[str]:
    """The path of a local file with the content of `path`, for as long as the context lasts."""
    if "://" not in os.fspath(path):
        yield os.fspath(path)
        return
    with tempfile.TemporaryDirectory(prefix="univg_cache_") as folder:
        path.copy(epath.Path(folder) / path.name)
        yield os.path.join(folder, path.name)


def _sum_of_index(keys: np.ndarray, sums: np.ndarray) -> str:
    return hashlib.blake2b(keys.tobytes() + sums.tobytes(), digest_size=16).hexdigest()


def _digest(identity: Mapping[str, Any]) -> str:
    content = json.dumps(identity, sort_keys=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
