"""Reading tars strictly: tarfile takes a damaged header, or the end of a cut file, for the end."""

import bz2
import contextlib
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

_MAX_HEADER_BYTES = 2**20  # of a long name
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


@contextlib.contextmanager
def opened(
    file: io.BufferedIOBase, *, seekable: bool
) -> Iterator[tuple[tarfile.TarFile, Iterator[tarfile.TarInfo]]]:
    """A tar, compressed or not, and its regular files; links are not among them.

    What can be seeked need not be read to be skipped. Raises what tarfile and decompressors raise.
    """
    if not seekable:
        file = io.BufferedReader(_Raw(file), 2**16)
    with contextlib.ExitStack() as stack:
        opener = decompressor(file)
        stream = stack.enter_context(opener(file)) if opener else file
        mode = "r:" if seekable and not opener else "r|"
        archive = tarfile.open(fileobj=stream, mode=mode, tarinfo=_TarInfo, bufsize=2**20)  # noqa: SIM115
        stack.enter_context(archive)
        yield archive, _infos(archive, stream if opener else None)


def read(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """A file, whole. Raises ReadError if it is not."""
    data = archive.extractfile(info).read()
    if len(data) != info.size:
        raise tarfile.ReadError(f"{info.name!r} has {len(data)} of {info.size} bytes")
    return data


def decompressor(file: io.BufferedIOBase) -> Callable[..., Any] | None:
    """What opens a compressed file; None if it is not compressed."""
    start = file.peek(6)
    return next((o for magic, o in _OPENERS.items() if start.startswith(magic)), None)


class _TarInfo(tarfile.TarInfo):
    """A header, whose damage is an error."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.EmptyHeaderError:
            raise tarfile.ReadError("it ends without the end mark of a tar") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from None

    @classmethod
    def frombuf(cls, buffer, encoding, errors):
        info = super().frombuf(buffer, encoding, errors)
        is_header = info.type in (
            *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
            *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
        )
        if info.size < 0 or (is_header and info.size > _MAX_HEADER_BYTES):
            raise tarfile.InvalidHeaderError(f"a size of {info.size} bytes")
        return info


def _infos(
    archive: tarfile.TarFile, compressed: io.BufferedIOBase | None
) -> Iterator[tarfile.TarInfo]:
    """The regular files. tarfile itself would keep all that it has seen."""
    position = -1
    while (info := archive.next()) is not None:
        if info.size < 0 or archive.offset <= position:
            raise tarfile.ReadError("its sizes lead backwards")
        position = archive.offset
        archive.members.clear()
        if info.isreg():
            yield info
    while compressed and compressed.read(2**20):  # the checksum stands at the end
        pass


class _Raw(io.RawIOBase):
    """A member of an archive as a raw stream, so that its first bytes can be looked at."""

    def __init__(self, file: io.BufferedIOBase):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
