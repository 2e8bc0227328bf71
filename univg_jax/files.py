"""Small files: written whole or not at all; read as JSON, or named in the error.

`check_output` tells beforehand whether something can be written.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import fsspec
from etils import epath

from univg_jax.errors import (
    AlreadyExistsError,
    NotFoundError,
    UnreachableError,
    UserError,
    quote,
)

CHECKPOINTS, CONFIG = "checkpoints", "config.json"  # of a workdir
CHECKSUM = "checksum"  # the name in an object of ours of the sum of all its other names
MAX_JSON_BYTES = 2**24  # an index of 100,000 tensors has half of this


# Of a request to a bucket that fails, after a second, two, four, ... : two minutes in all.
RETRIES, MAX_DELAY = 8, 32.0
# So epath finds it when a path gs:// is first used.
fsspec.register_implementation("gcs", "univg_jax.object_store.FileSystem", clobber=True)


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[None]:
    """A block that writes `path`: what the system refuses in it is a UserError with the cause."""
    try:
        yield
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file so that a reader, or a killed run, never sees half of it; makes its folder.

    The content goes to a file of another name in the same folder, which then takes the final name.
    Two processes that write the same path at once do not mix: the last one stays. Paths may be
    `gs://`. Raises UserError where the system refuses, such as on a full disk.
    """
    path, content = epath.Path(path), content.encode() if isinstance(content, str) else content
    # A bucket shows no file before it is whole.
    is_bucket, partial = "://" in os.fspath(path), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_bucket:
            path.write_bytes(content)
            return
        partial = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


