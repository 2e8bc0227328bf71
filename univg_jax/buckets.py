"""Aspect-ratio buckets: a fixed list of shapes, one of which every batch has.

A picture is cropped to the shape whose aspect ratio is nearest to its own. NovelAI's buckets and
SDXL's (arXiv 2307.01952, section 2.3) are the same idea. Loads without JAX.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Shaped

from univg_jax.errors import UserError

Shape = tuple[int, int]  # height, width in pixels

# Sides in sixteenths of the square's, the long and the short one. With a square of 1024 px these
# are 1408x704, 1344x768, 1216x832, 1152x896: near 2:1, 16:9, 3:2 and 4:3. Each has the square's
# area or up to 5.5% less, so that no shape costs more than the square. That the shapes of every
# area have the same ratios lets a stage of another resolution go on in each bucket where the one
# before stopped. Few shapes, since each is a program to compile and a thinner slice of the data.
# The list is our choice.
_SIXTEENTHS = ((22, 11), (21, 12), (19, 13), (18, 14), (16, 16))
_LARGEST = 2**18  # of a picture's sides; longer ones count as this, far beyond any file format


def standard(side: int) -> tuple[Shape, ...]:
    """The nine standard shapes of about `side` x `side` pixels, from tall to wide.

    Raises UserError if `side` is not a multiple of 16.
    """
    if side < 16 or side % 16:
        raise UserError(f"no standard buckets of {side} px: expected a multiple of 16")
    unit = side // 16
    tall = [(unit * long, unit * short) for long, short in _SIXTEENTHS]
    return (*tall, *((short, long) for long, short in reversed(tall[:-1])))


def nearest(
    shapes: Sequence[Shape], heights: Shaped[np.ndarray, " n"], widths: Shaped[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """The index of the shape whose aspect ratio is nearest to each picture's, on a log scale.

    Between two neighbors the border is the geometric mean of their ratios. A picture on it belongs
    to the first of them in the list. All is exact in integers, so that every host agrees.
    """
    order = sorted(range(len(shapes)), key=lambda i: shapes[i][1] / shapes[i][0])
    heights = np.clip(heights, 1, _LARGEST).astype(np.int64)
    widths = np.clip(widths, 1, _LARGEST).astype(np.int64)
    rank = np.zeros(len(heights), np.int64)
    for i, j in itertools.pairwise(order):  # (w / h)^2 against the product of both ratios
        (h1, w1), (h2, w2) = shapes[i], shapes[j]
        ratio, border = widths**2 * (h1 * h2), heights**2 * (w1 * w2)
        rank += ratio >= border if j < i else ratio > border
    return np.array(order, np.int64)[rank]
