"""What a config's stream gives, in numbers: shares, buckets, prompts, unusable records."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipelines.collate import Row
from data_pipelines.mixture import BucketShare, NoUsableRecord, Stream
from data_pipelines.quarantine import Quarantine
from data_pipelines.reader import DamagedRecord, Place, UnsuitableRecord
from data_pipelines.sources import Source
from univg_jax.buckets import Shape
from univg_jax.errors import UserError
from univg_jax.progress import Bar
from univg_jax.settings import Config

MIN_ROWS = 512  # that are read for the numbers
SHARE_ROWS = 10_000  # at least, of which is told whose turn they are, without reading
MAX_ROWS = 100_000  # searched for examples of what is rare
_STEPS_READ = 64  # over which the rows that are read are spread, where steps differ in bucket
MAX_TRUNCATED = 0.1  # of a source's prompts; above, there is a warning
_OFF = 0.25  # of the expected share: what is "far from it", if it is no chance either


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip:
    """A record that no row could be made of, and why."""

    place: Place | None
    task: str
    reason: str
    is_damaged: bool  # quarantined; otherwise it is sound but holds nothing for the task


class Skips(Quarantine):
    """Collects the skipped records, and remembers why a run would end instead of ending."""

    def __init__(self, *, tolerance: float):
        super().__init__(tolerance=tolerance)
        self.found: dict[tuple[str, str], Skip] = {}
        self.ends = ""

    def skip(
        self, error: DamagedRecord | UnsuitableRecord, *, task: str = "", is_new: bool = True
    ) -> None:
        """As `Quarantine.skip`, but raises nothing."""
        _, _, reason = str(error).partition(f" for task {task!r}: ")
        is_damaged = isinstance(error, DamagedRecord)
        found = Skip(
            place=error.place, task=task, reason=reason or str(error), is_damaged=is_damaged
        )
        self.found.setdefault((task, str(error)), found)
        try:
            super().skip(error, task=task, is_new=is_new)
        except UserError as end:
            self.ends = self.ends or str(end)


@dataclasses.dataclass(kw_only=True)
class Part:
    """What the stream gives of a task from a source."""

    task: str
    source: Source
    expected: float  # share of the rows, by the weights
    epochs: float  # of the source's records in the whole run
    dropout: tuple[float, float, float]  # expected, of the text, the image, both
    turns: int = 0  # rows of the surveyed steps
    lost: int = 0  # of these, those that no record can serve
    failure: str = ""  # why, of the first
    lengths: list[int] = dataclasses.field(default_factory=list)  # of prompts, in tokens, uncut
    truncated: int = 0
    drops: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    served: set[int] = dataclasses.field(default_factory=set)  # records that made a row
    examples: list[Row] = dataclasses.field(default_factory=list)
    skips: list[Skip] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.task} from {self.source.name}"

    @property
    def rows(self) -> int:
        """How many rows were read."""
        return len(self.lengths)

    @property
    def damaged(self) -> int:
        """How many of its records that were tried cannot be used."""
        return sum(skip.is_damaged for skip in self.skips)

    def add(self, row: Row) -> None:
        """Counts a row that was read."""
        source, index = row.origin
        cut = row.prompt.num_truncated
        self.lengths.append(int(row.prompt.text_mask.sum()) + cut)
        self.truncated += cut > 0
        self.drops[row.drop] += 1
        self.served.add(index)
        if row.example.caption is not None:
            kinds = source.read(index, ("caption_kinds",)).get("caption_kinds", ())
            self.kinds[kinds[row.example.caption] if len(kinds) else "no kind"] += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """The numbers of a stream's first steps; `warnings` are what to look at before a run."""

    config: Config
    parts: list[Part]
    steps: int  # surveyed
    buckets: list[tuple[BucketShare, float]]  # with the share of the surveyed steps
    ends: str  # why the run would end, if it would

    @property
    def num_rows(self) -> int:
        """The rows of the surveyed steps, whose turn is known; few of them were read."""
        return self.steps * self.config.data.batch_size

    @property
    def num_read(self) -> int:
        """How many rows were read."""
        return sum(part.rows for part in self.parts)

    @property
    def skips(self) -> list[Skip]:
        """All records that were skipped."""
        return [skip for part in self.parts for skip in part.skips]

    @property
    def truncated(self) -> float:
        """The share of the stream's prompts that are cut, from what was read of each source."""
        rates = [(p.expected, p.truncated / p.rows) for p in self.parts if p.rows]
        return sum(e * t for e, t in rates) / max(sum(e for e, _ in rates), 1e-12)

    def shares(self) -> dict[str, tuple[float, float]]:
        """Of each task, the realized and the expected share of the rows."""
        found: dict[str, tuple[float, float]] = {}
        for part in self.parts:
            realized, expected = found.get(part.task, (0.0, 0.0))
            realized += self.realized(part)
            found[part.task] = realized, expected + part.expected
        return found

    def realized(self, part: Part) -> float:
        """The share of rows that a part has; without the lost ones, which end a run."""
        return (part.turns - part.lost) / self.num_rows

    @property
    def warnings(self) -> list[str]:
        """What a run of weeks should not begin with, a line each."""
        return list(self._warnings())

    def _warnings(self) -> Iterator[str]:
        limit = self.config.data.num_tokens
        if self.ends:
            yield f"the run would end: {self.ends}"
        for part in self.parts:
            if part.failure:
                yield f"the run would end at {part.name}: {part.failure}"
        for task, (realized, expected) in self.shares().items():
            chance = 3 * np.sqrt(expected / self.num_rows)
            if abs(realized - expected) > max(_OFF * expected, chance):
                yield f"task {task} has {realized:.1%} of the rows, expected {expected:.1%}"
        for part in self.parts:
            tried = len(part.served) + len(part.skips)
            for kind, count in (
                ("cannot be used", part.damaged),
                ("hold nothing for it", len(part.skips) - part.damaged),
            ):
                if 2 * count > tried and not part.failure:
                    yield f"{part.name}: {count} of {tried} records tried {kind}"
            if not part.rows and not part.failure:
                yield (
                    f"{part.name} has no row among the first {MAX_ROWS:,}: "
                    f"its share is {part.expected:.1g}"
                )
            if part.rows and part.truncated / part.rows > MAX_TRUNCATED:
                yield (
                    f"{part.name}: {part.truncated / part.rows:.0%} of {part.rows} prompts are "
                    f"longer than data.num_tokens={limit} and are cut"
                )
        batch = self.config.data.batch_size
        for bucket, _ in self.buckets:
            if bucket.records < batch:
                yield (
                    f"bucket {_size(bucket.shape)} has {bucket.records:,} records, "
                    f"fewer than a batch of {batch}"
                )

    def lines(self) -> list[str]:
        """The summary for a terminal."""
        read = f"{self.num_read:,} rows read of the first {self.num_rows:,} ({self.steps:,} steps)"
        rows = [("task", "source", "records", "epochs", "share", "expected", "cut", "unusable")]
        for part in self.parts:
            cut = f"{part.truncated / part.rows:.1%}" if part.rows else "-"
            share, expected = f"{self.realized(part):.2%}", f"{part.expected:.2%}"
            records, epochs = f"{len(part.source):,}", f"{part.epochs:.3g}"
            bad = str(part.damaged)
            rows.append((part.task, part.source.name, records, epochs, share, expected, cut, bad))
        lines = [f"{self.config.name}: {read}", *_table(rows, left=2)]
        rows = [("bucket", "records", "share", "expected")]
        for bucket, realized in self.buckets:
            shares = f"{realized:.2%}", f"{bucket.share:.2%}"
            rows.append((_size(bucket.shape), f"{bucket.records:,}", *shares))
        lengths = [n for part in self.parts for n in part.lengths] or [0]
        lines += [
            *_table(rows, left=1),
            f"prompts: {np.median(lengths):.0f} tokens in the middle, {max(lengths)} at most; "
            f"{self.truncated:.1%} are cut at {self.config.data.num_tokens}",
        ]
        damaged = [skip for skip in self.skips if skip.is_damaged]
        unsuitable = len(self.skips) - len(damaged)
        lines.append(f"records: {len(damaged)} quarantined, {unsuitable} without their label")
        for (name, reason), count in self.reasons(damaged).most_common(10):
            lines.append(f"  {name}: {count} x {reason}")
        return lines + [f"warning: {text}" for text in self.warnings]

    def reasons(self, skips: list[Skip]) -> collections.Counter[tuple[str, str]]:
        """How often each reason was found in each source."""
        return collections.Counter(
            (skip.place.dataset if skip.place else "?", skip.reason) for skip in skips
        )


