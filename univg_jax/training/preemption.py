"""SIGTERM, which a cloud sends before it takes a machine away: save the step, and end."""

import itertools
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class PreemptionNotice:
    """Whether SIGTERM was received, from construction to the end of the `with` block.

    A single process handles the signal itself, in its main thread, where Python handles signals. Of
    several processes JAX's coordination service receives it, and chooses a step that none of them
    has passed, since all have to save the same one.
    """

    def __init__(self) -> None:
        self._received = False
        self._is_single_process = jax.process_count() == 1
        # The service counts calls, from 1, whatever step a resumed run is at.
        self._calls = itertools.count(1)
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._handles_signal = self._is_single_process and in_main_thread
        if self._handles_signal:
            self._previous_handler = signal.signal(signal.SIGTERM, self._receive)

    def __enter__(self) -> "PreemptionNotice":
        return self

    def __exit__(self, *_: object) -> None:
        if self._handles_signal:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def stop_requested(self) -> bool:
        """Whether to save and end now; every process asks once a step."""
        if self._is_single_process:
            return self._received
        return multihost_utils.reached_preemption_sync_point(next(self._calls))

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        self._received = True
