"""The tables of a page: numbers of evaluations side by side, and what is needed to repeat them."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence

from univg_jax import trees
from univg_jax.evaluation.report.cards import Card
from univg_jax.evaluation.report.differences import setting_text
from univg_jax.evaluation.results import Json
from univg_jax.evaluation.scorecard import format_number

FAILURES = "failures"  # numbers failures/KIND are counts
MOST_NAMED = 50  # files of an evaluation


@dataclasses.dataclass(frozen=True)
class Table:
    """Texts: a row's name, a cell for each evaluation, and one for each other system."""

    title: str
    systems: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str], Sequence[str]]]


def number_tables(cards: Sequence[Card]) -> list[Table]:
    """A table for all numbers `a/...` of each `a`, and one for those whose beginning is their own.

    The one with the number to look at first stands first.
    """
    groups = _grouped(name for card in cards for name in card.numbers)
    groups.pop(FAILURES, None)
    primaries = [name for card in cards for name in card.primaries]
    first = [title for title, names in groups.items() if set(names) & set(primaries[:1])]
    return [_table(title, groups[title], cards) for title in dict.fromkeys([*first, *groups])]


def failure_rows(cards: Sequence[Card]) -> list[tuple[str, list[str]]]:
    """How often each kind of failure is in each evaluation; the most frequent first."""
    kinds = dict.fromkeys(
        name for card in cards for name in card.numbers if name.startswith(f"{FAILURES}/")
    )
    ordered = sorted(kinds, key=lambda name: -sum(card.numbers.get(name) or 0 for card in cards))
    return [
        (
            name.removeprefix(f"{FAILURES}/"),
            [format_number(card.numbers.get(name)) for card in cards],
        )
        for name in ordered
    ]


def unreadable_lines(card: Card) -> list[str]:
    """The files of an evaluation that could not be read, up to MOST_NAMED, and why not."""
    lines = [f"{file} {why}" for file, why in card.unreadable.items()]
    more = len(lines) - MOST_NAMED
    return lines[:MOST_NAMED] + ([f"and {more} more (results.json)"] if more > 0 else [])


def sources(cards: Sequence[Card]) -> dict[str, list[str]]:
    """The other systems by the source of their numbers."""
    found: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for entry in (entry for card in cards for entry in card.beside):
        found[entry["source"]][entry["system"]] = None
    return {source: list(systems) for source, systems in found.items()}


def setting_rows(cards: Sequence[Card]) -> list[tuple[str, list[str]]]:
    """All that is needed to repeat the evaluations, by name: one text if it is the same in all."""
    flat = [trees.flatten({**_origin(card), **card.settings}) for card in cards]
    rows = []
    for key in dict.fromkeys(key for settings in flat for key in settings):
        texts = [setting_text(settings[key]) if key in settings else "-" for settings in flat]
        rows.append((key, texts if len(set(texts)) > 1 else texts[:1]))
    return rows


def _origin(card: Card) -> Json:
    """Where and when it was made. The settings have another `version`, which is the benchmark's."""
    renamed = {"version": "univg_jax", "revision": "code revision"}
    return {
        "folder": card.folder.name,
        **{renamed.get(name, name): value for name, value in card.provenance.items()},
    }


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """The names by what stands before their first slash, and by "" what stands alone."""
    names = list(dict.fromkeys(names))
    sizes = collections.Counter(name.split("/")[0] for name in names if "/" in name)
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        prefix, slash, _ = name.partition("/")
        groups[prefix if slash and sizes[prefix] > 1 else ""].append(name)
    return dict(groups)


def _table(title: str, names: Sequence[str], cards: Sequence[Card]) -> Table:
    primaries = [name for card in cards for name in card.primaries]
    beside: dict[tuple[str, str], list[int | float]] = collections.defaultdict(list)
    for entry in (entry for card in cards for entry in card.beside if entry["metric"] in names):
        beside[entry["system"], entry["metric"]].append(entry["value"])
    systems = list(dict.fromkeys(system for system, _ in beside))
    ordered = sorted(names, key=lambda name: name not in primaries)
    return Table(
        title=title,
        systems=systems,
        rows=[
            (
                name.removeprefix(f"{title}/"),
                [format_number(card.numbers.get(name)) for card in cards],
                [_range(beside.get((system, name), ())) for system in systems],
            )
            for name in ordered
        ],
    )


def _range(values: Sequence[int | float]) -> str:
    """One text for numbers that may differ between evaluations; empty for none."""
    texts = list(dict.fromkeys(map(format_number, sorted(values))))
    return texts[0] if len(texts) == 1 else f"{texts[0]} to {texts[-1]}" if texts else ""
