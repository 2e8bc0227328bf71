"""A run that does not get on ends, with the stacks of all its processes, instead of waiting on."""

import dataclasses
import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable

from absl import logging
from etils import epath

from univg_jax import heartbeat
from univg_jax.errors import UserError
from univg_jax.files import write_whole
from univg_jax.settings import Train

STACKS = "stacks"
STOPPED = 3.0  # seconds: a thread that slept for so long was stopped, with all of its process
WRITING = 10.0  # seconds that a file system, which may be what hangs, has for the stacks


@dataclasses.dataclass(frozen=True)
class _Limit:
    """Seconds from now, None: any number; and what is said if nothing else begins within them."""

    seconds: float | None
    reason: str
    since: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return self.seconds is not None and time.monotonic() - self.since >= self.seconds


class Watchdog:
    """In its `with` block, ends the run when it does not get on.

    At the start each part (`begin`) has `settings.watchdog_start` seconds, and after a `beat` the
    next one must come within `settings.watchdog`; None: no limit. At the end each process writes
    `workdir/stacks/process_N.txt`. So it does when another process is missing. `doing()` says what
    this process is at, for the line: by default the part of the start.
    """

    def __init__(self, workdir: epath.PathLike, settings: Train, *, part: str = "the start"):
        self._folder, self._settings = epath.Path(workdir) / STACKS, settings
        self._over = threading.Event()
        self._heartbeat = heartbeat.current()
        self.doing: Callable[[], str] = lambda: self._part
        self.begin(part)

    def begin(self, part: str, *, is_bounded: bool = True) -> None:
        """A part of the start begins, which may take any time if it is not bounded."""
        seconds = self._settings.watchdog_start if is_bounded else None
        self._part = part
        self._limit = _Limit(
            seconds,
            f"a part of the start takes more than {seconds or 0:g} s (train.watchdog_start)",
        )

    def beat(self, after: str) -> None:
        """The run gets on: it is now after a step, or what else takes time."""
        seconds = self._settings.watchdog
        self._limit = _Limit(
            seconds, f"no step for {seconds or 0:g} s after {after} (train.watchdog)"
        )

    def __enter__(self) -> "Watchdog":
        if self._heartbeat is not None:
            self._heartbeat.doing, self._heartbeat.before_end = self._say, self._write_stacks
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._heartbeat is not None:
            self._heartbeat.doing, self._heartbeat.before_end = str, lambda: None

    def _say(self) -> str:
        return self.doing()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(0.5):
            pause, before = time.monotonic() - before, time.monotonic()
            if pause > STOPPED:
                self._limit = dataclasses.replace(self._limit, since=self._limit.since + pause)
            if not (limit := self._limit).is_over:
                continue
            reason = f"{limit.reason}; the stacks of all processes are in {self._folder}"
            if self._heartbeat is not None:
                self._heartbeat.stalled(reason)
            self._write_stacks()
            heartbeat.end_process(f"{reason}; it is at: {self.doing()}", 1)

    def _write_stacks(self) -> None:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        index = 0 if self._heartbeat is None else self._heartbeat.index
        written = threading.Event()

        def write() -> None:
            try:
                write_whole(self._folder / f"process_{index}.txt", stacks)
                written.set()
            except UserError as error:
                logging.error("%s", error)

        threading.Thread(target=write, daemon=True).start()
        if not written.wait(WRITING):
            logging.error("the stacks, which cannot be written:\n%s", stacks.decode())
