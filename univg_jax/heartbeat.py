"""Several processes watch each other: one that is missing ends all, with a line that names it.

Each tells process 0 every `BEAT` seconds that it lives and what it does, through JAX's key-value
store, which process 0 holds. Process 0 watches the others, and they watch it. So a pod's traffic
grows with the number of processes, and no clocks are compared.

JAX's coordination service would end the others too, but later, and from C++ with pages of text. At
once it acts only where process 0 itself is gone; `at_coordinators_end` has a line for that.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from univg_jax.together import is_waiting
from univg_jax.trees import Json

BEAT = 1.0  # seconds
# Seconds without a beat. A process that lives may pause for long: its threads wait for each other
# (Python's lock) while one of them is in C++, and for a processor where there are too few.
PATIENCE = 100.0
# The same after an error of communication, whose cause is nearly always that a process has ended.
SUSPICIOUS = 15.0
_FIRST, _OTHERS = "univg_jax/first/", "univg_jax/others/"
_VERDICT = _FIRST + "verdict"


@dataclasses.dataclass
class _Seen:
    """What process 0 knows of another one: its newest beat, and when that came."""

    text: str
    beat: Json
    at: float


class Heartbeat:
    """Beats from construction to `stop`, and ends the process when another one is missing.

    `doing()` says what this process is at. `before_end()` is called before the process ends, unless
    another one has said why: it may save what helps to find the cause.
    """

    def __init__(self, client: Any, *, index: int, count: int) -> None:
        self._client, self.index, self._count = client, index, count
        self.doing: Callable[[], str] = str
        self.before_end: Callable[[], None] = lambda: None
        self._own: Json = {
            **{"host": socket.gethostname(), "pid": os.getpid(), "number": 0},
            **{"doing": "", "is_waiting": False},
        }
        self._stopped, self._ending = threading.Event(), threading.Lock()
        self._heard = self._begin = time.monotonic()
        self._seen: dict[int, _Seen] = {}
        for run in (self._beat, self._listen, self._watch):
            threading.Thread(target=run, daemon=True).start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """This process has done its work: nobody waits for it, and it for nobody."""
        atexit.unregister(self.stop)
        if not self._stopped.is_set():
            self._stopped.set()
            self._tell(is_done=True)

    def end_all(self, reason: str, code: int) -> None:
        """Tells the others that this process ends, and why; they end with `code`."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._tell(reason=reason, code=code)
        if self.index == 0:
            self._judge(f"{self._name(0)} ended: {reason}", code, is_known=True)
            time.sleep(3 * BEAT)  # the store ends with this process: first all should read it

    def suspect(self) -> None:
        """After an error that may be another process's end: returns if all turn out to live."""
        self._own["is_suspicious"] = True
        self._await_verdict(SUSPICIOUS + 4 * BEAT)

    def stalled(self, reason: str) -> None:
        """Ends all processes since this one does not get on; returns only if nobody listens."""
        self._own["stalled"] = reason
        self._await_verdict(PATIENCE)

    def _await_verdict(self, seconds: float) -> None:
        self._stopped.wait(seconds)
        if self._ending.locked():  # there is one, and another thread ends the process
            threading.Event().wait()

    def _tell(self, **more: str | int | bool) -> None:
        at = {"doing": self.doing(), "is_waiting": is_waiting()}
        self._own |= {"number": self._own["number"] + 1, **at, **more}
        key = f"{_FIRST}beat" if self.index == 0 else f"{_OTHERS}{self.index}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store is gone: see `_watch`
            self._client.key_value_set(key, json.dumps(self._own), allow_overwrite=True)

    def _judge(self, line: str, code: int, *, is_known: bool = False) -> None:
        verdict = {"line": line, "code": code, "is_known": is_known}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # there is a verdict already
            self._client.key_value_set(_VERDICT, json.dumps(verdict))

    def _beat(self) -> None:
        while not self._stopped.is_set():
            self._tell()
            self._stopped.wait(BEAT)

    def _listen(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                found = dict(self._client.key_value_dir_get(_FIRST))
                self._heard = time.monotonic()
                if _VERDICT in found:
                    self._end(**json.loads(found[_VERDICT]))
                elif self.index == 0:
                    self._look(dict(self._client.key_value_dir_get(_OTHERS)))
                elif not self._is_alive(0, found.get(f"{_FIRST}beat")):
                    self._end(_missing(self._name(0), self._patience), 1)
            self._stopped.wait(BEAT)

    def _watch(self) -> None:
        """Ends the process where the store, which is process 0's, does not answer."""
        before = time.monotonic()
        while not self._stopped.wait(BEAT):
            now = time.monotonic()
            if now - before > PATIENCE / 4:  # it is this process that was stopped
                self._heard = now
            before = now
            if now - self._heard > self._patience:
                self._end(_missing(self._name(0), self._patience), 1)

    def _look(self, beats: dict[str, str]) -> None:
        """Process 0 judges the others by their beats, and itself."""
        missing = [
            i for i in range(1, self._count) if not self._is_alive(i, beats.get(f"{_OTHERS}{i}"))
        ]
        every = {0: self._own} | {i: seen.beat for i, seen in self._seen.items()}
        if ended := [i for i, beat in every.items() if "reason" in beat]:
            beat = every[ended[0]]
            line = f"{self._name(ended[0])} ended: {beat['reason']}"
            self._judge(line, beat["code"], is_known=True)
        elif missing:
            more = f", as {len(missing) - 1} more" if missing[1:] else ""
            self._judge(f"{_missing(self._name(missing[0]), self._patience)}{more}", 1)
        elif stalled := [beat["stalled"] for beat in every.values() if "stalled" in beat]:
            # Who waits for others is not the cause; else it is what the fewest do.
            busy = {i: beat for i, beat in every.items() if not beat["is_waiting"]} or every
            doing = {i: str(beat["doing"]) for i, beat in busy.items()}
            rarest, number = Counter(doing.values()).most_common()[-1]
            who = next(self._name(i) for i in doing if doing[i] == rarest)
            at = f"{'all are' if number == self._count else f'{who} is'} at: {rarest}"
            self._judge(f"{stalled[0]}; {at}", 1)

    @property
    def _patience(self) -> float:
        seen = list(self._seen.values())  # another thread may add to them
        beats = (self._own, *(one.beat for one in seen))
        return SUSPICIOUS if any(beat.get("is_suspicious") for beat in beats) else PATIENCE

    def _is_alive(self, index: int, text: str | None) -> bool:
        seen, now = self._seen.get(index), time.monotonic()
        if text is not None and (seen is None or seen.text != text):
            seen = self._seen[index] = _Seen(text, json.loads(text), now)
        if seen is not None and seen.beat.get("is_done"):
            return True
        return now - (self._begin if seen is None else seen.at) <= self._patience

    def _name(self, index: int) -> str:
        seen = self._seen.get(index)
        beat = self._own if index == self.index else seen.beat if seen else {}
        where = f" (host {beat['host']}, pid {beat['pid']})" if beat else ""
        return f"process {index} of {self._count}{where}"

    def _end(self, line: str, code: int, is_known: bool = False) -> None:
        if self._stopped.is_set() or not self._ending.acquire(blocking=False):
            return
        if not is_known:
            self.before_end()
        # First all should read it: the store ends with process 0, and who loses another process
        # has an error of its own.
        time.sleep((3 if self.index == 0 else 2) * BEAT)
        end_process(line, code)


_current: Heartbeat | None = None


def start() -> None:
    """Begins to beat if this process is one of several, which `jax.distributed` has joined."""
    # JAX has no public name for its key-value store, and `jax.process_index` would wait here for
    # all processes to say what devices they have.
    from jax._src.distributed import global_state as joined

    global _current
    if joined.num_processes > 1:
        _current = Heartbeat(joined.client, index=joined.process_id, count=joined.num_processes)


def current() -> Heartbeat | None:
    """What watches the other processes; None where there are none."""
    return _current


def _missing(name: str, seconds: float) -> str:
    return f"{name} does not answer for {seconds:.0f} s: it has ended, or hangs"


def end_process(line: str, code: int) -> None:
    """Ends this process, whatever its threads do, with a line."""
    sys.stdout.flush()
    print(f"univg: {'error: ' if code < 128 else ''}{line}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():  # they would stay
        child.terminate()
    os._exit(code)


@contextlib.contextmanager
def at_coordinators_end() -> Iterator[None]:
    """The client of JAX's service that is made in the block ends this process with our line.

    When process 0 is gone the client calls `missed_heartbeat_callback`, by default a fatal error
    of C++. A Python function cannot take its argument, a status that has no Python type: C++
    throws `bad_cast` where nobody catches it, and terminates. So the line is in the handler of
    that. Where there is no such handler, or a later JAX has other names, all is as JAX has it.
    """
    from jax._src.lib import _jax

    make = getattr(_jax, "get_distributed_runtime_client", None)
    try:
        runtime = ctypes.CDLL("libstdc++.so.6")
        set_terminate = runtime._ZSt13set_terminatePFvvE
        current = runtime.__cxa_current_exception_type
    except (OSError, AttributeError):
        make = None
    if make is None:
        yield
        return
    handler = ctypes.CFUNCTYPE(None)
    current.restype = ctypes.c_void_p
    set_terminate.restype, set_terminate.argtypes = handler, [handler]

    def end(*_: object) -> None:
        end_process("process 0, the coordinator, has ended", 1)

    def terminate() -> None:
        kind = current()
        name = ctypes.c_char_p.from_address(kind + ctypes.sizeof(ctypes.c_void_p)) if kind else None
        if name is not None and name.value == b"St8bad_cast":
            end()
        before()

    before = set_terminate(ours := handler(terminate))
    atexit.register(lambda _: set_terminate(before), ours)  # which lives as long
    _jax.get_distributed_runtime_client = functools.partial(make, missed_heartbeat_callback=end)
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make
