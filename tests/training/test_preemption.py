"""Signals ask a run to end; a second one does not ask."""

import signal

import pytest

from tests.processes import running, wait_for
from univg_jax.training.preemption import PreemptionNotice, is_saving


@pytest.fixture(autouse=True)
def _handlers_are_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_is_known(number, capfd):
    with PreemptionNotice() as notice:
        assert not notice.stop_requested()
        signal.raise_signal(number)
        assert notice.stop_requested()
        assert notice.signum == number
    assert ("once more ends it at once" in capfd.readouterr().err) == (number == signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_at_once(first, second):
    with PreemptionNotice():
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt) as end:
            signal.raise_signal(second)
    assert end.value.exit_code == 128 + second


def test_a_signal_waits_only_where_there_are_steps_to_save():
    with PreemptionNotice() as notice:
        assert not is_saving()
        notice.begin()
        assert is_saving()
    assert not is_saving()


# Processes with a step that takes for ever.
STEP = """
import argparse, sys, time
from univg_jax.cli import flags, main, train
from univg_jax.training.preemption import PreemptionNotice

parser = argparse.ArgumentParser()
flags.add_processes(parser)

def run(args):
    main.configure(args)
    with PreemptionNotice() as notice:
        notice.begin()
        print("a step", flush=True)
        while True:
            time.sleep(0.1)

args = parser.parse_args()
main.parse = lambda argv: argparse.Namespace(
    command="train", verbose=False, run=run, waits=train._is_saving, **vars(args)
)
sys.exit(main.main([]))
"""


@pytest.mark.slow
@pytest.mark.xdist_group("multiprocess")
def test_the_second_signal_ends_several_processes_too():
    def say(processes, text):
        wait_for(processes, lambda: all(text in p.log.read_text() for p in processes))

    with running([1, 1], program=("-c", STEP)) as processes:
        say(processes, "a step")
        for process in processes:
            process.popen.send_signal(signal.SIGINT)
        say(processes, "once more ends it at once")
        for process in processes:
            process.popen.send_signal(signal.SIGTERM)
        assert [process.wait() for process in processes] == [128 + signal.SIGTERM] * 2
