"""Stage weights -> one elastic stream of batches.

Every row of the stream is a pure function of (seed, global position), and of where the stages
before stopped. `data_pipelines.order` says which record of which component (a task and a source) a
position has. Because nothing else is remembered, the state of the stream is one number beside that,
and any number of hosts may continue it.
"""

import collections
import concurrent.futures
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import grain
import jax
import numpy as np
from etils import epath
from jaxtyping import Int64

from data_pipelines import buckets, order
from data_pipelines.collate import Collator, Drop, Row
from data_pipelines.quarantine import Quarantine
from data_pipelines.reader import SKIPPED, DamagedRecord, Reader
from data_pipelines.sources import Source, open_sources
from data_pipelines.tasks import TASKS
from univg_jax import settings
from univg_jax.batch import Batch, BatchShape
from univg_jax.buckets import Shape
from univg_jax.errors import UserError, check_name
from univg_jax.settings import Config

# How many records in succession may fail to serve one row. So many unusable neighbors are a wrong
# dataset, and a row that tried on and on would look like a hang.
MAX_ATTEMPTS = 100
PROBED_RECORDS = 8  # of each component, before a model is built
_PROBES_AT_ONCE = 8
EVENTS = ("quarantined", "unsuitable", "truncated")  # what `Stream.counters` counts

_MAX_POSITION = 1 << 62  # the end of the "endless" stream: grain wants a length that fits int64

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """A task fed by a source, and its relative weight in the stream."""

    task: str
    source: Source
    weight: float


def components(
    task_settings: Mapping[str, settings.Task],
    *,
    data_dir: str = "",
    sources: Mapping[str, Source] | None = None,
) -> list[Component]:
    """The weighted (task, source) pairs of a config's `tasks`, in the order of TASKS.

    A task's sources share its weight by their number of records, or by the weights of a mapping
    `{source: weight}`. A task of weight zero is left out. `sources` replaces what would be opened
    by name.

    Raises:
      UserError: an unknown task.
      NotFoundError: a source that does not exist.
    """
    for name in task_settings:
        check_name(name, TASKS, what="task")
    used = [task for task in task_settings.values() if task.weight]
    names = dict.fromkeys(name for task in used for name in task.source_names)
    # With its fingerprint, which `Stream` needs, while its files are open.
    opened = open_sources(
        names, "train", data_dir=data_dir, given=sources, then=lambda found: found.fingerprint()
    )
    result = []
    for name in (name for name in TASKS if name in task_settings):
        task = task_settings[name]
        if task.weight == 0:
            _logger.info("task %r has weight 0 and is left out", name)
            continue
        weights = task.sources
        if not isinstance(weights, Mapping):
            weights = {source: len(opened[source]) for source in task.sources}
        total = sum(weights.values())
        result += [
            Component(
                task=name, source=opened[source], weight=task.weight * weights[source] / total
            )
            for source in task.source_names
        ]
    return result


