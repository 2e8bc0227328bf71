"""Checksums of the files of a folder, made and verified by all processes together.

Each process sums the files that it wrote itself, so that no process reads what others wrote. The
sums are one JSON file, which lists all files of the folder and has a checksum of itself. They are
XXH3-128, which is as fast as memory: they find what disks and networks do, and prove nothing about
who wrote a file. Sums of before that are BLAKE2b-128, and still read.
"""

import concurrent.futures
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
import xxhash
from etils import epath

from univg_jax.errors import UnreachableError, UserError, quote
from univg_jax.files import CHECKSUM, read_json, read_sealed, write_sealed, write_whole
from univg_jax.together import of_all, together

FILE = "checksums.json"
THREADS = 16
_FILES = "files"  # in the JSON; one without it has the names and hex digits of BLAKE2b alone
_STEP = "step"  # in the JSON of a checkpoint
_CHUNK = 2**20
_ALGORITHMS: Mapping[str, Callable] = {
    "xxh3_128": xxhash.xxh3_128,
    "blake2b_128": lambda content=b"": hashlib.blake2b(content, digest_size=16),
}
_SUM = re.compile(rf"({'|'.join(_ALGORITHMS)}):[0-9a-f]{{32}}")


def checksum(file: epath.Path, algorithm: str = "xxh3_128") -> str:
    """The sum of a file's bytes: `ALGORITHM:HEX`."""
    digest, buffer = _ALGORITHMS[algorithm](), memoryview(bytearray(_CHUNK))
    with file.open("rb") as f:
        while size := f.readinto(buffer):
            digest.update(buffer[:size])
    return f"{algorithm}:{digest.hexdigest()}"


def checksum_of(content: bytes) -> str:
    """The sum of a file with this content."""
    return f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"


def list_files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The names of all files below a folder, relative to it, in order."""
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            yield from list_files(child, f"{prefix}{child.name}/")
        else:
            yield prefix + child.name


def checksums(folder: epath.Path, names: Iterable[str]) -> dict[str, str]:
    """The sums of named files, read by several threads."""
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: checksum(folder / name), names), strict=True))


def write_own(folder: epath.Path, is_own: Callable[[str], bool]) -> None:
    """Sums this process's files into a JSON of its own, for `combine`."""
    own = checksums(folder, (name for name in list_files(folder) if is_own(name)))
    write_whole(folder / _own_file(jax.process_index()), json.dumps(own))


def combine(
    folder: epath.Path,
    *,
    step: int,
    of_processes: epath.Path,
    prefix: str,
    late: Mapping[str, str],
) -> None:
    """Writes the sums of all files of a step; one process calls it when all others have written.

    `of_processes` is the folder, at `prefix` in `folder`, in which `write_own` left its files. What
    no process has summed, such as an index over all of them, is summed here. `late` has the sums of
    files that are written after this.
    """
    sums: dict[str, str] = {}
    for index in range(jax.process_count()):
        file = of_processes / _own_file(index)
        sums |= {prefix + name: value for name, value in read_json(file).items()}
        file.unlink()
    sums |= late
    sums |= checksums(folder, (name for name in list_files(folder) if name not in sums))
    write(folder, sums, step=step)


def _own_file(process: int) -> str:
    return f"checksums.process_{process}.json"


def find_problems(
    folder: epath.Path,
    *,
    under: str | tuple[str, ...] = "",
    closed: str | None = None,
    step: int | None = None,
) -> tuple[str, ...]:
    """What is wrong with a folder's files whose names begin with (one of) `under`.

    Empty if nothing is. In a folder `closed` in it additional files are wrong, too, and so are the
    files of another step than `step`: somebody renamed or exchanged whole folders. Processes share
    the reading and agree on whether there are problems. A file that the process of the same number
    wrote is its share, because it is what that process reads next. Raises UnreachableError where a
    bucket does not answer: that is no damage.
    """
    with together():
        found = _own_problems(folder, under, closed, step)
    if jax.process_count() > 1:
        anywhere = of_all(np.array(bool(found)))
        if np.any(anywhere):
            return found or ("another process found damage",)
    return found


