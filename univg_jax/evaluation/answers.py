"""Answers that need no model, for benchmarks to name as trivial ones or as references.

Each function makes them from the training cases, as `BenchmarkTask.make_trivial` does. It reads one
case at a time and keeps no pictures but its result.
"""

from collections.abc import Callable

import cv2
import numpy as np

from data_pipelines import renderings
from univg_jax.evaluation.benchmark import AnswerFn, Case, Cases
from univg_jax.evaluation.metrics import Image

NEIGHBOR_SIDE = 16  # pixels a side at which pictures are compared


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


# --- editing and inpainting ---


def edit_answers(train: Cases) -> dict[str, AnswerFn]:
    """A copy of the source, its background, the mean training image."""
    return {
        "a copy of the source": lambda case: case.example.source,
        "the source's background": lambda case: _background(case.example.source),
        **mean_image(train),
    }


def _background(image: Image) -> Image:
    """Each row in its median color: ground and sky without what stands before them."""
    rows = np.rint(np.median(image, axis=1, keepdims=True)).astype(np.uint8)
    return np.broadcast_to(rows, image.shape)


def filled(train: Cases) -> dict[str, AnswerFn]:
    """The source, its hole filled: with one color, row by row, by OpenCV's two inpainters, with the
    mean training image.
    """

    def inpainter(method: int) -> Callable[[Case], Image]:
        # A radius of 1 pixel, the neighbors alone, has the smallest error on these pictures.
        return lambda case: cv2.inpaint(case.example.source, case.example.mask[..., 0], 1, method)

    fillings = {
        "the mean visible color": _mean_visible,
        "the mean visible color of each row": _mean_visible_of_rows,
        "OpenCV's inpainting by Telea": inpainter(cv2.INPAINT_TELEA),
        "OpenCV's inpainting by Navier-Stokes": inpainter(cv2.INPAINT_NS),
        **mean_image(train),
    }

    def keep_visible(fill: AnswerFn) -> AnswerFn:
        return lambda case: np.where(case.example.mask > 0, fill(case), case.example.source)

    return {name: keep_visible(fill) for name, fill in fillings.items()}


def _mean_visible(case: Case) -> Image:
    visible = case.example.source[case.example.mask[..., 0] == 0]
    color = visible.mean(axis=0) if len(visible) else np.full(3, renderings.GRAY)
    return np.broadcast_to(np.rint(color).astype(np.uint8), case.example.source.shape)


def _mean_visible_of_rows(case: Case) -> Image:
    """A row of which nothing is visible lies between its neighbors in color."""
    source, visible = case.example.source, case.example.mask[..., 0] == 0
    (seen,) = visible.any(axis=1).nonzero()
    if not len(seen):
        return _mean_visible(case)
    colors = np.stack([source[row][visible[row]].mean(axis=0) for row in seen])
    rows = np.arange(len(source))
    between = np.stack([np.interp(rows, seen, channel) for channel in colors.T], axis=-1)
    return np.broadcast_to(np.rint(between).astype(np.uint8)[:, None], source.shape)


def layout_answers(train: Cases) -> dict[str, AnswerFn]:
    """The canvas of blocks itself, and the mean training image."""
    return {"the layout itself": lambda case: case.example.source} | mean_image(train)


# --- labels of a picture ---


def depth_answers(train: Cases) -> dict[str, AnswerFn]:
    """The mean of the rendered training depths, the same of each row, and a ramp."""
    mean = mean_target(train)
    rows = np.rint(mean.mean(axis=1, keepdims=True)).astype(np.uint8)
    ramp = np.linspace(0, 255, len(mean)).round().astype(np.uint8)[:, None, None]
    return {
        "the mean training depth": constant(mean),
        "the mean training depth of each row": constant(np.broadcast_to(rows, mean.shape)),
        "a ramp, nearer from row to row": constant(np.broadcast_to(ramp, mean.shape)),
    }


def mean_pose(train: Cases) -> dict[str, AnswerFn]:
    """The skeleton of the mean training joints."""
    joints = np.mean([case.record["joints"] for case in train], axis=0, dtype=np.float32)
    joints[..., 2] = 1  # all visible
    height, width = train[0].example.target.shape[:2]
    pose = renderings.render_pose(joints, height=height, width=width)
    return {"the mean training pose": constant(pose)}


def mask_answers(train: Cases) -> dict[str, AnswerFn]:
    """All pixels; those that training masks cover most often, as many as a mask on average; and
    true masks of the scene, chosen without the expression.
    """
    covered = sum((renderings.decode_mask(case.example.target) for case in train), 0.0)
    frequency = covered / len(train)
    share = covered.sum() / (covered.size * len(train))
    likely = frequency >= np.quantile(frequency, 1 - share)

    def answer(choose: Callable[[Case], np.ndarray]) -> AnswerFn:
        return lambda case: renderings.render_mask(choose(case).astype(np.uint8))

    return {
        "everything": answer(lambda case: np.ones_like(likely)),
        "the mean training mask": answer(lambda case: likely),
        "all objects of the scene": answer(lambda case: visible_masks(case).any(axis=0)),
        "the largest object of the scene": answer(
            lambda case: max(visible_masks(case), key=np.count_nonzero)
        ),
    }


def visible_masks(case: Case) -> np.ndarray:
    """The masks of a case's record that have pixels: bool [k h w]."""
    masks = case.record["masks"] > 0
    return masks[masks.any(axis=(1, 2))]


# --- references: the answer of the training example that is most alike ---


def nearest_picture(train: Cases) -> dict[str, AnswerFn]:
    """The answer of the training example with the nearest source, by mean square difference."""

    def thumbnail(case: Case) -> np.ndarray:
        size = (NEIGHBOR_SIDE, NEIGHBOR_SIDE)
        return cv2.resize(case.example.source, size, interpolation=cv2.INTER_AREA).astype(float)

    seen = np.stack([thumbnail(case) for case in train])

    def answer(case: Case) -> Image:
        distance = np.square(seen - thumbnail(case)).mean(axis=(1, 2, 3))
        return train[int(distance.argmin())].example.target

    return {"the answer of the nearest training picture": answer}


def nearest_caption(train: Cases) -> dict[str, AnswerFn]:
    """The picture of the training example that shares most words of the text (Jaccard index)."""
    seen = [set(text.split()) for text in train.texts]

    def answer(case: Case) -> Image:
        words = set(case.example.text.split())
        shared = [len(words & other) / max(len(words | other), 1) for other in seen]
        return train[int(np.argmax(shared))].example.target

    return {"the picture of the nearest training caption": answer}
