"""The wall of a portrait: what a prompt asks for beside the person, and a copy of the face lacks.

The pictures of one person all have different walls, so the given face is never before the wall that
is asked for.
"""

import cv2
import numpy as np

from univg_jax.errors import UserError
from univg_jax.evaluation import answers, metrics
from univg_jax.evaluation.benchmark import AnswerFn, Case, Cases, ScoreFn
from univg_jax.evaluation.metrics import Image, Ratio
from univg_jax.evaluation.scorers import Scorers

CORNER = 8  # the upper corners that are looked at have 1 / CORNER of the picture's side
TOLERANCE = 12  # of 255: what differs less from a corner's pixel is wall


def walls() -> dict[str, tuple[int, int, int]]:
    """The color of every wall, by its name in captions."""
    # Imported here, since the artwork behind it is an optional dependency that few tasks need.
    from data_pipelines.datasets.emoji_scenes.portraits import WALLS

    return WALLS


def asked_wall(caption: str) -> str:
    """The wall that a caption names. Raises UserError if it names none."""
    if (found := next((wall for wall in walls() if f" {wall} wall" in caption), None)) is None:
        named = ", ".join(walls())
        raise UserError(
            f"caption {caption!r} of task 'id' names no wall: the benchmark emoji_scenes "
            f"scores 'in front of a ... wall' ({named})"
        )
    return found


def shown_wall(image: Image) -> str:
    """The wall whose color is nearest to the median color of the picture's upper corners."""
    n = max(1, len(image) // CORNER)
    corners = np.concatenate([image[:n, :n], image[:n, -n:]], axis=1).reshape(-1, 3)
    color = np.median(corners, axis=0)
    return min(walls(), key=lambda wall: float(np.square(color - walls()[wall]).sum()))


def score(scorers: Scorers, cases: Cases) -> ScoreFn:
    """Likeness to the given face, whether the wall is the one asked for, and both in one."""
    embed = scorers["face_embed"]

    def score_one(case: Case, image: Image) -> dict[str, Ratio]:
        face, made = (embed(picture[None])[0] for picture in (case.example.face, image))
        likeness = metrics.cosine(face, made)
        follows = float(shown_wall(image) == asked_wall(case.example.text))
        return {
            "identity_following": Ratio.of(follows * likeness.value),
            "identity_cosine": likeness,
            "wall": Ratio.of(follows),
        }

    return score_one


def trivial_answers(train: Cases) -> dict[str, AnswerFn]:
    """The given face, as it is and before any other wall; another person; the mean image."""

    def other_person(case: Case) -> Image:
        chosen = np.random.default_rng([1, case.index]).integers(len(train))
        return train[int(chosen)].example.target

    return {
        "the given face itself": lambda case: case.example.face,
        "the given face before any other wall": _before_any_other_wall,
        "another person's picture": other_person,
        **answers.mean_image(train),
    }


def _before_any_other_wall(case: Case) -> Image:
    """The face, its wall painted in the color of another one, whatever the prompt asks for."""
    face = case.example.face
    others = [color for wall, color in walls().items() if wall != shown_wall(face)]
    color = others[np.random.default_rng([3, case.index]).integers(len(others))]
    height, width = face.shape[:2]
    is_wall = np.zeros((height + 2, width + 2), np.uint8)
    flags = 4 | cv2.FLOODFILL_MASK_ONLY | cv2.FLOODFILL_FIXED_RANGE
    for x in (0, width - 1):
        near = (TOLERANCE,) * 3
        cv2.floodFill(face.copy(), is_wall, (x, 0), (0, 0, 0), near, near, flags)
    return np.where(is_wall[1:-1, 1:-1, None] > 0, np.uint8(color), face)