def _own_problems(
    folder: epath.Path, under: str | tuple[str, ...], closed: str | None, step: int | None
) -> tuple[str, ...]:
    """Those that this process finds in its share of the files."""
    sums, found = {}, ()
    try:
        sums, written_as = _read(folder)
        if step is not None and written_as not in (None, step):
            found = (f"it is step {written_as}, as {FILE} says",)
    except UnreachableError:
        raise
    except UserError as error:
        found = (str(error),)
    if closed is not None and sums and (folder / closed).is_dir():
        there = list_files(folder / closed, f"{closed}/")
        found += tuple(f"{name} is additional" for name in there if name not in sums)
    names = sorted(name for name in sums if name.startswith(under))

    def problem(name: str) -> str | None:
        algorithm = sums[name].partition(":")[0]
        if "://" not in os.fspath(folder) and stat.S_ISFIFO(_mode(folder / name)):
            return f"{name} is no file"  # and who reads it waits
        try:
            is_sound = checksum(folder / name, algorithm) == sums[name]
        except (FileNotFoundError, NotADirectoryError):
            return f"{name} is missing"
        except UnreachableError:  # that is no damage
            raise
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
        return None if is_sound else f"{name} is not what was written"

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return found + tuple(filter(None, pool.map(problem, _share(names))))


def _share(names: Sequence[str]) -> list[str]:
    """Those of the names that this process verifies."""
    index, count = jax.process_index(), jax.process_count()

    def owner(place: int, name: str) -> int:
        writer = re.search(r"process_(\d+)(/|$)", name)
        return (int(writer[1]) if writer else place) % count

    return [name for place, name in enumerate(names) if owner(place, name) == index]


def find_additional(folder: epath.Path) -> tuple[str, ...]:
    """The files of a folder that have no sum: somebody put them there later."""
    sums = read(folder)
    return tuple(n for n in list_files(folder) if n not in sums and n != FILE)


def write(folder: epath.Path, sums: Mapping[str, str], *, step: int | None = None) -> None:
    """Writes the sums of a folder's files; those of a checkpoint say of which step."""
    about = {} if step is None else {_STEP: step}
    write_sealed(folder / FILE, {_FILES: dict(sorted(sums.items())), **about})


def read(folder: epath.Path) -> dict[str, str]:
    """The sums of a folder's files. Raises UserError if its list is missing or damaged."""
    return _read(folder)[0]


def _read(folder: epath.Path) -> tuple[dict[str, str], int | None]:
    """The sums, and the step that they are of; None: the list is no checkpoint's, or an old one."""
    value, step = read_json(folder / FILE), None
    if _FILES in value:
        if CHECKSUM not in value:
            raise UserError(f"{folder / FILE} is damaged: it has no checksum of itself")
        value = read_sealed(folder / FILE)
        sums, step = value[_FILES], value.get(_STEP)
    else:
        sums = {name: f"blake2b_128:{digits}" for name, digits in value.items()}
    if not isinstance(sums, dict) or not all(_SUM.fullmatch(str(sum_)) for sum_ in sums.values()):
        raise UserError(f"{folder / FILE} is damaged: it has what is no checksum")
    if outside := [name for name in sums if not _is_below(name)]:
        raise UserError(f"{folder / FILE} is damaged: {quote(outside[0])} is no file in its folder")
    return sums, step


def _is_below(name: str) -> bool:
    """Whether a name, which may be anybody's, is one of a file below the folder of the list."""
    return not {"", ".", ".."} & {*name.split("/")} and "\0" not in name


def _mode(file: epath.Path) -> int:
    """What kind of file it is; 0 if there is none."""
    try:
        return os.stat(file).st_mode
    except OSError:
        return 0
