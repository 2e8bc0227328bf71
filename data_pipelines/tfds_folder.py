"""A dataset's folder as TFDS writes it, checked before its first record is read.

TFDS's own reader imports whatever module `features.json` names, and meets a missing, cut or foreign
shard only when a record of it is due, which may be days into a run. Here each shard's footer is
read when the dataset is opened, and features are made from an allow list alone.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format, message
from tensorflow_datasets.core.proto import dataset_info_pb2, feature_pb2
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines import tf_examples
from data_pipelines.records import FIELDS, family_features
from data_pipelines.shards import Shard, Shards
from univg_jax.errors import NotFoundError, UserError, check_name
from univg_jax.files import read_json

INFO, FEATURES = "dataset_info.json", "features.json"
BUILD = "build.json"  # of our own builds
SUFFIX = "array_record"
THREADS = 64  # shards opened at a time: in a bucket each waits for the network
HASHED_WHOLE = 64 * 2**20  # bytes of a split, up to which its fingerprint reads all records
NUM_HASHED = 1024  # records of a larger split; another number is another fingerprint

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a dataset: the features that its records are parsed by, and its shards."""

    folder: epath.Path
    name: str
    features: tfds.features.FeaturesDict
    shards: tuple[Shard, ...]

    @functools.cached_property
    def _layouts(self) -> dict[str, tf_examples.Layout]:
        return {name: tf_examples.Layout.of(feature) for name, feature in self.features.items()}

    @functools.cached_property
    def records(self) -> Shards:
        """All records, as they are stored."""
        return Shards(self.shards)

    def parse(self, record: bytes, fields: Sequence[str] | None = None) -> dict[str, Any]:
        """A record's fields, or some, in stored form (`data_pipelines.records`): images are bytes.

        Raises UserError for a record that is damaged or has not these fields.
        """
        return tf_examples.parse(record, self._layouts, fields)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A checksum of the number of records, and of what is stored in them.

        It covers all records of a split of at most HASHED_WHOLE bytes, and of a larger one
        NUM_HASHED, evenly spread: another build differs in each, a change of a few records is not
        seen. A copy, or the same build made again, has the same, in any number of shards. A build
        of ours has it in `build.json`, which is believed if the shards have the lengths that it
        says: to read 1,024 photographs of each of 40 sources takes minutes in a bucket.
        """
        lengths = in_parallel(_length, self.shards)
        if noted := self._noted_fingerprint(lengths):
            return noted
        made = Fingerprint(count=len(self.records), num_bytes=sum(lengths))
        made.add(self.records, made.indices.tolist())
        return made.hexdigest()

    def _noted_fingerprint(self, lengths: Sequence[int]) -> str | None:
        try:
            about = read_json(self.folder / BUILD)
            noted = [about["files"][shard.path.name]["bytes"] for shard in self.shards]
            found = about["fingerprints"][self.name]
        except (UserError, LookupError, TypeError):  # of another program, an older build, damaged
            return None
        return found if isinstance(found, str) and noted == lengths else None


class Fingerprint:
    """`Split.fingerprint` in the making: `add` the records at `indices`, in order."""

    def __init__(self, *, count: int, num_bytes: int):
        hashed = count if num_bytes <= HASHED_WHOLE else min(count, NUM_HASHED)
        self.indices = np.linspace(0, count - 1, hashed).astype(int)
        self._digest = hashlib.blake2b(b"%d" % count, digest_size=16)

    def add(self, records: Sequence[bytes], indices: Sequence[int]) -> None:
        """Adds some records."""

        def canonical(index: int) -> bytes:
            # What is stored in a record is a map, whose order in the file may be any.
            try:
                stored = tf_example_pb2.Example.FromString(records[index])
                return stored.SerializeToString(deterministic=True)
            except (RuntimeError, message.DecodeError):
                return b"damaged"

        for start in range(0, len(indices), NUM_HASHED):
            for part in in_parallel(canonical, indices[start : start + NUM_HASHED]):
                self._digest.update(b"%d " % len(part) + part)

    def hexdigest(self) -> str:
        """Of what was added."""
        return self._digest.hexdigest()


def _length(shard: Shard) -> int:
    return shard.path.stat().length


def open_split(folder: epath.Path, split: str) -> Split:
    """A split of the dataset in `folder`, all of its shards checked.

    Each is there, is an ArrayRecord file with a readable footer, has as many records as
    `dataset_info.json` says, and has the fields of `features.json` in its first one. No shard is
    there that `dataset_info.json` does not name. Records are not read but for the first ones.

    Raises UserError (NotFoundError for a missing file) with the path of what is wrong.
    """
    info = _parse(folder / INFO, dataset_info_pb2.DatasetInfo())
    if not info.splits:
        raise UserError(f"{folder / INFO} names no splits: it is damaged, or of another program")
    if info.file_format != SUFFIX:
        raise UserError(
            f"{folder / INFO} says that the records are {info.file_format or 'tfrecord'!r}; "
            f"expected {SUFFIX!r} (TFDS's file_format={SUFFIX!r})"
        )
    splits = {found.name: _shards(folder, info, found) for found in info.splits}
    check_name(split, splits, what=f"split of {folder}:")
    named = {shard.path.name for shards in splits.values() for shard in shards}
    for file in sorted(folder.iterdir()):
        if f".{SUFFIX}" in file.name and file.name not in named and not file.name.startswith("."):
            raise UserError(f"{file} is no shard that {INFO} names: of another dataset or build?")
    opened = Split(
        folder=folder, name=split, features=_features(folder / FEATURES), shards=splits[split]
    )
    in_parallel(lambda shard: _check_shard(shard, opened), opened.shards)
    if not sum(shard.examples_in_shard for shard in opened.shards):
        raise UserError(f"split {split!r} of {folder} is empty")
    return opened


def _parse(file: epath.Path, into: message.Message) -> message.Message:
    content = read_json(file)
    try:
        return json_format.ParseDict(content, into, ignore_unknown_fields=True)
    except json_format.ParseError as error:
        reason = str(error).partition("\n")[0][:200]
        raise UserError(f"{file} is damaged: {reason}") from None


def _shards(folder: epath.Path, info: message.Message, split: message.Message) -> tuple[Shard, ...]:
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=info.name, filetype_suffix=SUFFIX
    )
    try:
        found = tfds.core.splits.SplitInfo.from_proto(split, template)
        paths = found.filename_template.sharded_filepaths(len(split.shard_lengths))
    except (ValueError, LookupError, AttributeError) as error:
        raise UserError(f"{folder / INFO}, split {split.name!r}: {error}") from None
    if any(path.parent != folder for path in paths):
        raise UserError(f"{folder / INFO}, split {split.name!r}: its files are in another folder")
    return tuple(
        Shard(filename=os.fspath(path), examples_in_shard=length)
        for path, length in zip(paths, split.shard_lengths, strict=True)
    )


def _check_shard(shard: Shard, split: Split) -> None:
    """Raises UserError if a shard is not what `dataset_info.json` and `features.json` say."""
    if not shard.path.exists():
        raise NotFoundError(f"{shard.path} does not exist, but {INFO} names it")
    reader = split.records.reader(shard)
    if not reader.ok():
        try:
            reader.close()
        except RuntimeError as error:  # Riegeli's reason: a page of text after the first clause
            reason = str(error).partition(";")[0][:200]
            raise UserError(
                f"{shard.path} is truncated, or no ArrayRecord file: {reason}"
            ) from None
    if (count := reader.num_records()) != shard.examples_in_shard:
        raise UserError(
            f"{shard.path} has {count} records, but {INFO} says {shard.examples_in_shard}: "
            "of another dataset or build?"
        )
    try:
        first = reader.read([0])[0] if count else None
    except RuntimeError:
        return  # one damaged record in a sound file: for whoever reads it to skip
    try:
        if first is not None:
            split.parse(first)
    except UserError:
        raise UserError(
            f"{shard.path}: its first record has not the fields of {FEATURES} "
            f"({', '.join(split.features)}): of another dataset?"
        ) from None


# --- features ---


def _kinds(feature: feature_pb2.Feature) -> Iterator[tuple[str, str | None]]:
    """The class and the kind of content of a feature and of all inside it."""
    yield feature.python_class_name, feature.WhichOneof("content")
    for inner in feature.features_dict.features.values():
        yield from _kinds(inner)
    if feature.HasField("sequence"):
        yield from _kinds(feature.sequence.feature)


_KNOWN = frozenset(_kinds(family_features(FIELDS).to_proto()))


def _features(file: epath.Path) -> tfds.features.FeaturesDict:
    """The features of those fields that we know, without an import of what the file names.

    Fields that `records.FIELDS` does not have are left out, with a log line.

    Raises UserError for a feature of a class that none of our fields has, or not of TFDS.
    """
    proto = _parse(file, feature_pb2.Feature())
    fields = proto.features_dict.features
    if not fields:
        raise UserError(f"{file} names no fields: it is damaged, or TFDS before 4.5 wrote it")
    for name in sorted(fields):
        for kind in _kinds(fields[name]):
            ours = kind[0].startswith("tensorflow_datasets.")
            if kind not in _KNOWN and (name in FIELDS or not ours):
                raise UserError(
                    f"{file}: field {name!r} is a {kind[0][:100] or 'feature without a class'!r}, "
                    f"which is not read; expected {_class_names()}"
                )
        if name not in FIELDS:
            _logger.info("%s: field %r is none of records.FIELDS, and is not read", file, name)
            del fields[name]
    proto_class = (proto.python_class_name, "features_dict")
    if proto_class not in _KNOWN:
        raise UserError(f"{file} is a {proto.python_class_name[:100]!r}; expected a FeaturesDict")
    try:
        features = tfds.features.FeaturesDict.from_proto(proto)
        layouts = {name: tf_examples.Layout.of(feature) for name, feature in features.items()}
    except Exception as error:  # whatever TFDS raises for a feature without its parts
        raise UserError(f"{file} is damaged: {str(error).partition(chr(10))[0][:200]}") from None
    for name, layout in layouts.items():
        if layout is None:
            raise UserError(
                f"{file}: field {name!r} is not stored as its values are, but compressed or in "
                "lists of lists, which are not read"
            )
    return features


def _class_names() -> str:
    return ", ".join(sorted(name.rpartition(".")[2] for name, _ in _KNOWN))


def in_parallel(function: Callable[[Any], _T], items: Sequence[Any]) -> list[_T]:
    """`function` of each item, by threads that wait for files; raises what the first one did.

    `function` must not call this itself: the threads are the same for all, and few.
    """
    # Handed out in runs: with local files, an item is done faster than a thread is told of it.
    run = max(1, min(16, len(items) // THREADS))
    runs = [items[start : start + run] for start in range(0, len(items), run)]
    done = _threads().map(lambda some: [function(item) for item in some], runs)
    return [result for results in done for result in results]


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="files")
