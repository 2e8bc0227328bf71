"""`univg serve` as a process: what it refuses before it loads, its log, and its end."""

import json
import re
import signal
import socket
import threading
import time

import httpx2
import pytest

from tests import processes
from univg_jax.cli.main import main
from univg_jax.errors import UserError
from univg_jax.serving.address import open_socket

pytestmark = pytest.mark.xdist_group("pipeline")


def line_of(capsys, *arguments, root):
    """The one line of a command that fails."""
    assert main(["serve", f"--checkpoint={root / 'stage3'}", *arguments]) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("univg serve: error: ")
    return line


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--steps=0", "--steps=0: expected"),
        ("--steps=2,x", "--steps='x': expected"),
        ("--steps=2,2", "a number is there twice"),
        ("--solvers=eular", "unknown --solvers 'eular'; did you mean 'euler'?"),
        ("--max_queue=0", "--max_queue=0: expected"),
        ("--max_batch=1000000", "--max_batch=1000000: expected"),
        ("--port=65536", "--port=65536: expected"),
        ("--api_keys=nowhere", "--api_keys=nowhere: No such file"),
        ("--host=300.1.1.1", "--host=300.1.1.1 --port=8000: "),
        ("--host=", "--host is empty: expected an address"),
        ("--checkpoint=nowhere", "nowhere"),
    ],
)
def test_wrong_flags_are_one_line(capsys, flag, says, root):
    assert says in line_of(capsys, flag, root=root)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(capsys, root, monkeypatch):
    monkeypatch.setattr(
        "univg_jax.pipeline.Pipeline.load", lambda *_, **__: pytest.fail("it was loaded")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = line_of(capsys, f"--port={port}", root=root)
    assert f"--port={port}: Address already in use" in line


def test_of_two_that_start_together_one_has_the_port():
    """A socket that is bound, but does not listen yet, would share it."""
    with open_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}: Address already in use"):
            open_socket("127.0.0.1", port)


@pytest.mark.parametrize("value", ["", " ", ","])
def test_a_secret_that_is_empty_is_not_taken_for_none(capsys, root, monkeypatch, value):
    monkeypatch.setenv("UNIVG_API_KEYS", value)
    assert "UNIVG_API_KEYS has no key" in line_of(capsys, root=root)


@pytest.mark.parametrize(
    ("host", "keys", "is_told"),
    [
        ("0.0.0.0", "", True),
        ("0.0.0.0", "a-key-of-19-letters", False),
        ("localhost", "", False),
    ],
)
def test_who_may_ask_from_elsewhere_is_told(root, monkeypatch, caplog, host, keys, is_told):
    def load(*_, **__):
        raise UserError("the warning comes before the model")

    monkeypatch.setattr("univg_jax.pipeline.Pipeline.load", load)
    monkeypatch.delenv("UNIVG_API_KEYS", raising=False)
    if keys:
        monkeypatch.setenv("UNIVG_API_KEYS", keys)
    assert main(["serve", f"--checkpoint={root / 'stage3'}", f"--host={host}", "--port=0"]) == 1
    assert any("no --api_keys" in line for line in caplog.messages) == is_told


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "has no key"),
        ("# none\n\n", "has no key"),
        ("short\n", "key 1 is none: expected at least 16"),
    ],
)
def test_a_file_of_keys_is_checked(capsys, tmp_path, content, says, root):
    (tmp_path / "keys").write_text(content)
    line = line_of(capsys, f"--api_keys={tmp_path / 'keys'}", root=root)
    assert says in line
    assert "short" not in line


def wait_for(condition, process):
    until = time.monotonic() + processes.TIMEOUT
    while not (found := condition()):
        assert process.popen.poll() is None, process.log.read_text()
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_it_serves_until_sigterm_and_finishes_what_it_began(root):
    flags = [f"--checkpoint={root / 'stage3'}", "--port=0", "--max_batch=1"]
    with processes.running([1], "serve", *flags) as (process,):
        said = r"serving at (http://127\.0\.0\.1:\d+), compiling"
        address = wait_for(lambda: re.search(said, process.log.read_text()), process)[1]

        def get(path):
            try:
                return httpx2.get(f"{address}{path}", timeout=60)
            except (httpx2.ConnectError, httpx2.ReadError, httpx2.RemoteProtocolError):
                return None  # it has ended, or is about to

        wait_for(lambda: (found := get("/ready")) and found.status_code == 200, process)
        statuses, ends = [], []

        def ask():
            given = dict(prompt="a pig on grass", n=10, seed=0)
            response = httpx2.post(f"{address}/v1/generate", json=given, timeout=600)
            statuses.append((response.status_code, len(response.json()["data"])))
            ends.append(process.popen.poll())

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_for(lambda: "univg_queue_pictures 30.0" in get("/metrics").text, process)
        process.popen.send_signal(signal.SIGTERM)
        wait_for(lambda: get("/health") is None, process)  # nothing new
        for thread in threads:
            thread.join()
        assert statuses == [(200, 10)] * 3
        assert process.wait() == 0
        _, _, log = process.log.read_text().partition("/docs\n")
    lines = [json.loads(line) for line in log.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    asked = [line for line in lines if line["message"] == "POST /v1/generate 200"]
    assert [(line["task"], line["pictures"], line["status"]) for line in asked] == [
        ("t2i", 10, 200)
    ] * 3
    assert all(line["seconds"] > 0 and line["request_id"] for line in asked)
    assert any(line["message"].startswith("compiled 3 programs") for line in lines)
