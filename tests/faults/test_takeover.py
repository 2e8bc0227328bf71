"""Of two trainings in one workdir the one that was taken over writes nothing any more."""

import pathlib
import signal

import pytest

from tests import processes
from tests.faults.kill_loop import DEVICES, Runs, differences
from tests.marks import nightly

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("kill_loop")]

# The first one has no beat, so that only what it reads before it writes can tell it.
BEATING = "import runpy; from univg_jax import lock; lock.BEAT = {}; " + (
    "runpy.run_module('tests.faults.cached', run_name='__main__')"
)
FIRST, SECOND = (("-c", BEATING.format(seconds)) for seconds in (10_000, 0.5))


def files(workdir: pathlib.Path) -> dict[pathlib.Path, bytes]:
    """What a workdir has, but for a step that was being written: whoever comes next removes it."""
    found = [path for path in sorted(workdir.rglob("*")) if path.is_file()]
    return {path: path.read_bytes() for path in found if ".orbax-checkpoint-tmp" not in str(path)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(folder=tmp_path_factory.mktemp("takeover"), processes=1)


@pytest.mark.parametrize(
    "moment",
    ["checkpoints/6.orbax-checkpoint-tmp*", *nightly("checkpoints/3", "samples/0000006/*")],
    ids=["in a save", "after a save", "while it samples"],
)
def test_who_was_stopped_and_taken_over_ends_with_one_line(runs, tmp_path, moment):
    expected, workdir = runs.undisturbed(1), tmp_path / "run"
    command = runs.command(workdir, 1)
    with processes.running([DEVICES], *command, program=FIRST) as (first,):
        processes.wait_for([first], lambda: any(workdir.glob(moment)))
        first.popen.send_signal(signal.SIGSTOP)
        assert not (workdir / "summary.json").exists()
        with processes.running([DEVICES], *command, "--takeover", program=SECOND) as (second,):
            assert second.wait() == 0, second.log.read_text()
            pid = second.popen.pid
        before = files(workdir)
        first.popen.send_signal(signal.SIGCONT)
        code, log = first.wait(), first.log.read_text()
    errors = [line for line in log.splitlines() if "error: " in line]
    assert (code, len(errors)) == (1, 1), log
    # Orbax logs a save that fails, with a traceback.
    assert "Traceback" not in log or "Save Finalize thread (save_finalize) failed" in log, log
    assert f"univg train: error: {workdir} was taken over by process {pid} on " in errors[0]
    assert files(workdir) == before
    assert list(differences(expected, workdir)) == []
