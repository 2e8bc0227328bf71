"""Which component each position of the stream belongs to, and in which bucket.

A component is a pair of a task and a source. Position g belongs to the component into whose share
of [0, 1) the point `frac(g * golden ratio + offset(seed))` falls. A rotation by an irrational
number visits every interval in exact proportion, and so does every arithmetic subsequence of it.
Batches, and the slices that any number of hosts take of them, therefore have the shares of the
weights, without a period that could coincide with the batch size.

How often a component came up before position g has a closed form, so that a stream resumes at any
position at once.

Pictures of different shapes are not in one batch: each record is in the bucket whose shape is
nearest to its own (`univg_jax.buckets`). With the weights w_c and the share P(b | c) of a
component's records that are in bucket b, a step is of bucket b with the share
p_b = sum_c w_c P(b | c), and its rows are of component c with the share w_c P(b | c) / p_b, so that
of all rows the share of c is w_c. Both are rotations: of steps, and, in each bucket, of the rows of
its steps one after another. So every host is in the same bucket at each step, no record is left
out, and all stays a closed form of (seed, position). With one bucket this is the plain stream.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


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
        return Visit(component, self.count(position, component))

    def count(self, positions: int, component: int) -> int:
        """`#{g < positions : low <= x_g < high}` for the component's edges low and high.

        For 0 <= x < m and 0 <= low <= high <= m, `floor((x - low) / m) - floor((x - high) / m)` is
        1 if low <= x < high, else 0. Adding a multiple of m to x changes both terms alike, so the
        sum over g may use `a g + offset` without the mod, and becomes two floor sums.
        """
        a, m, r = self._STEP, self._MODULUS, self._offset
        low, high = self._edges[component], self._edges[component + 1]
        if high - low == m:
            return positions
        return _floor_sum(positions, m, a, r - low) - _floor_sum(positions, m, a, r - high)


class Schedule:
    """The bucket of each step, and the component of each of its rows.

    `lengths[b][c]` is how many records of component c are in bucket b, and a step has `batch_size`
    rows. A bucket without records never comes.
    """

    def __init__(
        self,
        weights: Sequence[float],
        lengths: Sequence[Sequence[int]],
        *,
        seed: int,
        batch_size: int,
    ):
        self._batch_size = batch_size
        totals = np.sum(lengths, axis=0)
        inside = [[w * (n / t) for w, n, t in zip(weights, ns, totals)] for ns in lengths]
        self.shares = [sum(row) / sum(weights) for row in inside]
        self._buckets = [b for b, share in enumerate(self.shares) if share > 0]
        self._steps = Rotation([self.shares[b] for b in self._buckets], seed=seed)
        # What has no weight is left out: rounding must not give it a point of the circle.
        self._components = [np.flatnonzero(row).tolist() for row in inside]
        self._rows = [
            Rotation([row[c] for c in some], seed=seed) if some else None
            for row, some in zip(inside, self._components)
        ]

    def __getitem__(self, position: int) -> tuple[int, Visit]:
        """A position's bucket, and its component and the earlier visits of that in the bucket."""
        step, row = divmod(position, self._batch_size)
        number, earlier = self._steps[step]
        bucket = self._buckets[number]
        component, visits = self._rows[bucket][earlier * self._batch_size + row]
        return bucket, Visit(self._components[bucket][component], visits)

    def count(self, positions: int, bucket: int, component: int) -> int:
        """How many of the first `positions` are of a component in a bucket."""
        if component not in self._components[bucket]:
            return 0
        step, row = divmod(positions, self._batch_size)
        number = self._buckets.index(bucket)
        rows = self._steps.count(step, number) * self._batch_size
        if row and self._steps[step].component == number:
            rows += row
        return self._rows[bucket].count(rows, self._components[bucket].index(component))


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
