"""When one of two processes is gone, stopped or stuck, the other one ends with a line that says so.

Real processes, which work together through `univg_jax.cli.main` as a command's do.
"""

import re
import signal

import pytest

from tests.processes import running, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("multiprocess")]

# What the processes do: steps with a collective, in which the last one may get stuck.
COMMAND = """
import argparse, os, sys, time
os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)  # the tests' own JAX has set it
from etils import epath
from univg_jax.cli import flags, main

parser = argparse.ArgumentParser()
flags.add_processes(parser)
parser.add_argument("--workdir")
parser.add_argument("--watchdog", type=float)
parser.add_argument("--what")

def run(args):
    main.configure(args)
    import jax
    from univg_jax import heartbeat
    from univg_jax.errors import UserError
    from univg_jax.together import together
    from univg_jax.training.watchdog import Watchdog

    heartbeat.PATIENCE = 20.0
    doing = "step"
    watchdog = Watchdog(epath.Path(args.workdir), args.watchdog, doing=lambda: doing)
    with watchdog:
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


def last_words(process):
    """The one line that a process said after its steps."""
    lines = process.log.read_text().splitlines()
    said = lines[lines.index("step 20") + 1 :]
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
