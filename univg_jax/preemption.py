"""SIGTERM, which a cloud sends before it takes a machine away: a run saves its step and all its
processes end.
"""

import itertools
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
    """SIGTERM ended the run; nothing is lost."""


class Notice:
    """Whether SIGTERM came, from here to the end of the `with` block.

    One process notes the signal itself (in its main thread, where Python handles signals). Of
    several, JAX's coordination service notes it and picks a step that none has passed, since all
    have to save the same one.
    """

    def __init__(self) -> None:
        self.came = False
        self.alone = jax.process_count() == 1
        # the service, which may pick the first of them, starts at 0 whatever the step
        self.calls = itertools.count(1)
        self.handles = self.alone and threading.current_thread() is threading.main_thread()
        if self.handles:
            self.before = signal.signal(signal.SIGTERM, self._note)

    def __enter__(self) -> "Notice":
        return self

    def __exit__(self, *_: object) -> None:
        if self.handles:
            signal.signal(signal.SIGTERM, self.before)

    def reached(self) -> bool:
        """Whether to end now; every process asks once a step."""
        return (
            self.came
            if self.alone
            else multihost_utils.reached_preemption_sync_point(next(self.calls))
        )

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.came = True
