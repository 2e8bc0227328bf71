"""The one way to start real processes in tests: alone, or as one run over TCP as on a pod.

Only the devices are virtual.
"""

import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

TIMEOUT = 600  # seconds: on a busy machine a run of 20 s was seen to take 300


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, and the file with all that it printed."""

    popen: subprocess.Popen
    log: pathlib.Path

    def wait(self) -> int:
        """The exit code."""
        return self.popen.wait(timeout=TIMEOUT)


def free_port() -> int:
    """A port that nobody has, for now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(
    devices: Sequence[int],
    *command: str,
    program: Sequence[str] = ("-m", "univg_jax"),
    first: Sequence[str] = (),
) -> Iterator[list[Process]]:
    """A process for each number of devices, which join where they are several; none survives.

    Each runs `python *program *command`, the first one with the arguments `first` behind.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        processes = []
        for index, count in enumerate(devices):
            joined = [
                f"--coordinator=localhost:{port}",
                f"--num_processes={len(devices)}",
                f"--process_id={index}",
            ]
            flags = f"--xla_force_host_platform_device_count={count}"
            log = pathlib.Path(logs) / str(index)
            popen = subprocess.Popen(
                [
                    *(sys.executable, *program, *command),
                    *(joined if len(devices) > 1 else ()),
                    *(first if index == 0 else ()),
                ],
                env=os.environ
                | {
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
                    "PYTHONPATH": os.getcwd(),
                },
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            stack.callback(popen.wait)
            stack.callback(popen.kill)
            processes.append(Process(popen, log))
        yield processes


def run(
    devices: Sequence[int], *command: str, program: Sequence[str] = ("-m", "univg_jax")
) -> list[list[str]]:
    """The lines that each process printed; all must end well."""
    with running(devices, *command, program=program) as processes:
        codes = [process.wait() for process in processes]
        logs = [process.log.read_text() for process in processes]
    assert codes == [0] * len(devices), "\n".join(logs)
    return [log.splitlines() for log in logs]


def wait_for(processes: Sequence[Process], condition: Callable[[], bool]) -> None:
    """Waits until the processes, all of which must be alive, have done something."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        assert all(p.popen.poll() is None for p in processes), [
            p.log.read_text() for p in processes
        ]
        time.sleep(0.02)


def join() -> None:
    """Called by a program that `running` started: joins the other processes, if there are any."""
    from univg_jax import distributed

    flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv if a.startswith("--"))
    if "coordinator" in flags:
        distributed.start(
            coordinator=flags["coordinator"],
            num_processes=int(flags["num_processes"]),
            process_id=int(flags["process_id"]),
        )
