"""MLPerf's validation loss of text-to-image training (mlcommons/training, text_to_image).

The rows are 29,696 pictures and captions of COCO 2014, chosen and sorted as in `coco30k`, at 256 x
256 by a bicubic filter without a crop. Row i is at time (i mod 8) / 8; 0 is data and 1 is noise:

    x_t = (1 - t) z + t e,     loss = mean (v(x_t) - (e - z))²

over the latents z of FLUX's codec, 16 channels; with other latents the number does not compare. The
loss is the mean of the eight means by time. Its target is 0.586, at every 262,144 samples.

torchtitan's own validation takes (i + 1/2) / 8. MLPerf's does not fix the noise; ours is keyed by
the row, so that two checkpoints see the same.
"""

from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from univg_jax.evaluation.benchmarks import coco30k
from univg_jax.evaluation.benchmarks.coco30k import Row
from univg_jax.evaluation.metrics import Ratio, merge
from univg_jax.evaluation.summaries import Scores, Summary, column

SAMPLES = 29_696
TIMES = 8
TARGET = 0.586


def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The rows, from what `coco30k.read` reads. Raises what it raises."""
    return coco30k.read(path, samples=SAMPLES, excerpt=excerpt)


def steps(count: int) -> Int[np.ndarray, " count"]:
    """The number of the time of each of `count` rows, 0 to 7 in turn."""
    return np.arange(count) % TIMES


def times(count: int) -> Float[np.ndarray, " count"]:
    """The time of each of `count` rows, from 0 to 7/8."""
    return steps(count) / TIMES


def score(row: Row, loss: float) -> dict[str, Ratio]:
    """The loss of a row, in the entry of its time."""
    at = np.arange(TIMES) == row.index % TIMES
    return {"loss": Ratio.of(np.where(at, loss, 0.0), at.astype(float))}


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`loss`, the mean of the means by time, and each of those."""
    total = merge(column(scores, "loss"))
    by_time = {
        f"time_{step}_8": Ratio.of(total.total[step], total.count[step]).value
        for step in range(TIMES)
    }
    return {"loss": total.value, **by_time}
