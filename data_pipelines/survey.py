"""What a config's stream gives, in numbers: shares, buckets, prompts, unusable records.

Whose turn it is is known for every row of the run without reading one (`data_pipelines.order`), so
the shares are exact. What prompts and records are like is told from the rows that are read.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int64

from data_pipelines.collate import Collator, Row
from data_pipelines.mixture import NoUsableRecord, Stream
from data_pipelines.quarantine import Quarantine
from data_pipelines.reader import DamagedRecord, Place, UnsuitableRecord
from data_pipelines.sources import Source
from univg_jax.errors import UserError, suggestion
from univg_jax.progress import Bar
from univg_jax.settings import Config

MIN_ROWS = 512  # that are read
MAX_ROWS = 100_000  # that are searched for examples of what is rare
MAX_CUT = 0.1  # of a source's prompts; above, there is a warning
_STEPS_READ = 64  # over which the first rows are spread, as all rows of a step are of one bucket
_BLOCKS = re.compile(r" \([a-z, ]+ blocks?\)")  # what task lg adds to a caption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skip:
    """A record of which no row of the task could be made, and why."""

    place: Place
    task: str
    reason: str
    is_damaged: bool  # quarantined; otherwise it is sound but holds nothing for the task


class Skips(Quarantine):
    """Collects the skipped records, and why a run would end because of them, but ends nothing."""

    def __init__(self, *, tolerance: float):
        super().__init__(tolerance=tolerance)
        self.found: dict[tuple[Place, str], Skip] = {}
        self.ends = ""

    def skip(
        self, error: DamagedRecord | UnsuitableRecord, *, task: str = "", is_new: bool = True
    ) -> None:
        """As `Quarantine.skip`, but raises nothing."""
        reason = str(error).partition(f" for task {task!r}: ")[2] or str(error)
        is_damaged = isinstance(error, DamagedRecord)
        self.found.setdefault(
            (error.place, task),
            Skip(place=error.place, task=task, reason=reason, is_damaged=is_damaged),
        )
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
    rows: Int64[np.ndarray, " buckets"]  # in the whole run
    examples: list[Row] = dataclasses.field(default_factory=list)
    lengths: list[int] = dataclasses.field(default_factory=list)  # tokens of each uncut prompt read
    num_cut: int = 0  # of these prompts
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    known_kinds: set[str] = dataclasses.field(default_factory=set)  # of captions, drawn or not
    served: set[int] = dataclasses.field(default_factory=set)  # records that made a row
    skips: list[Skip] = dataclasses.field(default_factory=list)
    failure: str = ""  # why the run would end when its turn comes

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.task} from {self.source.name}"

    @property
    def epochs(self) -> float:
        """How often the run takes all of the source's records."""
        return float(self.rows.sum() / len(self.source))

    @property
    def cut(self) -> float:
        """The share of the prompts that are longer than `data.num_tokens`."""
        return self.num_cut / max(len(self.lengths), 1)

    @property
    def num_tried(self) -> int:
        """How many records were read."""
        return len(self.served | {skip.place.index for skip in self.skips})

    @property
    def num_damaged(self) -> int:
        """How many of these cannot be used."""
        return sum(skip.is_damaged for skip in self.skips)

    @property
    def num_unsuitable(self) -> int:
        """How many of these hold nothing for the task."""
        return len(self.skips) - self.num_damaged

    def add(self, row: Row, *, num_examples: int) -> None:
        """Takes a row that was read."""
        source, index = row.origin
        self.served.add(index)
        self.lengths.append(int(row.prompt.text_mask.sum()) + row.prompt.num_truncated)
        self.num_cut += row.prompt.num_truncated > 0
        if "caption_kinds" in source.fields:
            record = source.read(index, ("captions", "caption_kinds"))
            kinds = record["caption_kinds"]
            self.known_kinds.update(kinds)
            if kinds and (k := drawn_caption(row, record["captions"])) is not None:
                self.kinds[kinds[k]] += 1
        if len(self.examples) < num_examples:
            self.examples.append(row)


