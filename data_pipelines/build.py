"""What all dataset builds share: records -> ArrayRecord folders, made by all cores, resumable.

`write_dataset` writes records of one's own. `build_families` writes one folder a family (records of
the same fields) below its output folder, and can be killed at any time and started again:

* `build.json` says by which arguments the folder was claimed; other arguments are refused.
* A dataset is written beside its final place, into a folder of this process's own, and moved there
  when it is complete. So one that has a `dataset_info.json` is complete, and is not built again. Of
  two builds at once, the second to be complete keeps what the first has put there.
* A record depends on its split and index alone, so the files do not depend on the number of
  processes.

TFDS writes local files only. For a bucket it writes into a temporary local folder, from where the
files are copied, `dataset_info.json` last.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from data_pipelines import records, tfds_folder
from data_pipelines.sources import open_source
from univg_jax.errors import AlreadyExistsError, UserError
from univg_jax.files import read_json, write_whole
from univg_jax.progress import Bar

CHUNK = 64  # records that a process makes at a time: enough to hide the cost of handing them over
CLAIM = "build.json"
DONE = tfds_folder.INFO  # TFDS's own file, which a complete dataset has

OrderedMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A folder of records to write.

    `make(split, indices)` returns the records of these indices, in stored form
    (`data_pipelines.records`). It is called in other processes, so it must be picklable.
    """

    name: str
    fields: Sequence[str]
    counts: Mapping[str, int]  # records of each split
    make: Callable[[str, range], list[dict[str, Any]]]


class _Writer(tfds.dataset_builders.AdhocBuilder, skip_registration=True):
    """TFDS's writer of (key, record) pairs, with a license, and without TensorFlow.

    The original asks TensorFlow whether it is given tensors.
    """

    def __init__(self, *, license: str, **kwargs: Any):
        self._license = license
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        info = super()._info()
        info.redistribution_info.license = self._license
        return info

    def _create_builder_config(self, builder_config: Any, version: Any) -> Any:
        return builder_config  # without TFDS's warning that it is not a registered one

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return dict(self._split_datasets)


def build_families(
    out: epath.PathLike,
    families: Sequence[Family],
    *,
    dataset: str,
    version: str,
    description: str,
    license: str,
    arguments: Mapping[str, Any],
    processes: int | None = None,
) -> None:
    """Writes the families that are not complete yet, each into `out/NAME`.

    `arguments` and `version` are all that the records depend on. `dataset` begins the names of the
    files, and `description` and `license` are stored beside them. `processes`: None is one a core.

    Raises UserError if `out` was claimed by other arguments.
    """
    out, arguments = epath.Path(out), {**arguments, "version": version}
    claim(out, arguments)
    missing = [family for family in families if not is_complete(out, family.name)]
    # A process takes a second to start, so each should have some chunks to make.
    useful = sum(sum(family.counts.values()) for family in missing) // (4 * CHUNK) + 1
    about = dict(name=dataset, version=version, description=description, license=license)
    with _pool(min(processes or _available_cores(), useful)) as ordered_map:
        for family in missing:
            total = sum(family.counts.values())
            with (
                Bar(total=total, desc=f"build {family.name}", unit="") as bar,
                _written(
                    out / family.name,
                    family.fields,
                    {split: _examples(family, split, ordered_map, bar) for split in family.counts},
                    **about,
                ) as written,
            ):
                claim(out, arguments)  # another build may have claimed it since
                _publish(written, out / family.name)


def write_dataset(
    folder: epath.PathLike, splits: Mapping[str, Iterable[Mapping[str, Any]]], *, license: str = ""
) -> None:
    """Writes records of one's own into `folder`, as a dataset.

    With `folder="data/mine"`, a config reads it with `data.dir="data"`, and `"mine"` among the
    `sources` of its tasks. `splits` has the records of "train", of "validation" for the validation
    loss, and of "test" for evaluation. All records have the same fields, in stored form
    (`data_pipelines.records`): a picture is the bytes of its PNG or JPEG file. They are read as
    they come, decoded once to be sure of them, and never all in memory.

    Raises UserError for a record that cannot be decoded or has other fields than the first one, by
    its split and place, and AlreadyExistsError if `folder` has other records.
    """
    final, readers = epath.Path(folder), {}
    fields: tuple[str, ...] = ()
    for split, split_records in splits.items():
        rest = iter(split_records)
        if (first := next(rest, None)) is None:
            raise UserError(f"split {split!r} has no records")
        fields = fields or tuple(first)
        readers[split] = _checked(itertools.chain([first], rest), fields, split)
    if not readers:
        raise UserError('no records: expected a mapping such as {"train": records}')
    about = dict(name="records", version="1.0.0", description="", license=license)
    with _written(final, fields, readers, **about) as written:
        if not _publish(written, final):
            for split in splits:
                ours, theirs = (open_source(os.fspath(f), split) for f in (written, final))
                if ours.fingerprint() != theirs.fingerprint():
                    raise AlreadyExistsError(
                        f"{final} has other records; choose another folder, or remove it"
                    )


