"""One command as several processes, one a host: `jax.distributed`, by flags or by what the
environment says.

A process that fails must not leave the others waiting for it. It says why and is gone; the others
are ended by JAX's coordination service, at once if the failed one was process 0, else when its
heartbeats stay out for `HEARTBEAT` seconds.
"""

import argparse
import os
import socket
import sys
import time
from typing import Any

from absl import logging

ENVIRONMENT = "UNIVG_DISTRIBUTED"
TIMEOUT = 300  # seconds for all processes to come together: hosts of a pod start minutes apart
HEARTBEAT = 100  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `start`, the same for every command that can run as several processes."""
    group = parser.add_argument_group(
        "several processes", "The same command on each, on a disk that they share."
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        help=f"Cloud TPU, GKE, SLURM or Open MPI say who the others are; also {ENVIRONMENT}=1",
    )
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="else: where process 0 runs, and a free port there,",
    )
    group.add_argument("--num_processes", type=int, metavar="N", help="how many there are,")
    group.add_argument("--process_id", type=int, metavar="I", help="and which one this is, from 0")


def start(args: argparse.Namespace, *, timeout: int = TIMEOUT) -> None:
    """Joins the other processes, if the flags speak of any; before the first use of JAX's backend.

    Raises ValueError for flags that do not fit together, ConnectionError if the coordinator's port
    is taken or it does not answer within `timeout` seconds. (If others stay out instead, JAX ends
    this process.)
    """
    coordinator, count, index = args.coordinator, args.num_processes, args.process_id
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        if args.distributed or os.environ.get(ENVIRONMENT, "0") not in ("", "0"):
            _initialize(timeout)
        return
    if missing:
        raise ValueError(f"{', '.join(given)} go together; missing: {', '.join(missing)}")
    if args.distributed:
        raise ValueError(f"--distributed finds what {', '.join(given)} say: give one or the other")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"--coordinator={coordinator}: expected HOST:PORT")
    if count < 1:
        raise ValueError(f"--num_processes={count}: expected at least 1")
    if not 0 <= index < count:
        raise ValueError(
            f"--process_id={index}: expected 0 to {count - 1}, since --num_processes={count}"
        )
    # JAX itself aborts where no coordinator answers, and may crash where its port is taken.
    if index > 0:
        _wait_for(host.strip("[]"), int(port), timeout)
    else:
        _check_free(int(port))
    _initialize(timeout, coordinator_address=coordinator, num_processes=count, process_id=index)


def among_others() -> bool:
    """Whether this process is one of several."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def leave(code: int) -> None:
    """Ends this process if it is one of several, without the goodbye for which it would wait for
    the others.
    """
    import jax

    if not among_others():
        return
    if jax.process_index() == 0:  # the coordinator: often all failed of one reason, and may say so
        time.sleep(2)
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
                raise ConnectionError(
                    f"--coordinator={host}:{port} does not answer for {timeout} s: {error}"
                ) from None
        time.sleep(0.2)


def _check_free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ConnectionError(
            f"--coordinator: port {port} of this host cannot be had: {error.strerror}"
        ) from None


def _initialize(timeout: int, **who: Any) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import multihost_utils

    from univg_jax import sharding

    try:
        jax.distributed.initialize(
            **who, initialization_timeout=timeout, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (ValueError, OSError) as error:  # OSError: no answer from what looked like a cloud
        if who:
            raise
        raise ValueError(
            f"--distributed: the environment does not say who the other processes are ({error})"
        ) from None
    if jax.default_backend() == "cpu" and jax.process_count() > 1:
        # Only process 0 would find its programs in the cache, and outrun the others by more than
        # the 30 s below.
        jax.config.update("jax_enable_compilation_cache", False)
    # All have just arrived: now CPUs open the channels between devices, which they must within 30 s
    # of each other. After one-sided work, or a compilation on a busy machine, they might not.
    multihost_utils.sync_global_devices("univg_jax.launch")
    ones = sharding.shard_batch(np.ones(jax.local_device_count()), sharding.make_mesh())
    jax.block_until_ready(jax.jit(jnp.sum)(ones))
    logging.info(
        "process %d of %d, %d devices in all",
        jax.process_index(),
        jax.process_count(),
        jax.device_count(),
    )
