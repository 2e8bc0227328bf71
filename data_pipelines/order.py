"""The order of the stream: which component each position belongs to.

A component is a pair of a task and a source. Position g belongs to the component into whose share
of [0, 1) the point `frac(g * golden ratio + offset(seed))` falls. A rotation by an irrational
number visits every interval in exact proportion, and so does every arithmetic subsequence of it.
Batches, and the slices that any number of hosts take of them, therefore have the shares of the
weights, without a period that could coincide with the batch size.

How often a component came up before position g has a closed form, so that a stream resumes at any
position at once.

The global batch of step k holds positions [k B, (k + 1) B). Of n hosts the i-th makes the i-th
contiguous n-th of it (`host_rows`). So the rows of the assembled global array stand in the order of
positions, whatever n is.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from univg_jax.errors import UserError


def host_rows(batch_size: int, *, process_index: int, process_count: int) -> range:
    """The rows of a global batch that one host makes.

    Raises UserError if the batch does not divide by the hosts.
    """
    if batch_size % process_count:
        raise UserError(f"global batch size {batch_size} does not divide by {process_count} hosts")
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


class Visit(NamedTuple):
    """A position's component, and how many earlier positions belong to the same component."""

    component: int
    number: int


class Rotation:
    """Maps each position to its `Visit`.

    Everything is exact integer arithmetic on a circle of 2^64 points: `x_g = (a g + offset) mod
    2^64` with a = 2^64 / golden ratio, and component c owns `edges[c] <= x < edges[c + 1]`.
    """

    _MODULUS = 1 << 64
    _STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: all 2^64 points are visited

    def __init__(self, weights: Sequence[float], *, seed: int):
        shares = np.cumsum(np.asarray(weights, np.float64)) / np.sum(weights)
        inner = [round(float(share) * self._MODULUS) for share in shares[:-1]]
        self._edges = [0, *inner, self._MODULUS]
        # numpy draws at most 63 bits here; the factor spreads the offsets over the whole circle.
        self._offset = int(np.random.default_rng(seed).integers(1 << 63)) * 2

    def __getitem__(self, position: int) -> Visit:
        x = (self._STEP * position + self._offset) % self._MODULUS
        component = bisect.bisect_right(self._edges, x) - 1
        return Visit(component, self._count(position, component))

    def _count(self, positions: int, component: int) -> int:
        """`#{g < positions : low <= x_g < high}` for the component's edges low and high.

        For 0 <= x < m and 0 <= low <= high <= m, `floor((x - low) / m) - floor((x - high) / m)` is
        1 if low <= x < high, else 0. Adding a multiple of m to x changes both terms alike, so the
        sum over g may use `a g + offset` without the mod, and becomes two floor sums.
        """
        a, m, r = self._STEP, self._MODULUS, self._offset
        low, high = self._edges[component], self._edges[component + 1]
        return _floor_sum(positions, m, a, r - low) - _floor_sum(positions, m, a, r - high)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """`sum_{i < n} floor((a i + b) / m)`, in O(log m) steps of Euclid's algorithm."""
    # Why this works: the sum counts the lattice points under the line y = (a x + b) / m.
    # 1. Whole multiples of m in a and b are a triangle and a rectangle of points, counted directly;
    #    afterwards 0 <= a, b < m.
    # 2. Counting the points that are left by rows instead of columns exchanges the axes: the same
    #    sum with a and m exchanged, over as many rows as the line reaches, with a new offset.
    # Like in Euclid's algorithm for (m, a), the numbers shrink until no row is left. Python's
    # floor division makes step 1 hold for a negative b too.
    total = 0
    while n:
        total += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        n, b = divmod(a * n + b, m)
        m, a = a, m
    return total
