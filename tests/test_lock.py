"""Who has a workdir: one process, as long as it lives."""

import json
import os
import pathlib
import subprocess
import sys
import threading

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from univg_jax import checkpoint, lock
from univg_jax.checkpoint import Checkpointer
from univg_jax.errors import UserError
from univg_jax.lock import WorkdirLock

HOLD = """
import sys, time
from univg_jax.lock import WorkdirLock
with WorkdirLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder):
    """Another process that holds a workdir until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_living_owner_is_not_disturbed_and_a_dead_one_is_replaced(tmp_path, caplog):
    with holder(tmp_path) as process:
        before = (tmp_path / "lock.json").read_text()
        owner = (
            rf"is in use by process {process.pid} on \S+ \(since .* UTC\); end that first, or take "
            "it over with --takeover"
        )
        with pytest.raises(UserError, match=owner):
            WorkdirLock(tmp_path)
        assert (tmp_path / "lock.json").read_text() == before
        process.kill()  # then a zombie, until the block ends
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with WorkdirLock(tmp_path):
            assert f"taken over from process {process.pid}" in caplog.text
    assert not (tmp_path / "lock.json").exists()


def test_nothing_is_copied_into_a_run_that_trains(tmp_path):
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"params": {"a": jnp.ones(2)}}, {}, {})
    with holder(tmp_path / "trains"):
        with pytest.raises(UserError, match="trains is in use by process"):
            checkpoint.copy(tmp_path / "run", None, tmp_path / "trains")
        assert [file.name for file in (tmp_path / "trains").iterdir()] == ["lock.json"]
    checkpoint.copy(tmp_path / "run", None, tmp_path / "trains")
    assert checkpoint.step_of(tmp_path / "trains") == 1


def test_an_owner_that_ends_leaves_nothing(tmp_path, caplog):
    with holder(tmp_path) as process:
        process.stdin.close()
        process.stdout.read()
        assert process.wait() == 0
    assert list(tmp_path.iterdir()) == []
    with WorkdirLock(tmp_path):
        pass
    assert not caplog.text


def test_another_process_with_the_owners_id_is_not_the_owner(tmp_path):
    with holder(tmp_path):
        file = tmp_path / "lock.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"start": "1"}))
        with WorkdirLock(tmp_path):
            pass


def test_of_many_that_start_at_once_one_gets_it(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    said = [process.stdout.readline() for process in processes]
    assert sorted(said) == ["", "", "", "held\n"]
    for process in processes:
        process.communicate()


def other_machine(folder, **fields):
    owner = dict(machine="another", pid=7, host="b", start="1", since="then", token="t") | fields
    (folder / "lock.json").write_text(json.dumps(owner))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.2)
    monkeypatch.setattr(lock, "PATIENCE", 0.6)


def test_an_owner_on_another_machine_lives_if_it_beats(tmp_path, quick):
    other_machine(tmp_path, beats=0)
    over = threading.Event()

    def beat():
        beats = 0
        while not over.wait(0.1):
            beats += 1
            other_machine(tmp_path, beats=beats)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 7 on b"):
            WorkdirLock(tmp_path)
    finally:
        over.set()
        thread.join()


def test_an_owner_on_another_machine_that_does_not_beat_is_dead(tmp_path, quick, caplog):
    other_machine(tmp_path)
    with WorkdirLock(tmp_path):
        assert "seeing if process 7 on b" in caplog.text
        assert "taken over from process 7 on b" in caplog.text


def test_the_owner_beats_and_sees_that_it_was_replaced(tmp_path, quick, caplog):
    file = tmp_path / "lock.json"
    with WorkdirLock(tmp_path) as held:
        wait_for(lambda: json.loads(file.read_text())["beats"] >= 2)
        held.check()
        other_machine(tmp_path)
        wait_for(lambda: "process 7 on b (since then) HAS TAKEN OVER" in caplog.text)
        with pytest.raises(UserError, match=r"was taken over by process 7 on b \(since then\)"):
            held.check()
    assert json.loads(file.read_text())["pid"] == 7  # another's lock stays


def test_a_living_owner_is_replaced_when_asked_for(tmp_path, monkeypatch, caplog):
    slept = []
    monkeypatch.setattr(lock.time, "sleep", slept.append)
    with holder(tmp_path) as process, WorkdirLock(tmp_path, takeover=True):
        assert slept == [2 * lock.BEAT], "the owner has time to see it"
        assert f"taken over from process {process.pid}" in caplog.text
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
        process.communicate()  # it ends, and leaves the lock alone
        assert (tmp_path / "lock.json").exists()


