"""`univg demo`: what is wrong is said before a model is loaded. The page is in tests/serving."""

import socket

import pytest

from univg_jax.cli.main import main


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_an_address_that_is_in_use_is_one_line(taken, capsys):
    assert main(["demo", "--checkpoint=nowhere", f"--port={taken}"]) == 1
    line = f"--host=127.0.0.1 --port={taken}: Address already in use"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--port=65536"], "--port=65536: expected a whole number >= 0 and <= 65535"),
        (["--host=nowhere.invalid"], "--host=nowhere.invalid --port=7860: "),
    ],
)
def test_what_cannot_be_served_is_one_line(capsys, flags, line):
    assert main(["demo", "--checkpoint=nowhere", *flags]) == 1
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert line in said
