"""Where records come from: random access to a dataset that TFDS wrote, or to any other `Source`."""

import itertools
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import tensorflow_datasets as tfds
from etils import epath

from data_pipelines import records
from data_pipelines.transforms import Record
from univg_jax.errors import NotFoundError, UserError, check_name


@runtime_checkable
class Source(Protocol):
    """Random access to the records of one split of one dataset."""

    name: str
    fields: tuple[str, ...]

    def __len__(self) -> int: ...

    def read(self, index: int, fields: Sequence[str] | None = None) -> Record:
        """The decoded record, or only some of its fields."""
        ...


class MemorySource:
    """Records in a list: to try a task or a model on a few examples without writing a dataset.

    `Stream(config, sources={"scenes": MemorySource("scenes", records)}, ...)` trains on them.
    """

    def __init__(self, name: str, items: Sequence[Record]):
        self.name, self._items = name, items
        self.fields = tuple(items[0]) if items else ()

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int, fields: Sequence[str] | None = None) -> Record:
        return _select(self._items[index], fields)


class TfdsSource:
    """Records that TFDS wrote as ArrayRecord; `read` decodes only the fields it is asked for."""

    def __init__(self, name: str, builder: tfds.core.DatasetBuilder, split: str):
        self.name = f"{name}/{split}"
        features = builder.info.features
        self.fields = tuple(features)
        skip = {
            field: tfds.decode.SkipDecoding()
            for field, feature in features.items()
            if isinstance(feature, tfds.features.Image)
        }
        self._data = builder.as_data_source(split, decoders=skip)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int, fields: Sequence[str] | None = None) -> Record:
        return records.decode(_select(self._data[index], fields))


def _select(record: Record, fields: Sequence[str] | None) -> Record:
    return record if fields is None else {name: record[name] for name in fields if name in record}


def open_source(name: str, split: str, *, data_dir: str = "") -> Source:
    """The dataset in the folder `name` below `data_dir`, or in the folder `name` itself.

    TFDS puts a dataset at most two folders deeper (config and version); of several versions the
    newest is opened.

    Raises:
      NotFoundError: no dataset is there; names the nearest that is.
      UserError: the dataset has no such split, or the split is empty.
    """
    folders = [epath.Path(data_dir) / name] if data_dir else []
    folders.append(epath.Path(name))
    patterns = ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json")
    for folder, pattern in itertools.product(folders, patterns):
        if found := [info.parent for info in folder.glob(pattern)]:
            datasets = {d.parent if _version(d) else d for d in found}
            if len(datasets) > 1:
                inside = ", ".join(sorted(d.name for d in datasets))
                raise UserError(f"{folder} holds several datasets ({inside}): name one of them")
            newest = max(found, key=_version)
            try:
                builder = tfds.builder_from_directory(newest)
            except Exception as error:  # whatever TFDS's parsers raise for a damaged file
                raise UserError(f"{newest} is no readable dataset: {error}") from None
            check_name(split, builder.info.splits, what=f"split of {folder}:")
            source = TfdsSource(name, builder, split)
            if not len(source):
                raise UserError(f"split {split!r} of {folder} is empty")
            return source
    parent = folders[0].parent
    siblings = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.exists() else []
    try:
        check_name(folders[0].name, siblings, what="dataset")
    except UserError as error:
        raise NotFoundError(f"no dataset at {folders[0]}: {error}") from None
    raise NotFoundError(
        f"no dataset at {folders[0]}: it has no dataset_info.json; an unfinished build?"
    )


def _version(folder: epath.Path) -> tuple[int, ...]:
    """(1, 10, 0) for TFDS's folder 1.10.0; an empty tuple for a folder that is no version."""
    numbers = folder.name.split(".")
    is_version = len(numbers) == 3 and all(number.isdigit() for number in numbers)
    return tuple(map(int, numbers)) if is_version else ()
