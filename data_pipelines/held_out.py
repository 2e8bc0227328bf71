"""Examples of the validation and test splits, read as needed and never all in memory.

`HeldOut` is the sequence of a task's records in a split. `HeldOutBatches` covers it once, in order,
and gives each host its rows. An example's number in the sequence is its sample id, and keys its
random choices, so that the same example is the same on any number of hosts.
"""

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
        opened = dict(sources or {})
        for name in config.tasks[task].sources:
            if name not in opened:
                opened[name] = open_source(name, split, data_dir=config.data.dir)
        suitable = (
            (source, index)
            for source in (opened[name] for name in config.tasks[task].sources)
            for index in range(len(source))
            if not TASKS[task].may_refuse or self._suits(source, index)
        )
        self._places = list(itertools.islice(suitable, num))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        source, stored = self._places[index]
        return transforms.resize_and_crop(source.read(stored), resolution=self._resolution)

    def example(self, index: int, *, seed: int = 0) -> Example:
        """Record `index` as an example of the task, its random choices keyed by (seed, index).

        Reads only the fields that the task needs. Raises UserError for a record with a missing or
        wrong field.
        """
        return self._example(*self._places[index], np.random.default_rng((seed, index)))

    def _example(self, source: Source, stored: int, rng: np.random.Generator) -> Example:
        task = TASKS[self.task]
        record, where = source.read(stored, task.needs), f"{source.name}[{stored}]"
        return task.example(record, rng, self._resolution, where=where, center=True)

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
        last = len(self._held_out) - 1
        for start in range(0, len(self._held_out), self._batch_size):
            indices = [start + row for row in self._rows]
            # Padding repeats the host's last record. A host whose rows all lie past the end needs
            # some record for its shape, and takes the very last one.
            rows = {
                i: Row(example=self._held_out.example(i), task=self._held_out.task, sample_id=i)
                for i in dict.fromkeys(min(i, last) for i in indices)
            }
            padding = dataclasses.replace(rows[max(rows)], valid=False)
            yield self._collator([rows[i] if i <= last else padding for i in indices])
