"""The words of a report: numbers as people read them, and why a task fails."""

import math
from collections.abc import Mapping

from univg_jax.evaluation.benchmark import Metric
from univg_jax.evaluation.report.read import TaskResult


def headline(tasks: Mapping[str, TaskResult]) -> dict[str, str | list[str]]:
    """What was reached, in a sentence, and the titles of the tasks that fail."""
    failed = [task.entry["title"].lower() for task in tasks.values() if not task.beats_both]
    if not tasks:
        return {"text": "No task was evaluated", "failed": []}
    count = len(tasks) - len(failed)
    subject = f"{count} of {len(tasks)} tasks beat" if failed else "Every task beats"
    text = f"{subject} both the untrained model and the strongest trivial answer"
    return {"text": text, "failed": failed}


def explain(task: TaskResult, *, images_seen: int | float, share_seen: int | float) -> list[str]:
    """Why a task fails, in plain sentences from its numbers; empty if it beats both opponents.

    `images_seen` is how many training images of the task the model saw, `share_seen` their share of
    all that it saw.
    """
    if task.beats_both:
        return []
    model, trivial, codec = (task.value(s) for s in ("model", "trivial", "codec"))
    chosen, error = task.strongest(), task.get("model", field="stderr")
    opponents = {
        "untrained": "the untrained model",
        "trivial": f"“{chosen}”" if chosen else "any trivial answer",
    }
    sentences = [
        f"It was not compared with {name}."
        if math.isnan(task.value(opponent))
        else f"{task.text('model')} does not beat {name} at {task.text(opponent)}."
        for opponent, name in opponents.items()
        if not task.beats(opponent)
    ]
    if _is_no_better(task.metric, codec, trivial):
        sentences.append(
            f"Nor does the codec's reconstruction of the true answer ({task.text('codec')}): "
            "the codec is the limit here, not the model."
        )
    elif error and abs(model - trivial) < 2 * error:
        sentences.append(
            "The difference to the trivial answer is below two standard errors of the model's "
            f"value ({task.text('model', field='stderr')}, {task.entry['examples']} examples)."
        )
    sentences.append(
        f"The task saw {images_seen:,.0f} training images, {100 * share_seen:.0f}\u00a0% of all "
        "that were shown."
        if images_seen
        else "No stage of this run trained the task."
    )
    if task.entry.get("difficulty"):
        sentences.append(f"A likely reason, not measured: {task.entry['difficulty']}")
    return sentences


def caveats(task: TaskResult) -> list[str]:
    """Lines beside the verdict: the references, and the metrics in which the model is no better."""
    lines = []
    for name in task.references:
        is_better = task.metric.improves(task.value("model"), task.value(name))
        lines.append(f"{'better' if is_better else 'not better'} than {name}: {task.text(name)}")
    for name in task.secondary:
        metric, model = task.metrics[name], task.value("model", name)
        if _is_no_better(metric, model, task.value("trivial", name)):
            lines.append(
                f"not better in {metric.label}: {task.text('model', name)}; "
                f"{task.strongest(name)} has {task.text('trivial', name)}"
            )
    return lines


def _is_no_better(metric: Metric, value: float, other: float) -> bool:
    """Both were measured, and `value` does not improve on `other`."""
    measured = math.isfinite(value) and math.isfinite(other)
    return measured and not metric.improves(value, other)


def format_duration(seconds: int | float) -> str:
    """Seconds as people say them: `8.3 s`, `4 min 10 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, remainder = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {remainder} s" if minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def format_count(n: int) -> str:
    """A number to three figures: `5.8 M`."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)
