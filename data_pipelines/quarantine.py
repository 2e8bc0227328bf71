"""Unusable records: each is logged once and counted, and too many of them end the run.

A few damaged records among millions should not stop a training run, but a wrong dataset should.
"""

import logging
import threading

from univg_jax.errors import UserError

# A fraction says something only after some records: one bad record among the first ten is no 10%.
MIN_READ = 100
MAX_FRACTION = 0.01  # of the records read; more than that is a wrong dataset, not damage

_logger = logging.getLogger(__name__)


class Quarantine:
    """Counts the records that were read, and those of them that are unusable.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_read = 0
        self._unusable: set[tuple[str, str]] = set()

    def __len__(self) -> int:
        """How many different (task, record) pairs are unusable so far."""
        return len(self._unusable)

    def record_success(self) -> None:
        """Counts a record that was read and made into an example."""
        with self._lock:
            self._num_read += 1

    def add(self, task: str, record: str, error: Exception) -> None:
        """Counts an unusable record, named like `scenes/train[7]`, and logs it the first time.

        Raises:
          UserError: more than MAX_FRACTION of at least MIN_READ records are unusable.
        """
        with self._lock:
            self._num_read += 1
            if (task, record) not in self._unusable:
                self._unusable.add((task, record))
                _logger.warning("quarantined %s for task %s: %s", record, task, error)
            count, total = len(self._unusable), self._num_read
        if total >= MIN_READ and count > MAX_FRACTION * total:
            raise UserError(
                f"{count} of {total} records read are unusable (more than {MAX_FRACTION:.0%}); "
                f"the last, {record}: {error}"
            ) from error
