"""SIGTERM, which a cloud sends before it takes a machine, and Ctrl-C: save the step, and end."""

import ctypes
import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

from univg_jax.errors import Ended

_NOTICE = b"\nCtrl-C: the run ends when its step is saved; once more ends it at once\n"
_saving: set["PreemptionNotice"] = set()
_passing: list[Callable[[], object]] = []  # tells JAX's service, once it runs


def is_saving() -> bool:
    """Whether a run in this process has steps that it will save before it ends."""
    return bool(_saving)


class Stopping(Exception):
    """A signal asked the run to end in the middle of what may be done again."""


class PreemptionNotice:
    """Whether a signal asked the run to end, from construction to the end of the `with` block.

    The signals are SIGTERM and Ctrl-C; the second one raises `errors.Ended`. They are handled in
    the main thread, where Python handles signals. Of several processes they are passed on to JAX's
    preemption service, which chooses a moment that none of them has passed, since all have to save
    the same step.
    """

    def __init__(self) -> None:
        self.signum = signal.SIGTERM  # what asked, as far as this process knows
        self._received = False
        self._is_single_process = jax.process_count() == 1
        # The service counts calls, from 1, whatever step a resumed run is at.
        self._calls = itertools.count(1)
        self._pass_on = (lambda: None) if self._is_single_process else _preemption_service()
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._previous_handlers = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
            if in_main_thread
        }

    def __enter__(self) -> "PreemptionNotice":
        return self

    def __exit__(self, *_: object) -> None:
        _saving.discard(self)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From here on there are steps to save."""
        _saving.add(self)

    def stop_requested(self) -> bool:
        """Whether to save and end now; all processes ask equally often."""
        if self._is_single_process:
            return self._received
        return multihost_utils.reached_preemption_sync_point(next(self._calls))

    def check(self) -> None:
        """Raises `Stopping` if the run is to end; all processes ask equally often."""
        if self.stop_requested():
            raise Stopping

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self._received:
            raise Ended(signum)
        self._received, self.signum = True, signal.Signals(signum)
        if signum == signal.SIGINT:
            os.write(2, _NOTICE)  # a handler may have come into the middle of another write
        self._pass_on()


def _preemption_service() -> Callable[[], object]:
    """Starts JAX's service, if it does not run yet; returns what tells it that a signal has come.

    The service's own handler, in C++, would replace Python's as soon as processes join. Then a
    signal while a program compiles would wait for minutes, and a second one would do nothing. So it
    starts where the steps do, and Python calls its handler.
    """
    from jax._src.distributed import global_state as joined

    if joined.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        joined.initialize_preemption_sync_manager()
        _passing.clear()
    if not _passing:
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
        exchange = ctypes.CDLL(None).signal
        exchange.restype, exchange.argtypes = handler, [ctypes.c_int, ctypes.c_void_p]
        theirs = exchange(signal.SIGTERM, None)
        _passing.append(functools.partial(theirs, int(signal.SIGTERM)))
    return _passing[0]
