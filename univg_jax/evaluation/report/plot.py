"""Plots as SVG that stands in the page and follows its colors: losses, numbers over a setting."""

import contextlib
import dataclasses
import html
import io
import re
from collections.abc import Iterator, Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from univg_jax.evaluation.report.read import Stage

# Each task has one color throughout the page, readable on white and on black. A task that is not
# named here takes a spare one.
COLORS = {
    "t2i": "#3b82f6",
    "ie": "#e8720c",
    "ip": "#12a594",
    "lg": "#9a6bff",
    "depth": "#c9a100",
    "pose": "#e5484d",
    "seg": "#46a758",
    "id": "#d6409f",
}
SPARE_COLORS = ("#0ea5b7", "#8d8d8d", "#a06a42", "#6e56cf")
# matplotlib draws in these two colors, and the page puts its own in their place, so that the plots
# follow the reader's light or dark mode.
INK, FAINT = "#010203", "#030201"


def color_of(task: str) -> str:
    """A task's color, the same on every page."""
    return COLORS.get(task) or SPARE_COLORS[sum(map(ord, task)) % len(SPARE_COLORS)]


def loss_plot(run: Stage) -> str:
    """The loss of all tasks (thick) and of each (thin), with validation losses as dots."""
    stage = run.summary["stage"]
    # The ids in two plots of one page must differ, and be the same in the next report.
    with _drawing(salt=stage, label=f"Loss of stage {stage} over its steps") as plot:
        _draw_losses(plot.axes, run)
    return plot.svg


def line_color(number: int) -> str:
    """The color of a plot's line, by its place among all."""
    return [*COLORS.values(), *SPARE_COLORS][number % (len(COLORS) + len(SPARE_COLORS))]


def line_plot(lines: Mapping[str, Mapping[int | float, int | float]], *, x: str, y: str) -> str:
    """Numbers `y` over `x`, each line in its `line_color`."""
    with _drawing(salt=f"{y} over {x}", label=f"{y} over {x}") as plot:
        for number, line in enumerate(lines.values()):
            xs = sorted(line)
            color = line_color(number)
            plot.axes.plot(xs, [line[x] for x in xs], "o-", color=color, lw=2, ms=4.5)
        # A name may have dollars, which are no formula.
        plot.axes.set_xlabel(x, parse_math=False)
        plot.axes.margins(y=0.15)
        _plain(plot.axes)
        if len(places := sorted({place for line in lines.values() for place in line})) <= 6:
            plot.axes.set_xticks(places, [f"{place:g}" for place in places])
    return plot.svg


@dataclasses.dataclass
class _Plot:
    axes: Axes
    svg: str = ""


@contextlib.contextmanager
def _drawing(*, salt: str, label: str) -> Iterator[_Plot]:
    """What draws in it makes `svg`, whose meaning is `label`. `salt` makes the ids its own."""
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 9,
        "axes.edgecolor": FAINT,
        **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), INK),
        **dict.fromkeys([f"axes.spines.{side}" for side in ("top", "right", "left")], False),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(4.8, 2.6), layout="constrained")
        plot = _Plot(figure.add_subplot())
        yield plot
        buffer = io.StringIO()
        # Without a date, so that the same run gives the same page.
        no_metadata = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    plot.svg = _inline(buffer.getvalue(), label=html.escape(label, quote=True))


def _draw_losses(axes: Axes, run: Stage) -> None:
    heights: list[float] = []

    def curve(name: str, *, color: str, lw: float, alpha: float | None = None) -> None:
        steps, values = run.series(name)
        # A centered mean over a twentieth of the points.
        half = len(values) // 40
        smooth = [values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))]
        axes.plot(steps, smooth, color=color, lw=lw, alpha=alpha, solid_capstyle="round")
        heights.extend(smooth)

    for name in {key: None for row in run.rows for key in row if key.startswith("loss/")}:
        color = color_of(name.removeprefix("loss/"))
        curve(name, color=color, lw=1.1, alpha=0.85)
        axes.plot(*run.series(f"val/{name}"), "o", color=color, ms=3, mec="none")
    curve("loss", color=INK, lw=2.2)
    if heights:
        # The first losses are far above all others and would flatten the curves.
        low, high = np.percentile(heights, [0, 98])
        margin = 0.08 * max(high - low, 1e-6)
        axes.set_ylim(max(low - margin, 0), high + margin)
    axes.set_xlabel("step")
    _plain(axes)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5, integer=True))


def _plain(axes: Axes) -> None:
    """Few marks: thin horizontal lines, and five numbers at most."""
    axes.grid(axis="y", color=FAINT, lw=0.6)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(5))


def _inline(svg: str, *, label: str) -> str:
    """matplotlib's SVG file as an element of a page: without a fixed size, in the page's colors."""
    svg = re.sub(r' (width|height)="[^"]*"', "", svg[svg.index("<svg") :], count=2)
    # Names such as patch_1 are in every plot of the page, and nothing refers to them.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    svg = svg.replace(INK, "var(--ink)").replace(FAINT, "var(--line)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
