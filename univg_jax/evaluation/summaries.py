"""From the rows of scores of all items to the numbers that a benchmark publishes.

Sums are rounded once, so a summary does not depend on the order of rows or on their shards.
"""

import collections
import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float

from univg_jax.evaluation.metrics import Ratio, merge

Scores = Mapping[str, Ratio]  # of one item, by metric
Summary = dict[str, float]  # by name; NaN where nothing was counted


@dataclasses.dataclass(frozen=True)
class Features:
    """A picture's features, for a distance between sets of pictures (`evaluation.fid`).

    `vector` is None for a picture that is not there. Features are added up by name as soon as they
    are made, and are not kept.
    """

    vector: Float[np.ndarray, " d"] | None
    convention: str


Group = TypeVar("Group", bound=Hashable)


def column(scores: Iterable[Scores], name: str) -> list[Ratio]:
    """One metric of all items."""
    return [entry[name] for entry in scores]


def by_group(groups: Sequence[Group], ratios: Sequence[Ratio]) -> dict[Group, Ratio]:
    """The sum of the ratios of each group, groups in the order in which they first come."""
    members: dict[Group, list[Ratio]] = collections.defaultdict(list)
    for group, ratio in zip(groups, ratios, strict=True):
        members[group].append(ratio)
    return {group: merge(ratios) for group, ratios in members.items()}


def values(prefix: str, ratios: Mapping[Hashable, Ratio], *, scale: float = 1.0) -> Summary:
    """The value of each ratio, its name after `prefix`."""
    return {f"{prefix}{name}": scale * ratio.value for name, ratio in ratios.items()}


def mean(numbers: Iterable[float]) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    known = [number for number in numbers if not math.isnan(number)]
    return math.fsum(known) / len(known) if known else math.nan


def mean_of(ratios: Iterable[Ratio]) -> float:
    """The mean of the values of those ratios that have counted something."""
    return mean(ratio.value for ratio in ratios)


def failure_counts(scores: Sequence[Scores]) -> Summary:
    """How often each kind of failure is there: the totals of the columns `failures/KIND`."""
    names = [name for entry in scores[:1] for name in entry if name.startswith("failures/")]
    return {name: float(merge(column(scores, name)).total.sum()) for name in names}
