"""What happens to the data where a run goes on with another config, which its user has declared."""

import collections
import itertools
import logging

import jax.numpy as jnp
import pytest

from tests.data_pipelines.toy import NUM_RECORDS, assert_same, make_config, stream
from univg_jax import workdir
from univg_jax.checkpoint import Checkpointer
from univg_jax.errors import UserError
from univg_jax.settings import Config
from univg_jax.training.initialize import begin_stream

STEPS = 5


@pytest.fixture
def folder(tmp_path):
    """A run that has read the batches of some steps."""
    config = Config.of(make_config())
    begun = stream()
    for _ in range(STEPS):
        next(begun)
    workdir.claim_workdir(tmp_path, config)
    with Checkpointer(tmp_path) as checkpointer:
        state = {"params": {"a": jnp.ones(2)}}
        checkpointer.save(STEPS, state, begun.get_state(), config.to_dict())
    return tmp_path


def go_on(folder, config):
    found = stream(config)
    begin_stream(Config.of(config), found, workdir=folder)
    return found


def records(batches):
    """The records of each task, in order."""
    found = collections.defaultdict(list)
    for batch in batches:
        for task, picture in zip(batch.task, batch.target, strict=True):
            found[int(task)].append(picture.flat[0])
    return found


def test_another_batch_size_goes_on_with_the_next_sample(folder, caplog):
    with caplog.at_level(logging.WARNING):
        found = next(go_on(folder, make_config(batch_size=4)))
    expected = list(itertools.islice(stream(make_config(batch_size=4)), 2 * STEPS + 1))[-1]
    assert_same(found, expected)
    assert "the data go on at sample 40, in the same order" in caplog.text


def test_other_weights_go_on_in_each_source(folder, caplog):
    """No record comes again before the epoch is over."""
    weights = dict(t2i=0.5, ie=0.25, ip=0.25)
    with caplog.at_level(logging.WARNING):
        changed = go_on(folder, make_config(**weights))
    assert "belongs to another mixture" in caplog.text
    assert "each task goes on in its sources where it was there" in caplog.text
    before, after = records(itertools.islice(stream(), STEPS)), records([next(changed)])
    assert set(before) & set(after)
    for task in after:
        both = [*before[task], *after[task]][:NUM_RECORDS]
        assert len(set(both)) == len(both)


def test_other_records_that_nobody_declared_are_refused(folder):
    workdir.claim_workdir(folder, Config.of(make_config()))
    with pytest.raises(UserError, match="belongs to another mixture"):
        begin_stream(Config.of(make_config()), stream(make_config(t2i=1.0)), workdir=folder)
