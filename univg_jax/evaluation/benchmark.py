"""What a benchmark is: its tasks, how an answer to each is scored, and what a model has to beat.

A benchmark is one module of `evaluation/benchmarks/` with a `BENCHMARK`. The runner is given that
object and knows nothing else about it. For every task the benchmark has *answers that need no
model*, which are pictures like a model's and are scored by the same code:

* trivial answers, which do not look for what the task asks: the same picture for every case, a copy
  of the input, a classic filter, any object. The best of them is what a model must beat;
* references, which may use the truth or look for a similar training example. They show what a
  metric does not measure, and what can be had without learning.
"""

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal

import numpy as np

from data_pipelines import tasks, transforms
from data_pipelines.transforms import Record
from univg_jax import fields
from univg_jax.errors import UserError, check_name, quote
from univg_jax.evaluation import benchmarks
from univg_jax.evaluation.metrics import Image, Ratio
from univg_jax.evaluation.official import Official
from univg_jax.evaluation.scorers import PROTOCOLS, Scorers
from univg_jax.settings import Config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One held-out example. Its `index` keys its noise and names its files."""

    index: int
    task: str
    record: Record  # at the example's size
    example: tasks.Example

    @property
    def prompt(self) -> str:
        """The text that the text encoder is given."""
        return tasks.prompt(self.task, self.example.text)

    @property
    def pictures(self) -> dict[str, Image]:
        """What shows the case: its input, if it has one, and its target."""
        shown = self.example.source if self.example.face is None else self.example.face
        return ({} if shown is None else {"input": shown}) | {"target": self.example.target}


@dataclasses.dataclass(frozen=True)
class Cases(Sequence[Case]):
    """The cases of a task, each made from its record only when it is indexed.

    So a process decodes the cases of its own rows, and only those that it works on are in memory.
    Random choices of an example are keyed by (seed, index). `fields` are the record fields that
    scoring needs beside those of the task. Indexing raises UserError where a record lacks a field.
    """

    task: str
    records: Sequence[Record]
    _: dataclasses.KW_ONLY
    resolution: int
    seed: int = 0
    fields: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Case:
        task, where = tasks.TASKS[self.task], f"case {index} of task {self.task!r}"
        record = self.records[index]
        record = task.check(record, where=where, extra=self.fields)
        record = transforms.resize_and_crop(record, resolution=self.resolution)
        rng = np.random.default_rng((self.seed, index))
        example = task.example(record, rng, self.resolution, where=where, center=True)
        return Case(index=index, task=self.task, record=record, example=example)

    @functools.cached_property
    def texts(self) -> list[str]:
        """The texts of all cases, for which each is read once and not kept."""
        return [case.example.text for case in self]


ScoreFn = Callable[[Case, Image], dict[str, Ratio]]
AnswerFn = Callable[[Case], Image]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a number is shown, and which of two is better."""

    label: str
    _: dataclasses.KW_ONLY
    better: Literal["higher", "lower"]
    percent: bool = False

    def improves(self, value: float, other: float) -> bool:
        """Whether `value` is strictly better; a NaN beats nothing and is not beaten."""
        return value > other if self.better == "higher" else value < other

    def best(self, values: Mapping[str, float]) -> str:
        """The name of the best value, the first of equals; of a NaN only if all are."""
        names = [name for name, value in values.items() if not math.isnan(value)] or list(values)
        return functools.reduce(lambda a, b: b if self.improves(values[b], values[a]) else a, names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkTask:
    """How one task of a benchmark is scored.

    `make_score(scorers, cases)` is called once and returns `score(case, image)`, which has the sums
    and counts of each metric. `make_trivial(train)` and `make_references(train)` make the answers
    that need no model from training cases. `make_guesses(cases)` has the expected values of
    trivial answers by chance, by name and metric: a verdict must not hang on one draw of them.
    `group(case)` names what several cases may share, such
    as a person: standard errors are over groups (None: over cases).

    The verdict is about the first metric, the primary one. It must be one that no trivial answer
    can win by construction: likeness alone, say, is won by a copy of the face.
    """

    title: str
    metrics: Mapping[str, Metric]
    make_score: Callable[[Scorers, Cases], ScoreFn]
    make_trivial: Callable[[Cases], dict[str, AnswerFn]]
    make_references: Callable[[Cases], dict[str, AnswerFn]] = lambda train: {}
    make_guesses: Callable[[Cases], dict[str, dict[str, float]]] = lambda cases: {}
    group: Callable[[Case], Hashable] | None = None
    needs_fields: tuple[str, ...] = ()  # of the records, beside those of the task
    needs_scorers: tuple[str, ...] = ()  # names of protocols
    difficulty: str = ""  # what makes the task hard: a likely reason if a model fails
    note: str = ""  # how to read the numbers

    @property
    def primary(self) -> str:
        """The name of the metric that decides which answer is better."""
        return next(iter(self.metrics))

    def score_fn(self, scorers: Scorers, cases: Cases) -> ScoreFn:
        """`make_score`, once all scorers are there. Raises UserError naming one that is missing."""
        for name in self.needs_scorers:
            if name not in scorers:
                raise UserError(f"{self.title} needs the scorer {name!r}: {PROTOCOLS[name]}")
        return self.make_score(scorers, cases)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A set of tasks with their cases.

    `cases(config, task, split=..., num=..., collator=...)` are the first `num` usable cases of a
    split, read as needed; `config.data.dir` says where, `collator` which prompts can be used.
    `fingerprint(config, splits)` is a text that changes when the data of these splits does.
    `open_scorers(pipeline, needs=...)` opens the scorers with those names; all processes call it.
    Raise `version` when numbers would change.
    """

    name: str
    version: int
    tasks: Mapping[str, BenchmarkTask]
    cases: Callable[..., Cases]
    fingerprint: Callable[[Config, Sequence[str]], str]
    open_scorers: Callable[..., Scorers]


def open_benchmark(spec: str) -> Benchmark | Official:
    """The benchmark that `spec` names: `geneval`, or `inpainting:hole=box,side=256` with settings.

    Raises UserError for a name or a setting that is unknown, with the nearest one, and for a value
    that cannot be.
    """
    name, _, text = spec.partition(":")
    check_name(name, benchmarks.BENCHMARKS, what="benchmark")
    module = importlib.import_module(f"{benchmarks.__name__}.{name}")
    settings = {}
    for item in re.split(r",(?=\w+=)", text) if text else ():  # a value may have commas
        key, _, value = item.partition("=")
        settings[key] = fields.parse_literal(value)
    if not hasattr(module, "benchmark"):
        if settings:
            raise UserError(f"{name} has no settings, but is given {quote(text)}")
        return module.BENCHMARK
    return module.benchmark(fields.make(module.Settings, settings, name))
