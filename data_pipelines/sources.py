"""Where records come from: random access to a dataset that TFDS wrote, or to any other `Source`."""

import concurrent.futures
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from etils import epath
from jaxtyping import UInt

from data_pipelines import records, tfds_folder
from data_pipelines.datasets import DATASETS
from data_pipelines.tfds_folder import in_parallel
from data_pipelines.transforms import Record
from univg_jax.errors import NotFoundError, UserError, suggestion
from univg_jax.images import size_of
from univg_jax.progress import Bar

_SOURCES_AT_ONCE = 8
SIZES = "{}.sizes.npy"  # the index of the sizes of a split, beside its shards

Sizes = UInt[np.ndarray, "n 2"]


@runtime_checkable
class Source(Protocol):
    """Random access to the records of one split of one dataset."""

    name: str
    fields: tuple[str, ...]

    def fingerprint(self) -> str:
        """A checksum of the records: another one where they differ, wherever they lie."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, fields: Sequence[str] | None = None) -> Record:
        """The decoded record, or only some of its fields."""
        ...

    def where(self, index: int) -> tuple[str, int]:
        """The file that holds the record, and its place in the file."""
        ...

    def sizes(self) -> Sizes:
        """Height and width of each record's picture as it is shown; they decide its bucket."""
        ...


@runtime_checkable
class ReducingSource(Source, Protocol):
    """A source that need not decode its pictures whole."""

    def read_reduced(self, index: int, fields: Sequence[str], *, least: tuple[int, int]) -> Record:
        """What `read` gives, but `image` may be smaller: it has at least this height and width.

        Nothing that lies on the picture, such as masks or boxes, may be among the fields.
        """
        ...


