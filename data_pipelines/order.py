"""The order of the stream: which record of which component each position has.

A component is a pair of a task and a source. Position g belongs to the component into whose share
of [0, 1) the point `frac(g * golden ratio + offset(seed))` falls. A rotation by an irrational
number visits every interval in exact proportion, and so does every arithmetic subsequence of it.
Batches, and the slices that any number of hosts take of them, therefore have the shares of the
weights, without a period that could coincide with the batch size.

How often a component came up before position g has a closed form, so that a stream resumes at any
position at once.

A component takes the records of its source in an order that each epoch shuffles anew. The stages
of a run are one walk through it: each begins where the one before it stopped (`Lineage`), so no
record comes again before all of its source have come.

The global batch of step k holds positions [k B, (k + 1) B). Of n hosts the i-th makes the i-th
contiguous n-th of it (`host_rows`). So the rows of the assembled global array stand in the order of
positions, whatever n is.
"""

import bisect
import dataclasses
import logging
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from univg_jax.errors import UserError
from univg_jax.trees import Json

_logger = logging.getLogger(__name__)


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
        return Visit(component, self.count(position, component))

    def count(self, positions: int, component: int) -> int:
        """`#{g < positions : low <= x_g < high}` for the component's edges low and high.

        For 0 <= x < m and 0 <= low <= high <= m, `floor((x - low) / m) - floor((x - high) / m)` is
        1 if low <= x < high, else 0. Adding a multiple of m to x changes both terms alike, so the
        sum over g may use `a g + offset` without the mod, and becomes two floor sums.
        """
        a, m, r = self._STEP, self._MODULUS, self._offset
        low, high = self._edges[component], self._edges[component + 1]
        return _floor_sum(positions, m, a, r - low) - _floor_sum(positions, m, a, r - high)


class Component(NamedTuple):
    """What decides the order of a task's records from a source; `weight` is relative."""

    task: str
    source: str
    length: int
    weight: float
    fingerprint: str


class Turn(NamedTuple):
    """Whose turn it is: a component and a record of its source.

    `is_first`: it is in the epoch in which the run began this source, so that no turn before it in
    the run had this record.
    """

    component: int
    index: int
    is_first: bool


class Place(NamedTuple):
    """How many visits a component has made to its source, whose build the fingerprint tells."""

    task: str
    source: str
    length: int
    fingerprint: str | None  # None: of a run from before there were fingerprints
    visits: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """Where the stages before a run stopped.

    `seed` is the first stage's, which keys the shuffles of all. `places` has every component that
    any of them had.
    """

    seed: int
    places: tuple[Place, ...] = ()

    @classmethod
    def of(cls, state: Json) -> "Lineage":
        """That of a saved order. Before there were lineages, each run was a first one."""
        saved = state.get("lineage", {"seed": state["mixture"]["seed"], "places": []})
        return cls(seed=saved["seed"], places=tuple(Place(*place) for place in saved["places"]))

    @classmethod
    def after(cls, state: Json) -> "Lineage":
        """That of a stage which follows a run that stopped at this saved order and position."""
        mixture, fingerprints = state["mixture"], state.get("fingerprints", {})
        lineage = cls.of(state)
        rotation = Rotation([weight for *_, weight in mixture["components"]], seed=mixture["seed"])
        places = []
        for number, (task, source, length, _) in enumerate(mixture["components"]):
            before = lineage.find(task, source)
            visits = rotation.count(state["next"], number) + (before.visits if before else 0)
            places.append(Place(task, source, length, fingerprints.get(source), visits))
        return lineage.updated(places)

    def find(self, task: str, source: str) -> Place | None:
        """The place of a component, if there was one."""
        return next((p for p in self.places if (p.task, p.source) == (task, source)), None)

    def updated(self, places: Sequence[Place]) -> "Lineage":
        """With these places instead of those of the same components."""
        own = {(place.task, place.source) for place in places}
        others = [place for place in self.places if (place.task, place.source) not in own]
        return dataclasses.replace(self, places=(*others, *places))


class Order:
    """The `Turn` of each position, as a function of the components, the seed and the lineage."""

    def __init__(self, components: Sequence[Component], *, seed: int):
        self._components, self._seed = components, seed
        self._rotation = Rotation([c.weight for c in components], seed=seed)
        self._has_warned = False
        self._begin(Lineage(seed=seed))

    def __getitem__(self, position: int) -> Turn:
        component, number = self._rotation[position]
        start, length = self._starts[component], self._components[component].length
        return Turn(
            component,
            index=int(self._walks[component][start + number]),
            is_first=number < length - start % length,
        )

    def state(self) -> dict[str, Any]:
        """JSON-able: all that decides the order."""
        components = [[c.task, c.source, c.length, c.weight] for c in self._components]
        return {
            "mixture": {"seed": self._seed, "components": components},
            "fingerprints": {c.source: c.fingerprint for c in self._components},
            "lineage": dataclasses.asdict(self._lineage),
        }

    def restore(self, state: Json) -> None:
        """Takes up a saved order again.

        Raises UserError if it is of another mixture or of other records, in which a position would
        silently skip and repeat some.
        """
        own = self.state()
        saved, mixture = state.get("mixture", {}), own["mixture"]
        if saved != mixture:
            field = next((k for k in mixture if saved.get(k) != mixture[k]), "mixture")
            raise UserError(
                "the saved data position belongs to another mixture: "
                f"{field} was {saved.get(field)}, is {mixture.get(field)}; to change weights, "
                "sources or seed start a new stream (a new workdir, init_from)"
            )
        if "fingerprints" not in state and not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "an old checkpoint: it does not say of which records its position is, and these "
                "are taken for the same"
            )
        for name, found in own["fingerprints"].items():
            if (before := state.get("fingerprints", {}).get(name, found)) != found:
                raise UserError(
                    f"{name} has other records than those of the saved data position: its "
                    f"fingerprint was {before}, is {found}; bring the former records back, or "
                    "start a new stream (a new workdir, init_from)"
                )
        self._begin(Lineage.of(state))

    def continue_from(self, state: Json) -> None:
        """Follows another run, from its saved order and its position in it, `state["next"]`.

        Each component that both have goes on in its source where the other stopped, with its epochs
        counted through. A component that is new, or whose source is another build, begins it anew.
        Two stages that follow the same one get the same records.
        """
        self._begin(Lineage.after(state))

    def _begin(self, lineage: Lineage) -> None:
        self._starts, places = [], []
        for task, source, length, _, fingerprint in self._components:
            start, before = 0, lineage.find(task, source)
            if before and before.length == length and before.fingerprint in (None, fingerprint):
                start = before.visits
            elif before:
                _logger.info(
                    "%s is another build than the stage before read: task %s begins it anew",
                    *(source, task),
                )
            self._starts.append(start)
            places.append(Place(task, source, length, fingerprint, start))
        self._lineage = lineage.updated(places)
        self._walks = [
            grain.MapDataset.range(c.length)
            .seed(zlib.crc32(f"{lineage.seed} {c.task} {c.source}".encode()))
            .shuffle()
            .repeat()
            for c in self._components
        ]


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