def survey(stream: Stream, skips: Skips, config: Config, *, num_examples: int) -> Survey:
    """Reads rows of a stream, which was made with `skips`, until each part has its examples.

    Whose turn it is is told for whole steps, since all rows of a step are of one bucket. A source
    of which no record serves is given up in that bucket.
    """
    batch = config.data.batch_size
    total = sum(c.weight for c in stream.components)
    parts = {
        (c.task, c.source.name): Part(
            task=c.task,
            source=c.source,
            expected=c.weight / total,
            epochs=c.weight / total * batch * config.train.steps / len(c.source),
            dropout=config.tasks[c.task].dropout,
        )
        for c in stream.components
    }
    lost = _read(stream, parts, batch=batch, num_examples=num_examples)
    steps = -(-SHARE_ROWS // batch)
    buckets: collections.Counter[Shape] = collections.Counter()
    for position in range(steps * batch):
        component, shape = stream.turn(position)
        key = component.task, component.source.name
        parts[key].turns += 1
        parts[key].lost += (*key, shape) in lost
        buckets[shape] += 1
    for skip in skips.found.values():
        if skip.place is not None and (skip.task, skip.place.dataset) in parts:
            parts[skip.task, skip.place.dataset].skips.append(skip)
    realized = [(b, buckets[b.shape] / (steps * batch)) for b in stream.bucket_shares()]
    return Survey(
        config=config, parts=list(parts.values()), steps=steps, buckets=realized, ends=skips.ends
    )


def _read(
    stream: Stream, parts: dict[tuple[str, str], Part], *, batch: int, num_examples: int
) -> set[tuple[Any, ...]]:
    """Fills the parts with rows; the parts and shapes that no record can serve."""
    lost: set[tuple[Any, ...]] = set()
    # Every step has one bucket: so some rows of many steps, where there are several.
    most = batch if len(stream.shapes) == 1 else max(1, MIN_ROWS // _STEPS_READ)
    counted = 0
    with Bar(total=MIN_ROWS, desc="read rows", unit="row") as bar:
        for position in range(MAX_ROWS):
            component, shape = stream.turn(position)
            part = parts[component.task, component.source.name]
            if counted >= MIN_ROWS and not _wanting(parts, lost, stream.shapes, num_examples):
                break
            is_counted = counted < MIN_ROWS and position % batch < most
            counted += is_counted
            key = (part.task, part.source.name, shape)
            if key in lost or not (is_counted or len(part.examples) < num_examples):
                bar.update(is_counted)
                continue
            try:
                row = stream.row(position)
            except NoUsableRecord as error:
                lost.add(key)
                part.failure = part.failure or str(error)
            else:
                part.add(row)
                if len(part.examples) < num_examples:
                    part.examples.append(row)
            bar.update(is_counted)
    return lost


def _wanting(
    parts: dict[tuple[str, str], Part],
    lost: set[tuple[Any, ...]],
    shapes: tuple[Shape, ...],
    num_examples: int,
) -> bool:
    """Whether a part that can be served has too few examples."""
    return any(
        len(part.examples) < num_examples and any((*key, shape) not in lost for shape in shapes)
        for key, part in parts.items()
    )


def _size(shape: Shape) -> str:
    return "{}x{}".format(*shape)


def _table(rows: list[tuple[str, ...]], *, left: int) -> list[str]:
    """Columns of one width each, the first `left` of them flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
