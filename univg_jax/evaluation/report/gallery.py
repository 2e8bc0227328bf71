"""The pictures of a page: the first items, those of several evaluations side by side, and the best
and the worst ones.
"""

import dataclasses
from collections.abc import Sequence

from univg_jax.evaluation.report.album import Album, Thumbnail
from univg_jax.evaluation.report.cards import Card, Case, Key

FILES = 4  # of an item that are shown, where one evaluation is
FEW = 4  # of the best and the worst items, where several are


@dataclasses.dataclass(frozen=True)
class Item:
    """A prompt and its pictures with their captions."""

    case: Case
    pictures: Sequence[tuple[str, Thumbnail]]


@dataclasses.dataclass(frozen=True)
class Extremes:
    """The best and the worst items of an evaluation, by the benchmark's measure of one item."""

    label: str
    best: Sequence[Item]
    worst: Sequence[Item]


def first_items(cards: Sequence[Card], labels: Sequence[str], *, album: Album) -> list[Item]:
    """The first items with pictures: all of one evaluation, or one of each of several."""
    if len(cards) == 1:
        return [_item(case, album=album) for case in _shown(cards[0], "first")]
    items: dict[Key, list[tuple[str, Case]]] = {}
    for card, label in zip(cards, labels, strict=True):
        for case in _shown(card, "first"):
            items.setdefault(case.key, []).append((label, case))
    return [
        Item(
            cases[0][1],
            [
                *_given(cases[0][1], album=album),
                *((label, album.add(path)) for label, case in cases for path in case.files[:1]),
            ],
        )
        for cases in items.values()
    ]


def extremes(cards: Sequence[Card], labels: Sequence[str], *, album: Album) -> list[Extremes]:
    """Those of each evaluation in which items differ; fewer of each where there are several."""
    found = []
    for card, label in zip(cards, labels, strict=True):
        best, worst = (_shown(card, kind) for kind in ("best", "worst"))
        if best and worst and best[0].quality != worst[0].quality:
            shown = [
                [_item(case, album=album) for case in (cases if len(cards) == 1 else cases[:FEW])]
                for cases in (best, worst)
            ]
            found.append(Extremes(label, *shown))
    return found


def _shown(card: Card, kind: str) -> list[Case]:
    return [case for case in card.cases.get(kind, ()) if case.files]


def _item(case: Case, *, album: Album) -> Item:
    given = _given(case, album=album)
    caption = "output" if given else ""
    made = [(caption, album.add(path)) for path in case.files[:FILES]]
    return Item(case, [*given, *made])


def _given(case: Case, *, album: Album) -> list[tuple[str, Thumbnail]]:
    return [(name, album.add(path)) for name, path in case.given.items()]
