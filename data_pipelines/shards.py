"""Random access to the records of many shards, with a bounded number of open files.

A shuffled stream of 40 sources of 1,000 shards reads from all 40,000 of them. An open reader holds
a file, and the index of its records. So the files that were not read for longest are closed.
"""

import bisect
import collections
import contextlib
import dataclasses
import itertools
import resource
import threading
import weakref
from collections.abc import Sequence

from array_record.python import array_record_module
from etils import epath

MAX_OPEN = 2**14  # of a process's files: about 10 KB and an index each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of records."""

    filename: str
    examples_in_shard: int

    @property
    def path(self) -> epath.Path:
        """Where it lies."""
        return epath.Path(self.filename)


# Not `Sequence[bytes]`: whoever checks that type at run time would read records for it.
class Shards(Sequence):
    """The records of ArrayRecord shards, one shard after another; safe to read from threads.

    Indexing raises IndexError for a place outside, and RuntimeError for a record or a file that
    cannot be read.
    """

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards
        counts = (shard.examples_in_shard for shard in shards)
        self._starts = [0, *itertools.accumulate(counts)]
        self._owner = next(_owners)  # not its id: the next object may have the same
        weakref.finalize(self, _open.forget, self._owner)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        return self.reader(self._shards[number]).read([index - self._starts[number]])[0]

    def reader(self, shard: Shard) -> array_record_module.ArrayRecordReader:
        """The open reader of a shard."""
        return _open.reader(self._owner, shard.filename)


class _OpenFiles:
    """The readers of a process, closed by the time of their last use.

    They belong to an owner: whoever opens a dataset anew reads its files as they are now.
    """

    def __init__(self, limit: int):
        self._limit, self._lock = limit, threading.Lock()
        self._readers: collections.OrderedDict[tuple[int, str], object] = collections.OrderedDict()
        self._gone: collections.deque[int] = collections.deque()  # owners whose files are open yet

    def reader(self, owner: int, name: str) -> array_record_module.ArrayRecordReader:
        with self._lock:
            if (found := self._readers.get((owner, name))) is not None:
                self._readers.move_to_end((owner, name))
                return found
        # Outside of the lock: in a bucket this waits for the network.
        made = array_record_module.ArrayRecordReader(
            name, options="readahead_buffer_size:0", file_reader_buffer_size=2**15
        )
        with self._lock:
            self._close_gone()
            found = self._readers.setdefault((owner, name), made)
            while len(self._readers) > self._limit:
                # Its file is closed when the last thread that reads from it lets go of it.
                self._readers.popitem(last=False)
        return found

    def forget(self, owner: int) -> None:
        """Closes all files of an owner, at once or before the next file is opened."""
        self._gone.append(owner)
        # A collection of garbage calls this at any instruction, also of a thread that has the lock:
        # it would wait for itself.
        if self._lock.acquire(blocking=False):
            try:
                self._close_gone()
            finally:
                self._lock.release()

    def _close_gone(self) -> None:
        while self._gone:
            owner = self._gone.popleft()
            for key in [key for key in self._readers if key[0] == owner]:
                del self._readers[key]


def _file_limit() -> int:
    """How many files may be open: half of what the system allows, which is first raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return MAX_OPEN if soft == resource.RLIM_INFINITY else min(MAX_OPEN, soft // 2)


_open = _OpenFiles(_file_limit())
_owners = itertools.count()
