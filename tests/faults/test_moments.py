"""SIGTERM, SIGKILL or SIGSTOP at a moment of a command that is known to have come.

Real processes (`moments`). The kill loop strikes at random moments, and seldom meets short ones.
"""

import contextlib
import json
import pathlib
import signal

import pytest

from tests.faults.kill_loop import DEVICES, Runs, differences
from tests.faults.moments import line_of
from tests.processes import Process, running, wait_for

pytestmark = pytest.mark.slow

PROGRAM = ("-m", "tests.faults.moments")
# As a command, but with less patience.
IMPATIENT = (
    "-c",
    "import sys, runpy; from univg_jax import heartbeat; heartbeat.PATIENCE = 20.0; "
    "sys.argv[0] = 'moments'; runpy.run_module('tests.faults.moments', run_name='__main__')",
)


@contextlib.contextmanager
def at_moment(moment, *command, devices=(1,), program=PROGRAM):
    """The processes of a command at a moment, which has come for all of them."""
    with running(devices, moment, *command, program=program) as processes:
        line = line_of(moment)
        wait_for(processes, lambda: all(line in p.log.read_text() for p in processes))
        yield processes


def terminate(processes: list[Process]) -> list[str]:
    """What the processes said, which must end as SIGTERM asks them to."""
    for process in processes:
        process.popen.send_signal(signal.SIGTERM)
    codes = [process.wait() for process in processes]
    logs = [process.log.read_text() for process in processes]
    assert codes == [128 + signal.SIGTERM] * len(processes), "\n".join(logs)
    assert not any("Traceback" in log for log in logs), "\n".join(logs)
    return logs


def test_sigterm_while_a_run_compiles(tmp_path):
    runs = Runs(folder=tmp_path, processes=1)
    with at_moment("compile", *runs.command(tmp_path / "run", 1), devices=[2]) as processes:
        (log,) = terminate(processes)
    assert log.splitlines()[-1] in (
        "univg: ended by SIGTERM",  # it was in XLA for longer than the grace
        "univg train: SIGTERM: no step was made; the same command goes on from there",
    )


# Nightly: ten starts of a run. In one process `tests/training/test_loop.py` has these moments, and
# the kill loop of the default suite some of them.
@pytest.mark.nightly
@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_at_each_moment_of_a_run(tmp_path, count):
    """It ends as an undisturbed one."""
    runs, workdir = Runs(folder=tmp_path, processes=count), tmp_path / "run"
    expected = runs.undisturbed(1)
    for moment in ("compile", "step", "restore", "validate", "sample", "save"):
        command, devices = runs.command(workdir, 1), [DEVICES // count] * count
        with at_moment(moment, *command, devices=devices) as processes:
            terminate(processes)
    assert not runs.attempt(workdir, 1)
    assert list(differences(expected, workdir)) == []


# Nightly: as long as it takes to know that a process is missing, four times. `tests/test_heartbeat`
# has the same without a model.
@pytest.mark.nightly
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("moment", ["compile", "restore"])
def test_a_process_that_is_lost_at_the_start_is_named(tmp_path, moment, signum):
    runs, workdir = Runs(folder=tmp_path, processes=2), tmp_path / "run"
    command = runs.command(workdir, 1)
    if moment == "restore":
        with at_moment("save", *command, devices=[1, 1]) as processes:
            terminate(processes)
    with at_moment(moment, *command, devices=[1, 1], program=IMPATIENT) as (first, second):
        second.popen.send_signal(signum)
        assert first.wait() == 1
        line = next(x for x in first.log.read_text().splitlines() if x.startswith("univg: error"))
    assert line.startswith("univg: error: process 1 of 2 (host ")
    assert f", pid {second.popen.pid}) does not answer for " in line
    if signum == signal.SIGSTOP:  # else a collective fails, and nobody waits
        assert (workdir / "stacks" / "process_0.txt").exists()


def evaluation(root: pathlib.Path, folder: pathlib.Path, *, prompts: int) -> tuple[str, ...]:
    """A command that makes images for so many prompts of GenEval."""
    rows = [
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": f"dog {k}"}
        for k in range(prompts)
    ]
    file = folder / "evaluation_metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        *("evaluate", f"--checkpoint={root / 'stage1'}", "--benchmark=geneval"),
        *(f"--data={file}", "--excerpt", "--generate_only", f"--out={folder / 'out'}"),
        "--batch_size=2",
    )


def images(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Which files there are, and which writing made them."""
    found = sorted(folder.rglob("*.png"))
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


@pytest.mark.xdist_group("pipeline")
def test_sigterm_in_an_evaluation_keeps_what_is_finished(root, tmp_path):
    """The next command makes the rest, and nothing again."""
    command = evaluation(root, tmp_path, prompts=30)
    with at_moment("image", *command) as processes:
        terminate(processes)
    made = images(tmp_path)
    assert 0 < len(made) < 30 * 4
    with running([1], *command) as (process,):
        assert process.wait() == 0
    after = images(tmp_path)
    assert len(after) == 30 * 4
    assert {name: after[name] for name in made} == made


# Nightly: see above.
@pytest.mark.nightly
@pytest.mark.xdist_group("pipeline")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost_in_an_evaluation_is_named(root, tmp_path, signum):
    command = evaluation(root, tmp_path, prompts=200)
    with at_moment("image", *command, devices=[1, 1], program=IMPATIENT) as (first, second):
        second.popen.send_signal(signum)
        assert first.wait() == 1
        line = next(x for x in first.log.read_text().splitlines() if x.startswith("univg: error"))
    assert line.startswith("univg: error: process 1 of 2 (host ")
    assert f", pid {second.popen.pid}) does not answer for " in line


# Nightly: `tests/export/test_run.py` has it in one process.
@pytest.mark.nightly
@pytest.mark.xdist_group("pipeline")
def test_sigterm_in_an_export_leaves_nothing_that_looks_whole(root, tmp_path):
    flags = [f"--checkpoint={root / 'stage1'}", "--format=safetensors"]
    with at_moment("export", "export", *flags, f"--out={tmp_path / 'out'}") as processes:
        (log,) = terminate(processes)
    assert "ended by SIGTERM\n" in log
    assert not (tmp_path / "out").exists()
