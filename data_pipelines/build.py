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
import io
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from univg_jax.errors import UserError
from univg_jax.files import write_whole

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
    counts: Mapping[str, int]  # records of each split
    make: Callable[[str, range], list[dict[str, Any]]]

    @property
    def total(self) -> int:
        """Records of all splits."""
        return sum(self.counts.values())


class RecordBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS's writer of one family. A dataset's own subclass says its name, version and features.

    `ordered_map` is the builtin `map` or that of a pool of processes. `advance(n)` is called when n
    more records are done.
    """

    def __init__(
        self,
        *,
        family: Family,
        ordered_map: OrderedMap = map,
        advance: Callable[[int], Any] = lambda count: None,
        **kwargs: Any,
    ):
        self._family, self._ordered_map, self._advance = family, ordered_map, advance
        super().__init__(file_format="array_record", **kwargs)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # TFDS's downloads; nothing here is downloaded
        return {split: self._generate_examples(split) for split in self._family.counts}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        count = self._family.counts[split]
        chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
        made = self._ordered_map(_Make(self._family.make, split), chunks)
        for chunk, records in zip(chunks, made, strict=True):
            yield from zip(chunk, records, strict=True)
            self._advance(len(chunk))


@dataclasses.dataclass(frozen=True)
class _Make:
    """`make` of one split: a class, because a lambda cannot be sent to another process."""

    make: Callable[[str, range], list[dict[str, Any]]]
    split: str

    def __call__(self, indices: range) -> list[dict[str, Any]]:
        return self.make(self.split, indices)


def build_families(
    out: epath.PathLike,
    families: Sequence[Family],
    *,
    builder: type[RecordBuilder],
    arguments: Mapping[str, Any],
    progress: bool = True,
    processes: int | None = None,
) -> None:
    """Writes the families that are not complete yet, each into `out/NAME`.

    `arguments` are all that the records depend on. `processes`: None is one a core.

    Raises UserError if `out` was claimed by other arguments.
    """
    out = epath.Path(out)
    claim(out, arguments)
    missing = [family for family in families if not is_complete(out, family.name)]
    if not missing:
        return
    # A process takes a second to start, so each should have some chunks to make.
    useful = -(-sum(family.total for family in missing) // (4 * CHUNK))
    # TFDS's bars count shards. Ours count records, whose number is known.
    tfds.disable_progress_bar()
    with _pool(min(processes or available_cores(), useful)) as ordered_map:
        for family in missing:
            with tqdm(
                total=family.total, desc=f"build {family.name}", unit="", disable=not progress
            ) as bar:
                _write(out, family, builder=builder, ordered_map=ordered_map, advance=bar.update)


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


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine's where a container limits it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[OrderedMap]:
    """`map` over so many processes, which gives its results in order; the builtin for one."""
    if processes <= 1:
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
    out: epath.Path,
    family: Family,
    *,
    builder: type[RecordBuilder],
    ordered_map: OrderedMap,
    advance: Callable[[int], Any],
) -> None:
    """Writes one family whole, over whatever an interrupted build left."""
    final, is_bucket = out / family.name, "://" in os.fspath(out)
    with contextlib.ExitStack() as stack:
        if is_bucket:
            staging = epath.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            # In the output folder, since a rename cannot cross file systems.
            staging = out / f".{family.name}.unfinished"
            stack.callback(_remove, staging)
            _remove(staging)
        _remove(final)
        writer = builder(
            config=family.name,
            data_dir=staging,
            family=family,
            ordered_map=ordered_map,
            advance=advance,
        )
        # TFDS prints that it downloads, which it does not.
        with contextlib.redirect_stdout(io.StringIO()):
            writer.download_and_prepare(download_dir=staging / "downloads")
        written = epath.Path(writer.data_dir)
        if is_bucket:
            _upload(written, final)
        else:
            written.rename(final)


def _upload(folder: epath.Path, final: epath.Path) -> None:
    """Copies the files of a folder to a bucket, the one that says it is complete last."""
    final.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir(), key=lambda file: file.name == DONE):
        file.copy(final / file.name, overwrite=True)


def _remove(folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()
