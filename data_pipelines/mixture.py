"""Task weights -> one elastic stream: every row of it is a pure function of (seed, global
position).

Position g of the stream belongs to the pair (task, source) into whose share of [0, 1) the point
`frac(g * golden ratio + offset(seed))` falls. A rotation by an irrational number visits every
interval in exact proportion, and so does every arithmetic subsequence of it: batches, and the
slices of any number of hosts, have the weights' shares without a period that could alias with them.
How often the pair came up before g has a closed form, so a stream resumes at any position at once.
That count walks the source in an order that each epoch shuffles anew.

The global batch at step k holds positions [k B, (k+1) B); of n hosts the i-th makes the i-th
contiguous n-th of it, so the rows of the assembled global array stand in the order of positions
whatever n is.
"""

import bisect
import dataclasses
import logging
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import cv2
import grain
import jax
import numpy as np
from jaxtyping import Bool, Int32

from data_pipelines import tasks, transforms
from data_pipelines.sources import Source, open_source
from data_pipelines.tasks import TASKS, Example
from data_pipelines.transforms import Record
from univg_jax.batch import Batch, Text
from univg_jax.errors import check_name

_logger = logging.getLogger(__name__)

Drop = Literal["none", "text", "image", "both"]  # the conditions to go without


# --- the order -----------------------------------------------------------------------------------


class Rotation:
    """Which component each position belongs to, and how many positions before it did.

    `x_g = (a g + offset) mod 2^64` with a = 2^64 / golden ratio; component c owns `[edges[c],
    edges[c+1])`.
    """

    _MODULUS = 1 << 64
    _STEP = 0x9E3779B97F4A7C15

    def __init__(self, weights: Sequence[float], *, seed: int):
        shares = np.cumsum(np.asarray(weights, np.float64)) / np.sum(weights)
        self._edges = [
            0,
            *(round(float(share) * self._MODULUS) for share in shares[:-1]),
            self._MODULUS,
        ]
        self._offset = int(np.random.default_rng(seed).integers(1 << 63)) * 2

    def __getitem__(self, position: int) -> tuple[int, int]:
        x = (self._STEP * position + self._offset) % self._MODULUS
        component = bisect.bisect_right(self._edges, x) - 1
        return component, self._visits(position, self._edges[component], self._edges[component + 1])

    def _visits(self, positions: int, low: int, high: int) -> int:
        """`#{g < positions : low <= x_g < high}`: x in [0, m) is counted by floor((x-low)/m) -
        floor((x-high)/m).
        """
        a, m, r = self._STEP, self._MODULUS, self._offset
        return _floor_sum(positions, m, a, r - low) - _floor_sum(positions, m, a, r - high)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """`sum_{i<n} floor((a i + b) / m)` by Euclid's algorithm, in O(log m)."""
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        n, b = divmod(a * n + b, m)
        m, a = a, m
    return total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """A task fed by a source, and its relative weight in the stream."""

    task: str
    source: Source
    weight: float


def components(
    task_configs: Any,
    *,
    split: str = "train",
    data_dir: str = "",
    sources: Mapping[str, Source] | None = None,
) -> list[Component]:
    """The weighted (task, source) pairs of a config's `tasks`, in the order of TASKS.

    A task's sources share its weight by their number of records, or by the weights of a mapping
    `{source: weight}`. A task of weight zero is left out. `sources` replaces what would be opened
    by name.

    Raises:
      ValueError: `check_weights` fails, or a source lacks a field that its task needs.
      FileNotFoundError: a source that does not exist.
    """
    opened = dict(sources or {})
    check_weights(task_configs)
    result = []
    for name in TASKS:
        if name not in task_configs:
            continue
        task = task_configs[name]
        if task["weight"] == 0:
            _logger.info("task %r has weight 0 and is left out", name)
            continue
        for source in task["sources"]:
            if source not in opened:
                opened[source] = open_source(source, split, data_dir=data_dir)
            missing = [field for field in TASKS[name].needs if field not in opened[source].fields]
            if missing:
                raise ValueError(
                    f"task {name!r} cannot read {opened[source].name}: no field {missing[0]!r} "
                    f"(has {', '.join(opened[source].fields)})"
                )
        if hasattr(task["sources"], "items"):
            parts = {source: float(weight) for source, weight in task["sources"].items()}
            if any(not np.isfinite(w) or w < 0 for w in parts.values()) or not any(parts.values()):
                raise ValueError(
                    f"source weights of task {name!r} are {parts}, expected finite numbers >= 0, one above"
                )
        else:
            parts = {source: float(len(opened[source])) for source in task["sources"]}
        total = sum(parts.values())
        result += [
            Component(task=name, source=opened[source], weight=float(task["weight"]) * part / total)
            for source, part in parts.items()
            if part > 0
        ]
    return result


