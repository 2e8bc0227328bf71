"""MLPerf's validation loss: which row is at which time, and the mean of means."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from univg_jax.evaluation.benchmarks import mlperf_loss
from univg_jax.evaluation.benchmarks.coco30k import Row

losses = st.lists(st.floats(0, 10), min_size=1, max_size=40)


def scored(numbers):
    rows = [Row(k, k, k, "") for k in range(len(numbers))]
    return rows, [mlperf_loss.score(r, n) for r, n in zip(rows, numbers, strict=True)]


def test_times_come_in_turn_and_equally_often():
    times = mlperf_loss.times(mlperf_loss.SAMPLES)
    assert set(collections.Counter(times.tolist()).values()) == {29_696 // 8}
    assert times[:9].tolist() == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0]


@given(losses)
def test_the_loss_by_the_published_algorithm(numbers):
    """Sums and counts of each time, one sample after the other."""
    sums, counts, t = np.zeros(8), np.zeros(8), 0
    for number in numbers:
        sums[t] += number
        counts[t] += 1
        t = (t + 1) % 8
    means = [s / c for s, c in zip(sums, counts, strict=True) if c]
    found = mlperf_loss.summary(*scored(numbers))
    assert found["loss"] == pytest.approx(sum(means) / len(means))
    assert found["time_0_8"] == pytest.approx(means[0])


@given(losses)
def test_shards_of_any_size_make_the_whole(numbers):
    rows, scores = scored(numbers)
    turned = mlperf_loss.summary(rows[::-1], scores[::-1])
    whole = mlperf_loss.summary(rows, scores)
    assert {k: repr(v) for k, v in turned.items()} == {k: repr(v) for k, v in whole.items()}
