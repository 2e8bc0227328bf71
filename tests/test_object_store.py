"""What a bucket does that a disk does not, on a real object store on this machine."""

import pytest

from tests import object_store as stores
from univg_jax import files
from univg_jax.errors import UnreachableError
from univg_jax.object_store import FileSystem

FILE = f"gs://{stores.BUCKET}/run/a"


@pytest.fixture(scope="module")
def server():
    with stores.running() as store:
        yield store


@pytest.fixture
def store(server, monkeypatch):
    """With one file; it waits for nothing."""
    monkeypatch.setattr(files, "MAX_DELAY", 0.0)
    server.fails, server.status = lambda n, path: False, 503
    client(server).pipe_file(FILE, b"content")
    yield server
    server.fails, server.status = lambda n, path: False, 503


def client(store):
    return FileSystem(endpoint_url=store.url, token="anon", skip_instance_cache=True)


@pytest.mark.parametrize("failures", [0, 3, files.RETRIES])
def test_a_request_that_fails_now_and_then_is_sent_again(store, monkeypatch, caplog, failures):
    monkeypatch.setattr(FileSystem, "failures", 0)
    first = store.requests
    store.fails = lambda n, path: n <= first + failures
    assert client(store).cat_file(FILE) == b"content"
    assert FileSystem.failures == failures == len(caplog.messages)
    for before, line in enumerate(caplog.messages):
        assert line.startswith("503 Service Unavailable: ")
        assert line.endswith(f"sent again, as were {before} requests before")


def test_one_that_fails_for_good_is_one_line(store):
    store.fails = lambda n, path: True
    with pytest.raises(
        UnreachableError, match=r"503 Service Unavailable: .*run.*a.*, 9 times"
    ) as end:
        client(store).info(FILE)
    assert "\n" not in str(end.value)


def test_what_is_refused_is_not_asked_for_again(store):
    store.fails, store.status = lambda n, path: True, 403
    first = store.requests
    with pytest.raises(UnreachableError, match=r"Forbidden: .*told to fail"):
        client(store).cat_file(FILE)
    assert store.requests == first + 1


def test_what_is_not_there_is_not_asked_for_again(store):
    first = store.requests
    with pytest.raises(FileNotFoundError):
        client(store).cat_file(f"{FILE}.other")
    assert store.requests == first + 1


def test_a_folder_without_files_is_empty(store):
    assert client(store).listdir(f"gs://{stores.BUCKET}/nothing") == []


def test_what_another_process_writes_is_seen(store):
    ours, theirs = client(store), client(store)
    folder = FILE.rpartition("/")[0]
    before = ours.listdir(folder, detail=False)
    assert not ours.exists(f"{FILE}.new")
    theirs.pipe_file(f"{FILE}.new", b"")
    assert ours.exists(f"{FILE}.new")
    assert len(ours.listdir(folder, detail=False)) == len(before) + 1
