"""Unusable records: each is named once, and too large a share of them ends the run.

A few damaged records among millions should not stop a run, but a wrong dataset should. A sequential
test tells them apart (Ville 1939; Robbins 1970). With k damaged ones among n records,

    E = mean over p in [p0, 1] of p^k (1 - p)^(n - k) / (p0^k (1 - p0)^(n - k))

weighs all shares p above the tolerance p0 against p0. While the true share is at most p0, E is a
supermartingale that starts at 1: the chance that it ever reaches 1 / alpha is at most alpha,
however long the run. Above p0 it grows without bound.
"""

import logging
import math
import threading
from collections.abc import Iterable, Iterator

from scipy import special

from data_pipelines.reader import SKIPPED, DamagedRecord, Reader, UnsuitableRecord
from data_pipelines.transforms import Record
from univg_jax.errors import UserError

TOLERANCE = 0.01  # p0: a share up to this is damage, a larger one a wrong dataset
# The chance that one process ends one attempt of a run whose share is within the tolerance. Each
# process, and each attempt, counts for itself: a thousand of them together stay below 1e-3. A share
# of 100%, 5% or 2% is seen after about 4, 500 or 5,000 records.
ALPHA = 1e-6
MAX_LOGGED = 100  # records; to name more of them would bury the log

_logger = logging.getLogger(__name__)


def log_evidence(damaged: int, read: int) -> float:
    """log E: how much speaks for a share above TOLERANCE after `read` records."""
    k, sound = damaged, read - damaged
    # The integral of p^k (1 - p)^sound over [p0, 1] is an incomplete beta function.
    above = special.betaincc(k + 1, sound + 1, TOLERANCE)
    if above == 0:
        return -math.inf
    mean = special.betaln(k + 1, sound + 1) + math.log(above) - math.log1p(-TOLERANCE)
    return float(mean - k * math.log(TOLERANCE) - sound * math.log1p(-TOLERANCE))


class Quarantine:
    """Names damaged records, counts them and the sound ones, and ends a run with too many.

    A record counts once a task. So the epochs of a small dataset are no new evidence: one cut
    picture of 32 is 3%, but never ends a run. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read = self._damaged = 0
        self._named: set[str] = set()

    def accept(self) -> None:
        """Counts a record that was read for the first time."""
        with self._lock:
            self._read += 1

    def skip(self, error: DamagedRecord | UnsuitableRecord, *, is_new: bool = True) -> None:
        """Names a damaged record the first time; counts any skipped record if it `is_new`.

        Raises UserError once the share of damaged records is surely above TOLERANCE.
        """
        if isinstance(error, UnsuitableRecord):
            if is_new:
                self.accept()
            return
        with self._lock:
            if error.record not in self._named and len(self._named) < MAX_LOGGED:
                self._named.add(error.record)
                _logger.warning("quarantined %s", error)
                if len(self._named) == MAX_LOGGED:
                    _logger.warning("further quarantined records are counted, but not named")
            if not is_new:
                return
            self._read, self._damaged = self._read + 1, self._damaged + 1
            damaged, read = self._damaged, self._read
        if log_evidence(damaged, read) >= -math.log(ALPHA):
            raise UserError(
                f"{damaged} of {read} records read are unusable (more than {TOLERANCE:.0%}); "
                f"the last: {error}"
            ) from error


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
