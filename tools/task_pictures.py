"""Cuts the pictures of docs/tasks out of docs/images/quickstart.png: docs/images/tasks/TASK_N.png.

    python -m tools.task_pictures

quickstart.png is `samples.png` of `make quickstart`: a row for each task, with its first
held-out examples. The first two of each are taken: what was given, the true answer and the model's,
side by side, without the texts around them.
"""

import pathlib

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from data_pipelines.tasks import TASKS
from univg_jax.images import decode_rgb

IMAGES = pathlib.Path(__file__).parents[1] / "docs" / "images"
WHITE = 250  # of 255: what is less is ink
LEAST = 40  # pixels: a picture is taller and wider, a line of text and its words are not
COLUMNS, EXAMPLES = 4, 2
SCALE = 2


def stretches(is_ink: Bool[np.ndarray, " n"]) -> list[slice]:
    """Where a line has ink without a gap, for at least LEAST pixels."""
    edges = np.flatnonzero(np.diff(is_ink.astype(np.int8), prepend=0, append=0))
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2]) if b - a >= LEAST]


def cut(grid: UInt8[np.ndarray, "h w 3"]) -> list[list[UInt8[np.ndarray, "..."]]]:
    """For each row of the grid, the strip of pictures of each of its examples."""
    is_ink = (grid < WHITE).any(axis=-1)
    rows = []
    for row in stretches(is_ink.any(axis=1)):
        pictures = stretches(is_ink[row].any(axis=0))
        count = len(pictures) // COLUMNS
        examples = [pictures[count * k :][:count] for k in range(EXAMPLES)]
        rows.append([grid[row, first.start : last.stop] for first, *_, last in examples])
    return rows


def open_grid() -> UInt8[np.ndarray, "h w 3"]:
    """The picture with a row for each task."""
    return decode_rgb((IMAGES / "quickstart.png").read_bytes())


def enlarge(strip: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "_h _w 3"]:
    """A strip as it is shown, each pixel SCALE pixels wide and high."""
    return strip.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def path_of(task: str, k: int) -> pathlib.Path:
    """Where the picture of example k of a task is."""
    return IMAGES / "tasks" / f"{task}_{k}.png"


def main() -> None:
    """Writes the pictures."""
    (IMAGES / "tasks").mkdir(exist_ok=True)
    for task, strips in zip(TASKS, cut(open_grid()), strict=True):
        for k, strip in enumerate(strips):
            Image.fromarray(enlarge(strip)).save(path_of(task, k), optimize=True)


if __name__ == "__main__":
    main()
