"""Files inside folders, zips and tars, whichever way a dataset was left on disk.

`members` streams all of them in stored order, and `Store` reads single ones by name. A tar may be
compressed (gzip, bzip2, xz) and may hold tars. What an archive is, is told by its first bytes and
not by its name. Nothing is unpacked to the disk, and no size that an archive states is believed.

Names are as stored, without leading `./` or `/`, and with `/` between folders. What systems leave
behind (`._x.jpg`, `__MACOSX`, `.DS_Store`, hidden folders) is not listed, and links in tars are
not followed.
"""

import contextlib
import functools
import io
import lzma
import os
import re
import tarfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator

from data_pipelines.native import tars
from univg_jax.errors import NotFoundError, UserError, quote

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".mpo"),
)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
ARCHIVE_SUFFIXES = (".zip", *TAR_SUFFIXES)
MAX_FILE_BYTES = 2**28  # of one picture, or whatever else is read whole
_MAX_RATIO = 1100  # deflate's best is 1032; a zip that says more has members over each other
_MAX_DEPTH = 3  # of tars in tars
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_ZIP_ENTRY, _ZIP_END = b"PK\x03\x04", b"PK\x05\x06"

# What Python's own readers raise for damaged files.
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(ValueError, KeyError, IndexError, OverflowError, RecursionError, NotImplementedError),
    *(RuntimeError, MemoryError),
)


