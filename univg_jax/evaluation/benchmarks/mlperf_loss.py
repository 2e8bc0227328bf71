"""MLPerf's validation loss of text-to-image training (mlcommons/training, text_to_image).

The rows are 29,696 pictures and captions of COCO 2014, chosen and sorted as in `coco30k`, at 256 x
256 by a bicubic filter without a crop. Row i is at time (i mod 8) / 8; 0 is data and 1 is noise:

    x_t = (1 - t) z + t e,     loss = mean (v(x_t) - (e - z))²

over the latents z of FLUX's codec, 16 channels. The loss is the mean of the eight means by time.
Its target is 0.586, at every 262,144 samples. Here pictures have the size of the run and latents
are those of its codec: with others than MLPerf's the number does not compare with its own.

torchtitan's own validation takes (i + 1/2) / 8. MLPerf's does not fix the noise; ours is keyed by
the seed and the row, so that two checkpoints see the same. Conditions are whole, without guidance.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from univg_jax.evaluation import similarity
from univg_jax.evaluation.benchmarks import coco30k
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Published
from univg_jax.evaluation.summaries import Scores, Summary, column
from univg_jax.fields import setting

if TYPE_CHECKING:
    from univg_jax.batch import Batch
    from univg_jax.pipeline import Pipeline

SAMPLES = 29_696
TIMES = 8
TARGET = 0.586
_ROWS = 4  # of a batch on each device


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where the pictures are."""

    pictures: str = setting(
        "", "the folder of COCO's val2014; by default that beside the captions", is_path=True
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A caption and its picture's file. `index` tells the time, and keys the noise."""

    index: int
    caption: str
    picture: str


def read(
    path: epath.PathLike, settings: Settings = Settings(), *, excerpt: bool = False
) -> tuple[Row, ...]:
    """The rows, of the captions that `coco30k.read` reads. Raises what it raises."""
    beside = epath.Path(path) if epath.Path(path).is_dir() else epath.Path(path).parent
    folder = settings.pictures or beside / "val2014"
    return tuple(
        Row(row.index, row.prompt, os.path.join(folder, os.path.basename(coco30k.real_file(row))))
        for row in coco30k.read(path, samples=SAMPLES, excerpt=excerpt)
    )


def steps(count: int) -> Int[np.ndarray, " count"]:
    """The number of the time of each of `count` rows, 0 to 7 in turn."""
    return np.arange(count) % TIMES


def times(count: int) -> Float[np.ndarray, " count"]:
    """The time of each of `count` rows, from 0 to 7/8."""
    return steps(count) / TIMES


def measure(pipeline: "Pipeline", rows: Sequence[Row], seed: int) -> dict[int, dict[str, Ratio]]:
    """The columns of this process's rows, by their numbers; all processes call it.

    A loss is a function of the seed and the row: neither the batch nor the devices change it, but
    for rounding. Raises UserError for a picture that cannot be read, a loss that is not finite, and
    a run that was not trained on text-to-image.
    """
    import jax

    from univg_jax import flow, sharding
    from univg_jax.images import check_finite
    from univg_jax.progress import Bar
    from univg_jax.together import each_together

    pipeline.check_task("t2i")
    conditioner, model = pipeline.generator.conditioner, pipeline.generator.model

    @jax.jit
    def losses(params: Any, frozen: Any, batch: "Batch", t: jax.Array) -> jax.Array:
        x0, conditions = sharding.constrain_rows(
            (conditioner.target_latents(frozen, batch), conditioner.conditions(frozen, batch))
        )
        noise = flow.sample_noise(jax.random.key(seed), batch.sample_id, x0.shape[1:])
        predict = lambda x_t, t: model.apply({"params": params}, x_t, t, conditions)  # noqa: E731
        return flow.loss_at(predict, x0, noise=noise, t=t)

    found: dict[int, dict[str, Ratio]] = {}
    count = jax.process_count()
    with Bar(total=len(rows), desc="loss", unit="row", disable=jax.process_index() > 0) as bar:
        for numbers, batch in each_together(_batches(pipeline, rows)):
            t = np.asarray(times(TIMES)[batch.sample_id % TIMES], np.float32)
            with jax.set_mesh(pipeline.mesh):
                on_devices = sharding.shard_batch((batch, t), pipeline.mesh)
                made = losses(pipeline.params, pipeline.frozen, *on_devices)
                values = sharding.local_rows(made, pipeline.mesh)[: len(numbers)]
            names = [f"the loss of row {number}" for number in numbers]
            check_finite(values, names, what="loss")
            for number, value in zip(numbers, values, strict=True):
                found[number] = score(rows[number], float(value))
            bar.update(min(len(numbers) * count, len(rows) - bar.n))
    return found


def _batches(pipeline: "Pipeline", rows: Sequence[Row]) -> Iterator[tuple[list[int], "Batch"]]:
    """The numbers of this process's rows, and batches of one size that begin with them.

    All processes have equally many batches. What fills one up is not `valid`, and has no number.
    """
    import jax

    from data_pipelines.examples import Example

    size, count = pipeline.rows * _ROWS, jax.process_count()
    mine, shape = range(jax.process_index(), len(rows), count), pipeline.collator.shape

    def example(row: Row) -> Example:
        picture = similarity.read_rgb(row.picture, what="COCO's val2014, with pictures=DIR")
        like: Image = np.broadcast_to(np.uint8(0), (shape.height, shape.width, 3))
        return Example(target=similarity.resized(picture, like=like), text=row.caption)

    for start in range(0, -(-len(rows) // count), size):
        numbers = list(mine[start : start + size])
        padding = [0] * (size - len(numbers))
        yield (
            numbers,
            pipeline.collator(
                [
                    pipeline.collator.row(
                        example(rows[number]),
                        task="t2i",
                        sample_id=rows[number].index,
                        valid=k < len(numbers),
                    )
                    for k, number in enumerate(numbers + padding)
                ]
            ),
        )


def score(row: Row, loss: float | None) -> dict[str, Ratio]:
    """The loss of a row, in the entry of its time; None is one that is not known."""
    at = np.arange(TIMES) == row.index % TIMES
    known = float(loss is not None)
    return {"loss": Ratio.of(np.where(at, loss or 0.0, 0.0), at * known)}


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`loss`, the mean of the means by time, and each of those."""
    total = merge(column(scores, "loss"))
    by_time = {
        f"time_{step}_8": Ratio.of(total.total[step], total.count[step]).value
        for step in range(TIMES)
    }
    return {"loss": total.value, **by_time}


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""

    def read_rows(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
        return read(path, settings, excerpt=excerpt)

    def score_row(
        row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
    ) -> dict[str, Ratio]:
        return score(row, None)

    return Official(
        name="mlperf_loss",
        version=1,
        read=read_rows,
        requests=lambda rows: [],
        score=score_row,
        measure=measure,
        summary=summary,
        quality=lambda scores: -scores["loss"].value,
        primary="loss",
        published=(
            Published("FLUX.1, where training ends", "loss", TARGET, "mlcommons/training, README"),
        ),
    )


BENCHMARK = benchmark()
