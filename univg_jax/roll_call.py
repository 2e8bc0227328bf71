"""Whether all processes of a command have come, before JAX joins them; if not, who is missing.

JAX's own service waits for all of them too, but does not say for whom. Process 0 listens on the
port that the service has afterwards. The others tell it their numbers, and wait for its answer: an
empty line once all are there, or one that names who is missing.
"""

import contextlib
import socket
import time

from univg_jax.errors import UnreachableError

_GREETING = "univg process "
_LONGEST = 64  # bytes of a greeting
_MARGIN = 10.0  # seconds until process 0's answer must have arrived


def call(port: int, count: int, *, timeout: int) -> None:
    """Process 0: returns when all others have come.

    Raises UnreachableError, as on all who have come, with the numbers of those who have not within
    `timeout` seconds, or if the port cannot be had.
    """
    deadline = time.monotonic() + timeout
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        with _listen(port) as server:
            while missing := [index for index in range(1, count) if index not in here]:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    break
                stack.enter_context(connection)
                if (index := _greeted(connection)) is not None:
                    here[index] = connection  # one that was started again counts, not the first
        problem = _describe(missing, count, timeout) if missing else ""
        for connection in here.values():
            with contextlib.suppress(OSError):
                connection.sendall(f"{problem}\n".encode())
                connection.recv(1)  # the other one closes first, which leaves the port free
    if problem:
        raise UnreachableError(problem)


def answer(host: str, port: int, index: int, *, timeout: int) -> None:
    """Another process: returns when process 0 has seen all.

    Raises UnreachableError if process 0 does not answer within `timeout` seconds, or says who is
    missing.
    """
    deadline, told = time.monotonic() + timeout, ""
    while not told:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(f"{_GREETING}{index}\n".encode())
                connection.settimeout(timeout + _MARGIN)
                told = connection.makefile(encoding="utf-8", errors="replace").readline(1000)
            error = "it hung up"
        except OSError as failure:
            error = failure
        if not told:
            if time.monotonic() > deadline:
                raise UnreachableError(
                    f"--coordinator={host}:{port} does not answer for {timeout} s: {error}"
                )
            time.sleep(0.2)
    if problem := told.strip():
        raise UnreachableError(problem)


def _describe(missing: list[int], count: int, timeout: int) -> str:
    more = f", as {len(missing) - 1} more" if missing[1:] else ""
    return f"process {missing[0]} of {count} has not come within {timeout} s{more}"


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UnreachableError(
            f"--coordinator: port {port} of this host cannot be had: {error.strerror}"
        ) from None


def _greeted(connection: socket.socket) -> int | None:
    """The number of the process that came; None: it is something else."""
    connection.settimeout(5)
    try:
        said = connection.makefile(encoding="ascii").readline(_LONGEST)
        return int(said.removeprefix(_GREETING)) if said.startswith(_GREETING) else None
    except (OSError, ValueError):
        return None
