"""Every benchmark knows a perfect answer from a trivial one, and its trivial answers are what they
are called.
"""

import numpy as np
import pytest

from data_pipelines.tasks import TASKS
from tests.evaluation import evaluation_cases as data
from univg_jax.evaluation.benchmarks import BENCHMARKS, CANDIDATES, draw_cases
from univg_jax.evaluation.metrics import merge
from univg_jax.evaluation.scorers import Scorers

PIXEL_TASKS = ("ie", "ip", "depth", "seg")  # those whose judge needs no fitted scorer
RECORDS = [data.scene(i) for i in range(12)]


def score(task, answer, cases):
    judge = BENCHMARKS[task].judge(Scorers(), cases)
    return merge(judge(case, answer(case))[BENCHMARKS[task].primary] for case in cases).value


def test_every_task_has_a_benchmark():
    assert list(BENCHMARKS) == list(TASKS)


@pytest.mark.parametrize("task", PIXEL_TASKS)
def test_the_true_answer_is_near_perfect_and_beats_every_trivial_one(task):
    cases, train = (
        draw_cases(task, RECORDS[:6], resolution=48),
        draw_cases(task, RECORDS[6:], resolution=48),
    )
    metric = BENCHMARKS[task].metrics[BENCHMARKS[task].primary]
    truth = score(task, lambda case: case.example.target, cases)
    # Depth is rendered in 8 bits of log depth: half a level is 1% of a meter; the others are exact.
    assert truth == pytest.approx(
        1.0 if metric.better == "higher" else 0.0, abs=0.02 if task == "depth" else 1e-12
    )
    for name, answer in BENCHMARKS[task].trivial(train).items():
        assert metric.improves(truth, score(task, answer, cases)), name


def test_trivial_answers_by_hand():
    (edit,) = draw_cases("ie", RECORDS[:1], resolution=48)
    copy = BENCHMARKS["ie"].trivial([])["a copy of the source"](edit)
    np.testing.assert_array_equal(copy, RECORDS[0]["source"])
    (hole,) = draw_cases("ip", RECORDS[:1], resolution=48)
    filled = BENCHMARKS["ip"].trivial([])["the mean visible color"](hole)
    inside = hole.example.mask[..., 0] > 0
    np.testing.assert_array_equal(filled[~inside], RECORDS[0]["image"][~inside])
    assert len(np.unique(filled[inside], axis=0)) == 1


def test_cases_are_fixed_by_the_seed():
    first, again = (draw_cases("ip", RECORDS, resolution=48, seed=3) for _ in range(2))
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a.example.mask, b.example.mask)
    assert [case.index for case in first] == list(range(len(RECORDS)))


def test_candidates_hold_the_truth_once_and_share_its_setting():
    from univg_jax.evaluation import benchmarks

    nouns = [f"noun{i}" for i in range(30)]
    records = [
        data.scene(0) | {"caption": f"a {n} on {'grass' if i % 2 else 'sand'}"}
        for i, n in enumerate(nouns)
    ]
    cases = draw_cases("t2i", records, resolution=48)
    rows = benchmarks._candidates(cases)
    for case, plain, objects in zip(cases, rows["retrieval_r1"], rows["retrieval_objects_r1"]):
        for row in (plain, objects):
            assert row[0] == case.example.text
            assert len(set(row)) == len(row) == CANDIDATES
        assert len({caption.rpartition(" on ")[2] for caption in objects}) == 1
    assert BENCHMARKS["t2i"].chance(cases)["retrieval_r1"] == 1 / CANDIDATES


def test_a_missing_scorer_or_label_is_named():
    cases = draw_cases("t2i", RECORDS[:2], resolution=48)
    with pytest.raises(ValueError, match="scene scorer"):
        BENCHMARKS["t2i"].judge(Scorers(), cases)
    with pytest.raises(ValueError, match="face encoder"):
        BENCHMARKS["id"].judge(Scorers(), [])
    with pytest.raises(ValueError, match="edit_mask"):
        draw_cases("ie", [{k: v for k, v in RECORDS[0].items() if k != "edit_mask"}], resolution=48)
