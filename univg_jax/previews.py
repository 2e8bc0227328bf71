"""Samples of every task while a run trains: held-out examples as grids of pictures."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jaxtyping import PyTree

from univg_jax.assembly import Run
from univg_jax.images import write_png
from univg_jax.pipeline import Pipeline
from univg_jax.together import each_together, of_all, together
from univg_jax.training.loop import Preview


def make_preview(run: Run) -> Preview:
    """A function of (parameters, folder) that writes one grid a task, and gives each as it is made.

    A column is an example of the validation split. Its rows are the source, where the task has one,
    the target and the model's output. An example's noise is the same every time.
    """
    count = run.config.train.sample_examples
    # Rows enough for every device.
    size = -(-count // jax.device_count()) * jax.device_count()
    batches = run.validation(num=count, batch_size=size)
    pipeline = Pipeline(
        config=run.config,
        params=None,
        frozen=run.frozen,
        mesh=run.mesh,
        generator=run.generator,
        collator=run.collator,
    )

    def preview(params: PyTree, folder: epath.Path) -> Iterator[tuple[str, np.ndarray]]:
        trained = dataclasses.replace(pipeline, params=params)
        for task, (batch,) in zip(batches, each_together(batches.values())):
            output = trained.generate_batch(batch, task, seed=run.config.seed)
            names = ("source", "target", "has_source", "valid", "sample_id")
            whole = {"output": output} | {name: getattr(batch, name) for name in names}
            if jax.process_count() > 1:
                whole = of_all(whole, tiled=True)
            kinds = [*(["source"] if whole["has_source"].any() else []), "target", "output"]
            # Processes give their rows in any order.
            order = [i for i in np.argsort(whole["sample_id"]) if whole["valid"][i]]
            grid = np.concatenate([np.concatenate(whole[kind][order], axis=1) for kind in kinds])
            with together():
                if jax.process_index() == 0:
                    run.lock.confirm()
                    write_png(folder / f"{task}.png", grid)
            yield f"samples/{task}", grid

    return preview
