"""The order of the stream: which record of which component each position has.

A component is a pair of a task and a source. `data_pipelines.schedule` says which of them a
position belongs to, and how often it came up before.

A component takes the records of its source (in a bucket, those in the bucket) in an order that
each epoch shuffles anew. The stages of a run are one walk through it: each begins where the one
before it stopped (`Lineage`), so no record comes again before all of its source have come.

The global batch of step k holds positions [k B, (k + 1) B). Of n hosts the i-th makes the i-th
contiguous n-th of it (`host_rows`). So the rows of the assembled global array stand in the order of
positions, whatever n is.
"""

import dataclasses
import logging
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int64, Integer

from data_pipelines.schedule import Schedule
from univg_jax.buckets import Shape
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


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The records of a source in one bucket, ascending; `name` is a checksum of their indices.

    It is None where these are all records of the source.
    """

    records: range | Integer[np.ndarray, " n"]
    name: str | None = None


class Component(NamedTuple):
    """What decides the order of a task's records from a source; `weight` is relative.

    `buckets` has the source's records in each bucket. None: there is one, with all records.
    """

    task: str
    source: str
    length: int
    weight: float
    fingerprint: str
    buckets: tuple[Bucket, ...] | None = None


class Turn(NamedTuple):
    """Whose turn it is: a component and one of its source's records in a bucket.

    `index` is the record's place in the bucket. `is_first`: it is in the epoch in which the run
    began this source, so that no turn before it in the run had this record.
    """

    component: int
    index: int
    is_first: bool
    bucket: int = 0


class Place(NamedTuple):
    """How many visits a component has made to its source in a bucket of `length` records.

    The fingerprint tells the source's build, and `bucket` which of its records these are.
    """

    task: str
    source: str
    length: int
    fingerprint: str | None  # None: of a run from before there were fingerprints
    visits: int
    bucket: str | None = None  # None: all

    @property
    def key(self) -> tuple[str, str, str | None]:
        """What two stages have in common where one goes on with the other's walk."""
        return self.task, self.source, self.bucket


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
        components, lineage = mixture["components"], cls.of(state)
        everything = dict(lengths=[n for _, _, n, _ in components], names=[None] * len(components))
        buckets = mixture.get("buckets", [everything])
        schedule = Schedule(
            [weight for *_, weight in components],
            [bucket["lengths"] for bucket in buckets],
            seed=mixture["seed"],
            batch_size=mixture.get("batch_size", 1),
        )
        places = []
        for b, bucket in enumerate(buckets):
            for c, (task, source, _, _) in enumerate(components):
                length, name = bucket["lengths"][c], bucket["names"][c]
                if length:
                    place = Place(task, source, length, fingerprints.get(source), 0, name)
                    before = lineage.find(place.key)
                    visits = schedule.count(state["next"], b, c) + (before.visits if before else 0)
                    places.append(place._replace(visits=visits))
        return lineage.updated(places)

    def find(self, key: tuple[str, str, str | None]) -> Place | None:
        """The place with a key (`Place.key`), if there was one."""
        return next((place for place in self.places if place.key == key), None)

    def updated(self, places: Sequence[Place]) -> "Lineage":
        """With these places instead of those with the same keys."""
        own = {place.key for place in places}
        others = [place for place in self.places if place.key not in own]
        return dataclasses.replace(self, places=(*others, *places))

    def to_json(self) -> Json:
        """As `of` reads it."""
        # Without the name of a bucket that is all of a source, a place has the form that it had
        # before there were buckets.
        places = [list(p if p.bucket else p[:-1]) for p in self.places]
        return {"seed": self.seed, "places": places}


