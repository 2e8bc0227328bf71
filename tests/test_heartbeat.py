"""When one of two processes is gone, stopped or stuck, the other one ends with a line that says so.

Real processes, which work together through `univg_jax.cli.main` as a command's do.
"""

import re
import signal
import socket

import pytest

from tests.processes import running, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("multiprocess")]

# What the processes do: a start, in which one may get stuck, and steps with a collective, in which
# the last one may.
COMMAND = """
import argparse, os, sys, time
os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)  # the tests' own JAX has set it
from univg_jax.cli import flags, main

parser = argparse.ArgumentParser()
flags.add_processes(parser)
parser.add_argument("--workdir")
parser.add_argument("--watchdog", type=float)
parser.add_argument("--what")
parser.add_argument("--hangs_at_start", type=int)

def run(args):
    main.configure(args)
    import jax
    from univg_jax import heartbeat
    from univg_jax.errors import UserError
    from univg_jax.settings import Train
    from univg_jax.together import together
    from univg_jax.training.watchdog import Watchdog

    heartbeat.PATIENCE = 20.0
    doing = "step"
    settings = Train(watchdog=args.watchdog, watchdog_start=args.watchdog)
    with Watchdog(args.workdir, settings) as watchdog:
        watchdog.begin("the data")
        print("the start", flush=True)
        with together():
            if jax.process_index() == args.hangs_at_start:
                time.sleep(1000)
        watchdog.doing = lambda: doing
        for step in range(10**9):
            watchdog.beat(f"step {step}")
            with together():
                pass
            if step == 20:
                print("step 20", flush=True)
                if args.what and jax.process_index() == jax.process_count() - 1:
                    doing = "data"
                    if args.what == "hangs":
                        time.sleep(1000)
                    raise UserError("no such file") if args.what == "fails" else KeyError("a bug")
            time.sleep(0.1)

args = parser.parse_args()
main.parse = lambda argv: argparse.Namespace(command="train", verbose=False, run=run, **vars(args))
sys.exit(main.main([]))
"""


def start(*arguments, count=2):
    return running([1] * count, *arguments, program=("-c", COMMAND))


def wait_for_steps(processes):
    wait_for(processes, lambda: all("step 20" in p.log.read_text() for p in processes))


def last_words(process, after="step 20"):
    """The one line that a process said after another one."""
    lines = process.log.read_text().splitlines()
    said = lines[lines.index(after) + 1 :]
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("index", [0, 1])
def test_one_line_names_the_process_that_is_missing(tmp_path, signum, index):
    with start(f"--workdir={tmp_path}") as processes:
        wait_for_steps(processes)
        missing, other = processes[index], processes[1 - index]
        missing.popen.send_signal(signum)
        assert other.wait() == 1
        line = last_words(other)
        if index == 0 and signum == signal.SIGKILL:
            assert line == "univg: error: process 0, the coordinator, has ended"
        else:
            assert line.startswith(f"univg: error: process {index} of 2 (host ")
            assert f", pid {missing.popen.pid}) does not answer for " in line
        if signum == signal.SIGSTOP:  # who gets an error instead is no longer in the loop
            stacks = (tmp_path / "stacks" / f"process_{1 - index}.txt").read_text()
            assert "raise_together" in stacks


@pytest.mark.parametrize(
    ("what", "reason"), [("fails", "no such file"), ("is wrong", "KeyError: 'a bug'")]
)
def test_one_line_says_why_another_process_has_ended(tmp_path, what, reason):
    with start(f"--workdir={tmp_path}", f"--what={what}") as (first, second):
        assert (second.wait(), first.wait()) == (1, 1)
        assert reason in second.log.read_text()
        line = last_words(first)
        assert line.startswith("univg: error: process 1 of 2 (host ")
        assert line.endswith(f", pid {second.popen.pid}) ended: {reason}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2])
def test_a_process_that_is_stuck_is_named_and_all_leave_their_stacks(tmp_path, count):
    with start(f"--workdir={tmp_path}", "--what=hangs", "--watchdog=5", count=count) as processes:
        assert [process.wait() for process in processes] == [1] * count
        for index, process in enumerate(processes):
            line = last_words(process)
            assert re.match(
                r"univg: error: no step for 5 s after step 2\d \(train.watchdog\); ", line
            )
            assert "; process 1 of 2 (host " in line or count == 1
            assert line.endswith(" is at: data")
            stacks = (tmp_path / "stacks" / f"process_{index}.txt").read_text()
            assert ("raise_together" in stacks) == (index < count - 1)
            assert '"<string>"' in stacks


def test_who_hangs_at_the_start_is_named_and_not_who_waits_for_it(tmp_path):
    flags = [f"--workdir={tmp_path}", "--watchdog=5", "--hangs_at_start=0"]
    with start(*flags) as processes:
        assert [process.wait() for process in processes] == [1, 1]
        for index, process in enumerate(processes):
            line = last_words(process, after="the start")
            assert line.startswith("univg: error: a part of the start takes more than 5 s (train.")
            assert f"; process 0 of 2 (host {socket.gethostname()}, pid " in line
            assert line.endswith(f", pid {processes[0].popen.pid}) is at: the data")
            stacks = (tmp_path / "stacks" / f"process_{index}.txt").read_text()
            assert ("raise_together" in stacks) == (index == 1)


# The command, where a network disk with the records does not answer.
HUNG_DISK = """
import sys, time
from univg_jax import assembly
from univg_jax.cli.main import main
assembly.open_sources = lambda *_, **__: time.sleep(1000)
sys.exit(main(sys.argv[1:]))
"""


def test_a_source_that_hangs_ends_the_run(tmp_path):
    command = (
        "train",
        "--config=experiments/emoji.py:preset=smoke",
        "--config.data.dataset=records",
        f"--config.data.dir={tmp_path}",
        "--config.train.watchdog_start=5",
        f"--workdir={tmp_path / 'run'}",
    )
    with running([1], *command, program=("-c", HUNG_DISK)) as (process,):
        assert process.wait() == 1
        line = process.log.read_text().splitlines()[-1]
        assert line.startswith("univg: error: a part of the start takes more than 5 s (train.")
        assert line.endswith("; it is at: the data")
        stacks = (tmp_path / "run" / "stacks" / "process_0.txt").read_text()
        assert "in _open_stream" in stacks
