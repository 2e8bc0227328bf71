"""Before processes join, all of them have come, or each that has says who is missing."""

import concurrent.futures
import socket
import time

import pytest

from tests.processes import free_port, running
from univg_jax import roll_call
from univg_jax.errors import UnreachableError

JOIN = """
import sys
from univg_jax import distributed
distributed.start.__kwdefaults__["timeout"] = 3
from univg_jax.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def said_by(function, *arguments, timeout):
    """The error of a process; None: it goes on."""
    try:
        function(*arguments, timeout=timeout)
    except UnreachableError as error:
        return str(error)


def meet(count, *, come, timeout, disturb=lambda port: None):
    """What process 0 says, and those of the others that come."""
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        others = [
            pool.submit(said_by, roll_call.answer, "localhost", port, index, timeout=timeout)
            for index in come
        ]
        first = pool.submit(said_by, roll_call.call, port, count, timeout=timeout)
        disturb(port)
        return [future.result() for future in (first, *others)]


def test_all_go_on_when_all_have_come():
    assert meet(1, come=[], timeout=60) == [None]
    assert meet(4, come=[3, 1, 2], timeout=60) == [None] * 4


def test_all_that_have_come_name_those_that_have_not():
    assert meet(3, come=[2], timeout=1) == ["process 1 of 3 has not come within 1 s"] * 2
    told = "process 2 of 4 has not come within 1 s, as 1 more"
    assert meet(4, come=[1], timeout=1) == [told] * 2


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"univg process x\n"])
def test_whoever_else_calls_is_nobody(said):
    def disturb(port):
        while True:
            try:
                with socket.create_connection(("localhost", port)) as connection:
                    connection.sendall(said)
                return
            except ConnectionRefusedError:
                time.sleep(0.01)

    assert meet(2, come=[], timeout=1, disturb=disturb) == [
        "process 1 of 2 has not come within 1 s"
    ]


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnreachableError, match=f"port {port} of this host cannot be had"):
            roll_call.call(port, 2, timeout=1)


@pytest.mark.slow
def test_a_command_one_of_whose_processes_never_comes(tmp_path):
    command = ["train", "--config=experiments/emoji.py:preset=smoke", f"--workdir={tmp_path / 'w'}"]
    flags = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", "--process_id=0"]
    with running([1], *command, *flags, program=("-c", JOIN)) as (process,):
        assert process.wait() == 1
        line = "univg train: error: process 1 of 2 has not come within 3 s\n"
        assert process.log.read_text() == line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_with_other_numbers_of_devices_are_refused(tmp_path):
    command = ["train", "--config=experiments/emoji.py:preset=smoke", f"--workdir={tmp_path / 'w'}"]
    with running([2, 1], *command) as both:
        for process in both:
            assert process.wait() == 1
            (line,) = process.log.read_text().strip().splitlines()
            assert line == (
                "univg train: error: every process needs as many devices as the others: "
                "process 0 has 2, process 1 has 1"
            )
    assert not list(tmp_path.iterdir())


# As with `--distributed`, where JAX finds the addresses in the environment.
FOUND = """
import sys
from univg_jax import distributed
from univg_jax.cli.main import main
addresses = dict(coordinator_address=sys.argv.pop(1), num_processes=2, process_id=0)
distributed.start = lambda **_: distributed._initialize(3, **addresses)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.nightly  # JAX takes its time to give up
def test_one_line_also_where_the_environment_has_the_addresses(tmp_path):
    command = ["train", "--config=experiments/emoji.py:preset=smoke", f"--workdir={tmp_path / 'w'}"]
    program = ("-c", FOUND, f"localhost:{free_port()}")
    with running([1], *command, program=program) as (process,):
        assert process.wait() == 1
        said = [line for line in process.log.read_text().splitlines() if line.startswith("univg")]
    assert said == ["univg train: error: not all processes have come within 3 s"]