class Order:
    """The `Turn` of each position, as a function of the components, the seed and the lineage.

    `shapes` are those of the components' buckets, and `batch_size` the rows of a step, all of which
    are of one bucket.
    """

    def __init__(
        self,
        components: Sequence[Component],
        *,
        seed: int,
        batch_size: int = 1,
        shapes: Sequence[Shape] = (),
    ):
        self._components, self._seed, self._shapes = components, seed, shapes
        self._batch_size = batch_size
        whole = [(Bucket(range(c.length)),) for c in components]
        # Of each bucket, the records of each component.
        self._buckets = list(zip(*(c.buckets or w for c, w in zip(components, whole))))
        self._schedule = Schedule(
            [c.weight for c in components],
            [[len(bucket.records) for bucket in row] for row in self._buckets],
            seed=seed,
            batch_size=batch_size,
        )
        self._has_warned = False
        self._begin(Lineage(seed=seed))

    @property
    def shares(self) -> list[float]:
        """The share of steps of each bucket."""
        return self._schedule.shares

    def __getitem__(self, position: int) -> Turn:
        bucket, (component, number) = self._schedule[position]
        start, length, walk = self._walks[bucket, component]
        return Turn(
            component,
            index=int(walk[start + number]),
            is_first=number < length - start % length,
            bucket=bucket,
        )

    def counts(self, positions: int) -> Int64[np.ndarray, "buckets components"]:
        """How many of the first `positions` each component has in each bucket."""
        numbers = range(len(self._components))
        return np.array(
            [
                [self._schedule.count(positions, b, c) for c in numbers]
                for b in range(len(self._buckets))
            ],
            np.int64,
        )

    def records(self, turn: Turn) -> range | Integer[np.ndarray, " n"]:
        """Which records of the source are in a turn's bucket: the turn's is at `turn.index`."""
        return self._buckets[turn.bucket][turn.component].records

    def state(self) -> dict[str, Any]:
        """JSON-able: all that decides the order."""
        components = [[c.task, c.source, c.length, c.weight] for c in self._components]
        mixture: dict[str, Any] = {"seed": self._seed, "components": components}
        if len(self._buckets) > 1:
            mixture |= {
                "buckets": [
                    {
                        "shape": list(shape),
                        "lengths": [len(bucket.records) for bucket in row],
                        "names": [bucket.name for bucket in row],
                    }
                    for shape, row in zip(self._shapes, self._buckets, strict=True)
                ],
                "batch_size": self._batch_size,
            }
        return {
            "mixture": mixture,
            "fingerprints": {c.source: c.fingerprint for c in self._components},
            "lineage": self._lineage.to_json(),
        }

    def restore(self, state: Json) -> None:
        """Takes up a saved order again.

        Raises UserError if it is of another mixture or of other records, in which a position would
        silently skip and repeat some.
        """
        own = self.state()
        saved, mixture = state.get("mixture", {}), own["mixture"]
        if saved != mixture:
            names = dict.fromkeys((*mixture, *saved))
            field = next((k for k in names if saved.get(k) != mixture.get(k)), "mixture")
            before, after = saved.get(field), mixture.get(field)
            if field == "buckets":
                before, after = _describe(before), _describe(after)
                after += " with other records in them" if after == before else ""
            raise UserError(
                "the saved data position belongs to another mixture: "
                f"{field} was {before}, is {after}; to change weights, "
                "sources, buckets or seed start a new stream (a new workdir, init_from)"
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
        counted through: in each bucket that has the same records, whatever its resolution. A
        component that is new, or whose source is another build or in other buckets, begins it anew.
        Two stages that follow the same one get the same records.
        """
        self._begin(Lineage.after(state))

    def _begin(self, lineage: Lineage) -> None:
        self._walks: dict[tuple[int, int], tuple[int, int, Any]] = {}
        places, anew = [], {}
        known = {key[:2] for place in lineage.places if (key := place.key)}
        for b, row in enumerate(self._buckets):
            for c, (component, bucket) in enumerate(zip(self._components, row)):
                task, source, _, _, fingerprint, _ = component
                length = len(bucket.records)
                if not length:
                    continue
                place = Place(task, source, length, fingerprint, 0, bucket.name)
                before = lineage.find(place.key)
                if before and before.length == length and before.fingerprint in (None, fingerprint):
                    place = place._replace(visits=before.visits)
                elif before:
                    anew[task, source] = "another build than the stage before read"
                elif (task, source) in known:
                    anew.setdefault((task, source), "in other buckets than in the stage before")
                places.append(place)
                self._walks[b, c] = (place.visits, length, _walk(lineage.seed, place))
        for (task, source), reason in anew.items():
            _logger.info("%s is %s: task %s begins it anew", source, reason, task)
        self._lineage = lineage.updated(places)


def _walk(seed: int, place: Place) -> grain.MapDataset:
    """The places in a bucket in the order of a component's visits, without end."""
    key = " ".join([str(seed), *filter(None, place.key)])
    shuffled = grain.MapDataset.range(place.length).seed(zlib.crc32(key.encode())).shuffle()
    return shuffled.repeat()


def _describe(buckets: Sequence[Json] | None) -> str:
    """The shapes of a saved order's buckets, for a message."""
    if not buckets:
        return "one"
    return ", ".join("x".join(map(str, bucket["shape"])) for bucket in buckets)
