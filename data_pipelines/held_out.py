"""Examples of the validation and test splits, read as needed and never all in memory.

`HeldOut` is the sequence of a task's records in a split. `HeldOutBatches` covers it once, in order,
and gives each host its rows. An example's number in the sequence is its sample id, and keys its
random choices, so that the same example is the same on any number of hosts.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data_pipelines import transforms
from data_pipelines.collate import Collator, Row
from data_pipelines.order import host_rows
from data_pipelines.sources import Source, open_source
from data_pipelines.tasks import TASKS, Example, UnsuitableRecord
from data_pipelines.transforms import Record
from univg_jax.batch import Batch
from univg_jax.errors import check_name
from univg_jax.settings import Config


# Not `Sequence[Record]`: whoever checks that type at run time would read records for it.
class HeldOut(Sequence):
    """The first `num` (None: all) records of a split that suit a task, center-cropped, all fields.

    They come in the stored order, the task's sources one after another, the same on every host.
    `held_out[i]` reads and decodes record i only then. For a task that can refuse a sound record
    (`Task.may_refuse`), making the sequence reads the task's fields of each record once, up to the
    `num`-th suitable one, and keeps only which are suitable.

    Raises UserError (NotFoundError) for a task that the config does not have, and for a source or a
    split that does not exist.
    """

    def __init__(
        self,
        config: Config,
        task: str,
        *,
        split: str,
        num: int | None = None,
        sources: Mapping[str, Source] | None = None,
    ):
        self.task = check_name(task, config.tasks, what="task of this config")
        self._resolution = config.data.resolution
        self._suitable: list[tuple[Source, Sequence[int]]] = []  # the records' indices by source
        missing = num
        for name in config.tasks[task].sources:
            source = (sources or {}).get(name)
            if source is None:
                source = open_source(name, split, data_dir=config.data.dir)
            indices: Sequence[int] = range(len(source))
            if TASKS[task].may_refuse:
                suitable = (i for i in indices if self._suits(source, i))
                indices = list(itertools.islice(suitable, missing))
            elif missing is not None:
                indices = indices[:missing]
            self._suitable.append((source, indices))
            if missing is not None:
                missing -= len(indices)
        self._ends = list(itertools.accumulate(len(indices) for _, indices in self._suitable))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        source, stored = self._find(index)
        return transforms.resize_and_crop(source.read(stored), resolution=self._resolution)

    def example(self, index: int, *, seed: int = 0) -> Example:
        """Record `index` as an example of the task, its random choices keyed by (seed, index).

        Reads only the fields that the task needs. Raises UserError for a record with a missing or
        wrong field.
        """
        source, stored = self._find(index)
        return self._example(source, stored, np.random.default_rng((seed, index)))

    def origin(self, index: int) -> str:
        """Where record `index` is stored, for messages: `scenes/validation[7]`."""
        source, stored = self._find(index)
        return f"{source.name}[{stored}]"

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} records")
        number = bisect.bisect_right(self._ends, index)
        source, indices = self._suitable[number]
        return source, indices[index - self._ends[number]]  # a negative index, from the end

    def _example(self, source: Source, stored: int, rng: np.random.Generator) -> Example:
        return TASKS[self.task].example(
            source.read(stored, TASKS[self.task].needs),
            rng,
            self._resolution,
            where=f"{source.name}[{stored}]",
            center=True,
        )

    def _suits(self, source: Source, stored: int) -> bool:
        try:
            # Whether a record suits a task does not depend on the random choices.
            self._example(source, stored, np.random.default_rng(0))
        except UnsuitableRecord:
            return False
        return True


class HeldOutBatches:
    """This host's rows of batches that cover a `HeldOut` once, in order.

    Each iteration starts anew, and decodes this host's rows of one batch at a time. `batch_size` is
    global. The last batch is padded with copies that are not `valid`.
    """

    def __init__(
        self,
        held_out: HeldOut,
        *,
        batch_size: int,
        collator: Collator,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._held_out, self._batch_size, self._collator = held_out, batch_size, collator
        self._rows = host_rows(batch_size, process_index=process_index, process_count=process_count)

    def __len__(self) -> int:
        return -(-len(self._held_out) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._held_out), self._batch_size):
            last = len(self._held_out) - 1
            indices = [start + row for row in self._rows]
            # Padding repeats the host's last record. A host whose rows all lie past the end needs
            # some record for its shape, and takes the very last one.
            rows = {i: self._row(i) for i in dict.fromkeys(min(i, last) for i in indices)}
            padding = dataclasses.replace(rows[max(rows)], valid=False)
            yield self._collator([rows[i] if i <= last else padding for i in indices])

    def _row(self, index: int) -> Row:
        example = self._held_out.example(index)
        return Row(example=example, task=self._held_out.task, sample_id=index)


def batches(
    config: Config,
    task: str,
    *,
    split: str,
    num: int | None = None,
    batch_size: int,
    collator: Collator,
    process_index: int = 0,
    process_count: int = 1,
    sources: Mapping[str, Source] | None = None,
) -> HeldOutBatches:
    """The `HeldOutBatches` of a config's task: see there, and `HeldOut` for the arguments."""
    return HeldOutBatches(
        HeldOut(config, task, split=split, num=num, sources=sources),
        batch_size=batch_size,
        collator=collator,
        process_index=process_index,
        process_count=process_count,
    )
