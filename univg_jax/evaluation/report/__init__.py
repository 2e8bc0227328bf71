"""One self-contained page about a run, and the same numbers as JSON.

The page needs no network, reads on a phone, and follows the reader's light or dark mode. It says
first what was reached and what was not: a task counts as learnt only if it beats both the untrained
model and the strongest trivial answer, and each that does not is named with the reasons in its
numbers.
"""

import json
from collections.abc import Sequence

from etils import epath

from univg_jax.evaluation.report import views, wording
from univg_jax.evaluation.report.page import write_page
from univg_jax.evaluation.report.plot import color_of
from univg_jax.evaluation.report.read import Evaluation, Stage, TaskResult
from univg_jax.evaluation.report.sheet import write_sheet
from univg_jax.evaluation.results import Json
from univg_jax.files import write_whole
from univg_jax.pages import load_templates

__all__ = ["Evaluation", "TaskResult", "write_page", "write_report", "write_sheet"]

PAGES = load_templates(__name__)
PAGES.globals |= dict(color=color_of, words=wording)


def write_report(
    run_dir: epath.PathLike,
    out_html: epath.PathLike,
    out_json: epath.PathLike,
    *,
    stages: Sequence[epath.PathLike],
    evaluation: Evaluation,
) -> None:
    """Writes the page and the JSON of the run `run_dir`.

    `stages` are the workdirs of its trainings. Raises NotFoundError naming what has not been
    written yet, UserError for a broken file.
    """
    runs, results = [Stage.read(workdir) for workdir in stages], evaluation.results
    tasks = {name: TaskResult(entry) for name, entry in results.tasks.items()}
    text = PAGES.get_template("report.html.jinja").render(
        name=epath.Path(run_dir).name,
        headline=wording.headline(tasks),
        tasks=[
            views.task_view(name, task, stages=runs, evaluation=evaluation)
            for name, task in tasks.items()
        ],
        stages=[views.stage_view(run) for run in runs],
        evaluation=evaluation,
    )
    numbers = {
        "stages": {run.summary["stage"]: _stage_json(run) for run in runs},
        "tasks": {name: _task_json(task) for name, task in tasks.items()},
        "evaluation": evaluation.folder.name,
        "settings": results.settings,
        "provenance": results.provenance,
    }
    write_whole(out_html, text)
    write_whole(out_json, json.dumps(numbers, indent=1) + "\n")


def _stage_json(run: Stage) -> Json:
    kept = ("steps", "seconds", "first_loss", "last_loss")
    return {
        **{key: run.summary[key] for key in kept},
        "mixture": run.summary["shares"],
        "latent_square": run.latent_square,
        "records": run.records,
    }


def _task_json(task: TaskResult) -> Json:
    def values(summaries: Json) -> Json:
        return {
            name: {metric: entry["value"] for metric, entry in summary.items()}
            for name, summary in summaries.items()
        }

    return {
        "metric": task.primary,
        "better": task.metric.better,
        "value": task.get("model"),
        "stderr": task.get("model", field="stderr"),
        "untrained": task.get("untrained"),
        "trivial": task.get("trivial"),
        "trivial_name": task.strongest(),
        "ceiling": task.get("codec"),
        "real": task.get("real"),
        "beats_both": task.beats_both,
        "secondary": {
            key: {
                "better": task.metrics[key].better,
                **{system: task.get(system, key) for system in task.entry["systems"]},
                "trivial_name": task.strongest(key),
            }
            for key in task.secondary
        },
        "trivial_answers": values(task.entry["trivial"]),
        "references": values(task.references),
        "examples": task.entry["examples"],
    }