def write_streamed(path: epath.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """As `write_whole`, of a file whose content `write(file)` writes as it comes.

    `file.name` is where it is until then: a local file, also for `gs://`, of which there must be
    space in the temporary folder. Raises UserError where the system refuses.
    """
    path = os.fspath(path)
    if "://" in path:
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, os.path.basename(path))
            write_streamed(local, write)
            try:
                epath.Path(local).copy(path, overwrite=True)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{path} cannot be written: {reason}") from error
        return
    folder, name = os.path.split(path)
    partial = os.path.join(folder, f".{name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        with writing(path):
            with open(partial, "wb") as file:
                write(file)
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


@contextlib.contextmanager
def write_folder(path: epath.PathLike, *, seal: str) -> Iterator[pathlib.Path]:
    """A local folder to write into; at the end of the block it is at `path`, whole or not at all.

    Until then it is beside `path`, under a name that begins with a dot. A bucket cannot rename it:
    the files are copied there, `seal`, without which readers take no folder for a whole one, last.
    Raises AlreadyExistsError if there is something at `path`, and UserError where the system
    refuses.
    """
    check_absent(path)
    target = epath.Path(path)
    is_bucket = "://" in os.fspath(path)
    with writing(path):
        parent = None if is_bucket else os.path.dirname(os.path.abspath(path))
        if parent is not None:
            os.makedirs(parent, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{target.name}.", suffix=".partial", dir=parent, ignore_cleanup_errors=True
        ) as partial:
            folder = pathlib.Path(partial, target.name)
            folder.mkdir()
            yield folder
            if not is_bucket:
                os.rename(folder, path)  # also onto an empty folder
                return
            names = [f.relative_to(folder) for f in sorted(folder.rglob("*")) if f.is_file()]
            for name in sorted(names, key=lambda name: str(name) == seal):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                epath.Path(folder / name).copy(target / name)


def check_absent(path: epath.PathLike) -> None:
    """Raises AlreadyExistsError if there is something at `path` but an empty folder."""
    target = epath.Path(path)
    if target.exists() and not (target.is_dir() and next(iter(target.iterdir()), None) is None):
        raise AlreadyExistsError(f"{path} exists: choose another folder, or delete it")


def check_space(path: epath.PathLike, num_bytes: int) -> None:
    """Raises UserError if the disk of `path` is too full; of a bucket, that of temporary files."""
    there = tempfile.gettempdir() if "://" in os.fspath(path) else os.path.abspath(path)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if (free := shutil.disk_usage(there).free) < num_bytes:
        raise UserError(
            f"{path} needs {format_bytes(num_bytes)}, and {there} has {format_bytes(free)} left"
        )


def append_lines(path: epath.PathLike, lines: Sequence[str]) -> None:
    """Adds lines to a text file, which begin on a line of their own; makes it and its folder.

    A bucket cannot append: the file is written anew there. Raises UserError where the system
    refuses.
    """
    path, text = epath.Path(path), "".join(f"{line}\n" for line in lines)
    with writing(path):
        if "://" in os.fspath(path):
            write_whole(path, (path.read_text() if path.exists() else "") + text)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(max(0, file.tell() - 1))
            is_torn = file.read(1) not in (b"", b"\n")  # half a line, of a full disk
            file.write((b"\n" if is_torn else b"") + text.encode())


def check_output(
    path: str | os.PathLike, *, flag: str, folder: bool = False, suffixes: Sequence[str] = ()
) -> None:
    """Raises UserError if no file (or `folder`) can be written at `path`; leaves nothing behind.

    `flag` says in the message where the path was given, `suffixes` are what a file's name may end
    in. The checkpoints of a run are no place for anything else. Of a bucket nothing else is looked
    at but the name.
    """
    text = os.fspath(path)
    where = f"{flag}={quote(text, most=200)[1:-1]}"
    if not text:
        raise UserError(f"{flag} is empty: expected a {'folder' if folder else 'file'}")
    if suffixes and not text.lower().endswith(tuple(suffixes)):
        raise UserError(f"{where} should end in {' or '.join(suffixes)}")
    check_address(text, where=where)
    if (workdir := _workdir_around(text)) is not None:
        raise UserError(
            f"{where} is in the checkpoints of the run {workdir}, where it would be taken for one: "
            "choose another place"
        )
    if "://" in text:
        return
    if not folder and (os.path.isdir(text) or text.endswith(os.sep)):
        raise UserError(f"{where} is a folder: expected a file")
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(text)  # fails for a name that is too long, too
        there = os.path.abspath(text)
        there = there if folder else os.path.dirname(there)
        while not os.path.lexists(there):
            there = os.path.dirname(there)
        # Only trying tells: permissions do not show a disk that is mounted to be read.
        with tempfile.TemporaryFile(dir=there):
            pass
    except NotADirectoryError:
        raise UserError(f"{where}: {there} is not a folder") from None
    except OSError as error:
        raise UserError(f"{where} cannot be written: {error.strerror or error}") from None


def check_address(path: epath.PathLike, *, where: str) -> None:
    """Raises UserError, which begins with `where`, for what is neither a path nor of a bucket gs://.

    What lies behind other addresses, such as s3:// or http://, is neither read nor written.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{where}: expected a path, not {quote(path)}")
    scheme, is_address, _ = os.fspath(path).partition("://")
    if is_address and scheme != "gs":
        raise UserError(f"{where}: expected a local path or gs://, not {quote(scheme)[1:-1]}://")


def _workdir_around(path: str) -> epath.Path | None:
    """The run in whose folder of checkpoints `path` is; None if it is in none."""
    whole = epath.Path(path if "://" in path else os.path.realpath(path))
    for folder in (whole, *whole.parents):
        if folder.name == CHECKPOINTS and (folder.parent / CONFIG).exists():
            return folder.parent
    return None


def read_json(path: epath.PathLike) -> dict[str, Any]:
    """The JSON object in a file, which may be anybody's.

    Raises NotFoundError if there is no such file, and UserError with its name if it is torn or
    anything else than one JSON object of at most `MAX_JSON_BYTES`: see `parse_json`.
    """
    path = epath.Path(path)
    # `epath` takes a pipe, on which reading would wait, for a file.
    is_file = path.is_file() if "://" in os.fspath(path) else os.path.isfile(path)
    if not is_file:
        kind = "is not a file" if path.exists() else "does not exist"
        raise NotFoundError(f"{path} {kind}")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except UnreachableError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return parse_json(content, where=os.fspath(path))


def parse_json(content: bytes, *, where: str) -> dict[str, Any]:
    """The JSON object in UTF-8 that `content` is; `where` names its file in messages.

    Raises UserError for more than `MAX_JSON_BYTES`, for what is no JSON or nested too deeply, and
    for an object with one name twice: readers differ in which of the two they take.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the name {twice[:80]!r} is there twice")
        return found

    if len(content) > MAX_JSON_BYTES:
        raise UserError(f"{where} has more than {MAX_JSON_BYTES} bytes of JSON")
    try:
        value = json.loads(content.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise UserError(f"{where} is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # also of UTF-8, and of numbers of thousands of digits
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a JSON object, but a {type(value).__name__}")
    return value


def format_bytes(count: float | int) -> str:
    """In GiB, and what is less than a hundredth of that in MiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 / 100 else f"{count / 2**20:.2f} MiB"


def write_sealed(path: epath.PathLike, value: dict[str, Any]) -> None:
    """Writes a JSON object whole, with a checksum of itself, for `read_sealed`."""
    write_whole(path, json.dumps({**value, CHECKSUM: _checksum(value)}, indent=1))


def read_sealed(path: epath.PathLike) -> dict[str, Any]:
    """The object that `write_sealed` wrote, or an earlier version without a checksum.

    Raises what `read_json` raises, and UserError if the file is not what was written.
    """
    value = read_json(path)
    if value.pop(CHECKSUM, expected := _checksum(value)) != expected:
        raise UserError(f"{path} is damaged: its checksum is another one")
    return value


def _checksum(value: dict[str, Any]) -> str:
    content = json.dumps({k: v for k, v in value.items() if k != CHECKSUM}, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