def drawn_caption(row: Row, captions: Sequence[str]) -> int | None:
    """Which of its record's captions a row has; None if it has none of them."""
    text = _BLOCKS.sub("", row.example.text)
    return next((k for k, caption in enumerate(captions) if caption.strip() == text), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """The numbers of a run's stream. `ends` says why the run would end, if it would."""

    config: Config
    stream: Stream
    parts: list[Part]
    ends: str

    @property
    def num_read(self) -> int:
        """How many rows were read."""
        return sum(len(part.lengths) for part in self.parts)

    @property
    def skips(self) -> list[Skip]:
        """All records that were skipped."""
        return [skip for part in self.parts for skip in part.skips]

    @property
    def cut(self) -> float:
        """The share of the stream's prompts that are cut: that of each part, as often as it comes.

        Rows of rare parts are read more often than they come.
        """
        read = [part for part in self.parts if part.lengths]
        return sum(p.expected * p.cut for p in read) / (sum(p.expected for p in read) or 1)

    def realized(self, part: Part) -> float:
        """The share of the run's rows that a part has."""
        return float(part.rows.sum() / sum(p.rows.sum() for p in self.parts))

    def bucket_shares(self) -> list[float]:
        """The share of the run's steps that each of `stream.shapes` has."""
        rows = np.sum([part.rows for part in self.parts], axis=0)
        return (rows / rows.sum()).tolist()

    def warnings(self) -> list[str]:
        """What a run of weeks should not begin with, a line each."""
        return list(self._warnings())

    def _warnings(self) -> Iterator[str]:
        data = self.config.data
        if self.ends:
            yield f"the run would end: {self.ends}"
        for part in self.parts:
            if part.failure:
                yield f"the run would end at {part.name}: {part.failure}"
            elif part.num_damaged:
                yield (
                    f"{part.name}: {part.num_damaged} of {part.num_tried} records tried cannot be "
                    "used"
                )
            if 2 * part.num_unsuitable > part.num_tried and not part.failure:
                yield (
                    f"{part.name}: {part.num_unsuitable} of {part.num_tried} records tried hold "
                    "nothing for it"
                )
            if not part.rows.any():
                yield f"{part.name} has no row in the run: its share is {part.expected:.1g}"
            elif not part.lengths and not part.failure:
                yield f"{part.name} has no row among the first {MAX_ROWS:,}"
            if part.cut > MAX_CUT:
                yield (
                    f"{part.name}: {part.cut:.0%} of {len(part.lengths)} prompts are longer than "
                    f"data.num_tokens={data.num_tokens} and are cut"
                )
        kinds = set().union(*(part.known_kinds for part in self.parts))
        for kind in data.caption_weights:
            if kind not in kinds:
                yield (
                    f"data.caption_weights: no record read has captions of the kind {kind!r}"
                    f"{suggestion(kind, sorted(kinds))}"
                )
        for bucket in self.stream.bucket_shares():
            if bucket.records < data.batch_size:
                yield (
                    f"bucket {bucket.shape[0]}x{bucket.shape[1]} has {bucket.records:,} records, "
                    f"fewer than a batch of {data.batch_size}"
                )

    def lines(self) -> list[str]:
        """The summary for a terminal."""
        steps = self.config.train.steps
        lines = [
            f"{self.config.name}: {steps:,} steps of {self.config.data.batch_size} rows, "
            f"{self.num_read:,} rows read",
            f"  {'task':8}{'source':30}{'records':>12}{'epochs':>9}{'share':>9}{'weight':>9}"
            f"{'cut':>8}{'quarantined':>13}{'unsuitable':>12}",
        ]
        for p in self.parts:
            lines.append(
                f"  {p.task:8}{p.source.name:30}{len(p.source):12,}{p.epochs:9.3g}"
                f"{self.realized(p):9.2%}{p.expected:9.2%}{p.cut:8.1%}{p.num_damaged:13}"
                f"{p.num_unsuitable:12}"
            )
        lengths = [n for part in self.parts for n in part.lengths] or [0]
        lines += [
            "buckets of the stream:",
            *self.stream.describe_buckets(),
            f"prompts: half have at most {np.median(lengths):.0f} tokens, the longest "
            f"{max(lengths)}; {self.cut:.1%} are cut at {self.config.data.num_tokens}",
        ]
        return lines + [f"warning: {text}" for text in self.warnings()]


def survey(
    config: Config,
    *,
    collator: Collator,
    num_examples: int,
    sources: Mapping[str, Source] | None = None,
) -> Survey:
    """Reads rows of a config's stream, until each task has its examples of each of its sources.

    A source of which no record serves is given up. Raises UserError as `mixture.Stream` does for
    what is wrong beside records.
    """
    skips = Skips(tolerance=config.data.max_bad_fraction)
    stream = Stream(config, collator=collator, sources=sources, quarantine=skips, probe=False)
    weights = sum(component.weight for component in stream.components)
    rows = stream.counts(config.train.steps)
    parts = [
        Part(task=c.task, source=c.source, expected=c.weight / weights, rows=rows[:, k])
        for k, c in enumerate(stream.components)
    ]
    _read(stream, parts, batch_size=config.data.batch_size, num_examples=num_examples)
    for part in parts:
        part.skips = [
            skip
            for skip in skips.found.values()
            if (skip.task, skip.place.dataset) == (part.task, part.source.name)
        ]
    return Survey(config=config, stream=stream, parts=parts, ends=skips.ends)


def _read(stream: Stream, parts: list[Part], *, batch_size: int, num_examples: int) -> None:
    """Fills the parts with rows: first some of many steps, then examples of what is rare."""
    each = batch_size if len(stream.shapes) == 1 else min(batch_size, MIN_ROWS // _STEPS_READ)
    first = [k // each * batch_size + k % each for k in range(MIN_ROWS)]
    with Bar(total=MIN_ROWS, desc="read rows", unit="row") as bar:
        for k, position in enumerate(dict.fromkeys([*first, *range(MAX_ROWS)])):
            wanting = [len(p.examples) < num_examples and not p.failure for p in parts]
            if k >= MIN_ROWS and not any(wanting):
                break
            number = stream.component_at(position)
            part = parts[number]
            if not part.failure and (k < MIN_ROWS or wanting[number]):
                try:
                    part.add(stream.row(position), num_examples=num_examples)
                except NoUsableRecord as error:
                    part.failure = str(error)
            bar.update(k < MIN_ROWS)