class MemorySource:
    """Records in a list: to try a task or a model on a few examples without writing a dataset.

    `Stream(config, sources={"scenes": MemorySource("scenes", records)}, ...)` trains on them.
    """

    def __init__(self, name: str, items: Sequence[Record]):
        self.name, self._items = name, items
        self.fields = tuple(items[0]) if items else ()

    def fingerprint(self) -> str:
        """A checksum of all records."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self._items:
            for part in _parts(item):
                digest.update(part)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int, fields: Sequence[str] | None = None) -> Record:
        return _select(self._items[index], fields)

    def where(self, index: int) -> tuple[str, int]:
        """Of no file: the place in the list."""
        return "", index

    def sizes(self) -> Sizes:
        """Those of the pictures in memory; 0 where a record has none."""
        found = [np.shape(item.get("image", ()))[:2] for item in self._items]
        return np.array([size if len(size) == 2 else (0, 0) for size in found], np.uint32)


class TfdsSource:
    """Records that TFDS wrote as ArrayRecord; `read` decodes only the fields it is asked for."""

    def __init__(self, name: str, split: tfds_folder.Split):
        self.name, self._split = name, split
        # A scale is no field of its own: `records.decode` has it in `depth`.
        self.fields = tuple(name for name in split.features if name != "depth_scale")
        self._data = split.records

    @property
    def folder(self) -> epath.Path:
        """Where its files are."""
        return self._split.folder

    def fingerprint(self) -> str:
        """`tfds_folder.Split.fingerprint`."""
        return self._split.fingerprint

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int, fields: Sequence[str] | None = None) -> Record:
        stored = None if fields is None else records.stored_fields(fields)
        return records.decode(self._split.parse(self._data[index], stored))

    def read_reduced(self, index: int, fields: Sequence[str], *, least: tuple[int, int]) -> Record:
        """As `read`; a JPEG of at least twice the size is decoded at a half, a quarter or less."""
        return records.decode(self._split.parse(self._data[index], fields), least=least)

    def where(self, index: int) -> tuple[str, int]:
        """The name of the record's shard, and the record's place in it."""
        for shard in self._split.shards:
            if index < shard.examples_in_shard:
                return shard.path.name, index
            index -= shard.examples_in_shard
        raise IndexError(index)

    def sizes(self) -> Sizes:
        """The index that was built beside the shards, or else what the pictures' headers say.

        Raises UserError for an index that is damaged or of another build.
        """
        index = self._split.folder / SIZES.format(self._split.name)
        if not index.exists():
            return self._sizes_of_pictures()
        try:
            if "://" in os.fspath(index):
                found = np.load(io.BytesIO(index.read_bytes()), allow_pickle=False)
            else:
                found = np.load(index, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise UserError(f"{index} is damaged: {error}; build the dataset anew") from None
        if found.dtype.kind != "u" or found.shape != (len(self), 2):
            raise UserError(
                f"{index} has {found.dtype} {found.shape}, expected unsigned integers "
                f"{(len(self), 2)}: of another build?"
            )
        return found

    def _sizes_of_pictures(self) -> Sizes:
        """Reads every record, but of its picture only the header."""

        def size(index: int) -> tuple[int, int]:
            try:
                return size_of(self._split.parse(self._data[index], ("image",))["image"])
            except (RuntimeError, KeyError, UserError):
                return 0, 0  # whoever reads it will say what is wrong with it

        found, chunk = np.zeros((len(self), 2), np.uint32), 4096
        with Bar(total=len(self), desc=f"sizes of {self.name}", unit="record") as bar:
            for start in range(0, len(self), chunk):
                indices = range(len(self))[start : start + chunk]
                found[start : start + chunk] = in_parallel(size, indices)
                bar.update(len(indices))
        return found


def _select(record: Record, fields: Sequence[str] | None) -> Record:
    return record if fields is None else {name: record[name] for name in fields if name in record}


def _parts(value: Any) -> Iterator[bytes]:
    """A decoded value as bytes that tell it from any other."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        yield b"%d[" % len(value)
        for item in value:
            yield from _parts(item)
    elif isinstance(value, np.ndarray):
        yield repr((value.dtype.str, value.shape)).encode()
        yield np.ascontiguousarray(value).tobytes()
    else:
        yield repr(value).encode()


def open_source(name: str, split: str, *, data_dir: str = "") -> Source:
    """The dataset in the folder `name` below `data_dir`, or in the folder `name` itself.

    TFDS puts a dataset at most two folders deeper (config and version); of several versions the
    newest is opened. Its files are checked: see `tfds_folder.open_split`.

    Raises:
      NotFoundError: no dataset is there; names the nearest that is.
      UserError: the dataset has no such split, the split is empty, or a file is not what it should
        be.
    """
    try:
        return TfdsSource(f"{name}/{split}", tfds_folder.open_split(_find(name, data_dir), split))
    except UserError:
        raise
    except OSError as error:  # no permission, a file where a folder should be, a dead disk
        raise UserError(f"cannot read the dataset {name} in {data_dir or '.'}: {error}") from None


def open_sources(
    names: Iterable[str],
    split: str,
    *,
    data_dir: str = "",
    given: Mapping[str, Source] | None = None,
    then: Callable[[Source], Any] = lambda source: None,
) -> dict[str, Source]:
    """The datasets with these names, opened several at a time, but for those that are `given`.

    `then` is called with each that was opened. Raises what `open_source` does, of the first.
    """

    def open_one(name: str) -> Source:
        source = open_source(name, split, data_dir=data_dir)
        then(source)
        return source

    opened = dict(given or {})
    missing = [name for name in names if name not in opened]
    with concurrent.futures.ThreadPoolExecutor(_SOURCES_AT_ONCE) as pool:
        found = pool.map(open_one, missing)
        return opened | dict(zip(missing, found, strict=True))


def _find(name: str, data_dir: str) -> epath.Path:
    """The folder with the `dataset_info.json` of a dataset."""
    folders = [epath.Path(data_dir) / name] if data_dir else []
    folders.append(epath.Path(name))
    patterns = (tfds_folder.INFO, f"*/{tfds_folder.INFO}", f"*/*/{tfds_folder.INFO}")
    for folder, pattern in itertools.product(folders, patterns):
        # TFDS writes into a folder "VERSION.incomplete..." first.
        found = [info.parent for info in folder.glob(pattern)]
        if found := [d for d in found if ".incomplete" not in d.name]:
            datasets = {d.parent if _version(d) else d for d in found}
            if len(datasets) > 1:
                inside = ", ".join(sorted(d.name for d in datasets))
                raise UserError(f"{folder} holds several datasets ({inside}): name one of them")
            return max(found, key=_version)
    command = ""
    for dataset in DATASETS.values():
        if folders[0].name in (dataset.families or (dataset.name,)):
            out = folders[0].parent
            made_by = f"univg data build --dataset={dataset.name} --source=DIR --out={out}"
            command = f"; it is made by: {made_by}"
    raise NotFoundError(f"no dataset at {folders[0]}: {_why_missing(folders[0])}{command}")


def _why_missing(folder: epath.Path) -> str:
    """Why no dataset is in a folder, with the nearest name where another one is beside it."""
    parent = folder.parent
    if folder.exists():
        return f"it has no {tfds_folder.INFO}; an unfinished build?"
    if not parent.exists():
        return f"{parent} does not exist"
    if not parent.is_dir():
        return f"{parent} is a file, expected a folder of datasets"
    inside = sorted(path.name for path in parent.iterdir())
    if f".{folder.name}.build" in inside:
        return "its build is not finished: build it again"
    siblings = [name for name in inside if name[0] != "." and (parent / name).is_dir()]
    if not siblings:
        return f"{parent} has no datasets"
    return f"unknown dataset {folder.name!r}{suggestion(folder.name, siblings)}"


def _version(folder: epath.Path) -> tuple[int, ...]:
    """(1, 10, 0) for TFDS's folder 1.10.0; an empty tuple for a folder that is no version."""
    numbers = folder.name.split(".")
    is_version = len(numbers) == 3 and all(number.isdigit() for number in numbers)
    return tuple(map(int, numbers)) if is_version else ()
