"""An export: written beside its place, read back, compared, and only then put there."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from univg_jax import checksums, encoders, files, version
from univg_jax.errors import check_name
from univg_jax.export import compare
from univg_jax.export.card import Measured, write_card
from univg_jax.export.compare import Difference
from univg_jax.export.format import Format, open_format
from univg_jax.export.job import Job
from univg_jax.pipeline import trained_tasks
from univg_jax.progress import timed
from univg_jax.streaming import return_freed_blocks
from univg_jax.trained import PROVENANCE, VERSION


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What `export_model` found of each task: against the same numbers, and what rounding does."""

    compared: Mapping[str, Difference]
    rounding: Mapping[str, Difference]


def export_model(
    job: Job, name: str, out: epath.PathLike, *, evaluation: Sequence[Measured] = ()
) -> Exported:
    """Writes the model as the format `name` into the folder `out`, which must not exist.

    Whatever is wrong with the arguments is found before the model is loaded. What is written is
    read back, and makes a picture of each task, before it gets its name; nothing is at `out` if
    this raises, or the process is killed. Beside what sampling needs, at no time are two models in
    memory. Raises UserError.
    """
    form = check(job, name, out)
    cases = compare.make_cases(trained_tasks(job.config), resolution=job.config.data.resolution)
    with timed("the checkpoint's pictures"):
        pipeline = job.pipeline()
        originals = compare.answer(pipeline, cases)
        expected = originals
        if job.dtype != "f32":
            pipeline = dataclasses.replace(pipeline, params=job.rounded(pipeline.params))
            expected = compare.answer(pipeline, cases)
        rounding = compare.differences(cases, originals, expected)
        facts = describe(job, name, pipeline.digests)
        del pipeline
    return_freed_blocks()
    with files.write_folder(out, seal=checksums.FILE) as folder:
        with timed(f"writing {name}"):
            form.write(job, folder)
        write_provenance(folder, facts)
        root = epath.Path(folder)
        sums = checksums.checksums(root, checksums.list_files(root))
        checksums.write(root, sums)
        with timed("the export's pictures"):
            made = form.reload(job, folder)(cases)
        compared = compare.differences(cases, expected, made)
        compare.check(compared, tolerance=form.tolerance)
        facts |= {
            "compared": {task: dataclasses.asdict(d) for task, d in compared.items()},
            "rounding": {task: dataclasses.asdict(d) for task, d in rounding.items()},
        }
        write_provenance(folder, facts)
        write_card(folder, job, form, facts, evaluation)
        # Without the card's: what only the user knows, such as the license, is added to it.
        checksums.write(root, sums | checksums.checksums(root, [PROVENANCE]))
    return Exported(compared=compared, rounding=rounding)


def check(job: Job, name: str, out: epath.PathLike) -> Format:
    """The format; raises UserError for all that can be wrong and needs no model."""
    form = open_format(name)
    files.check_output(out, flag="out", folder=True)
    files.check_absent(out)
    check_name(job.dtype, form.dtypes, what=f"dtype of format {name}:")
    # Both raise UserError: of other parameters than the checkpoint has, of a missing folder.
    job.which, job.config  # noqa: B018
    form.check(job)
    files.check_space(out, form.num_bytes(job))
    return form


def describe(job: Job, name: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """What `provenance.json` says, but for the comparison."""
    trained = job.trained
    return {
        "version": VERSION,
        "format": name,
        "parameters": job.which,
        "dtype": job.dtype,
        "step": trained.step,
        "checkpoint": str(trained.path),
        "digests": dict(digests),
        "encoders": encoders.describe(trained.folder),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "univg_jax": version.__version__,
        "revision": version.revision() or "unknown",
        "jax": jax.__version__,
        "config": job.config.to_dict(),
        "data_state": trained.data_state(),
    }


def write_provenance(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `provenance.json`."""
    files.write_whole(folder / PROVENANCE, json.dumps(facts, indent=1))
