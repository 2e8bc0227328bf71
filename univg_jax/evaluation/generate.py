"""Images of cases, split over processes: the same batches on any number of them.

Case i stands in the same row of the same global batch, with its index as sample id, whatever the
number of processes. Of every batch a process has an equal run of rows: with 2 processes and a batch
of 4, process 0 makes cases 0, 1, 4, 5, ... and process 1 cases 2, 3, 6, 7, ...
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from data_pipelines.collate import Row
from univg_jax.batch import Batch
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import Case, Image
from univg_jax.images import write_png

Images = UInt8[np.ndarray, "b h w 3"]
System = Callable[[Batch], Images]  # makes an image of each row of this process
Collate = Callable[[Sequence[Row]], Batch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseBatch:
    """This process's rows of one global batch: its cases, then padding that is not `valid`."""

    cases: Sequence[Case]  # possibly none
    batch: Batch

    def images(self, system: System) -> Images:
        """The system's images of the cases, without those of the padding."""
        return np.asarray(system(self.batch))[: len(self.cases)]


def case_batches(
    cases: Sequence[Case], *, collate: Collate, batch_size: int
) -> Iterator[CaseBatch]:
    """Every case once, in order, in batches of `batch_size` rows over all processes.

    Each process reads its own cases only. All processes get equally many batches of one size,
    because a system may be a program over all devices, which runs only when every process calls it:
    so the last batch is padded, and a process may have padding alone.

    Raises UserError if `batch_size` is not a multiple of the number of processes.
    """
    count, index = jax.process_count(), jax.process_index()
    if batch_size < 1 or batch_size % count:
        raise UserError(f"batch size {batch_size}: expected a multiple of {count} processes")
    local = batch_size // count
    for start in range(0, len(cases), batch_size):
        first = start + index * local
        mine = [cases[i] for i in range(first, min(first + local, len(cases)))]
        padding = local - len(mine)
        filler = [mine[-1] if mine else cases[len(cases) - 1]] if padding else []
        rows = [_row(case, valid=True) for case in mine]
        rows += [_row(case, valid=False) for case in filler * padding]
        yield CaseBatch(cases=mine, batch=collate(rows))


def _row(case: Case, *, valid: bool) -> Row:
    return Row(example=case.example, task=case.task, sample_id=case.index, valid=valid)


def picture_name(case: Case, kind: str = "output") -> str:
    """The file of a case's picture within the folder of an evaluation: `t2i/007.png`."""
    suffix = "" if kind == "output" else f"_{kind}"
    return f"{case.task}/{case.index:03d}{suffix}.png"


def case_pictures(case: Case) -> Mapping[str, Image]:
    """The pictures that show what a case asks: its input, if it has one, and its target."""
    example = case.example
    shown = example.source if example.face is None else example.face
    return ({} if shown is None else {"input": shown}) | {"target": example.target}


def write_pictures(
    folder: epath.Path, case: Case, image: Image, *, with_case: bool = False
) -> None:
    """Writes a case's image, and the case's own pictures beside it if asked."""
    pictures = {"output": image} | (case_pictures(case) if with_case else {})
    for kind, picture in pictures.items():
        write_png(folder / picture_name(case, kind), picture)