def members(
    path: str | os.PathLike, suffixes: tuple[str, ...] | None = IMAGE_SUFFIXES
) -> Iterator[tuple[str, bytes | UserError]]:
    """The names and contents of a folder, a zip or a tar, streamed.

    Files of a folder are sorted, those of an archive are in stored order; tars in tars are entered,
    and `a.tar/b.jpg` is the name of what they hold. `suffixes` (of any case) says which are read:
    None is all. One that cannot be read (too large, encrypted, another checksum) has a UserError in
    the place of its bytes. Raises NotFoundError for a path that is not there, and UserError with
    its name if it is no archive, truncated or damaged.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        for name, file in walk(path, suffixes):
            yield name, _file_bytes(file, name)
        return
    with _opened(path) as file, readable(path):
        if _is_zip(file):
            yield from _zip_members(file, suffixes)
        else:
            yield from _tar_members(file, suffixes, depth=0)


def lines(path: str | os.PathLike, suffix: str) -> Iterator[bytes]:
    """The lines of a file: as it is, compressed, or the first one with this suffix in a tar.

    Raises NotFoundError for a path that is not there, and UserError with its name if it cannot be
    read, has no such file, or a line of more than MAX_FILE_BYTES.
    """
    path = os.fspath(path)
    with _opened(path) as file, readable(path), contextlib.ExitStack() as stack:
        if path.lower().endswith(TAR_SUFFIXES):
            archive, infos = stack.enter_context(tars.opened(file, seekable=True))
            info = next((i for i in infos if _is_wanted(clean_name(i.name), (suffix,))), None)
            if info is None:
                raise UserError(f"{path} has no {suffix} in it")
            stream = archive.extractfile(info)
        else:
            opener = tars.decompressor(file)
            stream = stack.enter_context(opener(file)) if opener else file
        while line := stream.readline(MAX_FILE_BYTES + 1):
            if len(line) > MAX_FILE_BYTES:
                raise UserError(f"{path} has a line of more than {MAX_FILE_BYTES} bytes")
            yield line


def walk(
    root: str | os.PathLike, suffixes: tuple[str, ...] | None = IMAGE_SUFFIXES
) -> Iterator[tuple[str, str]]:
    """The names and paths of a folder's files: sorted, those of its own before deeper ones.

    Links are followed, each folder once.
    """
    root = os.fspath(root)
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders.sort()
        for file in sorted(files):
            path = os.path.join(folder, file)
            name = clean_name(os.path.relpath(path, root))
            if _is_wanted(name, suffixes):
                yield name, path


def clean_name(name: str) -> str:
    """A stored name without leading `./` or `/`, with `/` for a backslash, in one line of UTF-8.

    What is not UTF-8, and control characters, are escaped: names stay different.
    """
    name = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", _local(name))
    return name.encode("utf-8", "backslashreplace").decode()


def is_archive(path: str | os.PathLike) -> bool:
    """Whether the name is one of a zip or a tar."""
    return os.fspath(path).lower().endswith(ARCHIVE_SUFFIXES)


def without_suffix(path: str) -> str:
    """A path without the suffix of an archive."""
    longest = max((s for s in ARCHIVE_SUFFIXES if path.lower().endswith(s)), key=len, default="")
    return path[: len(path) - len(longest)]


def is_compressed(path: str | os.PathLike) -> bool:
    """Whether a file is compressed as a whole, so that its members can only be streamed."""
    with _opened(os.fspath(path)) as file:
        return tars.decompressor(file) is not None


class Store:
    """Single files of a folder, a zip or an uncompressed tar, by name.

    Picklable: another process opens the archive again. The names of an archive are held in memory
    (about 300 bytes each). Raises NotFoundError if `path` is not there.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not os.path.exists(self.path):
            raise NotFoundError(f"{self.path} does not exist: expected a folder, a zip or a tar")

    def __reduce__(self):
        return Store, (self.path,)

    def read(self, name: str) -> bytes:
        """The file of this name. Raises NotFoundError with both names, or UserError."""
        local = self._inside(name)
        if self._index is None:
            file = os.path.join(self.path, local)
            if not os.path.isfile(file):
                raise NotFoundError(f"there is no {quote(name, 200)} in {self.path}")
            data = _file_bytes(file, name)
        elif local in self._index:
            data = self._index[local]()
        else:
            raise NotFoundError(f"there is no {quote(name, 200)} in {self.path}")
        if isinstance(data, UserError):
            raise data
        return data

    def names(self, suffixes: tuple[str, ...] | None = None) -> list[str]:
        """The names in it: those of an archive in stored order."""
        if self._index is None:
            return [name for name, _ in walk(self.path, suffixes)]
        return [name for name in self._index if _is_wanted(name, suffixes)]

    def __contains__(self, name: str) -> bool:
        try:
            local = self._inside(name)
        except UserError:
            return False
        if self._index is None:
            return os.path.isfile(os.path.join(self.path, local))
        return local in self._index

    def _inside(self, name: str) -> str:
        """The name within the store; an absolute one may begin with the store's own path."""
        root = self.path.rstrip("/") + "/"
        local = _local(name.removeprefix(root)) if isinstance(name, str) else ""
        if not local or ".." in local.split("/") or "\0" in local:
            raise UserError(f"{quote(name, 200)} is not the name of a file in {self.path}")
        return local

    @functools.cached_property
    def _index(self):
        """What reads each file of an archive, by name; None for a folder."""
        if os.path.isdir(self.path):
            return None
        file = open(self.path, "rb")  # noqa: SIM115 (stays open as long as the store)
        weakref.finalize(self, file.close)
        with readable(self.path):
            if _is_zip(file):
                archive = _open_zip(file)
                return {
                    clean_name(info.filename): functools.partial(_zip_bytes, archive, info)
                    for info in archive.infolist()
                    if not info.is_dir()
                }
            if tars.decompressor(file):
                raise UserError(
                    f"{self.path} is compressed, so that single files cannot be read: unpack it"
                )
            with tars.opened(file, seekable=True) as (_, infos):
                return {
                    clean_name(info.name): functools.partial(_slice, file, info, self.path)
                    for info in infos
                }


def _local(name: str) -> str:
    return "/".join(p for p in name.replace("\\", "/").split("/") if p not in ("", "."))