class NoUsableRecord(UserError):
    """So many records in succession serve no row that their dataset is a wrong one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketShare:
    """A bucket of the stream: its shape, share of the steps, and records of all sources."""

    shape: Shape  # height, width in pixels
    share: float
    records: int


class Stream:
    """The endless training stream of a config, from position 0: an iterator of `Batch`.

    It gives this host's rows of each global batch of `data.batch_size` rows, made by threads. All
    rows of a batch are in one of `data.buckets`, which may be another one at each step
    (`data_pipelines.schedule`).
    `sources` maps names to sources, which are then not opened below `data.dir`: for example
    `{"scenes": MemorySource("scenes", records)}`.

    Raises:
      UserError: an unknown task, a source that lacks a field which its task needs or of which no
        record that is tried can be used, a batch that does not divide by the hosts.
      NotFoundError: a source that does not exist.

    The data may also end the stream later: by a share of unusable records that is above
    `data.max_bad_fraction` (`data_pipelines.quarantine`), by MAX_ATTEMPTS of them in succession, or
    by a storage that does not answer (UnreachableError). `next` then raises where this process is
    the only one. Where there are several it does not: see `failure`. The unusable records go to
    the file `quarantine`, or to an object that counts them. A few records of each source are tried
    at once, except with `probe=False`.
    """

    def __init__(
        self,
        config: Config,
        *,
        collator: Collator,
        process_index: int = 0,
        process_count: int = 1,
        sources: Mapping[str, Source] | None = None,
        quarantine: epath.PathLike | Quarantine | None = None,
        probe: bool = True,
    ):
        # Rows are the unit of parallelism; OpenCV's own threads would contend with XLA for the
        # cores.
        cv2.setNumThreads(1)
        self._config = config
        self._components = components(config.tasks, data_dir=config.data.dir, sources=sources)
        shapes, members = _occurring_buckets(self._components, BatchShape.buckets(config.data))
        self._order = order.Order(
            [
                order.Component(
                    *(c.task, c.source.name, len(c.source), c.weight, c.source.fingerprint()),
                    members[c.source.name],
                )
                for c in self._components
            ],
            seed=config.seed,
            batch_size=config.data.batch_size,
            shapes=shapes,
        )
        self._bucket_records = [
            sum(len(found[b].records) for found in members.values()) for b in range(len(shapes))
        ]
        # Of each bucket, what makes its batches, and a reader of each component.
        self._collators = {shape: collator.resized(*shape) for shape in shapes}
        self._readers = [
            [Reader(c.task, c.source, collator=made) for c in self._components]
            for made in self._collators.values()
        ]
        if not isinstance(quarantine, Quarantine):
            quarantine = Quarantine(tolerance=config.data.max_bad_fraction, file=quarantine)
        self._quarantine = quarantine
        names = dict.fromkeys(c.source.name for c in self._components)
        self._counts = dict.fromkeys((*EVENTS, *(f"quarantined/{name}" for name in names)), 0)
        self._failure: Exception | None = None
        self._is_alone = process_count == 1
        self._host_rows = order.host_rows(
            config.data.batch_size, process_index=process_index, process_count=process_count
        )
        self._next = 0  # the first position of the next global batch
        self._iterator: Any = None
        if probe:
            self._probe()

    @property
    def components(self) -> tuple[Component, ...]:
        """The pairs of a task and a source, in the order of TASKS."""
        return tuple(self._components)

    def component_at(self, position: int) -> int:
        """Which of the components has a global position; reads nothing."""
        return self._order[position].component

    def counts(self, steps: int) -> Int64[np.ndarray, "buckets components"]:
        """How many rows of the first steps each component has in each bucket (of `shapes`)."""
        return self._order.counts(steps * self._config.data.batch_size)

    @property
    def shares(self) -> dict[str, float]:
        """The fraction of rows that each task gets."""
        weights: dict[str, float] = collections.defaultdict(float)
        for component in self._components:
            weights[component.task] += component.weight
        return {task: weight / sum(weights.values()) for task, weight in weights.items()}

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Height and width of the batches that the stream gives: the buckets that have records."""
        return tuple(self._collators)

    def bucket_shares(self) -> list[BucketShare]:
        """The histogram of the buckets that have records, in the order of `data.buckets`."""
        return [
            BucketShare(shape=shape, share=share, records=count)
            for shape, share, count in zip(
                self.shapes, self._order.shares, self._bucket_records, strict=True
            )
        ]

    def describe_buckets(self) -> list[str]:
        """The histogram of the buckets, a line each."""
        shares = self.bucket_shares()
        most = max(bucket.share for bucket in shares)
        return [
            f"{b.shape[0]:5}x{b.shape[1]:<5}{b.share:7.2%}{b.records:12,} records "
            + "#" * round(30 * b.share / most)
            for b in shares
        ]

    def specs(self) -> list[Batch]:
        """The shapes of the global batches that the stream gives, one of each bucket."""
        return [made.spec(self._config.data.batch_size) for made in self._collators.values()]

    def counters(self) -> dict[str, int]:
        """How many records this host's batches came across so far, since the stream was made.

        quarantined: could not be used, and were replaced by others; also of each dataset
        unsuitable: are sound but hold nothing for the task, and were replaced by others
        truncated: have a prompt of more than `data.num_tokens` tokens, which was cut

        A record counts once a task, in the first epoch, when its turn comes. So the numbers are a
        function of the positions, and those of several hosts or attempts add up.
        """
        return dict(self._counts)

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None and self._failure is None:
            self._iterator = self._start(self._next)
        if self._failure is None:
            batch, events, self._failure = next(self._iterator)
            self._counts.update({e: self._counts[e] + n for e, n in events.items()})
            self._quarantine.flush()
            if self._failure is not None:
                self.close()
        if self._failure is not None:
            if self._is_alone:
                raise self._failure
            batch = self._padding(self._next)
        self._next += self._config.data.batch_size
        return batch

    @property
    def failure(self) -> Exception | None:
        """Why this host of several cannot go on: its batches then have no valid row.

        If it raised instead, the other hosts would wait for it in the next step. So all of them
        see in that step's metrics that rows are missing, and end together.
        """
        return self._failure

    def _padding(self, position: int) -> Batch:
        """A batch of the right shape for this host in the step at `position`, of no valid rows."""
        collator = list(self._collators.values())[self._order[position].bucket]
        spec = collator.spec(len(self._host_rows))
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec)

    def _start(self, start: int) -> Any:
        """Starts the threads that read, from a global position on."""
        data, rows = self._config.data, self._host_rows
        positions = grain.MapDataset.range(_MAX_POSITION // data.batch_size * len(rows)).map(
            lambda i: start + i // len(rows) * data.batch_size + rows[i % len(rows)]
        )
        batches = positions.map(self._row_or_failure).batch(
            len(rows), drop_remainder=True, batch_fn=self._collate
        )
        # Without options grain would keep 500 elements (here: batches) ready, from 16 threads.
        read = grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch)
        return iter(batches.to_iter_dataset(read_options=read))

    def _row_or_failure(self, position: int) -> Row | Exception:
        try:
            return self.row(position)
        except Exception as error:  # also a bug's: the other hosts wait for this one all the same
            return error

    def _collate(
        self, rows: Sequence[Row | Exception]
    ) -> tuple[Batch | None, collections.Counter[str], Exception | None]:
        """The batch of these rows and their events; or why there is none."""
        for row in rows:
            if isinstance(row, Exception):
                return None, collections.Counter(), row
        collator = self._collators[rows[0].example.target.shape[:2]]
        events = collections.Counter(event for row in rows for event in row.events)
        return collator(rows), events, None

    def row(self, position: int) -> Row:
        """The row at a global position, the same on every host; safe to call from several threads.

        A record that cannot be used is replaced by the next of its source in the same bucket.

        Raises NoUsableRecord after MAX_ATTEMPTS, UserError if too many records cannot be used.
        """
        turn = self._order[position]
        reader = self._readers[turn.bucket][turn.component]
        records = self._order.records(turn)
        count = len(records)
        events: list[str] = []
        for attempt in range(min(count, MAX_ATTEMPTS)):
            # A record's turn comes once an epoch; beside that it may replace others.
            is_new = attempt == 0 and turn.is_first
            # Each attempt starts the random numbers anew: a row then depends on the record that
            # serves it, and not on how many were skipped before.
            rng = np.random.default_rng((self._config.seed, position))
            drop = _sample_drop(self._config.tasks[reader.task], rng)
            index = int(records[(turn.index + attempt) % count])
            try:
                row = reader.row(index, rng, sample_id=position, drop=drop)
            except SKIPPED as error:
                reason = error
                self._quarantine.skip(error, task=reader.task, is_new=is_new)
                if is_new and isinstance(error, DamagedRecord):
                    events += ["quarantined", f"quarantined/{reader.source.name}"]
                elif is_new:
                    events.append("unsuitable")
                continue
            if is_new:
                self._quarantine.accept()
                events += ["truncated"] * (row.prompt.num_truncated > 0)
            return dataclasses.replace(row, events=tuple(events))
        raise NoUsableRecord(
            f"{attempt + 1} records in succession of {reader.source.name} cannot serve task "
            f"{reader.task!r}; the last: {reason}"
        )

    def _probe(self) -> None:
        """Reads a few records of every component: a wrong dataset fails before a model is built.

        Raises UserError if none of them is sound. A few damaged ones are no reason to stop.
        """
        with concurrent.futures.ThreadPoolExecutor(_PROBES_AT_ONCE) as pool:
            readers = self._readers[0]  # in any bucket: a record can be cropped to each
            found = []
            for reader in readers:
                spread = np.linspace(0, len(reader.source) - 1, PROBED_RECORDS).astype(int)
                found.append(pool.map(reader.why_skipped, np.unique(spread).tolist()))
        for reader, errors in zip(readers, map(list, found), strict=True):
            damaged = []
            for error in filter(None, errors):
                self._quarantine.skip(error, task=reader.task, is_new=False)
                if isinstance(error, DamagedRecord):
                    damaged.append(error)
            if len(damaged) == len(errors):
                raise UserError(
                    f"none of {len(errors)} records tried of {reader.source.name} can serve task "
                    f"{reader.task!r}; the first: {damaged[0]}"
                )

    def get_state(self) -> dict[str, Any]:
        """JSON-able and the same on every host: the next global position, and the order."""
        return {"next": self._next, **self._order.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a saved state, on any number of hosts.

        Raises UserError if it is of another mixture or of other records.
        """
        self._order.restore(state)
        self.close()
        self._next = int(state["next"])

    def continue_from(self, state: dict[str, Any]) -> None:
        """Begins a stage that follows another one, whose stream was saved at `state`.

        So what the stages before did not read comes first: see `order.Order.continue_from`.
        """
        self.close()
        self._order.continue_from(state)

    def close(self) -> None:
        """Ends the reading threads; the next `__next__` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _occurring_buckets(
    components: Sequence[Component], shapes: Sequence[BatchShape]
) -> tuple[list[Shape], dict[str, tuple[order.Bucket, ...]]]:
    """The shapes that any record is in, and each source's records in them, by its name."""
    sizes = [shape.size for shape in shapes]
    sources = {component.source.name: component.source for component in components}
    members = {name: buckets.split(source, sizes) for name, source in sources.items()}
    used = [b for b in range(len(sizes)) if any(len(m[b].records) for m in members.values())]
    occurring = {name: tuple(found[b] for b in used) for name, found in members.items()}
    return [sizes[b] for b in used], occurring


def _sample_drop(task: settings.Task, rng: np.random.Generator) -> Drop:
    """Which conditions to withhold: disjoint events with the probabilities `task.dropout`."""
    number = np.searchsorted(np.cumsum(task.dropout), rng.random(), side="right")
    return ("text", "image", "both", "none")[int(number)]
