"""Where records come from: random access to a dataset that TFDS wrote, or to a list in memory."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import tensorflow_datasets as tfds
from etils import epath

from data_pipelines import records
from data_pipelines.transforms import Record
from univg_jax.errors import check_name

_IMAGE_FIELDS = ("image", "source", "edit_mask", "depth", "masks", "face")


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
    """Records in a list."""

    def __init__(self, name: str, items: Sequence[Record]):
        self.name, self._items = name, items
        self.fields = tuple(items[0]) if items else ()

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int, fields: Sequence[str] | None = None) -> Record:
        record = self._items[index]
        return (
            record if fields is None else {name: record[name] for name in fields if name in record}
        )


class TfdsSource:
    """Records that TFDS wrote as ArrayRecord; images stay encoded until `read` decodes those it
    needs.
    """

    def __init__(self, name: str, builder: tfds.core.DatasetBuilder, split: str):
        self.name = f"{name}/{split}"
        features = builder.info.features
        self.fields = tuple(features)
        skip = {field: tfds.decode.SkipDecoding() for field in _IMAGE_FIELDS if field in features}
        self._data = builder.as_data_source(split, decoders=skip)

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int, fields: Sequence[str] | None = None) -> Record:
        stored = self._data[index]
        return records.decode(
            stored if fields is None else {name: stored[name] for name in fields if name in stored}
        )


def open_source(name: str, split: str, *, data_dir: str = "") -> Source:
    """The dataset in folder `name`, taken as a path of its own or below `data_dir`, at whatever
    depth TFDS put it.

    Raises:
      FileNotFoundError: no dataset is there; names the nearest that is.
      ValueError: the dataset has no such split, or the split is empty.
    """
    folders = [epath.Path(data_dir) / name] if data_dir else []
    folders.append(epath.Path(name))
    for folder in folders:
        for pattern in ("dataset_info.json", "*/dataset_info.json", "*/*/dataset_info.json"):
            if found := [info.parent for info in folder.glob(pattern)]:
                datasets = {d.parent if _version(d) else d for d in found}
                if len(datasets) > 1:
                    inside = ", ".join(sorted(d.name for d in datasets))
                    raise ValueError(
                        f"{folder} holds several datasets ({inside}): name one of them"
                    )
                builder = tfds.builder_from_directory(max(found, key=_version))
                check_name(split, builder.info.splits, what=f"split of {folder}:")
                source = TfdsSource(name, builder, split)
                if not len(source):
                    raise ValueError(f"split {split!r} of {folder} is empty")
                return source
    parent = folders[0].parent
    siblings = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent.exists() else []
    try:
        check_name(folders[0].name, siblings, what="dataset")
    except ValueError as error:
        raise FileNotFoundError(f"no dataset at {folders[0]}: {error}") from None
    raise FileNotFoundError(
        f"no dataset at {folders[0]}: it has no dataset_info.json; an unfinished build?"
    )


def _version(folder: epath.Path) -> tuple[int, ...]:
    """(1, 10, 0) of TFDS's folder 1.10.0; nothing of any other."""
    parts = folder.name.split(".")
    return tuple(map(int, parts)) if len(parts) == 3 and all(p.isdigit() for p in parts) else ()
