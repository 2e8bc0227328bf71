"""Cases are fixed by the seed and made as needed; a metric alone decides which value is better."""

import math

import numpy as np
import pytest

from tests.evaluation import evaluation_cases as data
from univg_jax.evaluation.benchmark import Metric

RECORDS = [data.scene(i) for i in range(12)]


def test_cases_are_fixed_by_the_seed():
    first, again = (data.make_cases("ip", RECORDS, seed=3) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.example.mask, b.example.mask)
    assert [case.index for case in first] == list(range(len(RECORDS)))


def test_a_case_is_read_only_when_it_is_indexed():
    class Counted(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    records = Counted(RECORDS)
    cases = data.make_cases("t2i", records)
    assert len(cases) == 12
    before = records.read  # the type checks of the tests look at some records
    assert cases[5].prompt == f"<t2i> {RECORDS[5]['caption']}"
    assert records.read - before == 1
    assert cases.texts == [record["caption"] for record in RECORDS]


@pytest.mark.parametrize(("better", "best"), [("higher", "c"), ("lower", "b")])
def test_the_best_value_is_the_first_of_equals_and_no_nan(better, best):
    metric = Metric(label="M", better=better)
    values = {"a": math.nan, "b": 1.0, "also b": 1.0, "c": 2.0, "also c": 2.0}
    assert metric.best(values) == best
    assert metric.best({"a": math.nan, "b": math.nan}) == "a"


def test_a_tie_or_a_nan_is_no_improvement():
    metric = Metric(label="M", better="lower")
    assert metric.improves(1.0, 2.0)
    assert not metric.improves(1.0, 1.0)
    assert not metric.improves(math.nan, 1.0)
    assert not metric.improves(1.0, math.nan)
