"""A few unusable records are logged and counted; too many of them end the run."""

import pytest

from data_pipelines.quarantine import MAX_FRACTION, MIN_READ, Quarantine
from univg_jax.errors import UserError


def test_a_record_counts_once_a_task_and_is_logged_once(caplog):
    quarantine = Quarantine()
    for task in ("t2i", "t2i", "ie"):
        quarantine.add(task, "scenes[7]", OSError("truncated"))
    assert len(quarantine) == 2
    assert caplog.text.count("quarantined scenes[7] for task t2i: truncated") == 1


def test_a_fraction_counts_only_after_some_records():
    quarantine = Quarantine()
    for k in range(MIN_READ - 1):
        quarantine.add("t2i", f"scenes[{k}]", OSError("truncated"))
    with pytest.raises(UserError, match=r"100 of 100 records read are unusable \(more than 1%\)"):
        quarantine.add("t2i", "scenes[99]", OSError("truncated"))


def test_as_many_as_the_limit_are_tolerated():
    quarantine = Quarantine()
    for _ in range(300 - 3):
        quarantine.record_success()
    for k in range(3):
        quarantine.add("t2i", f"scenes[{k}]", OSError("truncated"))
    assert len(quarantine) == MAX_FRACTION * 300
    with pytest.raises(UserError, match=r"4 of 301 .* the last, scenes\[3\]: truncated"):
        quarantine.add("t2i", "scenes[3]", OSError("truncated"))
