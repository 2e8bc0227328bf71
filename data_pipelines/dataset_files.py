"""The files of a built dataset: serialized records in ArrayRecord shards, and what describes them.

A folder is what TFDS reads, and has beside it an index of the pictures' sizes (`sources.SIZES`) and
`build.json`: by which arguments it was built, how many records there are, each split's fingerprint
and each file's checksum.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from array_record.python import array_record_module
from etils import epath
from google.protobuf import json_format
from tensorflow_datasets.core import example_serializer
from tensorflow_datasets.core.proto import dataset_info_pb2

from data_pipelines import records, tfds_folder
from data_pipelines.shards import Shard, Shards
from data_pipelines.sources import SIZES
from data_pipelines.tfds_folder import BUILD
from univg_jax import images
from univg_jax.errors import UserError, quote
from univg_jax.files import read_json, write_streamed, write_whole

SKIPPED = "skipped.jsonl"
LICENSE = "LICENSE"
# Records are pictures, which do not become smaller; each is read alone.
OPTIONS = "group_size:1,uncompressed"
_PICTURES = ("image", "source", "face")


class Serializer:
    """Stored records of some fields -> the bytes of tf.Examples, the same in every process.

    Each picture is decoded once, to be sure of it. Raises UserError for a record that has other
    fields, a picture that cannot be read, or a value of another type or shape.
    """

    def __init__(self, fields: Sequence[str]):
        self._fields = frozenset(fields)
        self._features = records.family_features(fields)
        info = self._features.get_serialized_info()
        self._serializer = example_serializer.ExampleSerializer(info)

    def __call__(self, record: Mapping[str, Any]) -> tuple[bytes, tuple[int, int]]:
        """The record's bytes, and the height and width of its picture."""
        if set(record) != self._fields:
            raise UserError(
                f"has the fields {', '.join(record)}; expected {', '.join(sorted(self._fields))}"
            )
        sizes = {}
        for name in _PICTURES:
            if name in record:
                try:
                    sizes[name] = images.verify(record[name])
                except UserError as error:
                    raise UserError(f"record field {name!r} {error}") from None
        try:
            encoded = self._features.encode_example(records.encodable(record))
            example = self._serializer.get_tf_example(encoded)
        except Exception as error:  # whatever TFDS raises for a value that its feature cannot take
            reason = str(error).partition("\n")[0][:200]
            raise UserError(f"cannot be stored: {type(error).__name__}: {reason}") from error
        return example.SerializeToString(deterministic=True), sizes.get("image", (0, 0))


@dataclasses.dataclass(frozen=True)
class Piece:
    """Records `start` to `stop` of a file of serialized records, whose lengths are known."""

    file: str
    offset: int  # of the first one, in bytes
    lengths: tuple[int, ...]


def write_shard(pieces: Iterable[Piece], file: epath.PathLike) -> None:
    """Packs serialized records into a shard: whole, or not at all."""

    def write(partial: BinaryIO) -> None:
        writer = array_record_module.ArrayRecordWriter(partial.name, OPTIONS)
        try:
            for piece in pieces:
                with epath.Path(piece.file).open("rb") as staged:
                    staged.seek(piece.offset)
                    for length in piece.lengths:
                        if len(content := staged.read(length)) != length:
                            raise UserError(f"{piece.file} is truncated: remove it; build again")
                        writer.write(content)
        finally:
            writer.close()

    write_streamed(file, write)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """A split that is written: the records of each shard, their bytes, and the pictures' sizes."""

    shards: tuple[int, ...]
    num_bytes: int
    sizes: np.ndarray


def shard_name(dataset: str, split: str, number: int, count: int) -> str:
    """As TFDS names them."""
    return f"{dataset}-{split}.{tfds_folder.SUFFIX}-{number:05d}-of-{count:05d}"


