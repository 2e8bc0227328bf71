"""Ctrl-C and SIGTERM end a command with one line and the usual exit code.

Python handles a signal between two of its own instructions, so while XLA compiles or a device
computes, which can take minutes, nothing would happen. A thread waits beside it: what does not end
within `GRACE` seconds is ended.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

GRACE = 3.0  # seconds
_LINES = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}


class Ended(KeyboardInterrupt):
    """A signal ended the command. No `Exception`, so that nothing on the way handles it."""

    def __init__(self, number: int) -> None:
        super().__init__(_LINES[signal.Signals(number)])
        self.exit_code = 128 + number


@contextlib.contextmanager
def ended_by_signals(*, at_once: bool) -> Iterator[None]:
    """In the block SIGINT and SIGTERM raise `Ended`.

    `at_once`: the process ends after `GRACE` seconds, whatever it does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    handlers = {number: signal.signal(number, end) for number in _LINES}
    with _ended_at_once() if at_once else contextlib.nullcontext():
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """In the block a signal ends the process after `GRACE` seconds, whatever it does."""
    over, (heard, written) = threading.Event(), os.pipe()
    os.set_blocking(written, False)
    before = signal.set_wakeup_fd(written)  # gets the number of each signal, at once

    def wait() -> None:
        while number := os.read(heard, 1)[0]:
            if number in _LINES and not over.wait(GRACE):
                print(f"univg: {_LINES[signal.Signals(number)]}", file=sys.stderr, flush=True)
                for child in multiprocessing.active_children():  # they would stay
                    child.terminate()
                os._exit(128 + number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.write(written, b"\0")
        thread.join()
        os.close(heard)
        os.close(written)
