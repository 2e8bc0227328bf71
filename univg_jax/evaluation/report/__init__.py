"""One self-contained page about a run, and the same numbers as JSON.

The page needs no network, reads on a phone, and follows the reader's light or dark mode. It says
first what was reached and what was not: a task counts as learnt only if it beats both the untrained
model and the best trivial answer, and each that does not is named with the reasons in its numbers.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from etils import epath

from univg_jax.evaluation.report import views, wording
from univg_jax.evaluation.report.read import Json, Stage, TaskResult, read_results
from univg_jax.evaluation.report.sheet import write_sheet
from univg_jax.files import write_whole

__all__ = ["Stage", "TaskResult", "read_results", "write_report", "write_sheet"]


def write_report(
    run_dir: epath.PathLike,
    out_html: epath.PathLike,
    out_json: epath.PathLike,
    *,
    stages: Sequence[epath.PathLike],
    evaluation: epath.PathLike,
) -> None:
    """Writes the page and the JSON of the run `run_dir`.

    `stages` are the workdirs of its trainings, `evaluation` is the folder that `univg evaluate`
    wrote. Raises NotFoundError naming what has not been written yet, UserError for a broken file.
    """
    evaluation = epath.Path(evaluation)
    runs, results = [Stage.read(workdir) for workdir in stages], read_results(evaluation)
    tasks = {name: TaskResult(entry) for name, entry in results["tasks"].items()}
    seen = views.images_by_task(runs)
    page = _environment().get_template("report.html.jinja")
    text = page.render(
        name=epath.Path(run_dir).name,
        headline=wording.headline(tasks),
        tasks=[
            views.task_view(name, task, seen=seen, evaluation=evaluation)
            for name, task in tasks.items()
        ],
        stages=[views.stage_view(run) for run in runs],
        totals=views.totals_view(runs),
        settings=results["settings"],
    )
    numbers = _as_json(runs, tasks, settings=results["settings"])
    write_whole(out_html, text)
    write_whole(out_json, json.dumps(numbers, indent=1) + "\n")


def _as_json(
    stages: Sequence[Stage], tasks: Mapping[str, TaskResult], *, settings: Json
) -> dict[str, Any]:
    kept = ("steps", "seconds", "first_loss", "last_loss")
    return {
        "stages": {
            stage.summary["stage"]: {
                **{key: stage.summary[key] for key in kept},
                "mixture": stage.summary["shares"],
            }
            for stage in stages
        },
        "tasks": {name: _task_json(task) for name, task in tasks.items()},
        "settings": settings,
    }


def _task_json(task: TaskResult) -> dict[str, Any]:
    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no NaN

    return {
        "metric": task.primary,
        "better": task.metric.better,
        "value": number(task.value("model")),
        "untrained": number(task.value("untrained")),
        "trivial": number(task.value("trivial")),
        "trivial_name": task.entry["trivial"]["chosen"],
        "ceiling": number(task.value("codec")),
        "real": number(task.value("real")),
        "beats_both": task.beats_both,
        "references": {name: number(task.reference(name)) for name in task.references},
        "secondary": {
            key: {system: number(task.value(system, key)) for system in task.systems}
            for key in task.metrics
            if key != task.primary
        },
        "examples": task.entry["examples"],
    }


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("univg_jax.evaluation.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
