"""Batches have one size, cover each case once, and name each case by its index."""

import numpy as np
import pytest

from tests.evaluation import evaluation_cases as data
from univg_jax.errors import UserError
from univg_jax.evaluation.generate import case_batches

CASES = data.make_cases("ie", [data.scene(i) for i in range(7)])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
def test_every_case_comes_once_with_its_index_and_padding_is_not_valid(batch_size):
    batches = list(case_batches(CASES, collate=data.stack, batch_size=batch_size))
    assert all(len(b.batch.sample_id) == batch_size for b in batches)
    ids = np.concatenate([b.batch.sample_id for b in batches])
    valid = np.concatenate([b.batch.valid for b in batches])
    np.testing.assert_array_equal(ids[valid], range(7))
    assert [case.index for b in batches for case in b.cases] == list(range(7))
    images = [image for b in batches for image in b.images(data.noise)]
    assert len(images) == 7


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_reads_its_own_rows_and_gets_as_many_batches_as_the_others(index, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: index)
    batches = list(case_batches(CASES, collate=data.stack, batch_size=8))
    (batch,) = batches
    assert [case.index for case in batch.cases] == [[0, 1, 2, 3], [4, 5, 6]][index]
    assert len(batch.batch.valid) == 4
    batches = list(case_batches(CASES, collate=data.stack, batch_size=4))
    assert [len(b.cases) for b in batches] == [[2, 2], [2, 1]][index]
    (_, last) = list(case_batches(CASES, collate=data.stack, batch_size=6))
    assert [c.index for c in last.cases] == [[6], []][index]  # the second has padding alone
    assert len(last.images(data.noise)) == [1, 0][index]


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(UserError, match="batch size 5: expected a multiple of 2 processes"):
        next(case_batches(CASES, collate=data.stack, batch_size=5))
