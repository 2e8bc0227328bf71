"""Whether an exported model makes the pictures of the model that it was made of."""

import dataclasses
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import UInt8

from data_pipelines.tasks import INPUTS, TASKS
from univg_jax.errors import UserError
from univg_jax.pipeline import Pipeline

Image = UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A picture to make: a task, a user's inputs (`prompt` and INPUTS by name), and a seed."""

    task: str
    inputs: Mapping[str, str | UInt8[np.ndarray, "..."]]
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two pictures are from each other, in levels of 255."""

    most: int
    mean: float

    @classmethod
    def of(cls, a: Image, b: Image) -> "Difference":
        """The difference of two pictures of one size."""
        apart = np.abs(a.astype(np.int16) - b)
        return cls(most=int(apart.max()), mean=float(apart.mean()))


def make_cases(tasks: Sequence[str], *, resolution: int) -> list[Case]:
    """A case of each task: its own example of a prompt, and smooth pictures made up."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = cv2.resize(small, (resolution, resolution), interpolation=cv2.INTER_CUBIC)
    mask = np.zeros((resolution, resolution), np.uint8)
    mask[resolution // 4 : 3 * resolution // 4, resolution // 4 : 3 * resolution // 4] = 255
    given = {"image": picture, "mask": mask, "face": picture}
    return [
        Case(
            task=name,
            inputs={
                **({"prompt": TASKS[name].prompt_example} if TASKS[name].prompt != "none" else {}),
                **{key: given[key] for key in INPUTS if key in TASKS[name].inputs},
            },
        )
        for name in tasks
    ]


def answer(pipeline: Pipeline, cases: Sequence[Case]) -> list[Image]:
    """The pipeline's picture of each case."""
    return [
        np.asarray(pipeline.run(case.task, **case.inputs, seed=case.seed).image) for case in cases
    ]


def differences(
    cases: Sequence[Case], a: Sequence[Image], b: Sequence[Image]
) -> dict[str, Difference]:
    """The difference of each task's pictures."""
    return {c.task: Difference.of(x, y) for c, x, y in zip(cases, a, b, strict=True)}


def check(found: Mapping[str, Difference], *, tolerance: int) -> None:
    """Raises UserError where a picture differs by more than `tolerance` levels."""
    for task, difference in found.items():
        if difference.most > tolerance:
            raise UserError(
                f"the exported model's picture of task {task} differs by {difference.most} of 255 "
                f"from that of the checkpoint, where {tolerance} is the most: nothing is exported"
            )