def check_weights(task_configs: Any) -> None:
    """Holds the weights and dropout of a config's `tasks` against what they may be, without any
    data.

    Raises:
      ValueError: an unknown task, a negative or not finite weight, none above zero, a task without
      source,
        dropout that is no probability.
    """
    for name, task in task_configs.items():
        tasks.find(name)
        if not (np.isfinite(task["weight"]) and task["weight"] >= 0):
            raise ValueError(
                f"weight of task {name!r} is {task['weight']}, expected a finite number >= 0"
            )
        if not task["sources"]:
            raise ValueError(f"task {name!r} has no source")
        chances = _drop_chances(task)
        if not (min(chances) >= 0 and sum(chances) <= 1):
            raise ValueError(
                f"drop_text, drop_image, drop_both of task {name!r} are {chances}: "
                "expected probabilities that sum to at most 1"
            )
    if not any(task["weight"] > 0 for task in task_configs.values()):
        raise ValueError("no task has a weight above zero")


# --- rows and batches ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One example on its way into a batch."""

    example: Example
    task: str
    sample_id: int
    drop: Drop = "none"
    valid: bool = True
    origin: "tuple[Source, int] | None" = None  # where the record lies


def collate(
    rows: Sequence[Row], *, tokenizer: Any, resolution: int, num_tokens: int, face_resolution: int
) -> Batch:
    """Rows -> `Batch`: absent sources and faces are zeros, absent masks ones, `sample_id` modulo
    2^32.
    """
    names = list(TASKS)
    no_source = np.zeros((resolution, resolution, 3), np.uint8)
    all_ones = np.ones((resolution, resolution, 1), np.uint8)
    no_face = np.zeros((face_resolution, face_resolution, 3), np.uint8)
    texts = [tokenizer(tasks.prompt(row.task, row.example.text), num_tokens) for row in rows]
    examples = [row.example for row in rows]
    faces = [
        no_face
        if e.face is None
        else transforms.resize_image(e.face, height=face_resolution, width=face_resolution)
        for e in examples
    ]
    batch = Batch(
        target=np.stack([e.target for e in examples]),
        source=np.stack([no_source if e.source is None else e.source for e in examples]),
        mask=np.stack([all_ones if e.mask is None else e.mask for e in examples]),
        tokens=np.stack([text.tokens for text in texts]).astype(np.int32),
        text_mask=np.stack([text.text_mask for text in texts]),
        identity_slot=np.stack([text.identity_slot for text in texts]),
        face=np.stack(faces),
        has_source=_flags(e.source is not None for e in examples),
        has_face=_flags(e.face is not None for e in examples),
        task=_indices(names.index(row.task) for row in rows),
        sample_id=np.array([row.sample_id % 2**32 for row in rows], np.uint32),
        valid=_flags(row.valid for row in rows),
        text=_stack([text.embedding for text in texts]),
    )
    return drop_conditions(batch, [row.drop for row in rows], tokenizer=tokenizer)


def drop_conditions(batch: Batch, drop: Drop | Sequence[Drop], *, tokenizer: Any) -> Batch:
    """`batch` with conditions withheld: the same for all rows, or one choice a row.

    Without its text a row keeps its task's tag, and loses its face, whose place was in the text.
    Without its image it has no source and a mask of ones.
    """
    drops = [drop] * batch.size if isinstance(drop, str) else drop
    no_text, no_image = (_flags(d in (kind, "both") for d in drops) for kind in ("text", "image"))
    names, num_tokens = list(TASKS), batch.tokens.shape[1]
    tags = {
        t: tokenizer(tasks.prompt(names[t], ""), num_tokens)
        for t in np.unique(batch.task[no_text]).tolist()
    }
    fields = {
        name: np.array(getattr(batch, name)) for name in ("tokens", "text_mask", "identity_slot")
    }
    text = batch.text and jax.tree.map(np.array, batch.text)
    for row in np.flatnonzero(no_text):
        tag = tags[int(batch.task[row])]
        for name, values in fields.items():
            values[row] = getattr(tag, name)
        if text is not None:
            for name in ("emb", "mask", "pooled"):
                getattr(text, name)[row] = getattr(tag.embedding, name)[0]
    kept = (~no_image)[:, None, None, None]
    return dataclasses.replace(
        batch,
        **fields,
        text=text,
        face=np.where(no_text[:, None, None, None], np.uint8(0), batch.face),
        has_face=batch.has_face & ~no_text,
        source=np.where(kept, batch.source, np.uint8(0)),
        mask=np.where(kept, batch.mask, np.uint8(1)),
        has_source=batch.has_source & ~no_image,
    )


