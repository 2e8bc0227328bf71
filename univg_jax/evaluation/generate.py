"""Images of cases, split over processes: the same batches on any number of them.

Case i stands in the same row of the same global batch, with its index as sample id, whatever the
number of processes. Of every batch a process has an equal run of rows: with 2 processes and a batch
of 4, process 0 makes cases 0, 1, 4, 5, ... and process 1 cases 2, 3, 6, 7, ...
"""

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import Bool, UInt8

from data_pipelines.collate import Collator
from univg_jax.batch import Batch
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import Case, Cases
from univg_jax.evaluation.metrics import Image
from univg_jax.images import open_picture, to_rgb, write_png
from univg_jax.together import most_of_all, together

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


def output_name(task: str, index: int) -> str:
    """The file of a model's image, such as `t2i/007.png`, within the folder of an evaluation."""
    return f"{task}/{index:03d}.png"


def picture_names(case: Case) -> dict[str, str]:
    """The files of a case's pictures by kind; `output` is the model's."""
    output = output_name(case.task, case.index)
    stem = output.removesuffix(".png")
    return {kind: f"{stem}_{kind}.png" for kind in case.pictures} | {"output": output}


def existing(cases: Cases, folder: epath.PathLike) -> set[int]:
    """The cases whose images are there. All processes call it, and get the same."""
    names = [output_name(cases.task, index) for index in range(len(cases))]
    return {index for index, there in enumerate(exist(names, folder)) if there}


def read_picture(folder: epath.Path, case: Case) -> Image:
    """The model's image of a case. Raises UserError naming a file that is no picture."""
    path = folder / output_name(case.task, case.index)
    try:
        image = to_rgb(open_picture(path.read_bytes()))
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    if image.shape != case.example.target.shape:
        raise UserError(f"{path} is {image.shape}: expected {case.example.target.shape}")
    return image


def exist(names: Sequence[str], folder: epath.PathLike) -> Bool[np.ndarray, " n"]:
    """Which files are in a folder. All processes call it, and get the same."""
    with together(), concurrent.futures.ThreadPoolExecutor(64) as pool:
        paths = (epath.Path(folder) / name for name in names)
        there = np.array(list(pool.map(lambda path: path.exists(), paths)), np.uint8)
    if jax.process_count() > 1:  # one that began earlier may have written some
        there = most_of_all(there)
    return there > 0


def write_pictures(folder: epath.Path, case: Case, image: Image, *, with_case: bool) -> None:
    """Writes a case's image, and the case's own pictures beside it if asked."""
    names = picture_names(case)
    for kind, picture in {**(case.pictures if with_case else {}), "output": image}.items():
        write_png(folder / names[kind], picture)
