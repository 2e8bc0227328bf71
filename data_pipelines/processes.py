"""A pool of processes that end with their parent, and say in one line if one of them is killed."""

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

from univg_jax.errors import UserError

_context: Any = None  # what all calls of this process get, if it is one of a pool


def _begin(context: Any) -> None:
    """Makes a new process one of a pool's: it ends with its parent, however that ends."""
    global _context
    _context = context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent decides
    parent = multiprocessing.parent_process()

    def follow() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(_context, *arguments)


@runtime_checkable
class Workers(Protocol):
    """What calls `function(context, *arguments)`: a `Pool`, or machines (`beam`)."""

    size: int  # calls at once, about

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        """The call's future."""
        ...

    def result(self, future: concurrent.futures.Future) -> Any:
        """Waits for it. Raises what the call raised."""
        ...


class Pool:
    """Processes that call `function(context, *arguments)`; a single one is this one."""

    def __init__(self, context: Any, executor: concurrent.futures.Executor | None, size: int):
        self._context, self._executor, self.size = context, executor, size

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future:
        """The future result."""
        if self._executor is not None:
            return self._executor.submit(_call, function, *arguments)
        done: concurrent.futures.Future = concurrent.futures.Future()
        done.set_result(function(self._context, *arguments))
        return done

    def result(self, future: concurrent.futures.Future) -> Any:
        """What it gave. Raises what it raised, and UserError if its process was killed."""
        try:
            return future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a process of the build was killed, perhaps for want of memory: build again with "
                "fewer --processes; it goes on from here"
            ) from None


@contextlib.contextmanager
def open_pool(context: Any, processes: int) -> Iterator["Pool"]:
    """So many processes, each of which gets `context` once. An error stops what is queued."""
    if processes <= 1:
        yield Pool(context, None, 1)
        return
    # Spawned, not forked: the caller may hold threads of JAX, which a fork would leave locked.
    executor = concurrent.futures.ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(context,),
    )
    try:
        yield Pool(context, executor, processes)
    finally:
        # After an error, do not begin the parts that are still queued.
        executor.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """The cores that this process may use: fewer than the machine's where a container limits it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
