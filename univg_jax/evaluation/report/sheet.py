"""A contact sheet of an evaluation: the first held-out examples of every task as one picture."""

import io
import textwrap

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from univg_jax.evaluation.report.read import Evaluation
from univg_jax.files import write_whole
from univg_jax.images import open_picture, to_rgb

COLUMNS = 4


def write_sheet(evaluation: Evaluation, path: epath.PathLike) -> None:
    """Writes the PNG `path` with a row for each task, of input, target and output side by side.

    Raises NotFoundError if a picture of the evaluation is missing, UserError if one is broken.
    """
    tasks = evaluation.results.tasks
    figure = Figure(figsize=(12, 1.4 * len(tasks)), dpi=100, layout="constrained")
    axes = figure.subplots(len(tasks), COLUMNS, squeeze=False)
    for row, name in zip(axes, tasks, strict=True):
        for axis in row:
            axis.set_axis_off()
        samples = evaluation.samples(name, COLUMNS)
        for axis, (prompt, pngs) in zip(row, samples, strict=False):
            pictures = [to_rgb(open_picture(png)) for png in pngs.values()]
            # A white column between two pictures: one before each, less the first.
            spaced = [np.pad(p, ((0, 0), (1, 0), (0, 0)), constant_values=255) for p in pictures]
            axis.imshow(np.concatenate(spaced, axis=1)[:, 1:], interpolation="nearest")
            axis.set_title(textwrap.fill(prompt, 44), fontsize=7, loc="left")
        label = f"{name}\n{', '.join(samples[0][1])}"
        row[0].text(-0.04, 0.5, label, transform=row[0].transAxes, fontsize=7, ha="right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())
