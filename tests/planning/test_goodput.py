"""What a pod's failures cost: a closed form, and a simulation that knows nothing of it."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from univg_jax.errors import UserError
from univg_jax.planning.goodput import Times, best_every, expected, measured, simulate

TIMES = Times(
    step=0.5, other=0.05, blocked=4.0, save=60.0, restore=90.0, compile=150.0, restart=240.0
)
HOUR = 3600.0


@pytest.mark.parametrize("chips", [64, 512, 2048, 9216])
@pytest.mark.parametrize("save", [20.0, 400.0])
def test_a_simulation_agrees(chips, save):
    times, mtbf = dataclasses.replace(TIMES, save=save), 20_000 * HOUR
    every = best_every(times, chips=chips, mtbf=mtbf)
    for steps in (every, 4 * every):
        runs = [
            simulate(
                times, chips=chips, mtbf=mtbf, every=steps, seconds=150 * mtbf / chips, seed=seed
            )
            for seed in range(8)
        ]
        # The mean of so many runs is within four of its standard errors, and what the end cuts off.
        error = np.std(runs) / math.sqrt(len(runs))
        found = expected(times, chips=chips, mtbf=mtbf, every=steps)
        assert abs(np.mean(runs) - found) < 4 * error + 0.005, (np.mean(runs), found, error)


@given(
    step=st.floats(0.01, 100),
    blocked=st.floats(0, 100),
    save=st.floats(0, 1000),
    chips=st.integers(1, 20_000),
    hours=st.floats(100, 1e6),
    factor=st.floats(0.02, 50),
)
def test_no_other_distance_of_saves_is_better(step, blocked, save, chips, hours, factor):
    times = dataclasses.replace(TIMES, step=step, blocked=blocked, save=blocked + save)
    pod = dict(chips=chips, mtbf=hours * HOUR)
    every = best_every(times, **pod)
    best = expected(times, **pod, every=every)
    assert 0 <= best <= step / (step + times.other)
    for other in (max(1, every - 1), every + 1, max(1, round(every * factor))):
        assert expected(times, **pod, every=other) <= best * (1 + 1e-9)


def test_without_failures_only_what_is_between_steps_is_lost():
    found = expected(TIMES, chips=1, mtbf=1e15, every=1000)
    assert found == pytest.approx(500 / (550 + 4), rel=1e-6)


def test_of_a_large_pod_the_distance_is_that_of_young():
    """sqrt(2 blocked MTBF), where failures are rare and saves short."""
    times = dataclasses.replace(TIMES, other=0.0, save=4.0)
    every = best_every(times, chips=64, mtbf=50_000 * HOUR)
    assert every * 0.5 == pytest.approx(math.sqrt(2 * 4 * 50_000 * HOUR / 64), rel=0.01)


ROWS = [
    {"step": 10, "seconds/start": 4.0, "seconds/compile": 20.0, "seconds/step": 5.0},
    {"step": 20, "seconds/step": 5.0, "seconds/data": 1.0, "seconds/save": 2.0},
]


def test_a_run_tells_what_its_parts_take():
    found = measured(ROWS)
    assert found == dict(step=0.5, other=0.05, blocked=2.0, restore=4.0, compile=20.0)
    with pytest.raises(UserError, match="have no steps"):
        measured([])