def _stack(embeddings: Sequence[Text | None]) -> Text | None:
    if embeddings[0] is None:
        return None
    return jax.tree.map(lambda *rows: np.concatenate(rows), *embeddings)


def _flags(values: Iterator[bool]) -> Bool[np.ndarray, " b"]:
    return np.array(list(values), bool)


def _indices(values: Iterator[int]) -> Int32[np.ndarray, " b"]:
    return np.array(list(values), np.int32)


def example_batch(
    items: Sequence[Record],
    *,
    task: str,
    tokenizer: Any,
    resolution: int,
    num_tokens: int,
    face_resolution: int,
    drop: Drop = "none",
    seed: int = 0,
    sample_ids: Sequence[int] | None = None,
    size: int | None = None,
) -> Batch:
    """Center-cropped examples of one task, for evaluation and sampling; random choices keyed by
    (seed, sample id).

    `drop` gives the null conditions of guidance; the same records, seed and ids with another `drop`
    give the same rows otherwise. `size` pads with copies of the last row that are not `valid`. Ids
    default to 0, 1, ...
    """
    if not items:
        raise ValueError(f"no record of task {task!r} to make a batch of")
    ids = range(len(items)) if sample_ids is None else sample_ids
    rows = []
    for record, sample_id in zip(items, ids, strict=True):
        rng = np.random.default_rng((seed, sample_id))
        where = f"example {sample_id} of task {task!r}"
        example = tasks.find(task).example(record, rng, resolution, where=where, center=True)
        rows.append(Row(example=example, task=task, sample_id=sample_id, drop=drop))
    padding = [dataclasses.replace(rows[-1], valid=False)] * ((size or len(rows)) - len(rows))
    return collate(
        rows + padding,
        tokenizer=tokenizer,
        resolution=resolution,
        num_tokens=num_tokens,
        face_resolution=face_resolution,
    )


def eval_records(
    config: Any,
    task: str,
    *,
    split: str,
    num: int | None = None,
    sources: Mapping[str, Source] | None = None,
) -> list[Record]:
    """The first `num` (None: all) records of a split that serve a task, center-cropped, with all
    their fields.

    In the stored order, the task's sources one after another; the same on every host.
    """
    check_name(task, config.tasks, what="task of this config")
    opened = dict(sources or {})
    found: list[Record] = []
    for name in config.tasks[task]["sources"]:
        source = opened.get(name) or open_source(name, split, data_dir=config.data.dir)
        for index in range(len(source)):
            if num is not None and len(found) >= num:
                return found
            record = source.read(index)
            try:
                TASKS[task].example(
                    record,
                    np.random.default_rng(0),
                    config.data.resolution,
                    where=f"{source.name}[{index}]",
                    center=True,
                )
            except tasks.UnsuitableRecord:
                continue
            found.append(transforms.resize_and_crop(record, resolution=config.data.resolution))
    return found


def eval_batches(
    config: Any,
    task: str,
    *,
    split: str,
    num: int | None = None,
    batch_size: int,
    tokenizer: Any,
    seed: int = 0,
    drop: Drop = "none",
    process_index: int = 0,
    process_count: int = 1,
    sources: Mapping[str, Source] | None = None,
) -> Iterator[Batch]:
    """This host's part of batches that cover `eval_records` once, in order, the last padded with
    rows not `valid`.

    `batch_size` is global. The sample id is the record's place among `eval_records`.
    """
    local = _local_size(batch_size, process_count)
    items = eval_records(config, task, split=split, num=num, sources=sources)
    for start in range(0, len(items), batch_size):
        ids = range(start + process_index * local, start + (process_index + 1) * local)
        # A host whose part lies wholly past the end repeats the last record as padding.
        present = [i for i in ids if i < len(items)] or [len(items) - 1]
        batch = example_batch(
            [items[i] for i in present],
            task=task,
            tokenizer=tokenizer,
            resolution=config.data.resolution,
            num_tokens=config.data.num_tokens,
            face_resolution=config.data.face_resolution,
            drop=drop,
            seed=seed,
            sample_ids=present,
            size=local,
        )
        valid = np.array([i < len(items) for i in ids])
        yield dataclasses.replace(batch, valid=valid)


