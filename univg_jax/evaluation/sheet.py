"""A contact sheet of an evaluation: the first held-out examples of every task as one picture."""

import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from matplotlib.figure import Figure
from PIL import Image

COLUMNS = 4
PARTS = ("input", "target", "output")


def write_sheet(
    results: Mapping[str, Any], evaluation: epath.PathLike, path: epath.PathLike
) -> None:
    """Writes the PNG `path`: a row a task, each example as its input (where there is one), target
    and output.

    `results` are those of `runner.evaluate`, its pictures in the folder `evaluation`.
    """
    tasks = results["tasks"]
    figure = Figure(figsize=(12, 1.4 * len(tasks)), dpi=100, layout="constrained")
    axes = figure.subplots(len(tasks), COLUMNS, squeeze=False)
    for row, (name, task) in zip(axes, tasks.items()):
        for axis in row:
            axis.set_axis_off()
        for axis, sample in zip(row, task["samples"]):
            axis.imshow(_side_by_side(epath.Path(evaluation), sample), interpolation="nearest")
            axis.set_title(textwrap.fill(sample["prompt"], 44), fontsize=7, loc="left")
        parts = [part for part in PARTS if task["samples"] and task["samples"][0].get(part)]
        row[0].text(
            -0.04,
            0.5,
            f"{name}\n{', '.join(parts)}",
            transform=row[0].transAxes,
            fontsize=7,
            ha="right",
        )
    with epath.Path(path).open("wb") as file:
        figure.savefig(file, format="png")


def _side_by_side(evaluation: epath.Path, sample: Mapping[str, Any]) -> UInt8[np.ndarray, "h w 3"]:
    pictures = []
    for part in PARTS:
        if sample.get(part):
            with (evaluation / sample[part]).open("rb") as file:
                pictures += [np.asarray(Image.open(file).convert("RGB")), None]
    height = max(len(picture) for picture in pictures if picture is not None)
    gap = np.full((height, 1, 3), 255, np.uint8)
    return np.concatenate(
        [gap if picture is None else picture for picture in pictures[:-1]], axis=1
    )
