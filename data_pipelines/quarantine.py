"""Unusable records: each is named once, and too large a share of them ends the run.

A few damaged records among millions should not stop a run, but a wrong dataset should. A sequential
test tells them apart (Ville 1939; Robbins 1970). With k damaged ones among n records,

    E = mean over p in [p0, 1] of p^k (1 - p)^(n - k) / (p0^k (1 - p0)^(n - k))

weighs all shares p above the tolerance p0 (`data.max_bad_fraction`) against p0. While the true
share is at most p0, E is a supermartingale that starts at 1: the chance that it ever reaches
1 / alpha is at most alpha, however long the run. Above p0 it grows without bound.
"""

import contextlib
import dataclasses
import json
import logging
import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath
from scipy import special

from data_pipelines.reader import SKIPPED, DamagedRecord, Place, Reader, UnsuitableRecord
from data_pipelines.transforms import Record
from univg_jax.errors import UserError
from univg_jax.files import append_lines

# p0 where no config says it: a share up to this is damage, a larger one a wrong dataset
TOLERANCE = 0.01
# The chance that one process ends one attempt of a run whose share is within the tolerance. Each
# process, and each attempt, counts for itself: a thousand of them together stay below 1e-3. A share
# of 100%, 5% or 2% is seen after about 4, 500 or 5,000 records.
ALPHA = 1e-6
MAX_LOGGED = 100  # records; to name more of them would bury the log

_logger = logging.getLogger(__name__)


def log_evidence(damaged: int, read: int, *, tolerance: float = TOLERANCE) -> float:
    """log E: how much speaks for a share above `tolerance` after `read` records."""
    if tolerance in (0, 1):  # the limits: then one damaged record is proof, or nothing is
        return math.inf if damaged > tolerance * read else -math.inf
    k, sound = damaged, read - damaged
    # The integral of p^k (1 - p)^sound over [p0, 1] is an incomplete beta function.
    above = special.betaincc(k + 1, sound + 1, tolerance)
    if above == 0:
        return -math.inf
    mean = special.betaln(k + 1, sound + 1) + math.log(above) - math.log1p(-tolerance)
    return float(mean - k * math.log(tolerance) - sound * math.log1p(-tolerance))


class Quarantine:
    """Names damaged records, counts them and the sound ones, and ends a run with too many.

    A record counts once a task. So the epochs of a small dataset are no new evidence: one cut
    picture of 32 is 3%, but never ends a run. Safe to use from several threads.

    With `file`, `flush` adds what was named since to that file of JSON lines: dataset, shard, key
    (the place in the shard), index (the place in the dataset), task and reason. A record is there
    once, also after a run was resumed: what the files beside it (those of other processes) have is
    not added again.
    """

    def __init__(self, *, tolerance: float = TOLERANCE, file: epath.PathLike | None = None) -> None:
        self._lock = threading.Lock()
        self._tolerance, self._file = tolerance, None if file is None else epath.Path(file)
        self._read = self._damaged = 0
        self._named: set[str] = set()
        self._written: set[tuple[str, int]] | None = None  # read when it is first needed
        self._pending: list[tuple[Place, str, str]] = []

    def accept(self) -> None:
        """Counts a record that was read for the first time."""
        with self._lock:
            self._read += 1

    def skip(
        self, error: DamagedRecord | UnsuitableRecord, *, task: str = "", is_new: bool = True
    ) -> None:
        """Names a damaged record the first time; counts any skipped record if it `is_new`.

        Raises UserError once the share of damaged records is surely above the tolerance.
        """
        if isinstance(error, UnsuitableRecord):
            if is_new:
                self.accept()
            return
        with self._lock:
            self._name(error)
            if self._file is not None and error.place is not None:
                self._pending.append((error.place, task, str(error)))
            if not is_new:
                return
            self._read, self._damaged = self._read + 1, self._damaged + 1
            damaged, read = self._damaged, self._read
        if log_evidence(damaged, read, tolerance=self._tolerance) >= -math.log(ALPHA):
            raise UserError(
                f"{damaged} of {read} records read are unusable "
                f"(more than data.max_bad_fraction={self._tolerance:.4g}); the last: {error}"
            ) from error

    def _name(self, error: DamagedRecord) -> None:
        if error.record in self._named or len(self._named) >= MAX_LOGGED:
            return
        self._named.add(error.record)
        _logger.warning("quarantined %s", error)
        if len(self._named) == MAX_LOGGED:
            _logger.warning("further quarantined records are counted, but not named")

    def flush(self) -> None:
        """Writes to the file what was named since the last time. Raises UserError."""
        if not self._pending:
            return
        with self._lock:
            pending, self._pending = self._pending, []
        if self._written is None:
            self._written = {
                (row.get("dataset"), row.get("index")) for row in read_quarantine(self._file.parent)
            }
        lines = []
        for place, task, reason in pending:
            if (key := (place.dataset, place.index)) not in self._written:
                self._written.add(key)
                about = dataclasses.asdict(place) | dict(task=task, reason=reason)
                lines.append(json.dumps(about, ensure_ascii=False))
        if lines:
            append_lines(self._file, lines)


def quarantine_file(
    workdir: epath.PathLike, *, process_index: int = 0, process_count: int = 1
) -> epath.Path:
    """Where a process of a run writes what it quarantines."""
    name = "quarantine" if process_count == 1 else f"quarantine-{process_index:05d}"
    return epath.Path(workdir) / f"{name}.jsonl"


def read_quarantine(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The quarantined records of a run, of all its processes.

    A line that is torn, or does not name a record, is left out with a warning.
    """
    workdir, rows = epath.Path(workdir), []
    for path in sorted(workdir.glob("quarantine*.jsonl")) if workdir.exists() else ():
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            row = None
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
            if _names_record(row):
                rows.append(row)
            else:
                _logger.warning("%s: line %d names no record, it is left out", path, number)
    return rows


def _names_record(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("dataset"), str)
        and isinstance(row.get("index"), int)
    )


def usable_records(reader: Reader, indices: Iterable[int]) -> Iterator[Record]:
    """The records at these places without the unusable ones, each place given once.

    Raises UserError once the share of damaged records is surely above TOLERANCE.
    """
    quarantine = Quarantine()
    for index in indices:
        try:
            record = reader.record(index)
        except SKIPPED as error:
            quarantine.skip(error)
        else:
            quarantine.accept()
            yield record
