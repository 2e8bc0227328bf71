"""What a report is made of: the files of training runs, and the results of an evaluation."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from univg_jax import checkpoint
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmark import Metric
from univg_jax.evaluation.results import Json, Results, find
from univg_jax.files import read_json
from univg_jax.images import open_picture
from univg_jax.writers import read_metrics

SYSTEMS = ("model", "untrained", "trivial", "codec", "real")
KINDS = ("input", "target", "output")  # of a sample's pictures, in the order in which they stand
EVALUATE, TRAIN = "`univg evaluate` writes it", "the training of this stage writes it"


def require(path: epath.Path, *, origin: str) -> epath.Path:
    """The path of a file. Raises NotFoundError where there is none, saying what writes it."""
    if not path.exists():
        raise NotFoundError(f"{path} is missing: {origin}")
    return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation below the folder that `univg evaluate` wrote to."""

    folder: epath.Path
    results: Results
    others: Sequence[str]  # names of those beside it, which are not shown

    @classmethod
    def of(cls, out: epath.PathLike, *, last_stage: epath.PathLike) -> "Evaluation":
        """The newest one of a checkpoint of the last stage, or the one that `out` is.

        Where that stage has no checkpoints any more, the newest of all. Raises what `results.find`
        and `Results.read` raise.
        """
        try:
            weights = checkpoint.digests(last_stage).values()
        except NotFoundError:
            weights = ()
        folder, results, others = find(out, weights=tuple(weights))
        return cls(folder=folder, results=results, others=others)

    @property
    def title(self) -> str:
        """Which one it is, in a line."""
        known = {**self.results.provenance, **self.results.settings}
        keys = ("checkpoint", "step", "date", "version", "revision", "machine")
        parts = [f"{key} {known[key]}" for key in keys if key in known]
        return " · ".join([*parts, self.folder.name])

    def samples(self, task: str, count: int | None = None) -> list[tuple[str, dict[str, bytes]]]:
        """The first samples of a task: prompt, and PNGs by kind.

        Raises NotFoundError if a picture is gone, UserError naming it if it cannot be read.
        """
        return [
            (sample["prompt"], {k: self._png(sample[k]) for k in KINDS if sample.get(k)})
            for sample in self.results.tasks[task]["samples"][:count]
        ]

    def _png(self, name: str) -> bytes:
        png = require(self.folder / name, origin=EVALUATE).read_bytes()
        try:
            open_picture(png)
        except UserError as error:
            raise UserError(f"{self.folder / name} {error}") from None
        return png


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
        """What was measured, in the order in which the page shows it."""
        return [name for name in SYSTEMS if name in self.entry["systems"]]

    @property
    def answers(self) -> dict[str, Json]:
        """The summaries of all that answered, by name; of the trivial answers each."""
        measured = {name: self.entry["systems"][name] for name in self.systems if name != "trivial"}
        return {**measured, **self.entry["trivial"], **self.references}

    @property
    def references(self) -> Json:
        """Summaries of the answers that show what a metric does not measure."""
        return self.entry.get("references", {})

    def get(self, name: str, metric: str | None = None, field: str = "value") -> float | None:
        """A number of a system or a reference; None if it was not measured.

        `field` may be `stderr` instead. `metric` is the primary one by default. `trivial` is the
        strongest trivial answer in that metric.
        """
        summary = {**self.references, **self.entry["systems"]}.get(name, {})
        return summary.get(metric or self.primary, {}).get(field)

    def strongest(self, metric: str | None = None) -> str | None:
        """The name of the strongest trivial answer in a metric; None if there is none."""
        return (
            self.entry["systems"].get("trivial", {}).get(metric or self.primary, {}).get("answer")
        )

    def value(self, name: str, metric: str | None = None) -> float:
        """As `get`, but NaN if it was not measured."""
        value = self.get(name, metric)
        return math.nan if value is None else value

    def text(self, name: str, metric: str | None = None, field: str = "value") -> str:
        """The number of `get`, in percent where the metric says so; n/a where it is None."""
        return self.format(self.get(name, metric, field), metric)

    def format(self, value: float | None, metric: str | None = None) -> str:
        """A number of a metric as people read it."""
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
        return cls(
            summary=read_json(require(summary, origin=f"{TRAIN} at its end")),
            rows=read_metrics(require(metrics, origin=TRAIN)),
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
    def latent_square(self) -> dict[str, float]:
        """The mean square of the latents of each task's targets; 1 is what the model expects."""
        prefix = "latent_square/"
        names = dict.fromkeys(name for row in self.rows for name in row if name.startswith(prefix))
        return {name.removeprefix(prefix): self.median(name) for name in names}

    @property
    def records(self) -> dict[str, int]:
        """How many records were quarantined, unsuitable or cut, if the run counted them."""
        counted = [name for row in self.rows[-1:] for name in row if name.startswith("records/")]
        return {name.removeprefix("records/"): int(self.rows[-1][name]) for name in counted}

    @property
    def images(self) -> dict[str, int | float]:
        """Training images of every task, as counted, or else as the realized share of all rows."""
        if counted := self.total("count"):
            return counted
        batch = self.summary.get("config", {}).get("data", {}).get("batch_size", 0)
        shares, steps = self.summary["shares"], self.summary["steps"]
        return {task: share * batch * steps for task, share in shares.items()}
