"""From images to a result: rows of sums and counts, gathered, added, and divided last.

A score is one row of sums and counts for each case. Rows travel between processes, and are added in
the order of cases with correct rounding. So one shard, k shards and uneven shards give the same
bits, as long as the images are the same.
"""

import collections
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from univg_jax.evaluation.benchmark import BenchmarkTask
from univg_jax.evaluation.metrics import Ratio, merge
from univg_jax.together import of_all

Scores = Mapping[str, Ratio]  # of one image, by metric
Entry = dict[str, float | str | None]  # value, stderr, count; the name of a trivial answer
Summary = dict[str, Entry]  # by metric
Groups = Sequence[Hashable]  # of each case, the group of cases that it is not independent of


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
        gathered = of_all(words)
        # Of each case one process has the row and the others have zeros, so this sum is exact.
        table = {
            name: np.ascontiguousarray(values).view(np.float64).sum(axis=0)
            for name, values in gathered.items()
        }
    # The template's order, which the gathering of a pytree does not keep.
    return {name: [Ratio(*row) for row in table[name]] for name in template}


def summarize(rows: Mapping[str, Sequence[Ratio]], groups: Groups | None = None) -> Summary:
    """Value, standard error and count of each metric; None where nothing was counted."""

    return {
        name: _entry(merge(ratios), standard_error(ratios, groups)) for name, ratios in rows.items()
    }


def guess(expected: float) -> Entry:
    """The entry of an expected value, for which nothing was counted."""
    return _entry(Ratio.of(expected), math.nan) | {"count": 0.0}


def _entry(total: Ratio, error: float) -> Entry:
    value = total.value if math.isfinite(total.value) else None  # JSON has no NaN
    stderr = error if math.isfinite(error) else None
    return {"value": value, "stderr": stderr, "count": float(total.count.sum())}


def standard_error(ratios: Sequence[Ratio], groups: Groups | None = None) -> float:
    """Jackknife over groups of cases, with v_-i the metric without group i, and v their mean:

        sqrt((n - 1) / n  sum_i (v_-i - v)²)

    `groups` names the group of each case, such as the person whom it shows: cases of one group are
    not independent. Without it each case is its own. A ratio of sums (oIoU) or a mean of ratios
    (PCK) has no simpler formula, and for a plain mean it is the usual standard error. NaN for fewer
    than two groups.
    """
    members: dict[Hashable, list[Ratio]] = collections.defaultdict(list)
    for group, ratio in zip(range(len(ratios)) if groups is None else groups, ratios, strict=True):
        members[group].append(ratio)
    sums, total = [merge(group) for group in members.values()], merge(ratios)
    n = len(sums)
    if n < 2:
        return math.nan
    without = [Ratio(total.total - r.total, total.count - r.count).value for r in sums]
    deviations = np.array(without) - np.mean(without)
    return float(np.sqrt((n - 1) / n * np.sum(deviations**2)))


def verdict(
    task: BenchmarkTask,
    *,
    systems: Mapping[str, Summary],
    trivial: Mapping[str, Summary],
    references: Mapping[str, Summary],
) -> dict[str, Any]:
    """A task's summaries, with what they say: the strongest trivial answers, whom the model beats.

    The strongest trivial answer of each metric joins `systems` as `trivial`, with its name under
    `answer`. `beats` is about the primary metric. A value that could not be measured is the worst
    of all.
    """
    if trivial:
        systems = {**systems, "trivial": _strongest(task, trivial)}
    model, metric = _value(systems["model"], task.primary), task.metrics[task.primary]
    beats = {
        name: metric.improves(model, _value(systems[name], task.primary))
        for name in ("untrained", "trivial")
        if name in systems
    }
    return {"systems": systems, "trivial": trivial, "references": references, "beats": beats}


def _strongest(task: BenchmarkTask, trivial: Mapping[str, Summary]) -> Summary:
    """For each metric the entry of the trivial answer that is best in it."""
    found = {}
    for name, metric in task.metrics.items():
        if values := {k: _value(v, name) for k, v in trivial.items() if name in v}:
            answer = metric.best(values)
            found[name] = {**trivial[answer][name], "answer": answer}
    return found


def _value(summary: Summary, metric: str) -> float:
    value = summary[metric]["value"]
    return math.nan if value is None else value


def table(tasks: Mapping[str, Any]) -> str:
    """The primary metric of each task of some results, in columns of text."""
    systems = ("model", "untrained", "trivial", "codec")
    head = " ".join(f"{name:>9}" for name in systems)
    lines = [f"{'task':6} {'metric':20} {head}  verdict (strongest trivial answer)"]
    for name, task in tasks.items():
        entries = [task["systems"].get(s, {}).get(task["metric"], {}) for s in systems]
        values = [entry.get("value") for entry in entries]
        shown = " ".join(f"{'-' if v is None else f'{v:.4f}':>9}" for v in values)
        lost = [f"the {opponent} one" for opponent, won in task["beats"].items() if not won]
        verdict = "beats both" if not lost else "does not beat " + " nor ".join(lost)
        answer = entries[systems.index("trivial")].get("answer", "none")
        lines.append(f"{name:6} {task['metric']:20} {shown}  {verdict} ({answer})")
    return "\n".join(lines)
