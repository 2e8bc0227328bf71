"""Buckets keep every share exact, and the order is what counting from the start would give."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.order import Bucket, Component, Order
from data_pipelines.schedule import Rotation, Schedule
from univg_jax.errors import UserError


@st.composite
def mixtures(draw):
    """Weights of components, and lengths[bucket][component]; every component has records."""
    count, buckets = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    weights = draw(st.lists(st.floats(0.05, 5), min_size=count, max_size=count))
    lengths = [
        draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)) for _ in range(buckets)
    ]
    lengths[0] = [max(n, int(not any(row[c] for row in lengths))) for c, n in enumerate(lengths[0])]
    return weights, lengths


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 2**31), st.sampled_from([1, 2, 8]), st.integers(0, 10**9))
def test_a_schedule_counts_what_came_before(mixture, seed, batch_size, late):
    weights, lengths = mixture
    schedule = Schedule(weights, lengths, seed=seed, batch_size=batch_size)
    counts = collections.Counter()
    for position in range(120):
        bucket, visit = schedule[position]
        assert lengths[bucket][visit.component]
        assert visit.number == counts[bucket, visit.component]
        counts[bucket, visit.component] += 1
    for b, row in enumerate(lengths):
        for c in range(len(row)):
            assert schedule.count(120, b, c) == counts[b, c]
    # Anywhere in the stream: each component of each bucket goes on without a gap.
    next_of = {
        (b, c): schedule.count(late, b, c) for b, row in enumerate(lengths) for c in range(len(row))
    }
    for position in range(late, late + 60):
        bucket, visit = schedule[position]
        assert visit.number == next_of[bucket, visit.component]
        next_of[bucket, visit.component] += 1


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(0, 2**31), st.sampled_from([1, 4, 16]))
def test_a_step_is_in_one_bucket_and_all_shares_are_exact(mixture, seed, batch_size):
    weights, lengths = mixture
    schedule = Schedule(weights, lengths, seed=seed, batch_size=batch_size)
    for step in range(20):
        rows = range(step * batch_size, (step + 1) * batch_size)
        assert len({schedule[position][0] for position in rows}) == 1
    steps = 20_000
    positions = steps * batch_size
    totals, shares = np.sum(lengths, axis=0), np.array(weights) / np.sum(weights)
    counts = np.zeros(np.shape(lengths), int)
    for b, c in np.ndindex(counts.shape):
        counts[b, c] = schedule.count(positions, b, c)
    assert counts.sum() == positions
    # The discrepancy of a golden rotation is below 3 log(N) / N; each bucket's adds its own.
    tolerance = 4 * 3 * np.log(steps) / steps
    expected = shares * np.array(lengths) / totals
    np.testing.assert_allclose(counts / positions, expected, atol=tolerance)
    np.testing.assert_allclose(counts.sum(axis=0) / positions, shares, atol=tolerance)
    np.testing.assert_allclose(schedule.shares, expected.sum(axis=1), rtol=1e-12)


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=5), st.integers(0, 2**31))
def test_one_bucket_is_the_plain_rotation_whatever_the_batch(weights, seed):
    rotation = Rotation(weights, seed=seed)
    schedule = Schedule(weights, [[7] * len(weights)], seed=seed, batch_size=6)
    for position in [*range(50), 10**12 + 5]:
        assert schedule[position] == (0, rotation[position])
    for component in range(len(weights)):
        assert schedule.count(10**6 + 3, 0, component) == rotation.count(10**6 + 3, component)


# --- the order in buckets ---

SHAPES = ((4, 8), (8, 8), (8, 4))
WEB = {"t2i": 0.3, "ip": 0.7}


def split(numbers) -> tuple[Bucket, ...]:
    """The records whose numbers are those of each bucket."""
    found = [np.flatnonzero(np.array(numbers) == b).astype(np.uint32) for b in range(len(SHAPES))]
    return tuple(Bucket(f, None if len(f) == len(numbers) else f.tobytes().hex()) for f in found)


def order(numbers, weights=WEB, *, seed=0, after=None, shapes=SHAPES, batch_size=4) -> Order:
    """The order of tasks on one source, whose record i is in bucket numbers[i]."""
    buckets = split(numbers)
    made = Order(
        [Component(task, "web", len(numbers), w, "a", buckets) for task, w in weights.items()],
        seed=seed,
        batch_size=batch_size,
        shapes=shapes,
    )
    if after is not None:
        made.continue_from(json.loads(json.dumps(after)))
    return made


def records(made: Order, positions) -> list[tuple[int, int, int]]:
    """(component, bucket, stored record) of each position."""
    turns = map(made.__getitem__, positions)
    return [(t.component, t.bucket, int(made.records(t)[t.index])) for t in turns]


# Not fewer records: the time of grain's index_shuffle is that of 2^16 records over their number.
NUMBERS = st.lists(st.integers(0, 2), min_size=10, max_size=40)


@settings(max_examples=15, deadline=None)
@given(NUMBERS, st.integers(0, 100))
def test_every_record_comes_once_an_epoch_of_its_bucket(numbers, seed):
    made, seen = order(numbers, seed=seed), collections.defaultdict(list)
    for component, bucket, record in records(made, range(200)):
        assert numbers[record] == bucket
        seen[component, bucket].append(record)
    for (_, bucket), found in seen.items():
        length = numbers.count(bucket)
        for start in range(0, len(found) - length + 1, length):
            assert sorted(found[start : start + length]) == [
                i for i, number in enumerate(numbers) if number == bucket
            ]


@settings(max_examples=15, deadline=None)
@given(NUMBERS, st.integers(0, 15), st.integers(0, 3))
def test_an_order_in_buckets_is_restored_and_goes_on_in_the_next_stage(numbers, steps, seed):
    first = order(numbers)
    state = json.loads(json.dumps(first.state() | dict(next=4 * steps)))
    resumed = order(numbers)
    resumed.restore(state)
    late = range(4 * steps, 4 * steps + 40)
    assert records(resumed, late) == records(first, late)
    # A stage of another resolution, seed, batch size and weights: one walk in each bucket.
    second = order(
        numbers,
        dict(t2i=1.0),
        seed=seed,
        after=state,
        shapes=((1, 2), (2, 2), (2, 1)),
        batch_size=3,
    )
    seen = collections.defaultdict(list)
    for component, bucket, record in records(first, range(4 * steps)):
        if component == 0:
            seen[bucket].append(record)
    for _, bucket, record in records(second, range(60)):
        seen[bucket].append(record)
    alone = order(numbers, dict(t2i=1.0))
    walk = collections.defaultdict(list)
    for _, bucket, record in records(alone, range(4 * steps + 100)):
        walk[bucket].append(record)
    for bucket, found in seen.items():
        shared = min(len(found), len(walk[bucket]))
        assert found[:shared] == walk[bucket][:shared]


def test_a_stage_in_other_buckets_begins_anew_and_says_so(caplog):
    caplog.set_level("INFO")
    numbers = [0, 1, 2, 0, 1, 1, 2, 2, 2]
    state = order(numbers).state() | dict(next=8)
    other = order([1, *numbers[1:]], after=state)
    # Bucket 2 has the same records, and goes on; the others begin.
    fresh = order([1, *numbers[1:]])
    for mine, new in zip(records(other, range(100)), records(fresh, range(100)), strict=True):
        assert mine[:2] == new[:2]
        assert mine[1] == 2 or mine == new
    assert "web is in other buckets than in the stage before: task t2i begins" in caplog.text


def test_a_stage_in_buckets_follows_one_without_where_all_pictures_are_square():
    plain = Order([Component("t2i", "web", 9, 1.0, "a")], seed=0)
    state = plain.state() | dict(next=5)
    bucketed = order([1] * 9, dict(t2i=1.0), after=state)
    assert [r for _, _, r in records(bucketed, range(4))] == [
        plain[position].index for position in range(5, 9)
    ]


def test_another_split_into_buckets_is_refused():
    numbers = [0, 1, 2, 0, 1, 1]
    state = json.loads(json.dumps(order(numbers).state() | dict(next=8)))
    with pytest.raises(UserError, match="buckets was 4x8, 8x8, 8x4, is 2x4, 4x4, 4x2; to change"):
        order(numbers, shapes=((2, 4), (4, 4), (4, 2))).restore(state)
    with pytest.raises(UserError, match="8x4, is 4x8, 8x8, 8x4 with other records in them; to"):
        order([1, 0, 2, 0, 1, 1]).restore(state)
    with pytest.raises(UserError, match="batch_size was 4, is 6"):
        order(numbers, batch_size=6).restore(state)
    plain = Order([Component(task, "web", 6, w, "a") for task, w in WEB.items()], seed=0)
    with pytest.raises(UserError, match="buckets was 4x8, 8x8, 8x4, is one; to change"):
        plain.restore(state)
    with pytest.raises(UserError, match="buckets was one, is 4x8, 8x8, 8x4; to change"):
        order(numbers).restore(plain.state() | dict(next=8))
