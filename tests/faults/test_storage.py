"""Storage that fails ends a run with the path and the cause, and harms no checkpoint before."""

import contextlib
import errno
import os
import signal
import subprocess

import pytest

from tests import processes
from tests.faults.kill_loop import DEVICES, PROGRAM, Runs
from tests.faults.storage import FAULTS, fill, make_read_only, may_mount, run
from tests.marks import nightly
from univg_jax import checkpoint


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_run_ends_with_the_path_and_the_cause(tmp_path, fault):
    if fault.needs_mount and not may_mount():
        pytest.skip("no tmpfs can be mounted here")
    assert run(fault, tmp_path / "disk") == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(folder=tmp_path_factory.mktemp("storage"), processes=1)


@pytest.mark.slow
@pytest.mark.xdist_group("kill_loop")
@pytest.mark.parametrize(
    ("folder", "strike", "number"),
    [
        ("samples", fill, errno.ENOSPC),
        *nightly(
            ("tensorboard", fill, errno.ENOSPC),
            ("tensorboard", make_read_only, errno.EROFS),
            (".", make_read_only, errno.EROFS),
        ),
    ],
)
def test_a_training_whose_folder_cannot_be_written(runs, tmp_path, folder, strike, number):
    """The folder (or all) is a disk of its own, which is struck after the first checkpoint."""
    if not may_mount():
        pytest.skip("no tmpfs can be mounted here")
    workdir = tmp_path / "run"
    (disk := workdir / folder).mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "-l", disk], check=True)
        command = runs.command(workdir, 1)
        with processes.running([DEVICES], *command, program=PROGRAM) as (training,):
            processes.wait_for([training], (workdir / "checkpoints" / "3").exists)
            training.popen.send_signal(signal.SIGSTOP)
            strike(disk)
            training.popen.send_signal(signal.SIGCONT)
            code, log = training.wait(), training.log.read_text()
        reports = checkpoint.verify(workdir)
    errors = [line for line in log.splitlines() if "error: " in line]
    assert (code, len(errors), "Traceback" in log) == (1, 1, False), log
    assert f"univg train: error: {disk}/" in errors[0]
    assert errors[0].endswith(f"cannot be written: {os.strerror(number)}")
    assert 3 in [report.step for report in reports]
    assert not any(report.problems for report in reports)
