"""One command as several processes, one a host: `jax.distributed`, with clear errors.

A process that fails must not wait for the others. It says why and exits, and they end with a line
that names it; so do they when one is gone without a word, or stopped (`heartbeat`).
"""

import collections
import contextlib
import os
import socket
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from univg_jax import heartbeat, roll_call, sharding
from univg_jax.errors import UnreachableError, UserError

ENVIRONMENT = "UNIVG_DISTRIBUTED"
TIMEOUT = 300  # seconds for all processes to start: hosts of a pod start minutes apart
HEARTBEAT = 300  # seconds of JAX's own service; ours is faster


def start(
    *,
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Joins the other processes, if there are any; call it before JAX's backend is first used.

    `distributed`, or the variable `UNIVG_DISTRIBUTED`, takes the addresses from the environment
    (Cloud TPU, GKE, SLURM, Open MPI). Otherwise the three others name them: where process 0
    listens, how many processes there are, and which one this is.

    Raises UserError for arguments that do not fit together, or processes with other numbers of
    devices; UnreachableError if the coordinator's port is taken, or it or one of the processes does
    not come within `timeout` seconds.
    """
    names = ("--coordinator", "--num_processes", "--process_id")
    given = dict(zip(names, (coordinator, num_processes, process_id), strict=True))
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if distributed or os.environ.get(ENVIRONMENT, "0") not in ("", "0"):
            _initialize(timeout)
        return
    if missing:
        raise UserError(f"{', '.join(given)} go together; missing: {', '.join(missing)}")
    if distributed:
        raise UserError(f"--distributed finds what {', '.join(given)} say: give one or the other")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT")
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: expected at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id}: expected 0 to {num_processes - 1}, "
            f"since --num_processes={num_processes}"
        )
    # JAX itself does not say who is missing, aborts where no coordinator answers, and may crash
    # where its port is taken.
    if process_id > 0:
        roll_call.answer(host.strip("[]"), int(port), process_id, timeout=timeout)
        _wait_for(host.strip("[]"), int(port), timeout)
    else:
        roll_call.call(int(port), num_processes, timeout=timeout)
    _initialize(
        timeout, coordinator_address=coordinator, num_processes=num_processes, process_id=process_id
    )


def is_one_of_several() -> bool:
    """Whether this process works with others."""
    return heartbeat.current() is not None


def exit_now(code: int, reason: str) -> None:
    """Ends this process at once if it is one of several; does nothing otherwise.

    The others are told why, and end too. An ordinary exit would wait for them at JAX's shutdown
    barrier.
    """
    if not is_one_of_several():
        return
    if (watching := heartbeat.current()) is not None:
        watching.end_all(reason, code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait_for(host: str, port: int, timeout: int) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"--coordinator={host}:{port} does not answer for {timeout} s: {error}"
                ) from None
        time.sleep(0.2)


def _check_devices() -> None:
    """Raises UserError, on all processes, if one has more devices than another.

    A batch, and JAX's own collectives of hosts, take as many rows from each.
    """
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        each = ", ".join(f"process {index} has {counts[index]}" for index in sorted(counts))
        raise UserError(f"every process needs as many devices as the others: {each}")


def _initialize(timeout: int, **addresses: str | int) -> None:
    try:
        with heartbeat.at_coordinators_end():
            jax.distributed.initialize(
                **addresses, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT
            )
    except RuntimeError:  # of C++: the time is over
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
        raise UnreachableError(f"not all processes have come within {timeout} s") from None
    except (ValueError, OSError) as error:  # OSError: no answer from what looked like a cloud
        if addresses:
            raise
        raise UserError(
            f"--distributed: the environment does not say who the other processes are ({error})"
        ) from None
    _check_devices()
    heartbeat.start()
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        # Only process 0 would find its programs in the cache, and be ahead of the others by more
        # than the 30 s below.
        jax.config.update("jax_enable_compilation_cache", False)
    # All processes have just arrived. This first collective opens the channels between CPU devices
    # now, because they must open within 30 s of each other: after one-sided work, or a compilation
    # on a busy machine, they might not.
    multihost_utils.sync_global_devices("univg_jax.distributed")
    ones = sharding.shard_batch(np.ones(jax.local_device_count()), sharding.make_mesh())
    jax.block_until_ready(jax.jit(jnp.sum)(ones))
    logging.info(
        "process %d of %d, %d devices in all",
        *(jax.process_index(), jax.process_count(), jax.device_count()),
    )
