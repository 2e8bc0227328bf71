"""The model card of an exported folder: README.md, for people who find it without the run."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from data_pipelines.datasets import DATASETS
from data_pipelines.tasks import TASKS
from univg_jax import encoders, version
from univg_jax.export.format import Format
from univg_jax.export.job import Job
from univg_jax.files import write_whole
from univg_jax.pages import load_templates
from univg_jax.pipeline import trained_tasks
from univg_jax.settings import Config

CARD = "README.md"
TEMPLATES = load_templates(__package__, is_html=False)
OF_OTHERS = "that of its publisher: read it beside the weights"
LICENSES = {"minilm": "MIT (all-MiniLM-L6-v2)"}  # of pretrained encoders, by kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What an evaluation of the model has found: numbers by name, the main ones in `primaries`."""

    benchmark: str
    examples: int
    numbers: Mapping[str, int | float]
    primaries: Sequence[str]
    date: str
    revision: str


def write_card(
    folder: Path,
    job: Job,
    form: Format,
    provenance: Mapping[str, Any],
    evaluation: Sequence[Measured],
) -> None:
    """Writes the card of a folder."""
    text = TEMPLATES.get_template("README.md.jinja").render(
        name=job.config.name,
        form=form,
        provenance=provenance,
        version=version.describe(),
        num_params=job.num_params,
        config=job.config,
        tasks=[TASKS[name] for name in trained_tasks(job.config)],
        data=data_rows(job.config),
        encoders=encoder_rows(job, form),
        evaluation=evaluation,
        limits=list(form.limits(job)),
        usage=form.usage(job),
        shares=shares(job.config),
    )
    write_whole(folder / CARD, text)


def shares(config: Config) -> dict[str, float]:
    """Each task's share of the training rows."""
    total = sum(config.tasks[name].weight for name in trained_tasks(config))
    return {name: config.tasks[name].weight / total for name in trained_tasks(config)}


def data_rows(config: Config) -> list[dict[str, str]]:
    """The datasets that the run was trained on, with the tasks that read each and its license."""
    reads: dict[str, list[str]] = {}
    for task in trained_tasks(config):
        for source in config.tasks[task].source_names:
            names = (epath.Path(source).name, config.data.dataset)
            name = next((n for n in names if n in DATASETS), source)
            reads.setdefault(name, []).append(task)
    return [
        {
            "name": name,
            "tasks": ", ".join(dict.fromkeys(tasks)),
            "summary": DATASETS[name].summary if name in DATASETS else "records of the user's own",
            "license": DATASETS[name].license if name in DATASETS else "not known to univg_jax",
        }
        for name, tasks in reads.items()
    ]


def encoder_rows(job: Job, form: Format) -> list[dict[str, str]]:
    """The frozen encoders, with where their weights are and their license."""
    rows = []
    for role, record in encoders.describe(job.trained.folder).items():
        if record["is_fitted"]:
            where, license_ = "in this folder: the run fitted it on its data", "as the data's"
        else:
            is_copied = job.copy_encoders or form.holds_encoders
            where = "in this folder, copied" if is_copied else "not in this folder"
            license_ = LICENSES.get(record["kind"], OF_OTHERS)
        rows.append(
            {
                "role": role,
                "kind": record["kind"],
                "where": where,
                "license": license_,
                "sha256": record["sha256"],
            }
        )
    return rows
