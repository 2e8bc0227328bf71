"""A run that does not get on ends, with the stacks of all its processes, instead of waiting on."""

import faulthandler
import tempfile
import threading
import time
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from univg_jax import heartbeat
from univg_jax.errors import UserError
from univg_jax.files import write_whole

STACKS = "stacks"
WRITING = 10.0  # seconds that a file system, which may be what hangs, has for the stacks


class Watchdog:
    """In its `with` block, ends the run when `beat` was not called for `seconds`; None: never.

    Each process then writes `workdir/stacks/process_N.txt`. So it does when another process is
    missing. `doing()` says what this process is at, for the line.
    """

    def __init__(
        self, workdir: epath.Path, seconds: float | None, *, doing: Callable[[], str]
    ) -> None:
        self._folder, self._seconds, self._doing = workdir / STACKS, seconds, doing
        self._over = threading.Event()
        self._heartbeat = heartbeat.current()
        self.beat("the start")

    def beat(self, after: str) -> None:
        """The run gets on: it is now after a step, or what else takes time."""
        self._newest = after, time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self._heartbeat is not None:
            self._heartbeat.doing, self._heartbeat.before_end = self._doing, self._write_stacks
        if self._seconds is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._heartbeat is not None:
            self._heartbeat.doing, self._heartbeat.before_end = str, lambda: None

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 10, 1.0)):
            after, since = self._newest
            if time.monotonic() - since < self._seconds:
                continue
            reason = (
                f"no step for {self._seconds:g} s after {after} (train.watchdog); the stacks of "
                f"all processes are in {self._folder}"
            )
            if self._heartbeat is not None:
                self._heartbeat.stalled(reason)
            self._write_stacks()
            heartbeat.end_process(f"{reason}; it is at: {self._doing()}", 1)

    def _write_stacks(self) -> None:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        written = threading.Event()

        def write() -> None:
            try:
                write_whole(self._folder / f"process_{jax.process_index()}.txt", stacks)
                written.set()
            except UserError as error:
                logging.error("%s", error)

        threading.Thread(target=write, daemon=True).start()
        if not written.wait(WRITING):
            logging.error("the stacks, which cannot be written:\n%s", stacks.decode())
