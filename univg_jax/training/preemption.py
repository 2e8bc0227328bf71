"""SIGTERM, which a cloud sends before it takes a machine, and Ctrl-C: save the step, and end."""

import itertools
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

_NOTICE = b"\nCtrl-C: the run ends when its step is saved; once more ends it at once\n"


class PreemptionNotice:
    """Whether a signal asked the run to end, from construction to the end of the `with` block.

    The signals are SIGTERM and Ctrl-C; a second Ctrl-C raises KeyboardInterrupt. A single process
    handles them itself, in its main thread, where Python handles signals. Of several processes
    JAX's coordination service receives SIGTERM, and chooses a step that none of them has passed,
    since all have to save the same one; Ctrl-C is passed on to it as SIGTERM.
    """

    def __init__(self) -> None:
        self.signum = signal.SIGTERM  # what asked, as far as this process knows
        self._received = self._interrupted = False
        self._is_single_process = jax.process_count() == 1
        # The service counts calls, from 1, whatever step a resumed run is at.
        self._calls = itertools.count(1)
        handled = {signal.SIGINT: self._interrupt}
        if self._is_single_process:
            handled[signal.SIGTERM] = self._receive
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._previous_handlers = {
            number: signal.signal(number, handler)
            for number, handler in handled.items()
            if in_main_thread
        }

    def __enter__(self) -> "PreemptionNotice":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def stop_requested(self) -> bool:
        """Whether to save and end now; every process asks once a step."""
        if self._is_single_process:
            return self._received
        return multihost_utils.reached_preemption_sync_point(next(self._calls))

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = True

    def _interrupt(self, signum: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted, self.signum = True, signal.SIGINT
        os.write(2, _NOTICE)  # a handler may have come into the middle of another write
        signal.raise_signal(signal.SIGTERM)
