"""Ctrl-C and SIGTERM end a command with one line and the usual exit code.

Python handles a signal between two of its own instructions, so while XLA compiles or a device
computes, which can take minutes, nothing would happen. A thread waits beside it: what does not end
within `GRACE` seconds is ended. Process 0 of several tells the others then, which takes it as long
again. In a callback or a `__del__` Python drops what is raised, and the signal would be lost: it is
sent again.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from univg_jax.errors import ENDED_BY, Ended

GRACE = 3.0  # seconds
AGAIN = 0.05  # seconds until a signal that was lost is sent again


@contextlib.contextmanager
def ended_by_signals(*, waits: Callable[[], bool]) -> Iterator[None]:
    """In the block SIGINT and SIGTERM raise `Ended`, and end the process after `GRACE` seconds.

    While `waits()`, there is work that the first signal lets come to its end: only the second one
    ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    heard = []

    def end(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        raise Ended(number)

    handlers = {number: signal.signal(number, end) for number in ENDED_BY}
    with _ended_at_last(waits), _sent_again():
        try:
            yield
        except Exception as error:
            if heard:  # an extension, such as numpy while it is imported, made another error of it
                raise Ended(heard[0]) from error
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _sent_again() -> Iterator[None]:
    """In the block an `Ended` that Python drops is raised again, outside of what dropped it."""
    before = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if isinstance(dropped.exc_value, Ended):
            to = [threading.main_thread().ident, dropped.exc_value.number]
            again = threading.Timer(AGAIN, signal.pthread_kill, to)
            again.daemon = True
            again.start()
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def _ended_at_last(waits: Callable[[], bool]) -> Iterator[None]:
    """In the block the thread ends the process, whatever it does."""
    over, (heard, written) = threading.Event(), os.pipe()
    os.set_blocking(written, False)
    before = signal.set_wakeup_fd(written)  # gets the number of each signal, at once

    def wait() -> None:
        is_first = True
        while number := os.read(heard, 1)[0]:
            if number not in ENDED_BY:
                continue
            may_wait, is_first = is_first, False
            # The work may begin within these seconds: it has heard of the signal, too.
            if not ((may_wait and waits()) or over.wait(GRACE) or (may_wait and waits())):
                print(f"univg: {ENDED_BY[signal.Signals(number)]}", file=sys.stderr, flush=True)
                for child in multiprocessing.active_children():  # they would stay
                    child.terminate()
                end_now(128 + number, ENDED_BY[signal.Signals(number)])

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


def end_now(code: int, reason: str) -> None:
    """Ends the process, and the others that it works with if it is one of several."""
    if (distributed := sys.modules.get("univg_jax.distributed")) is not None:
        telling = threading.Thread(target=distributed.exit_now, args=(code, reason), daemon=True)
        telling.start()
        telling.join(2 * GRACE)  # or nobody answers
    os._exit(code)
