"""Batches have one size, cover each case once, and name each case by its index."""

import pytest

from tests.evaluation import evaluation_cases as data
from univg_jax.errors import UserError
from univg_jax.evaluation.generate import case_batches

CASES = data.make_cases("ie", [data.scene(i) for i in range(7)])


@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
def test_every_case_comes_once_with_its_index_and_padding_is_not_valid(batch_size):
    cases, batches = zip(*case_batches(CASES, collator=data.COLLATOR, batch_size=batch_size))
    assert all(batch.size == batch_size for batch in batches)
    for mine, batch in zip(cases, batches, strict=True):
        assert batch.valid.tolist() == [i < len(mine) for i in range(batch_size)]
        assert batch.sample_id[batch.valid].tolist() == [case.index for case in mine]
    assert [case.index for mine in cases for case in mine] == list(range(7))


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_reads_its_own_rows_and_gets_as_many_batches_as_the_others(index, monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: index)
    ((cases, batch),) = case_batches(CASES, collator=data.COLLATOR, batch_size=8)
    assert [case.index for case in cases] == [[0, 1, 2, 3], [4, 5, 6]][index]
    assert batch.size == 4
    batches = list(case_batches(CASES, collator=data.COLLATOR, batch_size=4))
    assert [len(cases) for cases, _ in batches] == [[2, 2], [2, 1]][index]
    _, (cases, batch) = case_batches(CASES, collator=data.COLLATOR, batch_size=6)
    assert [case.index for case in cases] == [[6], []][index]  # the second has padding alone
    assert (batch.size, batch.valid.sum()) == (3, len(cases))


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(UserError, match="batch size 5: expected a multiple of 2 processes"):
        next(case_batches(CASES, collator=data.COLLATOR, batch_size=5))
