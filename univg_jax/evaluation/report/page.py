"""One page about any evaluations: their numbers, pictures and settings, side by side."""

import dataclasses
from collections.abc import Mapping, Sequence

from etils import epath

from univg_jax.evaluation.report import curves, gallery, tables
from univg_jax.evaluation.report.album import Album
from univg_jax.evaluation.report.cards import Card
from univg_jax.evaluation.report.differences import labels
from univg_jax.evaluation.report.find import Log, find
from univg_jax.evaluation.report.plot import line_color
from univg_jax.evaluation.scorecard import format_number
from univg_jax.files import write_whole
from univg_jax.pages import load_templates

MOST_BYTES = 8 * 2**20  # of the pictures of a page

PAGES = load_templates(__package__)
PAGES.globals |= dict(line_color=line_color, format_number=format_number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """What the page shows of one benchmark: its evaluations, which may be none, and its curves."""

    benchmark: str
    cards: Sequence[Card]
    labels: Sequence[str]
    curves: Sequence[curves.Curves]
    first: Sequence[gallery.Item]
    extremes: Sequence[gallery.Extremes]
    left_out: int  # pictures

    @classmethod
    def of(
        cls, benchmark: str, cards: Sequence[Card], logs: Mapping[str, Log], *, most: int
    ) -> "Group":
        """The view of evaluations of a benchmark. `most` bounds the bytes of its pictures."""
        album, names = Album(most), labels(cards)
        primaries = list(dict.fromkeys(name for card in cards for name in card.primaries))
        followed = curves.of_logs(logs, primaries)
        swept = [c for c in curves.of_sweep(cards) if not (followed and c.x == followed[0].x)]
        first = gallery.first_items(cards, names, album=album) if cards else []
        extremes = gallery.extremes(cards, names, album=album)
        return cls(
            benchmark=benchmark,
            cards=cards,
            labels=names,
            curves=[*followed, *swept],
            first=first,
            extremes=extremes,
            left_out=album.left_out,
        )

    @property
    def headline(self) -> str:
        """Its first number, or the least and the greatest of several evaluations."""
        names = [name for card in self.cards for name in card.primaries][:1]
        known = [x for name in names for c in self.cards if (x := c.numbers.get(name)) is not None]
        if not known:
            return self.benchmark
        texts = dict.fromkeys(map(format_number, (min(known), max(known))))
        return f"{self.benchmark}: {names[0]} {' to '.join(texts)}"


def write_page(path: epath.PathLike, evaluations: Sequence[epath.PathLike]) -> list[str]:
    """Writes the page of all that `find` finds; returns the names of evaluations left out.

    Raises what `find` raises.
    """
    found = find(evaluations)
    names = list(dict.fromkeys([*(card.benchmark for card in found.cards), *found.logs]))
    groups = [
        Group.of(
            name,
            [card for card in found.cards if card.benchmark == name],
            found.logs.get(name, {}),
            most=MOST_BYTES // len(names),
        )
        for name in names
    ]
    text = PAGES.get_template("evaluations.html.jinja").render(
        groups=groups, left_out=found.left_out, tables=tables
    )
    write_whole(path, text)
    return list(found.left_out)
