"""Answers that need no model, for benchmarks to name as their trivial ones.

Each function makes them from the training cases, as `BenchmarkTask.make_trivial` does. It reads one
case at a time and keeps no pictures but its result.
"""

import numpy as np

from data_pipelines import renderings
from univg_jax.evaluation.benchmark import AnswerFn, Case, Cases
from univg_jax.evaluation.metrics import Image


def constant(image: Image) -> AnswerFn:
    """The same picture for every case."""
    return lambda case: image


def mean_target(train: Cases) -> Image:
    """The mean of all targets, rounded."""
    total = sum((case.example.target for case in train), 0.0)
    return np.rint(total / len(train)).astype(np.uint8)


def mean_image(train: Cases) -> dict[str, AnswerFn]:
    """The mean training image."""
    return {"the mean training image": constant(mean_target(train))}


def mean_depth(train: Cases) -> dict[str, AnswerFn]:
    """The mean of the rendered training depths."""
    return {"the mean training depth": constant(mean_target(train))}


def copy(train: Cases) -> dict[str, AnswerFn]:
    """A copy of the source."""
    return {"a copy of the source": lambda case: case.example.source}


def filled(train: Cases) -> dict[str, AnswerFn]:
    """The source with its hole filled in the mean color of what is visible."""

    def fill(case: Case) -> Image:
        hole = case.example.mask[..., 0] > 0
        visible = case.example.source[~hole]
        color = visible.mean(axis=0) if len(visible) else np.full(3, renderings.GRAY)
        return np.where(hole[..., None], np.rint(color).astype(np.uint8), case.example.source)

    return {"the mean visible color": fill}


def layout_answers(train: Cases) -> dict[str, AnswerFn]:
    """The canvas of blocks itself, and the mean training image."""
    return {"the layout itself": lambda case: case.example.source} | mean_image(train)


def mean_pose(train: Cases) -> dict[str, AnswerFn]:
    """The skeleton of the mean training joints."""
    joints = np.mean([case.record["joints"] for case in train], axis=0, dtype=np.float32)
    joints[:, 2] = 1  # all visible
    resolution = train[0].example.target.shape[0]
    pose = renderings.render_pose(joints, resolution=resolution)
    return {"the mean training pose": constant(pose)}


def mask_answers(train: Cases) -> dict[str, AnswerFn]:
    """All pixels, and those that training masks cover most often: as many as a mask on average."""
    covered = sum((renderings.decode_mask(case.example.target) for case in train), 0.0)
    frequency = covered / len(train)
    share = covered.sum() / (covered.size * len(train))
    likely = frequency >= np.quantile(frequency, 1 - share)
    masks = {"everything": np.ones_like(likely), "the mean training mask": likely}
    return {
        name: constant(renderings.render_mask(mask.astype(np.uint8)))
        for name, mask in masks.items()
    }
