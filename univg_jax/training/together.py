"""What goes wrong on one host ends all of them, at the same point and with the reason."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from univg_jax.errors import UserError

_MOST = 2000  # bytes of a reason that the other hosts tell


def raise_together(failure: Exception | None) -> None:
    """Raises where any process has a failure: its own, or the first other's with its number.

    All processes call it, with None where nothing is wrong. One that raised alone would leave the
    others waiting for it.
    """
    if jax.process_count() > 1:
        told = _reason(failure).encode()[:_MOST]
        own = np.zeros(_MOST, np.uint8)
        own[: len(told)] = np.frombuffer(told, np.uint8)
        reasons = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, _MOST)
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
