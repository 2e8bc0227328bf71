"""Where a build lies: its unfinished folder, whose it is, and the place of the complete one."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines import tfds_folder
from data_pipelines.dataset_files import BUILD
from data_pipelines.native import Part
from data_pipelines.staging import Plan
from univg_jax.errors import UserError
from univg_jax.files import read_json, write_whole

_logger = logging.getLogger(__name__)


def staging_folder(final: epath.Path, *, is_shared: bool) -> epath.Path:
    """The folder of a build's unfinished files: the same one for each attempt.

    It is a local one, unless other machines must see it, too.
    """
    if "://" in (name := os.fspath(final)) and not is_shared:
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        return epath.Path(tempfile.gettempdir()) / f"univg_build_{final.name}_{digest}"
    return final.parent / f".{final.name}.build"


@contextlib.contextmanager
def locked(staging: epath.Path) -> Iterator[None]:
    """Holds the folder: another build of the same family waits until this one has ended.

    A bucket cannot be held.
    """
    if "://" in os.fspath(staging):
        yield
        return
    file = os.open(staging / "lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _logger.warning("another process builds %s: waiting for it", staging)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def claim(staging: epath.Path, plan: Plan, parts: Mapping[str, Sequence[Part]]) -> None:
    """Makes the folder this plan's; raises UserError if an unfinished build is another one."""
    names = json.dumps({split: [str(part) for part in each] for split, each in parts.items()})
    own = dict(
        arguments=plan.arguments,
        shard_bytes=plan.shard_bytes,
        parts=hashlib.blake2b(names.encode(errors="surrogatepass"), digest_size=16).hexdigest(),
    )
    file = staging / BUILD
    if not file.exists():
        write_whole(file, json.dumps(own, indent=1) + "\n")
        return
    found = read_json(file)
    check_same(staging, found.get("arguments", {}), plan.arguments)
    if found != own:
        raise UserError(
            f"{staging} is an unfinished build of other native files: "
            "bring those back, or remove it"
        )


def arguments_of(folder: epath.Path) -> Mapping[str, Any]:
    """By which arguments a complete family was built."""
    for file in (folder / BUILD, folder.parent / BUILD):  # older versions wrote it beside
        if file.exists():
            try:
                found = read_json(file)
            except UserError as error:
                raise UserError(f"{error}; remove {folder} and build again") from None
            return found.get("arguments", found)
    raise UserError(f"{folder} has no {BUILD}: it is not a build of ours; choose another folder")


def check_same(folder: os.PathLike, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    # What an older build does not name had no other value than the default.
    different = [name for name in wanted if name in found and found[name] != wanted[name]]
    if different:
        raise UserError(
            f"{folder} was built with "
            f"{', '.join(f'{name}={found[name]}' for name in different)}, not "
            f"{', '.join(str(wanted[name]) for name in different)}: "
            "choose another directory, or remove it, or ask for what it has (data.build)"
        )


def publish(written: epath.Path, final: epath.Path) -> bool:
    """Puts a complete dataset in its place; False if another build has put one there."""
    if (final / tfds_folder.INFO).exists():
        return False
    if "://" in os.fspath(final):
        final.mkdir(parents=True, exist_ok=True)
        files = sorted(written.iterdir(), key=lambda f: f.name == tfds_folder.INFO)
        for file in files:
            file.copy(final / file.name, overwrite=True)
        return True
    if final.exists():
        final.rmtree()  # nobody is writing it: a local dataset comes there by a rename
    try:
        written.rename(final)
    except OSError:
        if (final / tfds_folder.INFO).exists():
            return False
        raise
    return True
