"""A few damaged records are named and counted; a share that is surely too large ends the run."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.quarantine import (
    ALPHA,
    MAX_LOGGED,
    Quarantine,
    log_evidence,
    quarantine_file,
    read_quarantine,
)
from data_pipelines.reader import DamagedRecord, Place, UnsuitableRecord
from univg_jax.errors import UserError


def damaged(k: int, task: str = "t2i") -> DamagedRecord:
    return DamagedRecord(f"scenes[{k}] for {task}", f"scenes[{k}] for task {task!r}: truncated")


def reads_until(threshold: float, is_damaged: np.ndarray) -> float:
    """After how many reads E reaches `threshold`; infinity if it never does."""
    # A sound record only lowers E.
    for k, index in enumerate(np.flatnonzero(is_damaged), start=1):
        if log_evidence(k, int(index) + 1) >= math.log(threshold):
            return int(index) + 1
    return math.inf


@pytest.mark.parametrize("share", [0.005, 0.008, 0.01])
def test_a_share_within_the_tolerance_ends_no_run(share):
    """The old rule, "more than 1% of 100 or more", ended 33%, 71% and 100% of such runs."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        assert reads_until(1 / ALPHA, rng.random(100_000) < share) == math.inf


def test_the_chance_of_a_false_end_is_what_the_threshold_says():
    """Ville's inequality, at a threshold low enough to see some: P(E ever >= 20) <= 1/20."""
    rng = np.random.default_rng(0)
    runs = 1000
    ended = [reads_until(20, rng.random(10_000) < 0.01) < math.inf for _ in range(runs)]
    # four standard deviations of a binomial above 5%; and the rule is not idle
    assert 0 < np.mean(ended) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / runs)


@pytest.mark.parametrize(
    ("size", "count"), [(300, 3), (1000, 10), (10_000, 100)], ids=["300", "1000", "10000"]
)
def test_the_same_holds_for_a_finite_set_that_is_read_without_repetition(size, count):
    rng = np.random.default_rng(0)
    is_damaged = np.arange(size) < count  # exactly 1%
    ended = [reads_until(20, rng.permutation(is_damaged)) < math.inf for _ in range(500)]
    assert np.mean(ended) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 500)


@pytest.mark.parametrize(("share", "reads"), [(1.0, 4), (0.2, 150), (0.05, 1500), (0.02, 15_000)])
def test_a_share_that_is_too_large_ends_a_run_soon(share, reads):
    rng = np.random.default_rng(0)
    for _ in range(30):
        assert reads_until(1 / ALPHA, rng.random(reads) < share) <= reads


def test_a_record_is_named_once_a_task(caplog):
    quarantine = Quarantine()
    for task in ("t2i", "t2i", "ie"):
        quarantine.skip(damaged(7, task), is_new=False)
    assert caplog.text.count("quarantined scenes[7] for task 't2i': truncated") == 1
    assert caplog.text.count("quarantined scenes[7] for task 'ie'") == 1


def test_the_log_is_not_buried(caplog):
    quarantine = Quarantine()
    for k in range(2 * MAX_LOGGED):
        quarantine.skip(damaged(k), is_new=False)
    assert caplog.text.count("quarantined scenes") == MAX_LOGGED
    assert "further quarantined records are counted, but not named" in caplog.text


def test_repeated_epochs_are_no_new_evidence():
    """One cut picture of 32 is 3%, but one."""
    quarantine = Quarantine()
    for epoch in range(1000):
        quarantine.skip(damaged(3), is_new=epoch == 0)
        for _ in range(31):
            if epoch == 0:
                quarantine.accept()


def test_the_end_says_how_many_and_which():
    quarantine = Quarantine()
    quarantine.accept()
    message = r"^4 of 5 .* \(more than data.max_bad_fraction=0.01\); the last: scenes\[3\] for task"
    for k in range(3):
        quarantine.skip(damaged(k))
    with pytest.raises(UserError, match=message):
        quarantine.skip(damaged(3))


def test_a_record_that_does_not_suit_is_sound():
    quarantine = Quarantine()
    for _ in range(100):
        quarantine.skip(UnsuitableRecord("scenes[0]: no visible joint"))
    quarantine.skip(damaged(1))
    quarantine.skip(damaged(2))


def test_the_limits_of_the_tolerance():
    """0: one damaged record ends the run; 1: none ever does."""
    strict, patient = Quarantine(tolerance=0.0), Quarantine(tolerance=1.0)
    for _ in range(1000):
        strict.accept()
        patient.skip(damaged(1))
    with pytest.raises(UserError, match="1 of 1001 records read are unusable"):
        strict.skip(damaged(1))


@pytest.mark.parametrize("tolerance", [0.001, 0.1, 0.5])
def test_another_tolerance(tolerance):
    rng = np.random.default_rng(0)
    for share, ends in ((tolerance, False), (min(1, 3 * tolerance), True)):
        is_damaged = rng.random(20_000) < share
        found = any(
            log_evidence(k, int(index) + 1, tolerance=tolerance) >= -math.log(ALPHA)
            for k, index in enumerate(np.flatnonzero(is_damaged), start=1)
        )
        assert found == ends


def placed(index: int) -> DamagedRecord:
    place = Place(dataset="faces/train", index=index, shard="faces-00001", key=index - 100)
    return DamagedRecord(f"faces/train[{index}] for id", "is not a readable image", place=place)


def test_the_file_names_each_record_once_over_processes_and_attempts(tmp_path):
    for attempt in range(3):  # by one, two and again two processes
        count = min(2, attempt + 1)
        for process in range(count):
            file = quarantine_file(tmp_path / "run", process_index=process, process_count=count)
            quarantine = Quarantine(file=file)
            for index in (101, 102, 101, 103 + attempt):
                quarantine.skip(placed(index), task="id", is_new=False)
                quarantine.flush()
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["quarantine-00000.jsonl", "quarantine.jsonl"]
    rows = read_quarantine(tmp_path / "run")
    assert sorted(row["index"] for row in rows) == [101, 102, 103, 104, 105]
    assert rows[-1] == dict(
        **dict(dataset="faces/train", index=103, shard="faces-00001", key=3, task="id"),
        reason="is not a readable image",
    )


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(), x))
ROWS = st.fixed_dictionaries({}, optional={"dataset": VALUES, "index": VALUES})


@given(damaged=st.lists(VALUES | ROWS, max_size=4))
def test_whatever_is_there_a_record_is_added(tmp_path_factory, damaged):
    file = tmp_path_factory.mktemp("rows") / "quarantine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in damaged))
    quarantine = Quarantine(file=file)
    quarantine.skip(placed(101), is_new=False)
    quarantine.flush()
    assert read_quarantine(file.parent)[-1]["index"] == 101


def test_a_line_that_names_no_record_is_named(tmp_path, caplog):
    (tmp_path / "quarantine.jsonl").write_text('{"dataset": "faces/train", "index": [1]}\n')
    assert read_quarantine(tmp_path) == []
    assert f"{tmp_path}/quarantine.jsonl: line 1 names no record" in caplog.text


def test_half_a_line_of_a_killed_run_is_left_out_and_does_not_spoil_the_next(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    file.write_text('{"dataset": "faces/train", "ind')
    quarantine = Quarantine(file=file)
    quarantine.skip(placed(101), is_new=False)
    quarantine.flush()
    assert [row["index"] for row in read_quarantine(tmp_path)] == [101]