def test_the_owner_sees_a_new_one_before_it_writes(tmp_path):
    """Also between two beats, or when it was stopped for longer than any."""
    with WorkdirLock(tmp_path) as held:
        held.confirm()
        other_machine(tmp_path)
        held.check()  # not known yet
        with pytest.raises(UserError, match=r"was taken over by process 7 on b \(since then\)"):
            held.confirm()
    assert json.loads((tmp_path / "lock.json").read_text())["pid"] == 7


def test_a_block_that_fails_says_who_has_the_workdir_now(tmp_path):
    def fail(folder, *, is_lost):
        with WorkdirLock(folder):
            if is_lost:
                other_machine(folder)
            raise UserError("a checkpoint cannot be written")

    with pytest.raises(UserError, match=r"was taken over by process 7 on b"):
        fail(tmp_path, is_lost=True)
    (tmp_path / "lock.json").unlink()
    with pytest.raises(UserError, match="a checkpoint cannot be written"):
        fail(tmp_path, is_lost=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [None, "", "[]"], ids=["deleted", "empty", "damaged"])
@pytest.mark.parametrize("by", ["beat", "write"])
def test_a_lock_that_is_lost_under_its_owner_is_written_again(tmp_path, quick, caplog, content, by):
    file = tmp_path / "lock.json"
    with WorkdirLock(tmp_path) as held:
        before = json.loads(file.read_text())
        for _ in range(2):
            file.unlink() if content is None else file.write_text(content)
            if by == "write":
                held.confirm()
            wait_for(lambda: file.exists() and file.read_text() not in ("", "[]"))
            assert json.loads(file.read_text())["token"] == before["token"]
        held.check()
        assert "is gone, it is written again" in caplog.text
        process = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert f"is in use by process {os.getpid()}" in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_gone_is_not_made_again(tmp_path, quick):
    folder = tmp_path / "run"
    with WorkdirLock(folder) as held:
        folder.rename(tmp_path / "elsewhere")
        threading.Event().wait(3 * lock.BEAT)
        with pytest.raises(UserError, match=r"run is gone: who moved or deleted it\?"):
            held.confirm()
    assert not folder.exists()


def test_who_was_taken_over_knows_it_when_the_new_owner_has_ended_too(tmp_path, quick, caplog):
    """One that was stopped all the time, or whose machine was."""
    with holder(tmp_path) as process:
        stopped = WorkdirLock.__new__(WorkdirLock)  # with what the other process knows
        stopped.__dict__ = {
            "_file": lock.epath.Path(tmp_path / "lock.json"),
            "_owner": json.loads((tmp_path / "lock.json").read_text()),
            "_released": threading.Event(),
            "_writing": threading.Lock(),
            "_lost_to": "",
        }
        with WorkdirLock(tmp_path, takeover=True):
            pass
        with WorkdirLock(tmp_path):  # whoever has it next ends, too
            pass
        assert caplog.text.count("taken over from") == 1
        with holder(tmp_path) as killed:
            killed.kill()
        with WorkdirLock(tmp_path):
            pass
        process.communicate()
    assert json.loads((tmp_path / "lock.json").read_text())["ended"]
    with pytest.raises(UserError, match=rf"was taken over by process {os.getpid()} on"):
        stopped.confirm()


def wait_for(condition):
    """Until it holds, at most ten seconds."""
    pause = threading.Event()
    assert any(condition() or pause.wait(0.05) for _ in range(200))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_torn_lock_is_nobodys(tmp_path, content):
    pathlib.Path(tmp_path / "lock.json").write_text(content)
    with WorkdirLock(tmp_path):
        pass


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
KEYS = ("host", "pid", "start", "machine", "since", "token", "beats")


@given(content=st.dictionaries(st.sampled_from(KEYS), VALUES))
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_whatever_a_lock_says_it_is_somebodys_or_nobodys(tmp_path, content, monkeypatch):
    """Nobody's is taken, and somebody's is named in one line."""
    monkeypatch.setattr(lock, "BEAT", 0.001)
    monkeypatch.setattr(lock, "PATIENCE", 0.002)
    (tmp_path / "lock.json").write_text(json.dumps(content))
    said = "is in use by process"
    try:
        with WorkdirLock(tmp_path):
            pass
    except UserError as error:
        said = str(error)
    assert "is in use by process" in said


def test_the_same_process_may_take_it_again(tmp_path):
    first = WorkdirLock(tmp_path)
    second = WorkdirLock(tmp_path)
    first.release()
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == second._owner["token"]
    second.release()
    assert not (tmp_path / "lock.json").exists()
