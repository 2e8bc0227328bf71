"""Generated masks of what a text refers to, against the annotated ones.

    oIoU = sum I / sum U      mIoU = mean(I / U), 0 where U is empty      P@X = share of I / U >= X

over all samples, each a text and a mask. A generated picture is resized to the size of its
photograph (bicubic), and a pixel belongs to the mask if the mean of its channels is at least
`renderings.MASK_THRESHOLD` of white. So a picture by anybody, of any size, is of the whole
photograph.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from data_pipelines import renderings
from univg_jax.evaluation import metrics
from univg_jax.evaluation.metrics import Mask, Ratio, merge
from univg_jax.evaluation.similarity import resized
from univg_jax.evaluation.summaries import Scores, Summary, column, failure_counts

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
Picture = UInt8[np.ndarray, "_ _ 3"]  # of any size beside a mask
EVERYTHING = np.full((1, 1, 3), 255, np.uint8)  # the mask of all of a photograph


def decode(image: Picture, *, shape: tuple[int, int]) -> Mask:
    """The mask that a picture of any size shows, at the photograph's (height, width)."""
    plane = np.broadcast_to(np.uint8(0), (*shape, 3))
    return renderings.decode_mask(resized(image, like=plane)) > 0


def score(
    image: Picture | None, target: Mask, *, at: Sequence[float] = PRECISION_AT, exceed: bool = False
) -> dict[str, Ratio]:
    """Sums and counts of a sample, `official` and `strict`; None is a picture that is missing.

    Officially a missing picture counts nowhere, and strictly it is an empty mask. Precision asks
    the IoU to be at least a number, or to `exceed` it. `failures/` say that the picture is missing,
    that its mask is empty, or that it lies beside the true one.
    """
    mask = np.zeros(target.shape, bool) if image is None else decode(image, shape=target.shape)
    scores = {
        "oiou": metrics.overall_iou(mask, target),
        "miou": metrics.mean_iou(mask, target),
        **{
            name_of(x, exceed=exceed): metrics.precision(mask, target, at=x, exceed=exceed)
            for x in at
        },
    }
    is_there = float(image is not None)
    official = {k: Ratio(r.total * is_there, r.count * is_there) for k, r in scores.items()}
    is_empty, is_beside = not mask.any(), mask.any() and not (mask & target).any()
    return {
        **{f"official/{k}": r for k, r in official.items()},
        **{f"strict/{k}": r for k, r in scores.items()},
        "failures/missing": Ratio.of(1 - is_there),
        "failures/empty_mask": Ratio.of(is_there * float(is_empty)),
        "failures/mask_elsewhere": Ratio.of(float(is_beside)),
    }


def name_of(x: float, *, exceed: bool) -> str:
    """The name of a precision, or accuracy where it is to exceed the number."""
    return f"accuracy@{x}" if exceed else f"precision@{x}"


def summary(splits: Sequence[str], scores: Sequence[Scores]) -> Summary:
    """The numbers of each split, such as `testA/official/oiou`, and how many samples failed.

    `splits` names that of each sample. A number is NaN where nothing was counted.
    """
    found: Summary = {}
    for split in dict.fromkeys(splits):
        chosen = [entry for name, entry in zip(splits, scores, strict=True) if name == split]
        for name in scores[0]:
            if not name.startswith("failures/"):
                found[f"{split}/{name}"] = merge(column(chosen, name)).value
    return found | failure_counts(scores)
