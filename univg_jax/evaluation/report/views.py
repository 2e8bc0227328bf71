"""What the page's template shows of each task and each stage, beside the results themselves."""

import json
import math
from collections.abc import Sequence
from typing import Any

from univg_jax import trees
from univg_jax.evaluation.report.plot import loss_plot
from univg_jax.evaluation.report.read import Evaluation, Stage, TaskResult
from univg_jax.evaluation.report.wording import caveats, explain
from univg_jax.images import data_uri

View = dict[str, Any]
SHORTEST = 0.05  # seconds: what took less is left out of a stage's times


def task_view(
    name: str, task: TaskResult, *, stages: Sequence[Stage], evaluation: Evaluation
) -> View:
    """A task's row of the table, its reasons and its samples."""
    total = sum(sum(stage.images.values()) for stage in stages)
    seen = sum(stage.images.get(name, 0.0) for stage in stages)
    return {
        "name": name,
        "result": task,
        "scale": _scale(task),
        "examples": _examples(task),
        "reasons": explain(task, images_seen=seen, share_seen=seen / total if total else 0.0),
        "samples": [
            (prompt, {kind: data_uri(png) for kind, png in pngs.items()})
            for prompt, pngs in evaluation.samples(name)
        ],
        # Beside the verdict and not in a footnote, since they qualify it.
        "caveats": caveats(task),
    }


def _examples(task: TaskResult) -> str:
    count, groups = task.entry["examples"], task.entry["groups"]
    return f"{count} examples" + (f" in {groups} groups" if groups != count else "")


def _scale(task: TaskResult) -> dict[str, float]:
    """Where each system stands between the worst (0 %) and the best (100 %) of them."""
    # The model last, so that it is drawn above the others.
    ordered = ("untrained", "trivial", "codec", "real", "model")
    values = {s: task.value(s) for s in ordered if math.isfinite(task.value(s))}
    if "codec" in values:
        values.pop("real", None)  # two ceilings crowd a thin line; the table has both
    if not values:
        return {}
    best = values[task.metric.best(values)]
    worst = max(values.values(), key=lambda value: abs(value - best))
    span = abs(best - worst) or 1.0
    return {s: round(100 * abs(value - worst) / span, 2) for s, value in values.items()}


def stage_view(stage: Stage) -> View:
    """A stage's loss plot, its mixture (task, realized, declared, in percent) and its settings."""
    summary = stage.summary
    declared, realized = summary.get("weights", {}), summary["shares"]
    tasks = [task for task in {**declared, **realized} if not task.startswith("_")]
    total_weight = sum(declared.values()) or 1.0
    mixture = [
        (task, 100 * realized.get(task, 0.0), 100 * declared.get(task, 0.0) / total_weight)
        for task in tasks
    ]
    return {
        "run": stage,
        "images": sum(stage.images.values()),
        "mixture": mixture,
        "widest": max((max(shares) for _, *shares in mixture), default=1.0) or 1.0,
        "spent": _spent_view(stage),
        "loss_svg": loss_plot(stage),
        "legend": [task for task in tasks if len(stage.series(f"loss/{task}")[0])],
        "config": {
            key: json.dumps(value, default=str)
            for key, value in trees.flatten(summary.get("config", {})).items()
        },
    }


def _spent_view(stage: Stage) -> dict[str, int | float]:
    """The seconds of everything that a stage spent time on."""
    other = {n: s for n, s in stage.total("seconds").items() if n != "step"}
    spent = {"training": max(stage.summary["seconds"] - sum(other.values()), 0.0), **other}
    return {name: seconds for name, seconds in spent.items() if seconds >= SHORTEST}
