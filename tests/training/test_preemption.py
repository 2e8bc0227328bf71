"""Signals ask a run to end; a second one does not ask."""

import signal

import pytest

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