# --- the stream ----------------------------------------------------------------------------------


class Stream:
    """This host's part of the endless training stream: an iterator of `Batch` whose state is one
    number.
    """

    def __init__(
        self,
        rows: "_Rows",
        *,
        global_batch_size: int,
        process_index: int,
        process_count: int,
        read: Any,
    ):
        self._rows, self._read = rows, read
        self._global_batch_size = global_batch_size
        self._local = _local_size(global_batch_size, process_count)
        self._offset = process_index * self._local
        self._next = 0
        self._iterator: Any = None

    @property
    def shares(self) -> dict[str, float]:
        """The fraction of rows that each task gets."""
        return self._rows.shares

    @property
    def quarantined(self) -> int:
        """How many records this host could not use, each replaced by the next of its source."""
        return self._rows.quarantined

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start(self._next)
        batch = next(self._iterator)
        self._next += self._global_batch_size
        return batch

    def _start(self, start: int) -> Any:
        size, local, offset = self._global_batch_size, self._local, self._offset
        positions = grain.MapDataset.range((1 << 62) // size * local).map(
            lambda i: start + i // local * size + offset + i % local
        )
        batches = positions.map(self._rows.row).batch(
            local, drop_remainder=True, batch_fn=self._rows.collate
        )
        return iter(batches.to_iter_dataset(read_options=self._read))

    def row(self, position: int) -> Row:
        """The row at a global position, which any host can make."""
        return self._rows.row(position)

    def get_state(self) -> dict[str, Any]:
        """JSON-able and the same on every host: the next global position, and what it is a position
        in.
        """
        return {"next": self._next, "mixture": self._rows.identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a saved state, on any number of hosts.

        Raises:
          ValueError: the state is of another mixture, under which the position would silently skip
          and repeat.
        """
        saved, own = state.get("mixture"), self._rows.identity
        if saved != own:
            saved = saved if isinstance(saved, dict) else {}
            field = next((k for k in own if saved.get(k) != own[k]), "mixture")
            raise ValueError(
                f"the saved data position belongs to another mixture: {field} was {saved.get(field)}, "
                f"is {own.get(field)}; to change weights, sources or seed start a new stream (a new workdir, init_from)"
            )
        self.close()
        self._next = int(state["next"])

    def close(self) -> None:
        """Ends the reading threads; the next `__next__` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class _Rows:
    """Position -> row, whatever the hosts. Safe to call from several threads."""

    # records read before the quarantined fraction counts, and replacements tried for one row
    _PATIENCE = 100
    _TOLERATED = 0.01

    def __init__(self, parts: Sequence[Component], *, config: Any, tokenizer: Any):
        self._parts, self._config, self._tokenizer = parts, config, tokenizer
        self._rotation = Rotation([part.weight for part in parts], seed=config.seed)
        self._orders = [
            grain.MapDataset.range(len(part.source))
            .seed(zlib.crc32(f"{config.seed} {part.task} {part.source.name}".encode()))
            .shuffle()
            .repeat()
            for part in parts
        ]
        self._lock = threading.Lock()
        self._read, self._bad = 0, set()
        self.identity = {
            "seed": int(config.seed),
            "components": [[p.task, p.source.name, len(p.source), float(p.weight)] for p in parts],
        }
        total = sum(part.weight for part in parts)
        self.shares = {
            name: sum(p.weight for p in parts if p.task == name) / total
            for name in dict.fromkeys(p.task for p in parts)
        }

    @property
    def quarantined(self) -> int:
        return len(self._bad)

    def row(self, position: int) -> Row:
        component, visit = self._rotation[position]
        part = self._parts[component]
        first = int(self._orders[component][visit])
        for attempt in range(min(len(part.source), self._PATIENCE)):
            index = (first + attempt) % len(part.source)
            # A replacement draws the same numbers: nothing depends on how many records were
            # skipped.
            rng = np.random.default_rng((self._config.seed, position))
            drop = _draw_drop(self._config.tasks[part.task], rng)
            try:
                record = part.source.read(index, TASKS[part.task].needs)
                where = f"{part.source.name}[{index}]"
                example = TASKS[part.task].example(
                    record, rng, self._config.data.resolution, where=where
                )
            except tasks.UnsuitableRecord as error:
                reason = error
            # a decoder or a transform may raise anything on a corrupt record
            except Exception as error:
                reason = error
                self._quarantine(part, index, error)
            else:
                with self._lock:
                    self._read += 1
                return Row(
                    example=example,
                    task=part.task,
                    sample_id=position,
                    drop=drop,
                    origin=(part.source, index),
                )
        raise ValueError(
            f"{attempt + 1} records in succession of {part.source.name} cannot serve task {part.task!r}; "
            f"the last: {reason}"
        )

    def _quarantine(self, part: Component, index: int, error: Exception) -> None:
        with self._lock:
            self._read += 1
            key = (part.task, part.source.name, index)
            if key not in self._bad:
                self._bad.add(key)
                _logger.warning(
                    "quarantined %s[%d] for task %s: %s", part.source.name, index, part.task, error
                )
            if self._read >= self._PATIENCE and len(self._bad) > self._TOLERATED * self._read:
                raise ValueError(
                    f"{len(self._bad)} of {self._read} records read are unusable (more than {self._TOLERATED:.0%}); "
                    f"the last, {part.source.name}[{index}]: {error}"
                ) from error

    def collate(self, rows: Sequence[Row]) -> Batch:
        data = self._config.data
        return collate(
            rows,
            tokenizer=self._tokenizer,
            resolution=data.resolution,
            num_tokens=data.num_tokens,
            face_resolution=data.face_resolution,
        )

    def probe(self, per_component: int = 8) -> None:
        """Makes a few examples of every component, so that a wrong dataset fails before a model is
        built.
        """
        for part in self._parts:
            for index in np.unique(np.linspace(0, len(part.source) - 1, per_component).astype(int)):
                try:
                    record = part.source.read(int(index), TASKS[part.task].needs)
                except Exception as error:
                    _logger.warning("cannot decode %s[%d]: %s", part.source.name, index, error)
                    continue
                where = f"task {part.task!r}, {part.source.name}[{index}]"
                try:
                    TASKS[part.task].example(
                        record, np.random.default_rng(0), self._config.data.resolution, where=where
                    )
                except tasks.UnsuitableRecord as error:
                    _logger.info("%s", error)


def make_stream(
    config: Any,
    *,
    tokenizer: Any,
    split: str = "train",
    process_index: int = 0,
    process_count: int = 1,
    sources: Mapping[str, Source] | None = None,
) -> Stream:
    """The training stream of a config (`seed`, `tasks`, `data`), from position 0.

    `data.batch_size` is global. `sources` maps names to records in memory, instead of opening them
    below `data.dir`.

    Raises:
      ValueError: bad weights or dropout, a batch that does not divide by the hosts, a record that
      breaks the
        schema (some of each source are tried here); from `next`: more than 1% of the records are
        unusable.
      FileNotFoundError: a source that does not exist.
    """
    # rows are the unit of parallelism; OpenCV's own pool would contend with XLA for the cores
    cv2.setNumThreads(1)
    data = config.data
    parts = components(config.tasks, split=split, data_dir=data.dir, sources=sources)
    rows = _Rows(parts, config=config, tokenizer=tokenizer)
    rows.probe()
    return Stream(
        rows,
        global_batch_size=data.batch_size,
        process_index=process_index,
        process_count=process_count,
        # Grain's default keeps 500 elements (here: batches) on 16 threads.
        read=grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch),
    )


def _draw_drop(task: Any, rng: np.random.Generator) -> Drop:
    """Which conditions to withhold: disjoint events of probabilities drop_text, drop_image,
    drop_both.
    """
    thresholds = np.cumsum(_drop_chances(task))
    return ("text", "image", "both", "none")[
        int(np.searchsorted(thresholds, rng.random(), side="right"))
    ]


def _drop_chances(task: Any) -> list[float]:
    return [float(task.get(f"drop_{name}", 0.0)) for name in ("text", "image", "both")]


def _local_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ValueError(f"global batch size {batch_size} does not divide by {process_count} hosts")
    return batch_size // process_count
