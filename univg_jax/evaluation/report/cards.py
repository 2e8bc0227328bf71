"""What a page shows of an evaluation, alike for public benchmarks and for embedded ones."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from univg_jax.evaluation.report.read import TaskResult
from univg_jax.evaluation.results import FILE, Json, Results
from univg_jax.evaluation.scorecard import SHOWN, Scorecard
from univg_jax.files import read_json

Key = tuple[str, int, str]  # task, index, prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An item with its pictures. Evaluations that have the same item have the same `key` for it.

    `given` is what all of them start from or aim at, by name, and `files` are what was made.
    """

    key: Key
    given: Mapping[str, epath.Path] = dataclasses.field(default_factory=dict)
    files: Sequence[epath.Path] = ()
    quality: int | float | None = None  # higher is better


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One evaluation. `beside` are numbers of other systems: system, metric, value, source.

    `unreadable` says of files that could not be read why not, by name.
    """

    folder: epath.Path
    benchmark: str
    settings: Json
    provenance: Json
    items: int
    numbers: Mapping[str, int | float | None]
    primaries: Sequence[str]  # names of the numbers to look at first
    beside: Sequence[Json]
    cases: Mapping[str, Sequence[Case]]  # first, best, worst
    unreadable: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: epath.PathLike) -> "Card":
        """The card of an evaluation's folder. Raises what reading its results.json raises."""
        folder = epath.Path(folder)
        is_public = read_json(folder / FILE).get("kind") == "public"
        return _of_scorecard(folder) if is_public else _of_results(folder)


def _of_scorecard(folder: epath.Path) -> Card:
    card = Scorecard.read(folder)
    images = folder / card.images
    return Card(
        folder=folder,
        benchmark=card.benchmark,
        settings=card.settings,
        provenance=card.provenance,
        items=card.rows,
        numbers=card.numbers,
        primaries=[card.primary],
        beside=card.published,
        cases={
            kind: [
                Case(
                    key=(case["task"], case["index"], case["prompt"]),
                    files=[images / name for name in case["files"]],
                    quality=case["quality"],
                )
                for case in cases
            ]
            for kind, cases in card.cases.items()
        },
        unreadable={
            file: why
            for case in card.cases.get("unreadable", ())
            for file, why in case["reasons"].items()
        },
    )


def _of_results(folder: epath.Path) -> Card:
    results = Results.read(folder)
    tasks = {name: TaskResult(entry) for name, entry in results.tasks.items()}
    each = math.ceil(SHOWN / len(tasks)) if tasks else 0
    return Card(
        folder=folder,
        benchmark=results.benchmark,
        settings=results.settings,
        provenance=results.provenance,
        items=sum(task.entry["examples"] for task in tasks.values()),
        numbers={
            f"{name}/{metric}": task.get("model", metric)
            for name, task in tasks.items()
            for metric in task.metrics
        },
        primaries=[f"{name}/{task.primary}" for name, task in tasks.items()],
        beside=[entry for name, task in tasks.items() for entry in _others(name, task)],
        cases={
            "first": [
                _sample(folder, name, index, sample)
                for name, task in tasks.items()
                for index, sample in enumerate(task.entry["samples"][:each])
            ]
        },
    )


def _others(name: str, task: TaskResult) -> list[Json]:
    """The systems that the same evaluation has measured beside the model."""
    return [
        {
            "system": "strongest trivial" if system == "trivial" else system,
            "metric": f"{name}/{metric}",
            "value": value,
            "source": "the same evaluation",
        }
        for system in task.systems
        for metric in task.metrics
        if system != "model" and (value := task.get(system, metric)) is not None
    ]


def _sample(folder: epath.Path, task: str, index: int, sample: Mapping[str, Any]) -> Case:
    return Case(
        key=(task, index, sample["prompt"]),
        given={kind: folder / sample[kind] for kind in ("input", "target") if sample.get(kind)},
        files=[folder / sample["output"]],
    )
