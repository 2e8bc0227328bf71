"""Every component gets its share, on every host; the stages of a run are one walk."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.order import Component, Order, host_rows
from data_pipelines.schedule import Rotation
from univg_jax.errors import UserError


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 10**12),
)
def test_a_visit_counts_the_earlier_ones(weights, seed, start):
    rotation = Rotation(weights, seed=seed)
    counts: dict[int, int] = {}
    for position in range(200):
        component, visit = rotation[position]
        assert visit == counts.get(component, 0)
        counts[component] = visit + 1
    # Anywhere in the stream: the next visit of a component is one more.
    last: dict[int, int] = {}
    for position in range(start, start + 50):
        component, visit = rotation[position]
        assert visit == last.get(component, visit - 1) + 1
        last[component] = visit


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("batch_size", [8, 64, 144, 512])
@pytest.mark.parametrize(
    "weights", [(1.0, 1.0), (0.28, 0.47, 0.2, 0.01, 0.01, 0.01, 0.02), (1.0,) * 4]
)
def test_every_host_gets_each_share(hosts, batch_size, weights):
    rotation = Rotation(weights, seed=3)
    steps = 8192 // batch_size
    positions = np.arange(steps * batch_size).reshape(steps, hosts, -1)
    components = np.array([rotation[int(g)][0] for g in positions.ravel()]).reshape(positions.shape)
    expected = np.array(weights) / np.sum(weights)
    whole = np.bincount(components.ravel(), minlength=len(weights)) / components.size
    # The discrepancy of a golden rotation is below 3 log(N) / N: here 0.0033.
    assert np.abs(whole - expected).max() < 0.0033
    for host in range(hosts):
        realized = (
            np.bincount(components[:, host].ravel(), minlength=len(weights))
            / components[:, host].size
        )
        # A host's slice of 144 (a Fibonacci number) barely moves between steps, so that each of its
        # windows errs the same way; a window of n errs by less than 2/n, and drifting averages most
        # of it away.
        bound = 0.0033 * hosts + (2 * hosts / batch_size if batch_size == 144 else 0)
        assert np.abs(realized - expected).max() < bound


def test_hosts_divide_a_batch_in_order():
    rows = [host_rows(12, process_index=i, process_count=3) for i in range(3)]
    assert [list(r) for r in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(UserError, match="global batch size 8 does not divide by 3 hosts"):
        host_rows(8, process_index=0, process_count=3)


# --- stages ---

LENGTHS = dict(t2i=40, ie=23, ip=7)


def order(weights: dict[str, float], *, seed: int = 0, after: dict | None = None, **fields):
    """The order of a run of tasks with these weights, which follows another one."""
    made = Order(
        [
            Component(
                task=task,
                source="web",
                weight=float(weight),
                length=fields.get("length", LENGTHS[task]),
                fingerprint=fields.get("fingerprint", "a"),
            )
            for task, weight in weights.items()
        ],
        seed=seed,
    )
    if after is not None:
        made.continue_from(json.loads(json.dumps(after)))
    return made


def records(made: Order, tasks, positions: int) -> dict[str, list[int]]:
    """The records that each task gets at the first positions."""
    found, names = collections.defaultdict(list), list(tasks)
    for turn in map(made.__getitem__, range(positions)):
        found[names[turn.component]].append(turn.index)
    return found


WEIGHTS = st.dictionaries(st.sampled_from(list(LENGTHS)), st.floats(0.1, 1), min_size=1)
STAGES = st.lists(st.tuples(WEIGHTS, st.integers(0, 3), st.integers(0, 60)), min_size=3, max_size=3)


@settings(max_examples=12, deadline=None)
@given(STAGES)
def test_three_stages_are_one_walk_through_each_source(stages):
    """Whatever their weights, seeds and lengths, and whichever tasks a stage leaves out."""
    state, found = None, collections.defaultdict(list)
    for weights, seed, positions in stages:
        made = order(weights, seed=seed, after=state)
        for task, indices in records(made, weights, positions).items():
            found[task] += indices
        resumed = order(weights, seed=seed)
        resumed.restore(json.loads(json.dumps(made.state())))  # without the stages before
        assert records(resumed, weights, 9) == records(made, weights, 9)
        state = made.state() | dict(next=positions)
    for task, indices in found.items():
        alone = order({task: 1.0}, seed=stages[0][1])
        assert indices == records(alone, [task], len(indices))[task]


def test_of_a_set_larger_than_what_three_stages_read_no_record_comes_twice():
    """At 1e-5 of the paper's counts: 205M, 57M and 2.9M text-to-image rows of 2 billion pairs."""
    state, seen, counts = None, [], []
    for weights, rows in ((dict(t2i=1), 2050), (dict(t2i=1, ie=1), 1140), (dict(t2i=1, ie=1), 58)):
        made = order(weights, after=state, length=20_000)
        seen += (indices := records(made, weights, rows)["t2i"])
        counts.append(len(indices))
        state = made.state() | dict(next=rows)
    assert counts == pytest.approx([2050, 570, 29], abs=2)
    assert len(set(seen)) == len(seen)


def test_a_turn_is_the_first_of_its_record_in_the_rest_of_an_epoch():
    state = order(dict(ie=1)).state() | dict(next=30)  # in the second epoch of 23 records
    turns = [order(dict(ie=1), after=state)[position] for position in range(60)]
    assert [turn.is_first for turn in turns] == [True] * 16 + [False] * 44


def test_a_stage_begins_anew_what_is_another_build(caplog):
    caplog.set_level("INFO")
    state = order(dict(t2i=1)).state() | dict(next=10)
    weights = dict(t2i=1, ie=1)
    for changes in (dict(fingerprint="b"), dict(length=41)):
        made = order(weights, after=state, **changes)
        fresh = order(weights, **changes)
        assert records(made, weights, 30) == records(fresh, weights, 30)
    assert caplog.text.count("web is another build than the stage before read: task t2i") == 2


def test_a_stage_follows_a_run_from_before_there_were_fingerprints():
    state = order(dict(t2i=1)).state() | dict(next=10)
    old = dict(next=10, mixture=state["mixture"])
    made = order(dict(t2i=1), after=old)
    assert records(made, ["t2i"], 9) == records(order(dict(t2i=1), after=state), ["t2i"], 9)
    assert made[0] != order(dict(t2i=1))[0]
