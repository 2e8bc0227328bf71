"""Images of cases, split over processes: the same batches on any number of them.

Case i stands in the same row of the same global batch, with its index as sample id, whatever the
number of processes. Of every batch a process has an equal run of rows: with 2 processes and a batch
of 4, process 0 makes cases 0, 1, 4, 5, ... and process 1 cases 2, 3, 6, 7, ...
"""

from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from data_pipelines.collate import Collator
from univg_jax.batch import Batch
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import Case, Cases
from univg_jax.evaluation.metrics import Image
from univg_jax.images import write_png

# Makes an image of each row of this process.
System = Callable[[Batch], UInt8[np.ndarray, "b h w 3"]]


def case_batches(
    cases: Cases, *, collator: Collator, batch_size: int
) -> Iterator[tuple[list[Case], Batch]]:
    """Every case once, in order, in batches of `batch_size` rows over all processes.

    Each process reads its own cases only, and gets them with the batch that they are the first rows
    of. All processes get equally many batches of one size, because a system may be a program over
    all devices, which runs only when every process calls it: so the last batch is padded with rows
    that are not `valid`, and a process may have padding alone.

    Raises UserError if `batch_size` is not a multiple of the number of processes.
    """
    count, index = jax.process_count(), jax.process_index()
    if batch_size < 1 or batch_size % count:
        raise UserError(f"batch size {batch_size}: expected a multiple of {count} processes")
    local = batch_size // count
    for first in range(index * local, index * local + len(cases), batch_size):
        mine = [cases[i] for i in range(first, min(first + local, len(cases)))]
        padding = [mine[-1] if mine else cases[len(cases) - 1]] * (local - len(mine))
        rows = [
            collator.row(case.example, task=case.task, sample_id=case.index, valid=i < len(mine))
            for i, case in enumerate(mine + padding)
        ]
        yield mine, collator(rows)


def picture_names(case: Case) -> dict[str, str]:
    """The files of a case's pictures, such as `t2i/007.png`, within the folder of an evaluation."""
    stem = f"{case.task}/{case.index:03d}"
    return {kind: f"{stem}_{kind}.png" for kind in case.pictures} | {"output": f"{stem}.png"}


def write_pictures(folder: epath.Path, case: Case, image: Image, *, with_case: bool) -> None:
    """Writes a case's image, and the case's own pictures beside it if asked."""
    names = picture_names(case)
    for kind, picture in {**(case.pictures if with_case else {}), "output": image}.items():
        write_png(folder / names[kind], picture)
