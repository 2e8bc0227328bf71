"""What a report is made of: the files of training runs, and the results of an evaluation."""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmark import Metric

Json = Mapping[str, Any]  # an object of a JSON file
SYSTEMS = ("model", "untrained", "trivial", "codec", "real")
KINDS = ("input", "target", "output")  # of a sample's pictures, in the order in which they stand
EVALUATE, TRAIN = "`univg evaluate` writes it", "the training of this stage writes it"


def read_file(path: epath.Path, *, origin: str) -> bytes:
    """The content of a file. Raises NotFoundError, which says where such a file comes from."""
    if not path.exists():
        raise NotFoundError(f"{path} is missing: {origin}")
    return path.read_bytes()


def parse_json(text: str | bytes, path: epath.Path) -> Json:
    """The JSON object in the text of a file. Raises UserError naming the file if it is not one."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} has {type(value).__name__}, expected an object")
    return value


def read_results(evaluation: epath.PathLike) -> Json:
    """The results.json in the folder of an evaluation. Raises UserError if it cannot be read."""
    path = epath.Path(evaluation) / "results.json"
    results = parse_json(read_file(path, origin=EVALUATE), path)
    if not {"settings", "tasks"} <= set(results):
        raise UserError(f"{path} is not the results of an evaluation: it has no settings and tasks")
    return results


def read_sample(evaluation: epath.PathLike, sample: Mapping[str, str]) -> dict[str, bytes]:
    """The PNGs of a sample by kind. Raises NotFoundError if one is gone."""
    folder, kinds = epath.Path(evaluation), [kind for kind in KINDS if sample.get(kind)]
    return {kind: read_file(folder / sample[kind], origin=EVALUATE) for kind in kinds}


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task of some results, as results.json has it in `entry`."""

    entry: Json

    @property
    def primary(self) -> str:
        """The name of the metric that the verdict is about."""
        return self.entry["metric"]

    @functools.cached_property
    def metrics(self) -> dict[str, Metric]:
        """All metrics, the primary one first."""
        return {name: Metric(**metric) for name, metric in self.entry["metrics"].items()}

    @property
    def metric(self) -> Metric:
        """The primary metric."""
        return self.metrics[self.primary]

    @property
    def secondary(self) -> Sequence[str]:
        """The names of the other metrics."""
        return [name for name in self.metrics if name != self.primary]

    @property
    def systems(self) -> Sequence[str]:
        """What was measured, in the order of the page's columns."""
        return [name for name in SYSTEMS if name in self.entry["systems"]]

    @property
    def references(self) -> Json:
        """Summaries of the answers that show what a metric does not measure."""
        return self.entry.get("references", {})

    def get(self, name: str, metric: str | None = None, field: str = "value") -> float | None:
        """A number of a system or a reference; None if it was not measured.

        `field` may be `stderr` instead. `metric` is the primary one by default.
        """
        summary = {**self.references, **self.entry["systems"]}.get(name, {})
        return summary.get(metric or self.primary, {}).get(field)

    def value(self, name: str, metric: str | None = None) -> float:
        """As `get`, but NaN if it was not measured."""
        value = self.get(name, metric)
        return math.nan if value is None else value

    def text(self, name: str, metric: str | None = None, field: str = "value") -> str:
        """The number of `get`, in percent where the metric says so; n/a where it is None."""
        value = self.get(name, metric, field)
        if value is None:
            return "n/a"
        if self.metrics[metric or self.primary].percent:
            return f"{100 * value:.1f}\u00a0%"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"

    def beats(self, opponent: str) -> bool:
        """Whether the model is better; an opponent that was not measured is not beaten."""
        return self.entry["beats"].get(opponent, False)

    @property
    def beats_both(self) -> bool:
        """Whether the model is better than its untrained self and the best trivial answer."""
        return self.beats("untrained") and self.beats("trivial")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What one training run left in its workdir: `summary.json` and the rows of `metrics.jsonl`."""

    summary: Json
    rows: Sequence[Mapping[str, int | float]]

    @classmethod
    def read(cls, workdir: epath.PathLike) -> "Stage":
        """Raises UserError naming the file if the stage has not finished or a file is broken."""
        folder = epath.Path(workdir)
        summary, metrics = folder / "summary.json", folder / "metrics.jsonl"
        finished = read_file(summary, origin=f"{TRAIN} at its end")
        lines = read_file(metrics, origin=TRAIN).splitlines()
        return cls(
            summary=parse_json(finished, summary),
            rows=[parse_json(line, metrics) for line in lines if line.strip()],
        )

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one metric, where it was logged and finite."""
        points = [(r["step"], r[name]) for r in self.rows if name in r and math.isfinite(r[name])]
        steps, values = zip(*points) if points else ((), ())
        return np.array(steps, float), np.array(values, float)

    def median(self, name: str) -> float:
        """The median of one metric; NaN where it was never logged."""
        values = self.series(name)[1]
        return float(np.median(values)) if len(values) else math.nan

    def total(self, prefix: str) -> dict[str, int | float]:
        """The sums of all metrics `prefix/<name>`, by name."""
        sums: dict[str, float] = collections.defaultdict(float)
        for row in self.rows:
            for key, value in row.items():
                if key.startswith(f"{prefix}/"):
                    sums[key.removeprefix(f"{prefix}/")] += value
        return sums

    @property
    def images(self) -> dict[str, int | float]:
        """Training images of every task, as counted, or else as the realized share of all rows."""
        if counted := self.total("count"):
            return counted
        batch = self.summary.get("config", {}).get("data", {}).get("batch_size", 0)
        shares, steps = self.summary["shares"], self.summary["steps"]
        return {task: share * batch * steps for task, share in shares.items()}
