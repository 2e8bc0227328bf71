"""Builds: the entries of native files -> folders of ArrayRecord shards, resumable, by all cores.

A build has two phases, which run side by side on one pool of processes:

1. Each part of a split (`data_pipelines.native`) becomes a staged file of serialized records, with
   a note of their lengths and of the entries that were left out.
2. The records of all parts, in order, are cut into shards of about SHARD_BYTES, and what is packed
   is deleted.

Both are functions of the native files alone, and every file is written aside and then named. So a
build may be killed at any time, by anything: started again it goes on, and ends byte for byte as if
it had not been. The number of processes changes nothing either. Staged files lie in
`OUT/.NAME.build`, and the complete folder gets its place `OUT/NAME` by one rename.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from data_pipelines import tfds_folder
from data_pipelines.build_folders import (
    arguments_of,
    check_same,
    claim,
    locked,
    publish,
    staging_folder,
)
from data_pipelines.dataset_files import SKIPPED, Piece, describe, shard_name, write_shard
from data_pipelines.native import Dataset, Entry, Part
from data_pipelines.processes import Workers, available_cores, open_pool
from data_pipelines.sources import open_source
from data_pipelines.staging import NOTE, SHARD_BYTES, Packing, Plan, Staged, stage
from univg_jax.errors import AlreadyExistsError, UserError
from univg_jax.files import format_bytes, write_whole
from univg_jax.progress import Bar

DONE = "done"  # in the staging folder: what will be the dataset
PENDING = 4  # parts that each process may be ahead of the packing

OpenWorkers = Callable[[Plan, epath.Path], contextlib.AbstractContextManager[Workers]]

_logger = logging.getLogger(__name__)


def build(
    dataset: Dataset,
    out: epath.PathLike,
    options: Any,
    *,
    processes: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    open_workers: OpenWorkers | None = None,
) -> None:
    """Builds the families of a dataset that are not complete yet, each into `out/FAMILY`.

    `options` is of `dataset.options`. `processes`: None is one a core. `out` may be a bucket.
    `open_workers(plan, folder)` opens other workers than processes of this machine, all of which
    see the folder (`data_pipelines.beam`).

    Raises UserError for native files that are not what they should be, if no entry can be used, and
    if there is a build by other options.
    """
    out = epath.Path(out)
    for name, native in dataset.open(options).items():
        plan = Plan.of(dataset, name, native, options, shard_bytes=shard_bytes)
        if not is_complete(out, name, plan.arguments):
            _build_family(plan, out / name, processes, open_workers)


def write_dataset(
    folder: epath.PathLike, splits: Mapping[str, Iterable[Mapping[str, Any]]], *, license: str = ""
) -> None:
    """Writes records of one's own into `folder`, as a dataset.

    With `folder="data/mine"`, a config reads it with `data.dir="data"`, and `"mine"` among the
    `sources` of its tasks. `splits` has the records of "train", of "validation" for the validation
    loss, and of "test" for evaluation. All records have the same fields, in stored form
    (`data_pipelines.records`): a picture is the bytes of its PNG or JPEG file. They are read as
    they come, and never all in memory.

    Raises UserError for a record that cannot be read or has other fields than the first one, by
    its split and place, and AlreadyExistsError if `folder` has other records.
    """
    final = epath.Path(folder)
    given = _Given(splits)
    plan = Plan(
        dataset="records",
        family=final.name,
        native=given,
        arguments={},
        version="1.0.0",
        description="",
        license=license,
        splits=given.splits,
        is_strict=True,
    )
    parts = {split: given.parts(split) for split in given.splits}
    base = None if "://" in os.fspath(final) else final.parent
    if base is not None:
        base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base, prefix=f".{final.name}.") as name:
        staging = epath.Path(name)
        with open_pool(plan, 1) as pool:
            _Work(plan, parts, staging, pool).run()
        if not publish(staging / DONE, final):
            for split in splits:
                ours, theirs = (open_source(os.fspath(f), split) for f in (staging / DONE, final))
                if ours.fingerprint() != theirs.fingerprint():
                    raise AlreadyExistsError(
                        f"{final} has other records; choose another folder, or remove it"
                    )


class _Given:
    """Records that a caller has, as a `Native` of one part a split, read once."""

    def __init__(self, splits: Mapping[str, Iterable[Mapping[str, Any]]]):
        self._rest: dict[str, Iterator[Mapping[str, Any]]] = {}
        self.fields: tuple[str, ...] = ()
        for split, given in splits.items():
            rest = iter(given)
            if (first := next(rest, None)) is None:
                raise UserError(f"split {split!r} has no records")
            self.fields = self.fields or tuple(first)
            self._rest[split] = itertools.chain([first], rest)
        if not self._rest:
            raise UserError('no records: expected a mapping such as {"train": records}')
        self.splits = tuple(self._rest)

    def parts(self, split: str) -> Sequence[Part]:
        return (split,)

    def entries(self, part: Part) -> Iterator[Entry]:
        for index, record in enumerate(self._rest[part]):
            where = f"{part}[{index}]"
            if set(record) != set(self.fields):
                raise UserError(
                    f"{where} has the fields {', '.join(record)}; "
                    f"the first record has {', '.join(self.fields)}"
                )
            yield Entry(key=where, raw=record)

    def make(self, raw: Any) -> Mapping[str, Any]:
        return raw


def is_complete(out: epath.PathLike, family: str, arguments: Mapping[str, Any]) -> bool:
    """Whether the family was built to its end.

    Raises UserError if it was by other arguments.
    """
    folder = epath.Path(out) / family
    if not (folder / tfds_folder.INFO).exists():
        return False
    check_same(folder, arguments_of(folder), arguments)
    return True


def _build_family(
    plan: Plan, final: epath.Path, processes: int | None, open_workers: OpenWorkers | None
) -> None:
    staging = staging_folder(final, is_shared=open_workers is not None)
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{staging} cannot be written: {error.strerror or error}") from None
    with locked(staging):
        if is_complete(final.parent, final.name, plan.arguments):  # by another process meanwhile
            staging.rmtree()
            return
        parts = {split: plan.native.parts(split) for split in plan.native_splits}
        claim(staging, plan, parts)
        total = sum(len(each) for each in parts.values())
        if open_workers is not None:
            opened = open_workers(plan, staging)
        else:
            opened = open_pool(plan, min(processes or available_cores(), total))
        with opened as workers:
            _Work(plan, parts, staging, workers).run()
        publish(staging / DONE, final)
        staging.rmtree()


class _Work:
    """One family on its way: submits parts, packs what is staged, and describes the result."""

    def __init__(
        self,
        plan: Plan,
        parts: Mapping[str, Sequence[Part]],
        staging: epath.Path,
        workers: Workers,
    ):
        self._plan, self._parts, self._staging, self._workers = plan, parts, staging, workers
        self._done = staging / DONE
        self._done.mkdir(exist_ok=True)
        for file in self._done.glob(".*"):  # of a process that was killed while it wrote
            file.unlink()
        # What earlier attempts wrote. Shards get their last names when their number is known.
        self._there = {file.name.partition("-of-")[0] for file in self._done.iterdir()}
        self._packings = {
            output: Packing(plan)
            for split in parts
            for output in plan.outputs(split)
            if output in plan.splits
        }
        self._writing: dict[concurrent.futures.Future, set[str]] = {}  # shards, and what they need
        self._taken: set[str] = set()  # staged files that are not deleted yet
        self._skipped: list[dict[str, str]] = []

    def run(self) -> None:
        """Builds all into the folder DONE of the staging folder."""
        total = sum(len(parts) for parts in self._parts.values())
        with Bar(total=total, desc=f"build {self._plan.family}", unit="part") as bar:
            for split, parts in self._parts.items():
                outputs = {k: self._packings[k] for k in self._outputs(split)}
                for part, file in self._staged(split, parts):
                    self._take(split, part, file)
                    bar.set_postfix_str(self._so_far(), refresh=False)
                    bar.update()
                for output, packing in outputs.items():
                    if packing.has_rest:
                        self._write(output, packing.finish())
            self._wait(0)
            bar.total = bar.n  # a limit may have left out the last parts
        self._describe()

    def _so_far(self) -> str:
        packings = self._packings.values()
        written = format_bytes(sum(p.num_bytes for p in packings))
        return f"{sum(p.num_records for p in packings):,} records, {written}"

    def _outputs(self, split: str) -> list[str]:
        return [output for output in self._plan.outputs(split) if output in self._packings]

    def _staged(self, split: str, parts: Sequence[Part]) -> Iterator[tuple[Part, str]]:
        """The parts of a split and their staged files, in order, made by the pool ahead of need."""
        packings = [self._packings[output] for output in self._outputs(split)]
        ahead: collections.deque[tuple[Part, str, concurrent.futures.Future | None]]
        ahead = collections.deque()
        rest = iter(enumerate(parts))
        while not all(packing.is_full for packing in packings):
            for number, part in itertools.islice(rest, PENDING * self._workers.size - len(ahead)):
                file = os.fspath(self._staging / f"{split}-{number:06d}")
                is_there = epath.Path(file + NOTE).exists()
                future = None if is_there else self._workers.submit(stage, split, part, file)
                ahead.append((part, file, future))
            if not ahead:
                return
            part, file, future = ahead.popleft()
            if future is not None:
                self._workers.result(future)
            yield part, file
        for *_, future in ahead:
            if future is not None:
                future.cancel()

    def _take(self, split: str, part: Part, file: str) -> None:
        staged = Staged.load(file + NOTE)
        where = dict(dataset=self._plan.dataset, split=split, part=str(part))
        self._skipped += [dict(**where, key=key, reason=reason) for key, reason in staged.skipped]
        self._taken.add(file)
        for index, output in enumerate(self._plan.outputs(split)):
            if output in self._packings:
                for pieces in self._packings[output].add(file, staged, index):
                    self._write(output, pieces)
        self._wait(2 * self._workers.size)

    def _write(self, output: str, pieces: list[Piece]) -> None:
        """Has the newest shard written, if an earlier attempt did not do so."""
        number = len(self._packings[output].shards) - 1
        named = shard_name(self._plan.dataset, output, number, 0).removesuffix("-of-00000")
        file = self._done / f"{output}-{number:05d}.shard"
        if not self._there & {file.name, named}:
            future = self._workers.submit(_write_shard, pieces, os.fspath(file))
            self._writing[future] = {piece.file for piece in pieces}

    def _wait(self, most: int) -> None:
        """Waits until at most so many shards are being written; deletes what none needs now."""
        while len(self._writing) > most:
            future = next(iter(self._writing))
            self._workers.result(future)
            del self._writing[future]
        needed = set().union(*self._writing.values())
        needed |= {file for packing in self._packings.values() for file in packing.files}
        for file in self._taken - needed:
            epath.Path(file).unlink(missing_ok=True)
        self._taken &= needed

    def _describe(self) -> None:
        plan = self._plan
        contents = {output: packing.contents() for output, packing in self._packings.items()}
        for output, found in contents.items():
            if not found.shards:
                self._staging.rmtree()  # or what is staged would be taken for good later
                raise UserError(f"{plan.family}: {self._why_empty(output)}")
            for number in range(len(found.shards)):
                file = self._done / f"{output}-{number:05d}.shard"
                if file.exists():  # or it was named before a kill
                    name = shard_name(plan.dataset, output, number, len(found.shards))
                    file.rename(self._done / name)
        if self._skipped:
            lines = [json.dumps(row) + "\n" for row in self._skipped]
            write_whole(self._done / SKIPPED, "".join(lines))
        records = {output: sum(found.shards) for output, found in contents.items()}
        describe(
            self._done,
            contents,
            family=plan.family,
            dataset=plan.dataset,
            fields=plan.native.fields,
            version=plan.version,
            description=plan.description,
            license=plan.license,
            about=dict(arguments=plan.arguments, records=records, skipped=len(self._skipped)),
        )
        if self._skipped:
            _logger.warning(
                "%s: %d of %d entries were left out and are listed in %s: %s",
                *(plan.family, len(self._skipped), len(self._skipped) + sum(records.values())),
                *(SKIPPED, self._reasons()),
            )

    def _why_empty(self, output: str) -> str:
        (split,) = (split for split in self._parts if output in self._plan.outputs(split))
        if not (reasons := self._reasons(split)):
            return f"the native files have no entry of split {output!r}"
        return f"no entry of split {output!r} can be used; {reasons}"

    def _reasons(self, *splits: str) -> str:
        counts = collections.Counter(
            row["reason"] for row in self._skipped if not splits or row["split"] in splits
        )
        return "; ".join(f"{reason} ({n}x)" for reason, n in counts.most_common(3))


def _write_shard(plan: Plan, pieces: Sequence[Piece], file: str) -> None:
    """What a process of the pool does with a shard."""
    write_shard(pieces, file)
