"""Every component gets its share, on every host, and each visit knows its number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.order import Rotation, host_rows
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