def describe(
    folder: epath.Path,
    splits: Mapping[str, Contents],
    *,
    family: str,
    dataset: str,
    fields: Sequence[str],
    version: str,
    description: str,
    license: str,
    about: Mapping[str, Any],
) -> None:
    """Writes all files beside the shards; `dataset_info.json` last: it says that all is there.

    `about` is what `build.json` tells of the build beside the files.
    """
    records.family_features(fields).save_config(os.fspath(folder))
    if license:
        write_whole(folder / LICENSE, license)
    for split, contents in splits.items():
        write_streamed(folder / SIZES.format(split), functools.partial(_save, contents.sizes))
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    files, fingerprints = {}, {}
    for split, contents in splits.items():
        shards, fingerprints[split] = _look_at(folder, dataset, split, contents)
        files |= shards
    others = (name for name in names if name not in (*files, BUILD, tfds_folder.INFO))
    files = dict(sorted((files | {name: _file(folder / name) for name in others}).items()))
    about = dict(dataset=dataset, version=version, **about, fingerprints=fingerprints, files=files)
    write_whole(folder / BUILD, json.dumps(about, indent=1) + "\n")
    info = dataset_info_pb2.DatasetInfo(
        name=dataset,
        config_name=family,
        version=version,
        description=description,
        file_format=tfds_folder.SUFFIX,
        module_name="data_pipelines.build",
    )
    if license:
        info.redistribution_info.license = license
    for split, contents in splits.items():
        info.splits.add(
            name=split,
            shard_lengths=contents.shards,
            num_bytes=contents.num_bytes,
            filepath_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        )
    write_whole(folder / tfds_folder.INFO, json_format.MessageToJson(info, sort_keys=True))


def verify(folder: epath.PathLike) -> Iterator[tuple[str, str]]:
    """The files of a built folder whose bytes are not those that were built: (name, what is wrong).

    Raises UserError if it has no `build.json` with checksums.
    """
    folder = epath.Path(folder)
    about = read_json(folder / BUILD)
    if not isinstance(files := about.get("files"), dict):
        raise UserError(f"{folder / BUILD} has no checksums: an earlier version wrote it")
    for name, expected in files.items():
        is_name = name.isprintable() and name == os.path.basename(name)
        if not is_name or not isinstance(expected, dict):
            raise UserError(f"{folder / BUILD} is damaged: {quote(name)} in it is no file's entry")
        try:
            found = _file(folder / name)["checksum"]
        except FileNotFoundError:
            yield name, "is missing"
        except OSError as error:  # a folder, no permission
            yield name, f"cannot be read: {error.strerror or error}"
        else:
            if found != expected.get("checksum"):
                yield name, "has another checksum"


def _look_at(
    folder: epath.Path, dataset: str, split: str, contents: Contents
) -> tuple[dict[str, Any], str]:
    """The entry of each shard, and the split's fingerprint; each shard is read once."""
    names = [
        shard_name(dataset, split, k, len(contents.shards)) for k in range(len(contents.shards))
    ]
    num_bytes = sum((folder / name).stat().length for name in names)
    fingerprint = tfds_folder.Fingerprint(count=sum(contents.shards), num_bytes=num_bytes)
    files, start = {}, 0
    for name, count in zip(names, contents.shards):
        with _nearby(folder / name) as file:
            files[name] = _file(file) | {"records": count}
            indices = fingerprint.indices - start
            mine = indices[(indices >= 0) & (indices < count)].tolist()
            fingerprint.add(Shards([Shard(filename=str(file), examples_in_shard=count)]), mine)
        start += count
    return files, fingerprint.hexdigest()


@contextlib.contextmanager
def _nearby(file: epath.Path) -> Iterator[epath.Path]:
    """A file on this machine: itself, or a copy of one in a bucket."""
    if "://" not in os.fspath(file):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        yield file.copy(epath.Path(folder) / file.name)


def _save(array: np.ndarray, file: BinaryIO) -> None:
    np.save(file, array)


def _file(path: epath.Path) -> dict[str, Any]:
    digest, count = hashlib.blake2b(digest_size=16), 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
            count += len(chunk)
    return {"bytes": count, "checksum": digest.hexdigest()}
