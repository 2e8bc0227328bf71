"""What all processes do together, and what goes wrong on one of them ends all with the reason.

Each operation here knows that it waits for the others: where all hang, it is not the cause.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from univg_jax.errors import UserError

_MOST = 2000  # bytes of a reason that the other processes tell
_END = object()
T = TypeVar("T")
_waiting = 0  # blocks of `_wait`, one in another


@contextlib.contextmanager
def _wait() -> Iterator[None]:
    """A block in which this process waits for others."""
    global _waiting
    _waiting += 1
    try:
        yield
    finally:
        _waiting -= 1


def is_waiting() -> bool:
    """Whether this process waits for others."""
    return _waiting > 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes enter: it ends on all of them, or raises on all.

    It is also a barrier, and must not have another collective operation inside: a process that
    raised alone would leave the others waiting there. Raises what the block does; where it did not
    fail, UserError with the number and the reason of the first process where it did.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    raise_together(failure)


def each_together(items: Iterable[T]) -> Iterator[T]:
    """`items`, equally many on all processes: where one fails to make its next one, all raise."""
    iterator = iter(items)
    while True:
        with together():
            item = next(iterator, _END)
        if item is _END:
            return
        yield item


def of_first(value: np.ndarray) -> np.ndarray:
    """The value that process 0 gives; all processes give one of its shape and type."""
    if jax.process_count() == 1:
        return value
    with _wait():
        return np.asarray(multihost_utils.broadcast_one_to_all(value))


def of_all(tree: PyTree, *, tiled: bool = False) -> PyTree:
    """What all processes give, one array a leaf: stacked by process, or `tiled` along their rows.

    All processes call it, with trees of the same shapes and types. An array that is split over the
    devices of all of them is given `tiled`, and is whole then.
    """
    with _wait():
        return multihost_utils.process_allgather(tree, tiled=tiled)


def most_of_all(own: np.ndarray) -> np.ndarray:
    """The elementwise maximum of all processes' arrays of one shape. All of them call it."""
    return np.asarray(of_all(own)).reshape(-1, *own.shape).max(axis=0)


def barrier(name: str) -> None:
    """Waits for all other processes, if there are any."""
    if jax.process_count() > 1:
        with _wait():
            multihost_utils.sync_global_devices(name)


def raise_together(failure: Exception | None) -> None:
    """Raises on all processes where any has a failure; they give None where nothing is wrong."""
    if jax.process_count() > 1:
        told = _reason(failure).encode()[:_MOST]
        own = np.zeros(_MOST, np.uint8)
        own[: len(told)] = np.frombuffer(told, np.uint8)
        reasons = np.asarray(of_all(own)).reshape(-1, _MOST)
        failed = np.flatnonzero(reasons[:, 0])
        if failure is None and len(failed):
            reason = reasons[failed[0]].tobytes().rstrip(b"\0").decode(errors="replace")
            raise UserError(f"process {failed[0]} of {jax.process_count()} cannot go on: {reason}")
    if failure is not None:
        raise failure


def _reason(failure: Exception | None) -> str:
    if failure is None or isinstance(failure, UserError):
        return str(failure or "")
    return f"{type(failure).__name__}: {failure}"
