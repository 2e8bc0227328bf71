"""Examples of the validation and test splits, read as needed and never all in memory.

`HeldOut` is the sequence of a task's records in a split. `HeldOutBatches` covers it once, in order,
and gives each host its rows. An example's number in the sequence is its sample id, and keys its
random choices, so that the same example is the same on any number of hosts.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from data_pipelines.collate import Collator, Row
from data_pipelines.order import host_rows
from data_pipelines.quarantine import Quarantine
from data_pipelines.reader import SKIPPED, Reader
from data_pipelines.sources import Source, open_source
from data_pipelines.transforms import Record
from univg_jax.batch import Batch
from univg_jax.errors import UserError, check_name
from univg_jax.settings import Config


# Not `Sequence[Record]`: whoever checks that type at run time would read records for it.
class HeldOut(Sequence):
    """The first `num` (None: all) usable records of a split for a task, center-cropped.

    They come in the stored order, the task's sources one after another. `held_out[i]` reads and
    decodes record i only then, its fields that the task needs and `fields`; `held_out.row(i)` makes
    a row of it as `collator` shapes it, its random choices keyed by (seed, i).

    Making the sequence reads every record once, up to the `num`-th that can be used, and keeps only
    where those lie: all hosts then agree on the sequence, and what is wrong is found before a model
    is made. Records that hold nothing for the task are left out, damaged ones by name in the log.

    Raises:
      UserError: a task that the config does not have, a source without a needed field, no record
        that can be used, far too many damaged ones (`data_pipelines.quarantine`).
      NotFoundError: a source or a split that does not exist.
      UnreachableError: the storage does not answer.
    """

    def __init__(
        self,
        config: Config,
        task: str,
        *,
        split: str,
        collator: Collator,
        num: int | None = None,
        seed: int = 0,
        fields: tuple[str, ...] = (),
        sources: Mapping[str, Source] | None = None,
    ):
        self.task = check_name(task, config.tasks, what="task of this config")
        self._seed = seed
        opened = dict(sources or {})
        for name in config.tasks[task].source_names:
            if name not in opened:
                opened[name] = open_source(name, split, data_dir=config.data.dir)
        readers = [
            Reader(task, opened[name], collator=collator, fields=fields)
            for name in config.tasks[task].source_names
        ]
        self._places: list[tuple[Reader, int]] = []
        quarantine = Quarantine()
        for reader, index in ((r, i) for r in readers for i in range(len(r.source))):
            if len(self._places) == num:
                break
            try:
                self._row(reader, index, len(self._places))
            except SKIPPED as error:
                reason = error
                quarantine.skip(error)
            else:
                quarantine.accept()
                self._places.append((reader, index))
        if not self._places and num != 0:
            names = ", ".join(reader.source.name for reader in readers)
            raise UserError(f"no record of {names} can serve task {task!r}; the last: {reason}")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        reader, stored = self._places[index]
        return reader.record(stored, self._rng(index))

    def row(self, index: int) -> Row:
        """Record `index` as a row, with its place in the sequence as its sample id."""
        return self._row(*self._places[index], index)

    def _row(self, reader: Reader, stored: int, index: int) -> Row:
        return reader.row(stored, self._rng(index), sample_id=index, center=True)

    def _rng(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, index))


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
            rows = {i: self._held_out.row(i) for i in dict.fromkeys(min(i, last) for i in indices)}
            padding = dataclasses.replace(rows[max(rows)], valid=False)
            yield self._collator([rows[i] if i <= last else padding for i in indices])
