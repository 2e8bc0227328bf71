"""What the page's template shows, as plain dicts of texts and numbers."""

import json
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from univg_jax import trees
from univg_jax.evaluation.report.plot import color_of, loss_plot
from univg_jax.evaluation.report.read import Stage, TaskResult, read_sample
from univg_jax.evaluation.report.wording import caveats, explain, format_count, format_duration
from univg_jax.images import data_uri

View = dict[str, Any]
SHORTEST = 0.05  # seconds: what took less is left out of a stage's times


def task_view(
    name: str, task: TaskResult, *, stages: Sequence[Stage], evaluation: epath.PathLike
) -> View:
    """A task's row of the table, its reasons and its samples."""
    total = sum(sum(stage.images.values()) for stage in stages)
    seen = sum(stage.images.get(name, 0.0) for stage in stages)
    reasons = explain(task, images_seen=seen, share_seen=seen / total if total else 0.0)
    return {
        "result": task,
        "color": color_of(name),
        "scale": _scale(task),
        "reasons": reasons,
        "samples": [
            (sample["prompt"], {k: data_uri(p) for k, p in read_sample(evaluation, sample).items()})
            for sample in task.entry["samples"]
        ],
        # Beside the verdict and not in a footnote, since they qualify it.
        "caveats": caveats(task),
    }


def _scale(task: TaskResult) -> list[View]:
    """Where each system stands between the worst (0 %) and the best (100 %) of them."""
    # The model last, so that it is drawn above the others.
    ordered = ("untrained", "trivial", "codec", "real", "model")
    values = {s: task.value(s) for s in ordered if math.isfinite(task.value(s))}
    if "codec" in values:
        values.pop("real", None)  # two ceilings crowd a thin line; the table has both
    if not values:
        return []
    best = values[task.metric.best(values)]
    worst = max(values.values(), key=lambda value: abs(value - best))
    span = abs(best - worst) or 1.0
    return [
        dict(
            system=system,
            percent=round(100 * abs(value - worst) / span, 2),
            value=task.text(system),
        )
        for system, value in values.items()
    ]


def stage_view(stage: Stage) -> View:
    """A stage's loss plot, mixture, speed and configuration."""
    summary = stage.summary
    declared, realized = summary.get("weights", {}), summary["shares"]
    tasks = [task for task in {**declared, **realized} if not task.startswith("_")]
    total_weight = sum(declared.values()) or 1.0
    mixture = [
        dict(
            task=task,
            color=color_of(task),
            realized=100 * realized.get(task, 0.0),
            declared=100 * declared.get(task, 0.0) / total_weight,
        )
        for task in tasks
    ]
    return {
        "name": summary["stage"],
        "steps": f"{summary['steps']:,}",
        "duration": format_duration(summary["seconds"]),
        "first_loss": f"{summary['first_loss']:.3f}",
        "last_loss": f"{summary['last_loss']:.3f}",
        "parameters": format_count(summary["parameters"]),
        "steps_per_second": f"{stage.median('steps_per_second'):.2f}",
        "images_per_second": f"{stage.median('images_per_second'):.0f}",
        "images": f"{sum(stage.images.values()):,.0f}",
        "mixture": mixture,
        "widest": max((max(m["realized"], m["declared"]) for m in mixture), default=1.0) or 1.0,
        "spent": _spent_view(stage),
        "loss_svg": loss_plot(stage),
        "legend": [(t, color_of(t)) for t in tasks if len(stage.series(f"loss/{t}")[0])],
        "config": {
            key: json.dumps(value, default=str)
            for key, value in trees.flatten(summary.get("config", {})).items()
        },
    }


def _spent_view(stage: Stage) -> list[tuple[str, str, float]]:
    """What a stage's time went into: name, duration, percent."""
    total = stage.summary["seconds"]
    not_training = {n: s for n, s in stage.total("seconds").items() if n != "step"}
    spent = {"training": max(total - sum(not_training.values()), 0.0)} | not_training
    return [
        (name, format_duration(seconds), 100 * seconds / max(total, 1e-9))
        for name, seconds in spent.items()
        if seconds >= SHORTEST
    ]


def totals_view(stages: Sequence[Stage]) -> View:
    """The sums over all stages."""
    return {
        "steps": f"{sum(s.summary['steps'] for s in stages):,}",
        "duration": format_duration(sum(s.summary["seconds"] for s in stages)),
        "images": f"{sum(sum(s.images.values()) for s in stages):,.0f}",
        "parameters": format_count(max((s.summary["parameters"] for s in stages), default=0)),
    }
