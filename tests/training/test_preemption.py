"""Signals ask a run to end; a second Ctrl-C does not ask."""

import signal

import pytest

from univg_jax.training.preemption import PreemptionNotice


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


def test_the_second_interrupt_ends_at_once():
    with PreemptionNotice():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # a cloud may repeat itself
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