def _is_wanted(name: str, suffixes: tuple[str, ...] | None) -> bool:
    *folders, base = name.split("/")
    hidden = base.startswith("._") or base in ("", ".DS_Store", "Thumbs.db")
    if hidden or any(f == "__MACOSX" or (f.startswith(".") and f != "..") for f in folders):
        return False
    return suffixes is None or base.lower().endswith(suffixes)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[io.BufferedIOBase]:
    if not os.path.isfile(path):  # a pipe would wait
        kind = "is not a file" if os.path.exists(path) else "does not exist"
        raise NotFoundError(f"{path} {kind}: expected a folder, a zip or a tar")
    with readable(path), open(path, "rb") as file:
        yield file


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Makes a UserError that names the archive of what readers of archives raise for damage."""
    try:
        yield
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{path} is not a whole zip or tar: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _file_bytes(path: str, name: str) -> bytes | UserError:
    try:
        size = os.path.getsize(path)
        if size > MAX_FILE_BYTES:
            return _too_large(name, size)
        with open(path, "rb") as file:
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        return UserError(f"{path} cannot be read: {error.strerror or error}")


def _too_large(name: str, size: int) -> UserError:
    return UserError(f"{quote(name, 200)} has {size} bytes: more than {MAX_FILE_BYTES}")


def _is_zip(file: io.BufferedIOBase) -> bool:
    start = file.read(4)
    file.seek(0)
    return start in (_ZIP_ENTRY, _ZIP_END)


def _open_zip(file: io.BufferedIOBase) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(file)
    total = sum(info.file_size for info in archive.infolist())
    if total > max(2**30, _MAX_RATIO * os.fstat(file.fileno()).st_size):
        raise UserError(f"{file.name} would unpack to {total} bytes, and is taken for a zip bomb")
    return archive


def _zip_members(
    file: io.BufferedIOBase, suffixes: tuple[str, ...] | None
) -> Iterator[tuple[str, bytes | UserError]]:
    archive = _open_zip(file)
    for info in archive.infolist():
        name = clean_name(info.filename)
        if info.is_dir():
            continue
        if _is_wanted(name, suffixes):
            yield name, _zip_bytes(archive, info)
        elif _is_wanted(name, TAR_SUFFIXES):
            with archive.open(info) as inner:
                for inside, data in _tar_members(inner, suffixes, depth=1):
                    yield f"{name}/{inside}", data


def _zip_bytes(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes | UserError:
    if info.file_size > MAX_FILE_BYTES:
        return _too_large(info.filename, info.file_size)
    try:
        with archive.open(info) as file:
            data = file.read(MAX_FILE_BYTES)
        if len(data) != info.file_size:
            raise EOFError(f"{len(data)} of {info.file_size} bytes")
        return data
    except _DAMAGE as error:
        name = quote(clean_name(info.filename), 200)
        return UserError(f"{name} in {archive.fp.name} cannot be read: {_reason(error)}")


def _tar_members(
    file: io.BufferedIOBase, suffixes: tuple[str, ...] | None, *, depth: int
) -> Iterator[tuple[str, bytes | UserError]]:
    """Of a tar, compressed or not. The file of one in another archive is not seekable."""
    with tars.opened(file, seekable=not depth) as (archive, infos):
        for info in infos:
            name = clean_name(info.name)
            if _is_wanted(name, suffixes):
                is_small = info.size <= MAX_FILE_BYTES
                yield name, tars.read(archive, info) if is_small else _too_large(name, info.size)
            elif _is_wanted(name, TAR_SUFFIXES):
                if depth == _MAX_DEPTH:
                    raise UserError(f"{quote(name, 200)}: tars in tars more than {depth} deep")
                inner = archive.extractfile(info)
                for inside, data in _tar_members(inner, suffixes, depth=depth + 1):
                    yield f"{name}/{inside}", data


def _slice(file: io.BufferedIOBase, info: tarfile.TarInfo, path: str) -> bytes | UserError:
    if info.size > MAX_FILE_BYTES or info.issparse():
        return _too_large(info.name, info.size)
    file.seek(info.offset_data)
    data = file.read(info.size)
    if len(data) != info.size:
        return UserError(f"{path} is truncated: {quote(info.name, 200)} is not whole")
    return data
