"""From images to a result: rows of sums and counts, gathered, added, and divided last.

A score is one row of sums and counts for each case. Rows travel between processes, and are added in
the order of cases with correct rounding. So one shard, k shards and uneven shards give the same
bits, as long as the images are the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from univg_jax.evaluation.benchmark import BenchmarkTask
from univg_jax.evaluation.metrics import Ratio, merge

Scores = Mapping[str, Ratio]  # of one image, by metric
Summary = dict[str, dict[str, float | None]]  # by metric: value, stderr, count


def gather(rows: Mapping[int, Scores], *, count: int, template: Scores) -> dict[str, list[Ratio]]:
    """The ratios of all `count` cases by metric, from the rows that each process has.

    All processes call it. `template` is any row: it has the names and the lengths, which a process
    without cases could not know.
    """
    table = {name: np.zeros((count, 2, len(ratio.total))) for name, ratio in template.items()}
    for index, scores in rows.items():
        for name, ratio in scores.items():
            table[name][index] = ratio.total, ratio.count
    if jax.process_count() > 1:
        # As 32-bit words: on its way through a device JAX would round float64 to float32.
        words = {name: values.view(np.uint32) for name, values in table.items()}
        gathered = multihost_utils.process_allgather(words)
        # Of each case one process has the row and the others have zeros, so this sum is exact.
        table = {
            name: np.ascontiguousarray(values).view(np.float64).sum(axis=0)
            for name, values in gathered.items()
        }
    # The template's order, which the gathering of a pytree does not keep.
    return {name: [Ratio(*row) for row in table[name]] for name in template}


def summarize(rows: Mapping[str, Sequence[Ratio]]) -> Summary:
    """Value, standard error and count of each metric; None where nothing was counted."""

    def entry(total: Ratio, error: float) -> dict[str, float | None]:
        value = total.value if math.isfinite(total.value) else None  # JSON has no NaN
        stderr = error if math.isfinite(error) else None
        return {"value": value, "stderr": stderr, "count": float(total.count.sum())}

    return {name: entry(merge(ratios), standard_error(ratios)) for name, ratios in rows.items()}


def standard_error(ratios: Sequence[Ratio]) -> float:
    """Jackknife over cases, with v_-i the metric of all cases but i, and v their mean:

        sqrt((n - 1) / n  sum_i (v_-i - v)²)

    A ratio of sums (oIoU) or a mean of ratios (PCK) has no simpler formula, and for a plain mean it
    is the usual standard error. NaN for fewer than two cases.
    """
    n, total = len(ratios), merge(ratios)
    if n < 2:
        return math.nan
    without = [Ratio(total.total - r.total, total.count - r.count).value for r in ratios]
    deviations = np.array(without) - np.mean(without)
    return float(np.sqrt((n - 1) / n * np.sum(deviations**2)))


def verdict(
    task: BenchmarkTask,
    *,
    systems: Mapping[str, Summary],
    trivial: Mapping[str, Summary],
    references: Mapping[str, Summary],
) -> dict[str, Any]:
    """A task's summaries, with what they say: the best trivial answer, and whom the model beats.

    The best trivial answer joins `systems` as `trivial`. A value that could not be measured is the
    worst of all.
    """
    metric = task.metrics[task.primary]
    values = {name: _value(summary, task.primary) for name, summary in trivial.items()}
    chosen = metric.best(values) if values else None
    systems = {**systems} if chosen is None else {**systems, "trivial": trivial[chosen]}
    model = _value(systems["model"], task.primary)
    beats = {
        name: metric.improves(model, _value(systems[name], task.primary))
        for name in ("untrained", "trivial")
        if name in systems
    }
    trivial = {"chosen": chosen, "all": trivial}
    return {"systems": systems, "trivial": trivial, "references": references, "beats": beats}


def _value(summary: Summary, metric: str) -> float:
    value = summary[metric]["value"]
    return math.nan if value is None else value


def table(results: Mapping[str, Any]) -> str:
    """The primary metric of each task of some results, in columns of text."""
    systems = ("model", "untrained", "trivial", "codec")
    head = " ".join(f"{name:>9}" for name in systems)
    lines = [f"{'task':6} {'metric':20} {head}  verdict"]
    for name, task in results["tasks"].items():
        values = [task["systems"].get(s, {}).get(task["metric"], {}).get("value") for s in systems]
        shown = " ".join(f"{'-' if v is None else f'{v:.4f}':>9}" for v in values)
        lost = [f"the {opponent} one" for opponent, won in task["beats"].items() if not won]
        verdict = "beats both" if not lost else "does not beat " + " nor ".join(lost)
        lines.append(f"{name:6} {task['metric']:20} {shown}  {verdict}")
    return "\n".join(lines)
