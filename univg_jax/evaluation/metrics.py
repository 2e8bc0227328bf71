"""Metrics as sums and counts: each is a `Ratio`, and ratios add, so shards merge without bias.

A metric of one example is `Ratio(total, count)`. Adding the ratios of all examples and dividing
last gives the metric of the set, however the examples were spread over processes; the mean of
per-shard means would not. Depending on what is put into `count` the same addition yields

    mean over images   total = value,        count = 1        (mIoU, AbsRel, L1, PSNR)
    ratio of sums      total = intersection, count = union    (oIoU)
    mean over entries  total = hits,         count = visible  (PCK, one entry a joint; mIoU of
                                                               boxes by class, one entry a class)

All arithmetic is numpy float64. Images are uint8 RGB; errors are on the scale [0, 1].
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8
from scipy import ndimage

Number = float | int | np.number
Image = UInt8[np.ndarray, "_ _ 3"]
Aligned = UInt8[np.ndarray, "h w 3"]  # of the size of all others in a call
Map = Num[np.ndarray, "h w"]
Mask = Bool[np.ndarray, "h w"]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Sums and counts, by entry; `value` is the mean of total / count over entries with a count."""

    total: Float[np.ndarray, " k"]
    count: Float[np.ndarray, " k"]

    @classmethod
    def of(cls, total: Number | np.ndarray, count: Number | np.ndarray = 1.0) -> "Ratio":
        """The ratio of numbers or of vectors, in float64."""
        total = np.atleast_1d(np.asarray(total, float))
        return cls(total, np.broadcast_to(np.asarray(count, float), total.shape))

    def __add__(self, other: "Ratio") -> "Ratio":
        return Ratio(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """NaN where nothing was counted."""
        counted = self.count > 0
        ratios = self.total[counted] / self.count[counted]
        return float(np.mean(ratios)) if len(ratios) else math.nan


def merge(ratios: Iterable[Ratio]) -> Ratio:
    """The sum of `ratios`, correctly rounded: the same bits in any order."""
    rows = [(ratio.total, ratio.count) for ratio in ratios] or np.zeros((1, 2, 1))
    # math.fsum rounds once, at the end: plain addition would depend on the order of the shards.
    return Ratio(*np.apply_along_axis(math.fsum, 0, np.array(rows)))


def mean(ratios: Iterable[Ratio]) -> Ratio:
    """The expected sums and counts of one of `ratios`, chosen at random."""
    ratios = list(ratios)
    total = merge(ratios)
    return Ratio(total.total / len(ratios), total.count / len(ratios))


def l1(prediction: Aligned, target: Aligned, region: Map | Mask | None = None) -> Ratio:
    """Mean |prediction - target| / 255 over pixels and channels, within `region` if given.

    An image whose region is empty counts nowhere.
    """
    error = np.abs(prediction.astype(float) - target.astype(float)).mean(axis=-1) / 255
    if region is None:
        return Ratio.of(error.mean())
    inside = np.asarray(region) > 0
    return Ratio.of(error[inside].mean()) if inside.any() else Ratio.of(0.0, 0.0)


def psnr(prediction: Aligned, target: Aligned) -> Ratio:
    """10 log10(255² / MSE) in dB; infinite for equal images, as torchmetrics has it."""
    mse = float(np.mean((prediction.astype(float) - target.astype(float)) ** 2))
    return Ratio.of(10 * np.log10(255**2 / mse) if mse else math.inf)


def ssim(
    prediction: Aligned, target: Aligned, *, edges: Literal["inside", "mirrored"] = "inside"
) -> Ratio:
    """Structural similarity (Wang et al. 2004) of each channel, mean over channels and windows.

    A Gaussian window of 11 pixels and sigma 1.5; variances divided by the weight and not by one
    less; K = 0.01 and 0.03 of the range of 255. Windows lie inside the picture, as in the paper
    and in scikit-image (with `gaussian_weights=True, use_sample_covariance=False`), or around each
    pixel of the picture, mirrored at its edges, as in torchmetrics. Raises ValueError for pictures
    below 11 pixels a side.
    """
    radius = 5
    if min(prediction.shape[:2]) <= 2 * radius:
        raise ValueError(f"SSIM of {prediction.shape}: its window has {2 * radius + 1} pixels")
    rows, columns = (slice(radius, n - radius) for n in prediction.shape[:2])

    def window_mean(x: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h2 w2 c"]:
        means = ndimage.gaussian_filter(x, 1.5, radius=radius, axes=(0, 1), mode="mirror")
        return means[rows, columns] if edges == "inside" else means

    x, y = prediction.astype(float), target.astype(float)
    mean_x, mean_y = window_mean(x), window_mean(y)
    variances = window_mean(x * x) - mean_x**2 + window_mean(y * y) - mean_y**2
    covariance = window_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return Ratio.of(np.mean(similarity * (2 * covariance + c2) / (variances + c2)))


def mean_iou(prediction: Mask, target: Mask) -> Ratio:
    """I / U of one image, for the mean over images; an empty union scores 0, as in RefCOCO."""
    union = np.sum(prediction | target)
    return Ratio.of(np.sum(prediction & target) / max(union, 1))


def overall_iou(prediction: Mask, target: Mask) -> Ratio:
    """(I, U) in pixels: the ratio of sums over the set, oIoU (also called cIoU)."""
    return Ratio.of(np.sum(prediction & target), np.sum(prediction | target))


def precision(prediction: Mask, target: Mask, *, at: float, exceed: bool = False) -> Ratio:
    """Precision@X of one mask: whether its IoU is at least `at`.

    So it is in RefCOCO's protocol; PhraseCut's accuracy asks it to `exceed` the number.
    """
    iou = mean_iou(prediction, target).value
    return Ratio.of(float(iou > at if exceed else iou >= at))


def choice(prediction: Mask, masks: Bool[np.ndarray, "k h w"], *, right: int) -> Ratio:
    """Whether a prediction overlaps mask `right` more, by IoU, than any other of the masks.

    1 if it does, 1 / m if m masks share the largest overlap, 0 if it overlaps none. One mask alone
    is no choice and counts nowhere. Summed over which mask is the right one this is at most 1: an
    answer that does not know it is right in one of k cases.
    """
    if len(masks) < 2:
        return Ratio.of(0.0, 0.0)
    overlaps = np.array([mean_iou(prediction, mask).value for mask in masks])
    return recall_at_1(np.roll(overlaps, -right)) if overlaps.any() else Ratio.of(0.0)


def box_iou(box: Float[np.ndarray, "4"], other: Float[np.ndarray, "4"]) -> float:
    """Intersection over union of two boxes x0 y0 x1 y1; 0 if both are empty."""
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    intersection = float(np.prod(np.maximum(sides, 0.0)))
    areas = [float(np.prod(np.maximum(b[2:] - b[:2], 0.0))) for b in (box, other)]
    union = sum(areas) - intersection
    return intersection / union if union > 0 else 0.0


def best_box_iou(
    boxes: Float[np.ndarray, "k 4"], detections: list[Float[np.ndarray, "_ 4"]]
) -> Float[np.ndarray, " k"]:
    """The IoU of each box with its best detection; `detections[i]` have the class of `boxes[i]`."""
    return np.array(
        [max((box_iou(b, d) for d in found), default=0.0) for b, found in zip(boxes, detections)]
    )


def layout(
    boxes: Float[np.ndarray, "k 4"],
    names: Sequence[str],
    detections: Mapping[str, Float[np.ndarray, "_ 4"]],
    *,
    classes: Sequence[str] = (),
) -> dict[str, Ratio]:
    """How well each box is filled: its IoU with the best detection of its name.

        layout_miou     mean IoU over boxes        layout_success  share of boxes with IoU >= 0.5

    With `classes`, all names that there are, also the mean over these of both, each class a mean
    over its own boxes: `..._by_class`, with one entry a class.
    """
    nothing = np.zeros((0, 4))
    ious = best_box_iou(boxes, [detections.get(name, nothing) for name in names])
    values = {"layout_miou": ious, "layout_success": (ious >= 0.5).astype(float)}
    scores = {name: Ratio.of(v.sum(), len(v)) for name, v in values.items()}
    if classes:
        member = np.array([[name == c for c in classes] for name in names], float)
        member = member.reshape(len(names), len(classes))
        for name, v in values.items():
            scores[f"{name}_by_class"] = Ratio.of(v @ member, member.sum(axis=0))
    return scores


def align_depth(
    p: Float[np.ndarray, " n"], g: Float[np.ndarray, " n"], *, limits: tuple[float, float]
) -> Float[np.ndarray, " n"]:
    """The prediction p, scaled and shifted to fit the target g, and clipped to `limits`.

        s p + o,   (s, o) = argmin sum (s p + o - g)²

    A constant prediction aligns to the mean of the target. `limits` are the nearest and farthest
    depth that count in the data set, not those of this picture, which a prediction cannot know.
    """
    deviation = p - p.mean()
    variance = np.mean(deviation**2)
    # Relative to the magnitude, so that rounding of a constant is not taken for structure.
    is_constant = variance <= 1e-12 * max(np.mean(p**2), 1e-300)
    scale = 0.0 if is_constant else np.mean(deviation * (g - g.mean())) / variance
    return np.clip(scale * deviation + g.mean(), *limits)


def depth_errors(
    prediction: Map, target: Map, *, limits: tuple[float, float], valid: Mask | None = None
) -> dict[str, Ratio]:
    """Errors of depth p against g where it is `valid`, after `align_depth` to g there.

    abs_rel = mean |p - g| / g        delta1 = share of max(p/g, g/p) < 1.25

    Without `valid`, g is where it lies between `limits`. An image without any counts nowhere.
    """
    valid = (target > limits[0]) & (target < limits[1]) if valid is None else valid
    if not valid.any():
        return dict.fromkeys(("abs_rel", "delta1"), Ratio.of(0.0, 0.0))
    g = target[valid].astype(float)
    p = align_depth(prediction[valid].astype(float), g, limits=limits)
    return {
        "abs_rel": Ratio.of(np.mean(np.abs(p - g) / g)),
        "delta1": Ratio.of(np.mean(np.maximum(p / g, g / p) < 1.25)),
    }


def pck(
    prediction: Num[np.ndarray, "k 2"],
    target: Num[np.ndarray, "k 2"],
    *,
    visible: Bool[np.ndarray, " k"],
    box_size: float,
    at: float = 0.1,
) -> Ratio:
    """PCK: hits (distance below `at` box sizes) and visible joints, one entry a joint.

    A NaN prediction is a miss.
    """
    with np.errstate(invalid="ignore"):
        hit = np.linalg.norm(prediction.astype(float) - target, axis=-1) < at * box_size
    return Ratio.of((hit & visible).astype(float), visible.astype(float))


def recall_at_1(scores: Float[np.ndarray, " n"]) -> Ratio:
    """1 if the true candidate, the first, scores highest; 1/m if it shares the top with m - 1.

    So a scorer that gives every candidate the same score is at chance.
    """
    top = scores == scores.max()
    return Ratio.of(float(top[0]) / float(top.sum()))


def cosine(a: Num[np.ndarray, " d"], b: Num[np.ndarray, " d"]) -> Ratio:
    """a . b / (|a| |b|); 0 if either is zero."""
    a, b = a.astype(float), b.astype(float)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return Ratio.of(float(a @ b) / norms if norms > 0 else 0.0)


def unit_vectors(x: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d"]:
    """Rows scaled to length 1; a zero row stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
