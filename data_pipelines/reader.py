"""The one way from a stored record to a row: read, decode, check, crop, size, tokenize.

Training, held-out examples, the fits of encoders, `univg data` and evaluation all read through
`Reader`: a record is of use to all of them or to none, and every message names it.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np

from data_pipelines import transforms
from data_pipelines.collate import Collator, Drop, Row
from data_pipelines.sources import ReducingSource, Source
from data_pipelines.tasks import TASKS, Example, UnsuitableRecord
from data_pipelines.transforms import Record
from univg_jax.errors import NotFoundError, UnreachableError, UserError


class MissingFieldError(UserError):
    """A source whose records have not all fields that are asked of them."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a record is: its dataset and number there, and its shard and place in the shard."""

    dataset: str
    index: int
    shard: str
    key: int


class DamagedRecord(UserError):
    """A record that cannot be read, breaks the schema, or has a prompt that cannot be tokenized."""

    def __init__(self, record: str, message: str, *, place: Place | None = None):
        super().__init__(message)
        self.record = record  # its task and place, which name it
        self.place = place


# Fields beside which an `image` may be decoded smaller, as nothing of them lies on it; and to how
# many times the target's size: what is left to the resize to the target is then antialiased.
_APART_FROM_IMAGE = {"image", "caption", "captions", "caption_kinds", "face", "person"}
_OVERSAMPLING = 2

# What `Reader` raises about one record: whoever reads many goes on with the next.
SKIPPED = (DamagedRecord, UnsuitableRecord)


class Reader:
    """Reads a source's records for one task, in the shape of the rows that `collator` makes.

    `fields` are those needed beside the task's, and captions are drawn by the weights of
    `collator`. Of a task that takes no picture but a face, large JPEG files are decoded at a part
    of their size, twice that of the row or more; `record` has them whole. Raises MissingFieldError
    if the source lacks a field. Every method may raise

      DamagedRecord: nobody can use the record, whatever is wrong with it.
      UnsuitableRecord: it is sound, but holds nothing for this task.
      UnreachableError: the storage does not answer. Another host or the next try would read the
        record, so whoever went on without it would make another stream than they.
      NotFoundError: what is missing is not in the record, such as a prompt in a cache.
    """

    def __init__(
        self, task: str, source: Source, *, collator: Collator, fields: tuple[str, ...] = ()
    ):
        self.task, self.source, self._collator = task, source, collator
        self._extra, self._fields = fields, TASKS[task].fields(source.fields, fields)
        if missing := [field for field in self._fields if field not in source.fields]:
            raise MissingFieldError(
                f"task {task!r} cannot read {source.name}: no field {missing[0]!r} "
                f"(has {', '.join(source.fields)})"
            )
        # Where a picture is the task's source, too, geometry may come to lie on it later.
        is_alone = "image" not in TASKS[task].inputs and _APART_FROM_IMAGE.issuperset(self._fields)
        self._is_reduced = is_alone and isinstance(source, ReducingSource)

    def record(self, index: int, rng: np.random.Generator | None = None) -> Record:
        """The checked fields of a record, center-cropped to the size of the target.

        It has the caption that `row` draws by `rng`, by default one that is fixed.
        """
        with self._naming(index) as where:
            record = self._read(index)
            record = TASKS[self.task].check(record, where=where, extra=self._extra)
            weights = self._collator.caption_weights
            rng = np.random.default_rng(index) if rng is None else rng
            record = TASKS[self.task].with_caption(record, rng, weights)
            return transforms.resize_and_crop(record, resolution=self._collator.shape.size)

    def example(self, index: int, rng: np.random.Generator, *, center: bool = False) -> Example:
        """A record as an example of the task, cropped at random or to the `center`."""
        with self._naming(index) as where:
            return self._example(index, rng, center=center, where=where)

    def why_skipped(self, index: int) -> DamagedRecord | UnsuitableRecord | None:
        """What is wrong with a record for this task; None if it can be used."""
        try:
            self.example(index, np.random.default_rng(0))
        except SKIPPED as error:
            return error
        return None

    def row(
        self,
        index: int,
        rng: np.random.Generator,
        *,
        sample_id: int = 0,
        drop: Drop = "none",
        center: bool = False,
    ) -> Row:
        """The same as a row, with its prompt tokenized."""
        with self._naming(index) as where:
            example = self._example(index, rng, center=center, where=where)
            origin = (self.source, index)
            return self._collator.row(
                example, task=self.task, sample_id=sample_id, drop=drop, origin=origin
            )

    def _example(
        self, index: int, rng: np.random.Generator, *, center: bool, where: str
    ) -> Example:
        task, record = TASKS[self.task], self._read(index, may_reduce=True)
        if self._extra:  # the task itself checks its own fields alone
            record = task.check(record, where=where, extra=self._extra)
        return task.example(
            record,
            rng,
            self._collator.shape.size,
            caption_weights=self._collator.caption_weights,
            where=where,
            center=center,
        )

    def _read(self, index: int, *, may_reduce: bool = False) -> Record:
        if not (may_reduce and self._is_reduced):
            return self.source.read(index, self._fields)
        height, width = self._collator.shape.size
        least = (_OVERSAMPLING * height, _OVERSAMPLING * width)
        return self.source.read_reduced(index, self._fields, least=least)

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[str]:
        """Makes one of the documented errors of what is raised inside, and names the record."""
        where = f"{self.source.name}[{index}]"
        try:
            yield where
        except NotFoundError:
            raise
        # A decoder or a transform may raise anything on a damaged record.
        except Exception as error:
            if _is_of_storage(error):
                raise UnreachableError(f"cannot read {where}: {error}") from error
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            text = str(error).removeprefix(f"{where}: ")
            message = f"{where} for task {self.task!r}: {kind}{text}"
            place = Place(self.source.name, index, *self.source.where(index))
            if isinstance(error, UnsuitableRecord):
                unsuitable = UnsuitableRecord(message)
                unsuitable.place = place
                raise unsuitable from error
            raise DamagedRecord(f"{where} for {self.task}", message, place=place) from error


def _is_of_storage(error: Exception) -> bool:
    """Whether the storage failed, and not a decoder."""
    # Pillow raises OSErrors for damaged pictures, but only the system's have a number.
    has_number = isinstance(error, OSError) and error.errno is not None
    return has_number or isinstance(error, ConnectionError | TimeoutError)
