"""Examples of the validation and test splits, read as needed and never all in memory.

`HeldOut` is the sequence of a task's records in a split. `HeldOutBatches` covers it once, and gives
each host its rows. An example's number in the sequence is its sample id; its random choices are
keyed by its place in the split. So the same example is the same on any number of hosts.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int64, UInt8, UInt16

from data_pipelines import buckets
from data_pipelines.collate import Collator, Row
from data_pipelines.order import host_rows
from data_pipelines.quarantine import Quarantine
from data_pipelines.reader import SKIPPED, DamagedRecord, Reader, UnsuitableRecord
from data_pipelines.sources import Source, open_sources
from data_pipelines.transforms import Record
from univg_jax.batch import Batch
from univg_jax.buckets import Shape
from univg_jax.errors import UnreachableError, UserError, check_name
from univg_jax.settings import Config

_WINDOW = 4096  # records that are tried before the hosts agree on them, at most

_UNTRIED, _USABLE, _UNSUITABLE, _DAMAGED, _FAILED = range(5)
_Verdicts = UInt8[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """The processes that make a sequence together: each tries its share of the records.

    `agree` gives all of them the elementwise maximum of their arrays; all of them call it.
    """

    index: int = 0
    count: int = 1
    agree: Callable[[_Verdicts], _Verdicts] = lambda own: own


# Not `Sequence[Record]`: whoever checks that type at run time would read records for it.
class HeldOut(Sequence):
    """The first `num` (None: all) usable records of a split for a task, center-cropped.

    They come in the stored order, the task's sources one after another. `held_out[i]` reads and
    decodes record i only then, its fields that the task needs and `fields`; `held_out.row(i)` makes
    a row of it as `collator` shapes it, or in the nearest of `shapes` where there are any.

    Making the sequence reads each record once, up to the `num`-th that can be used, and keeps only
    where those lie: what is wrong is found before a model is made. `hosts` share the reading, and
    then agree. Records that hold nothing for the task are left out, damaged ones by name in the
    log.

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
        shapes: Sequence[Shape] = (),
        hosts: Hosts = Hosts(),
    ):
        self.task = check_name(task, config.tasks, what="task of this config")
        self._seed, self._hosts = seed, hosts
        names = config.tasks[task].source_names
        opened = open_sources(names, split, data_dir=config.data.dir, given=sources)
        self.shapes = tuple(shapes) or (collator.shape.size,)
        self._sources = [opened[name] for name in names]
        # Of each shape, a reader of each source.
        self._readers = [
            [
                Reader(task, source, collator=collator.resized(*shape), fields=fields)
                for source in self._sources
            ]
            for shape in self.shapes
        ]
        ends = np.cumsum([len(source) for source in self._sources])
        self._starts = [0, *ends.tolist()]
        self._places = np.array(self._find(num), np.int64)
        self._shape_numbers = self._nearest(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Record:
        place = int(self._places[index])
        source, stored = self._locate(place)
        return self._readers[self._shape_numbers[index]][source].record(stored, self._rng(place))

    def row(self, index: int) -> Row:
        """Record `index` as a row, with its place in the sequence as its sample id."""
        shape = int(self._shape_numbers[index])
        return self._row(int(self._places[index]), index, shape=shape)

    def indices(self, shape: Shape) -> Int64[np.ndarray, " k"]:
        """The records whose rows have this one of `shapes`."""
        return np.flatnonzero(self._shape_numbers == self.shapes.index(shape))

    def _locate(self, place: int) -> tuple[int, int]:
        """The source, and the record in it, at a place in the split: all sources in a row."""
        source = int(np.searchsorted(self._starts, place, side="right")) - 1
        return source, place - self._starts[source]

    def _row(self, place: int, index: int, *, shape: int) -> Row:
        source, stored = self._locate(place)
        reader = self._readers[shape][source]
        return reader.row(stored, self._rng(place), sample_id=index, center=True)

    def _rng(self, place: int) -> np.random.Generator:
        return np.random.default_rng((self._seed, place))

    def _nearest(self, places: Int64[np.ndarray, " n"]) -> UInt16[np.ndarray, " n"]:
        """The number of the shape of each record."""
        numbers = np.zeros(len(places), np.uint16)
        if len(self.shapes) == 1:
            return numbers
        owners = np.searchsorted(self._starts, places, side="right") - 1
        for source in np.unique(owners):
            mine = owners == source
            sizes = self._sources[source].sizes()[places[mine] - self._starts[source]]
            numbers[mine] = buckets.numbers_of(sizes, self.shapes)
        return numbers

    def _find(self, num: int | None) -> list[int]:
        """The places of the usable records."""
        untried = iter(range(self._starts[-1]))
        found: list[int] = []
        quarantine, reason = Quarantine(), None
        while num is None or len(found) < num:
            missing = _WINDOW if num is None else min(num - len(found), _WINDOW)
            window = list(itertools.islice(untried, missing))
            if not window:
                break
            for place, error in zip(window, self._try(window), strict=True):
                if error is None:
                    quarantine.accept()
                    found.append(place)
                else:
                    reason = error
                    quarantine.skip(error)
        if not found and num != 0:
            names = ", ".join(source.name for source in self._sources)
            raise UserError(
                f"no record of {names} can serve task {self.task!r}; the last: {reason}"
            )
        return found

    def _try(self, window: list[int]) -> list[DamagedRecord | UnsuitableRecord | None]:
        """What is wrong with each of these records, the same on all hosts."""
        errors: dict[int, Exception] = {}
        shapes = self._nearest(np.array(window, np.int64)).tolist()
        verdicts = np.full(len(window), _UNTRIED, np.uint8)
        for i in range(self._hosts.index, len(window), self._hosts.count):
            try:
                self._row(window[i], window[i], shape=shapes[i])
                verdicts[i] = _USABLE
            except SKIPPED as error:
                errors[i] = error
                verdicts[i] = _DAMAGED if isinstance(error, DamagedRecord) else _UNSUITABLE
            except Exception as error:  # nobody may be left waiting
                errors[i], verdicts[i] = error, _FAILED
                break
        agreed = self._hosts.agree(verdicts)
        if (agreed == _FAILED).any():
            mine = (error for i, error in errors.items() if verdicts[i] == _FAILED)
            raise next(mine, UnreachableError("another process cannot read its held-out records"))
        return [
            None if verdict == _USABLE else errors.get(i) or self._tell(window[i], verdict)
            for i, verdict in enumerate(agreed.tolist())
        ]

    def _tell(self, place: int, verdict: int) -> DamagedRecord | UnsuitableRecord:
        """The error of a record that another process has read."""
        source, stored = self._locate(place)
        where = f"{self._sources[source].name}[{stored}]"
        message = f"{where} for task {self.task!r}: another process has read it, and says why not"
        if verdict == _DAMAGED:
            return DamagedRecord(f"{where} for {self.task}", message)
        return UnsuitableRecord(message)


class HeldOutBatches:
    """This host's rows of batches that cover a `HeldOut` once: one shape after another, in order.

    Each iteration starts anew, and decodes this host's rows of one batch at a time. `batch_size` is
    global. The last batch of a shape is padded with copies that are not `valid`.
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
        self._held_out, self._batch_size = held_out, batch_size
        # Of each shape, what makes its batches, and its records.
        self._groups = [
            (collator.resized(*shape), held_out.indices(shape)) for shape in held_out.shapes
        ]
        self._rows = host_rows(batch_size, process_index=process_index, process_count=process_count)

    def __len__(self) -> int:
        return sum(-(-len(indices) // self._batch_size) for _, indices in self._groups)

    def __iter__(self) -> Iterator[Batch]:
        for collator, indices in self._groups:
            last = len(indices) - 1
            for start in range(0, len(indices), self._batch_size):
                mine = [start + row for row in self._rows]
                # Padding repeats the host's last record. A host whose rows all lie past the end
                # needs some record for its shape, and takes the very last one.
                read = dict.fromkeys(min(i, last) for i in mine)
                rows = {i: self._held_out.row(int(indices[i])) for i in read}
                padding = dataclasses.replace(rows[max(rows)], valid=False)
                yield collator([rows[i] if i <= last else padding for i in mine])
