"""Checksums of the files of a folder, made and verified by all processes together.

Each process sums the files that it wrote itself, so that no process reads what others wrote. The
sums are one JSON file, `{name: BLAKE2b-128 in hex}`, which lists all files of the folder.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from univg_jax.errors import UserError
from univg_jax.files import read_json, write_whole

FILE = "checksums.json"
THREADS = 8


def checksum(file: epath.Path) -> str:
    """BLAKE2b-128 of a file's bytes, in hex."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as f:
        while chunk := f.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


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
    folder: epath.Path, *, of_processes: epath.Path, prefix: str, ignore: Iterable[str]
) -> None:
    """Writes the sums of all files of `folder`; one process calls it when all others have written.

    `of_processes` is the folder, at `prefix` in `folder`, in which `write_own` left its files. What
    no process has summed, such as an index over all of them, is summed here.
    """
    sums: dict[str, str] = {}
    for index in range(jax.process_count()):
        file = of_processes / _own_file(index)
        sums |= {prefix + name: value for name, value in read_json(file).items()}
        file.unlink()
    rest = (name for name in list_files(folder) if name not in sums and name not in ignore)
    sums |= checksums(folder, rest)
    write(folder, sums)


def _own_file(process: int) -> str:
    return f"checksums.process_{process}.json"


def find_problems(folder: epath.Path, *, under: str = "") -> tuple[str, ...]:
    """What is wrong with a folder's files whose names begin with `under`; empty if nothing is.

    Processes share the reading and agree on whether there are problems.
    """
    sums, found = {}, ()
    try:
        sums = read_json(folder / FILE)
    except UserError as error:  # perhaps on this process alone, so the others are told below
        found = (str(error),)
    names = sorted(name for name in sums if name.startswith(under))

    def problem(name: str) -> str | None:
        try:
            is_sound = checksum(folder / name) == sums[name]
        except FileNotFoundError:
            return f"{name} is missing"
        return None if is_sound else f"{name} is not what was written"

    own = names[jax.process_index() :: jax.process_count()]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        found += tuple(filter(None, pool.map(problem, own)))
    if jax.process_count() > 1:
        anywhere = multihost_utils.process_allgather(np.array(bool(found)))
        if np.any(anywhere):
            return found or ("another process found damage",)
    return found


def find_additional(folder: epath.Path, *, ignore: Iterable[str]) -> tuple[str, ...]:
    """The files of a folder that have no sum: somebody put them there later."""
    sums = read_json(folder / FILE)
    return tuple(n for n in list_files(folder) if n not in sums and n not in ignore)


def write(folder: epath.Path, sums: Mapping[str, str]) -> None:
    """Writes the sums of a folder's files."""
    write_whole(folder / FILE, json.dumps(dict(sorted(sums.items())), indent=1))
