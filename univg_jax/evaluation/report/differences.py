"""In what several evaluations differ: their names on a page, and the axes of a sweep."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from univg_jax import trees
from univg_jax.evaluation.report.cards import Card

SCALES = {"text": "guidance", "image": "image guidance"}  # keys of a task's guidance
_DIGEST = re.compile("[0-9a-f]{12,}")


@dataclasses.dataclass(frozen=True)
class Axis:
    """A setting in which evaluations differ, and its value in each."""

    name: str
    values: tuple[Any, ...]

    @property
    def is_numeric(self) -> bool:
        """Whether it can be the x axis of a plot."""
        return all(isinstance(x, int | float) and not isinstance(x, bool) for x in self.values)

    @property
    def partition(self) -> tuple[int, ...]:
        """The same number for the same value: equal for settings that change together."""
        texts = [json.dumps(value, sort_keys=True) for value in self.values]
        return tuple(texts.index(text) for text in texts)


def setting_text(value: Any) -> str:
    """A setting as people read it."""
    if value is None or value in ({}, []):
        return "none"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def axes(cards: Sequence[Card]) -> list[Axis]:
    """The settings in which they differ, in their order.

    A scale of guidance that several tasks share is one. A hash is none, since it says nothing
    to people.
    """
    flat = [trees.flatten(card.settings) for card in cards]
    found: dict[tuple[str, str], Axis] = {}
    for key in dict.fromkeys(key for settings in flat for key in settings):
        values = tuple(settings.get(key) for settings in flat)
        first, last = key.split(".")[0], key.split(".")[-1]
        name = SCALES.get(last, key) if first == "guidance" else key
        hashes = any(isinstance(value, str) and _DIGEST.fullmatch(value) for value in values)
        everywhere = all(key in settings for settings in flat)
        axis = Axis(name, values)
        if everywhere and not hashes and len(set(axis.partition)) > 1:
            found.setdefault((name, str(axis.values)), axis)
    return list(found.values())


def in_order(cards: Sequence[Card]) -> list[Card]:
    """The cards by the numbers in which they differ; as they are where those are the same."""
    numbers = [axis.values for axis in axes(cards) if axis.is_numeric]
    order = sorted(range(len(cards)), key=lambda k: [values[k] for values in numbers])
    return [cards[k] for k in order]


def labels(cards: Sequence[Card]) -> list[str]:
    """What tells each from the others, as short as may be.

    Their checkpoints are named only where settings do not tell them apart, and their folders only
    where nothing else does.
    """
    settings = [[f"{axis.name} {setting_text(x)}" for x in axis.values] for axis in axes(cards)]
    origins = [card.provenance.get("checkpoint") or card.settings.get("images") for card in cards]
    texts = [""] * len(cards)
    for parts in (*settings, list(map(str, origins)), [card.folder.name for card in cards]):
        if parts not in settings and len(set(texts)) == len(texts) and all(texts):
            break
        texts = [f"{text}, {part}" if text else part for text, part in zip(texts, parts)]
    return texts
