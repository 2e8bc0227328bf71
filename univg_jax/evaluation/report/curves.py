"""How a number depends on a setting of a sweep, or on the step of a run that was followed."""

import dataclasses
from collections.abc import Mapping, Sequence

from univg_jax.evaluation.report.cards import Card
from univg_jax.evaluation.report.differences import axes, setting_text
from univg_jax.evaluation.report.find import Log
from univg_jax.evaluation.report.plot import line_plot
from univg_jax.evaluation.scorecard import format_number
from univg_jax.writers import is_number

Line = Mapping[int | float, int | float]  # y by x


@dataclasses.dataclass(frozen=True)
class Curves:
    """Lines by name: `y` against `x`."""

    x: str
    y: str
    lines: Mapping[str, Line]

    @property
    def title(self) -> str:
        """What it shows."""
        return f"{self.y} over {self.x}"

    @property
    def svg(self) -> str:
        """The plot, an element of a page."""
        return line_plot(self.lines, x=self.x, y=self.y)

    @property
    def rows(self) -> list[tuple[str, list[str]]]:
        """The table: a text of x, and one of y for each line."""
        return [
            (setting_text(x), [format_number(line.get(x)) for line in self.lines.values()])
            for x in sorted({x for line in self.lines.values() for x in line})
        ]


def of_sweep(cards: Sequence[Card]) -> list[Curves]:
    """Each primary number over the setting that has most values; none without such a setting,
    and a seed is none.

    There is a line for each value of the others.
    """
    differing = axes(cards)
    numeric = [axis for axis in differing if axis.is_numeric and axis.name != "seed"]
    if not numeric:
        return []
    x = max(numeric, key=lambda axis: len(set(axis.values)))
    # What changes whenever x does, and only then, makes no lines.
    others = [axis for axis in differing if axis is not x and axis.partition != x.partition]
    found = []
    for name in dict.fromkeys(name for card in cards for name in card.primaries):
        lines: dict[str, dict[int | float, int | float]] = {}
        for k, card in enumerate(cards):
            if (value := card.numbers.get(name)) is not None:
                line = ", ".join(f"{axis.name} {setting_text(axis.values[k])}" for axis in others)
                lines.setdefault(line, {})[x.values[k]] = value
        if lines:
            found.append(Curves(x.name, name, lines))
    return found


def of_logs(logs: Mapping[str, Log], primaries: Sequence[str]) -> list[Curves]:
    """Numbers over the steps of runs, a line for each: `primaries`, by default the first one."""
    first = [name for log in logs.values() for row in log[:1] for name in row["numbers"]][:1]
    found = []
    for name in primaries or first:
        lines = {
            run if len(logs) > 1 else "": {
                row["step"]: row["numbers"][name]
                for row in log
                if is_number(row["numbers"].get(name))
            }
            for run, log in logs.items()
        }
        if any(lines.values()):
            found.append(Curves("step", name, lines))
    return found
