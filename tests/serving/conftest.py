"""A server of the smoke run that tests share, in a thread of this process."""

import contextlib
import threading
import time

import httpx2
import pytest

from univg_jax import Pipeline
from univg_jax.serving.address import open_socket, url_of
from univg_jax.serving.server import Server, Settings


@contextlib.contextmanager
def running(pipeline, *, wait=True, **settings):
    """A server and a client of it."""
    server = Server(pipeline, Settings(**settings))
    with open_socket("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.serve_on, args=[listening], daemon=True)
        thread.start()
        address = url_of(listening)
        try:
            while not server.started:
                time.sleep(0.01)
            with httpx2.Client(base_url=address, timeout=120) as client:
                while wait and client.get("/ready").status_code != 200:
                    assert thread.is_alive()
                    time.sleep(0.1)
                yield server, client
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def pipeline(root):
    return Pipeline.load(root / "stage3")


@pytest.fixture(scope="session")
def served(pipeline):
    with running(pipeline, max_batch=8, max_wait_ms=20, max_queue=64, max_mib=1) as found:
        yield found


@pytest.fixture(scope="session")
def client(served):
    return served[1]
