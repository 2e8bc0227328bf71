"""Rows of sums and counts become a summary and a verdict."""

import dataclasses
import math

import numpy as np
import pytest

from univg_jax.evaluation import score
from univg_jax.evaluation.benchmark import BenchmarkTask, Metric
from univg_jax.evaluation.metrics import Ratio

TASK = BenchmarkTask(
    title="Toy",
    metrics={"m": Metric(label="M", better="lower"), "other": Metric(label="O", better="higher")},
    make_score=lambda scorers, cases: None,
    make_trivial=lambda train: {},
)


def summary(value):
    return {"m": {"value": value, "stderr": None, "count": 1.0}}


def test_the_standard_error_of_a_mean_is_the_usual_one():
    values = np.random.default_rng(0).random(20)
    expected = values.std(ddof=1) / math.sqrt(20)
    # Sums of 20 numbers in two orders.
    assert score.standard_error([Ratio.of(v) for v in values]) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(score.standard_error([Ratio.of(1.0)]))


def test_cases_of_one_person_are_not_independent():
    rng = np.random.default_rng(2)
    persons = np.repeat(np.arange(10), 4)
    values = rng.normal(size=10)[persons]  # all that varies is the person
    ratios = [Ratio.of(v) for v in values]
    naive, by_person = score.standard_error(ratios), score.standard_error(ratios, list(persons))
    # The error of the mean of 10 numbers, each of which is there four times.
    expected = values[::4].std(ddof=1) / math.sqrt(10)
    assert by_person == pytest.approx(expected, rel=1e-9)
    assert by_person > 1.9 * naive
    alone = score.standard_error(ratios, list(range(40)))
    assert alone == pytest.approx(naive, rel=1e-12)
    assert math.isnan(score.standard_error(ratios, [0] * 40)), "one person has no spread"


def test_rows_in_any_order_give_the_same_bits():
    rng = np.random.default_rng(1)
    rows = {i: {"m": Ratio.of(rng.random(3), np.ones(3))} for i in range(9)}
    mixed = {int(i): rows[int(i)] for i in rng.permutation(9)}
    one, two = (score.gather(r, count=9, template=rows[0]) for r in (rows, mixed))
    assert score.summarize(one) == score.summarize(two)


def test_what_was_never_counted_has_no_value():
    rows = score.gather({0: {"m": Ratio.of(0.0, 0.0)}}, count=1, template={"m": Ratio.of(0.0)})
    assert score.summarize(rows) == {"m": {"value": None, "stderr": None, "count": 0.0}}


def test_the_best_trivial_answer_is_what_a_model_must_beat():
    far = summary(0.9) | {"other": {"value": 5.0, "stderr": None, "count": 1.0}}
    near = summary(0.1) | {"other": {"value": 3.0, "stderr": None, "count": 1.0}}
    verdict = score.verdict(
        TASK,
        systems={"model": summary(0.2), "untrained": summary(0.5)},
        trivial={"far": far, "near": near, "unknown": summary(None)},
        references={},
    )
    assert verdict["beats"] == {"untrained": True, "trivial": False}
    # In each metric the one that is strongest there: `other` is better when higher.
    assert verdict["systems"]["trivial"] == {
        "m": near["m"] | {"answer": "near"},
        "other": far["other"] | {"answer": "far"},
    }


def test_a_benchmark_without_trivial_answers_has_a_verdict_too():
    verdict = score.verdict(TASK, systems={"model": summary(0.2)}, trivial={}, references={})
    assert verdict["trivial"] == {}
    assert "trivial" not in verdict["systems"]
    assert verdict["beats"] == {}


def test_the_table_has_a_line_for_each_task():
    systems = {"model": summary(0.2), "untrained": summary(0.5), "trivial": summary(None)}
    verdict = score.verdict(TASK, systems=systems, trivial={"none": summary(None)}, references={})
    metrics = {name: dataclasses.asdict(metric) for name, metric in TASK.metrics.items()}
    tasks = {"toy": {"metric": "m", "metrics": metrics, **verdict}}
    header, line = score.table(tasks).splitlines()
    assert header.split()[:7] == [
        *("task", "metric", "model", "untrained", "trivial", "codec", "verdict")
    ]
    assert line.split()[:6] == ["toy", "m", "0.2000", "0.5000", "-", "-"]
    assert line.endswith("does not beat the trivial one (none)")
