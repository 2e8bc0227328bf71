"""What all dataset builds share: records -> ArrayRecord folders, made by all cores, resumable.

A build writes one folder a family (records of the same fields) below its output folder. It can be
killed at any time and started again:

* `build.json` says by which arguments the folder was claimed; other arguments are refused.
* A family is written beside its final place, and moved there when it is complete. So a family that
  has a `dataset_info.json` is complete, and is not built again.
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
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from data_pipelines import records
from univg_jax.errors import UserError
from univg_jax.files import write_whole
from univg_jax.progress import Bar

CHUNK = 64  # records that a process makes at a time: enough to hide the cost of handing them over
CLAIM = "build.json"
DONE = "dataset_info.json"  # TFDS's own file, which a complete family has

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
    out = epath.Path(out)
    claim(out, {**arguments, "version": version})
    missing = [family for family in families if not is_complete(out, family.name)]
    # A process takes a second to start, so each should have some chunks to make.
    useful = sum(sum(family.counts.values()) for family in missing) // (4 * CHUNK) + 1
    # TFDS's bars count shards. Ours count records, whose number is known.
    tfds.disable_progress_bar()
    about = dict(name=dataset, version=version, description=description, license=license)
    with _pool(min(processes or _available_cores(), useful)) as ordered_map:
        for family in missing:
            _write(out, family, ordered_map=ordered_map, writer=functools.partial(_Writer, **about))


def is_complete(out: epath.PathLike, family: str) -> bool:
    """Whether the family was written to its end."""
    return (epath.Path(out) / family / DONE).exists()


def claim(out: epath.PathLike, arguments: Mapping[str, Any]) -> None:
    """Writes the arguments of a build into `out`, or compares them with those already there.

    Raises UserError if `out` holds a build by other arguments.
    """
    path = epath.Path(out) / CLAIM
    if not path.exists():
        write_whole(path, json.dumps(dict(arguments), indent=2) + "\n")
        return
    try:
        found = dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {out} and build again") from None
    for name, value in arguments.items():
        if found.get(name) != value:
            raise UserError(
                f"{out} was built with {name}={found.get(name)}, not {value}: "
                "choose another directory, or remove it"
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


def _write(
    out: epath.Path, family: Family, *, ordered_map: OrderedMap, writer: Callable[..., _Writer]
) -> None:
    """Writes one family whole, over whatever an interrupted build left."""
    final, is_bucket = out / family.name, "://" in os.fspath(out)
    # A local family is staged in the output folder, since a rename cannot cross file systems.
    staging = epath.Path(tempfile.mkdtemp()) if is_bucket else out / f".{family.name}.unfinished"
    for folder in (staging, final):
        folder.rmtree(missing_ok=True)
    total = sum(family.counts.values())
    try:
        with Bar(total=total, desc=f"build {family.name}", unit="") as bar:
            builder = writer(
                config=family.name,
                features=records.family_features(family.fields),
                split_datasets={
                    split: _examples(family, split, ordered_map, bar) for split in family.counts
                },
                data_dir=staging,
                file_format="array_record",
            )
            # TFDS prints that it downloads, which it does not.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(download_dir=staging / "downloads")
        written = epath.Path(builder.data_dir)
        if is_bucket:
            final.mkdir(parents=True)
            for file in sorted(written.iterdir(), key=lambda file: file.name == DONE):
                file.copy(final / file.name)
        else:
            written.rename(final)
    finally:
        staging.rmtree(missing_ok=True)


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