def is_complete(out: epath.PathLike, family: str) -> bool:
    """Whether the family was written to its end."""
    return (epath.Path(out) / family / DONE).exists()


def claim(out: epath.PathLike, arguments: Mapping[str, Any]) -> None:
    """Writes the arguments of a build into `out`, or compares them with those already there.

    Raises UserError if `out` holds a build by other arguments, or cannot be written to.
    """
    path = epath.Path(out) / CLAIM
    if not path.exists():
        write_whole(path, json.dumps(dict(arguments), indent=2) + "\n")
        return
    try:
        found = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; remove {out} and build again") from None
    different = [name for name in arguments if found.get(name) != arguments[name]]
    if different:
        raise UserError(
            f"{out} was built with "
            f"{', '.join(f'{name}={found.get(name)}' for name in different)}, not "
            f"{', '.join(str(arguments[name]) for name in different)}: "
            "choose another directory, or remove it, or ask for what it has (data.build)"
        )


def _available_cores() -> int:
    """The cores that this process may use: fewer than the machine's where a container limits it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[OrderedMap]:
    """`map` over so many processes, which gives its results in order; the builtin for one."""
    if processes == 1:
        yield map
        return
    # Spawned, not forked: the caller may hold threads of JAX, which a fork would leave locked.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            yield pool.map
        finally:
            # After an error, do not make the chunks that are still queued.
            pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _written(
    final: epath.Path,
    fields: Iterable[str],
    splits: Mapping[str, Iterator[tuple[int, Mapping[str, Any]]]],
    **about: str,
) -> Iterator[epath.Path]:
    """A local folder, of this process alone, with the dataset that is to go to `final`."""
    staging = _staging(final)
    try:
        builder = _Writer(
            **about,
            config=final.name,
            features=records.family_features(fields),
            split_datasets=splits,
            data_dir=staging,
            file_format=tfds_folder.SUFFIX,
        )
        tfds.disable_progress_bar()  # it counts shards; ours counts records
        # TFDS prints that it downloads, which it does not.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(download_dir=staging / "downloads")
        yield epath.Path(builder.data_dir)
    finally:
        staging.rmtree(missing_ok=True)


def _staging(final: epath.Path) -> epath.Path:
    """A new folder that no other process writes to; removes those that killed ones have left.

    It is on the disk of `final`, since a rename cannot cross file systems, but for a bucket.
    """
    if "://" in os.fspath(final):
        return epath.Path(tempfile.mkdtemp())
    host = socket.gethostname()
    pattern = rf"\.{re.escape(final.name)}\.{re.escape(host)}-(\d+)-\w+\.unfinished"
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.iterdir():
        found = re.fullmatch(pattern, left.name)
        if found and not _is_alive(int(found[1])):
            left.rmtree(missing_ok=True)
    prefix = f".{final.name}.{host}-{os.getpid()}-"
    return epath.Path(tempfile.mkdtemp(prefix=prefix, suffix=".unfinished", dir=final.parent))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _publish(written: epath.Path, final: epath.Path) -> bool:
    """Puts a complete dataset in its place; False if another build has put one there."""
    is_bucket = "://" in os.fspath(final)
    if (final / DONE).exists():
        return False
    if final.exists() and not is_bucket:
        final.rmtree()  # nobody is writing it: a local dataset comes there by a rename
    try:
        if is_bucket:
            final.mkdir(parents=True, exist_ok=True)
            for file in sorted(written.iterdir(), key=lambda file: file.name == DONE):
                file.copy(final / file.name, overwrite=True)
        else:
            written.rename(final)
    except OSError:
        if (final / DONE).exists():
            return False
        raise
    return True


def _checked(
    split_records: Iterable[Mapping[str, Any]], fields: tuple[str, ...], split: str
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The records with their places; raises UserError for one that cannot be used."""
    for index, record in enumerate(split_records):
        if set(record) != set(fields):
            raise UserError(
                f"{split}[{index}] has the fields {', '.join(record)}; "
                f"the first record has {', '.join(fields)}"
            )
        try:
            records.decode(record)
        except UserError as error:
            raise UserError(f"{split}[{index}]: {error}") from None
        yield index, records.encodable(record)


def _examples(
    family: Family, split: str, ordered_map: OrderedMap, bar: Bar
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a split by their indices."""
    indices = range(family.counts[split])
    chunks = [indices[start : start + CHUNK] for start in indices[::CHUNK]]
    made = ordered_map(functools.partial(family.make, split), chunks)
    for chunk, chunk_records in zip(chunks, made, strict=True):
        yield from zip(chunk, chunk_records, strict=True)
        bar.update(len(chunk))
