"""Pictures without more than their names: of folders, archives and archives in folders."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import Entry, archives, layouts
from univg_jax.errors import NotFoundError, UserError


@dataclasses.dataclass(frozen=True)
class Files:
    """A part of files side by side: their names in `root`."""

    root: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.root}: {self.names[0]} to {self.names[-1]}"


@dataclasses.dataclass(frozen=True)
class Archive:
    """A part that is an archive: its name in `root`."""

    root: str
    name: str

    def __str__(self) -> str:
        return os.path.join(self.root, self.name)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of each split, in folders and archives; `what` they are, for messages.

    A part is an archive, or some files of a folder. A folder's archives are read as well, but for
    those that are unpacked beside themselves: then only the archive is read.
    """

    what: str
    sources: Mapping[str, tuple[str, ...]]  # of each split: folders and archives
    fields: tuple[str, ...] = ("image",)

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that have a source."""
        return tuple(self.sources)

    def parts(self, split: str) -> Sequence[Archive | Files]:
        """Archives, then slices of folders."""
        parts: list[Archive | Files] = []
        for source in self.sources[split]:
            if not os.path.isdir(source):
                parts.append(Archive(*os.path.split(source)))
                continue
            packed, loose = look_into(source)
            names = self._of_split(packed + loose, split)
            parts += [Archive(source, name) for name in packed if name in names]
            loose = [name for name in loose if name in names]
            parts += [Files(source, slice_) for slice_ in layouts.slices(loose)]
        if not parts:
            listed = ", ".join(self.sources[split])
            raise NotFoundError(f"{listed} has no pictures: expected {self.what}")
        return parts

    def entries(self, part: Archive | Files) -> Iterator[Entry]:
        """The pictures of a part, by their names."""
        for name, data in read(part):
            yield Entry(key=name, raw=(name, data), ids=names_of(name))

    def make(self, raw: tuple[str, Any]) -> dict[str, Any]:
        """The picture as it is."""
        return {"image": check(raw[1])}

    def _of_split(self, names: Sequence[str], split: str) -> set[str]:
        return set(names)


def look_into(folder: str) -> tuple[list[str], list[str]]:
    """The names of the archives and of the other pictures in a folder, sorted."""
    wanted = archives.IMAGE_SUFFIXES + archives.ARCHIVE_SUFFIXES
    names = [name for name, _ in archives.walk(folder, wanted)]
    packed = [name for name in names if archives.is_archive(name)]
    unpacked = tuple(f"{archives.without_suffix(name)}/" for name in packed)
    loose = [
        name
        for name in names
        if not archives.is_archive(name) and not (unpacked and name.startswith(unpacked))
    ]
    return packed, loose


def read(part: Archive | Files) -> Iterator[tuple[str, bytes | UserError]]:
    """The pictures of a part; those of an archive are named after it, too."""
    if isinstance(part, Files):
        store = archives.Store(part.root)
        for name in part.names:
            try:
                yield name, store.read(name)
            except UserError as error:
                yield name, error
        return
    is_empty = True
    for name, data in archives.members(str(part)):
        is_empty = False
        yield f"{archives.without_suffix(part.name)}/{name}", data
    if is_empty:
        raise UserError(f"{part} has no pictures: expected {', '.join(archives.IMAGE_SUFFIXES)}")


def names_of(name: str) -> tuple[str, ...]:
    """Shorter names of a picture: without folders, and without suffix."""
    base = os.path.basename(name)
    return base, layouts.stem(base)


def check(picture: Any) -> bytes:
    """The bytes of a picture's file. Raises UserError where there are none."""
    if isinstance(picture, UserError):
        raise picture
    if not picture:
        raise UserError("the picture is empty")
    return picture
