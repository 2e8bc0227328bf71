"""Draws the rooms of the library and their imports: docs/architecture.svg.

    python tools/architecture.py

Rooms and arrows are those of the code. An arrow A -> B says that A imports B. It is left out where
a longer way says the same: A -> C is implied by A -> B -> C. Here stand only the places of the
boxes and what is written in them. `tests/cli/test_docs.py` holds that the committed drawing is what
this file makes.
"""

import ast
import dataclasses
import pathlib
from collections.abc import Iterator
from html import escape

ROOT = pathlib.Path(__file__).parents[1]
DRAWING = ROOT / "docs" / "architecture.svg"
PACKAGES = ("univg_jax", "data_pipelines", "experiments")
WIDTH = 1000
BOX_HEIGHT = 50
INK = "#1b1f24"

Graph = dict[str, set[str]]  # room -> the rooms that it imports


@dataclasses.dataclass(frozen=True)
class Box:
    """A room's place in the drawing, in pixels from the top left, and what it is for."""

    x: int
    y: int
    width: int
    purpose: str
    color: str
    height: int = BOX_HEIGHT


COMMAND, MODEL, TRAIN, SCIENCE, DATA, BASE = (
    "#e5dcf5", "#d3e6f8", "#fbdfc9", "#d5edd6", "#f9efc2", "#e6e8eb",
)  # fmt: skip

BOXES = {
    "cli": Box(0, 0, 790, "univg COMMAND: flags -> config -> library; nothing imports it", COMMAND),
    "experiments": Box(810, 0, 190, "configs, without JAX", DATA),
    "distributed": Box(0, 95, 125, "several processes", COMMAND),
    "evaluation": Box(140, 95, 130, "benchmarks, report", MODEL),
    "export": Box(280, 95, 70, "formats", MODEL),
    "serving": Box(360, 95, 90, "page, server", MODEL),
    "previews": Box(460, 95, 75, "samples", MODEL),
    "precompute": Box(545, 95, 120, "caches of prompts", MODEL),
    "planning": Box(675, 95, 115, "costs on any TPU", MODEL),
    "configs": Box(810, 95, 90, "files, flags", COMMAND),
    "runtime": Box(910, 95, 90, "JAX set up", COMMAND),
    "pipeline": Box(140, 190, 345, "a trained model, ready: one method a task", MODEL),
    "inputs": Box(500, 190, 290, "what users give -> examples", MODEL),
    "assembly": Box(140, 285, 860, "config -> mesh, model, tokenizer, stream, sampler", MODEL),
    "training": Box(140, 380, 220, "the step, the loop, optimizers", TRAIN),
    "sampling": Box(385, 380, 180, "guidance, ODE solvers", SCIENCE),
    "encoders": Box(590, 380, 175, "text, codec, identity", SCIENCE),
    "data_pipelines": Box(790, 380, 210, "", DATA, 240),
    "checkpoint": Box(140, 475, 220, "save, restore, hand over", TRAIN),
    "flow": Box(380, 475, 85, "the loss", SCIENCE),
    "conditioning": Box(480, 475, 150, "Batch -> Conditions", SCIENCE),
    "interop": Box(650, 475, 115, "public weights", SCIENCE),
    "trained": Box(0, 430, 125, "a step, an export", TRAIN),
    "retention": Box(0, 520, 125, "steps that stay", TRAIN),
    "stored": Box(0, 570, 110, "one step", TRAIN),
    "workdir": Box(200, 570, 170, "a run's config and steps", TRAIN),
    "models": Box(400, 570, 365, "MM-DiT, UniVG, encoders: all of the Flax", SCIENCE),
    "sharding": Box(0, 665, 510, "the mesh, and where every array lies on it", TRAIN),
}
DATA_LINES = (
    "datasets, build: native files",
    "    -> records",
    "sources: records on disk",
    "reader, tasks: record -> example",
    "renderings, transforms: pixels",
    "schedule, order, buckets, mixture:",
    "    which record at which position",
    "collate, tokenizer: rows -> Batch",
    "held_out: validation, test",
    "cache, quarantine, inspect",
)
# Small rooms that many others import. They import only each other.
SMALL = {
    "settings": "a config's sections and their defaults",
    "sizes": "the named sizes of the model",
    "fields": "types, ranges, meanings",
    "buckets": "shapes of pictures",
    "batch": "Batch, the one schema",
    "errors": "UserError and its kinds",
    "trees": "names of a tree's leaves",
    "files": "a file whole, or not at all",
    "object_store": "gs://, tried again",
    "images": "pixels, PNG",
    "jpeg": "plain JPEG, faster",
    "pages": "HTML from templates",
    "version": "version, revision",
    "result": "what a trained model answers",
    "progress": "bars, or lines in a log",
    "streaming": "tensors in blocks",
    "quantization": "kernels in 8 bits",
    "pretrained": "folders of pretrained weights",
    "tpu": "chips, compiler options",
    "writers": "TensorBoard, JSONL",
    "checksums": "of a folder's files",
    "lock": "a workdir's one process",
    "heartbeat": "which process is missing",
    "roll_call": "whether all have come",
    "together": "what fails on one host ends all",
}
COLUMNS, TOP, ROW_HEIGHT = 3, 745, 24  # of the box with the small rooms
SMALL_HEIGHT = 36 + ROW_HEIGHT * -(-len(SMALL) // COLUMNS)
HEIGHT = TOP + SMALL_HEIGHT + 2


def modules() -> dict[str, pathlib.Path]:
    """The modules of the three packages, by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def room_of(module: str) -> str:
    """A module or package of the first level of univg_jax, or one of the other two packages."""
    package, _, inside = module.partition(".")
    return inside.split(".")[0] if package == "univg_jax" else package


def imported(path: pathlib.Path, names: dict[str, pathlib.Path]) -> Iterator[str]:
    """The modules of ours that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        for target in targets:
            # `from univg_jax.flow import loss` names a function: its module is one level up.
            while target and target not in names:
                target = target.rpartition(".")[0]
            if target:
                yield target


def import_graph() -> Graph:
    """What each room imports of the others."""
    names = modules()
    graph: Graph = {room_of(module): set() for module in names}
    for module, path in names.items():
        here = room_of(module)
        graph[here] |= {room_of(other) for other in imported(path, names)} - {here}
    # The package itself and `python -m univg_jax` only forward to a room.
    for name in ("", "__main__"):
        del graph[name]
    return {room: others - {""} for room, others in sorted(graph.items())}


def reachable(graph: Graph, room: str) -> set[str]:
    """All rooms that a room imports, directly or through others."""
    found: set[str] = set()
    waiting = [room]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


def arrows(graph: Graph) -> list[tuple[str, str]]:
    """The imports that no longer way implies, without those of the small rooms."""
    return [
        (room, other)
        for room, others in graph.items()
        for other in sorted(others)
        if other not in SMALL
        and not any(other in reachable(graph, between) for between in others - {other})
    ]


def check(graph: Graph) -> None:
    """Raises ValueError if rooms and places differ, or a small room imports one that is not."""
    placed = BOXES.keys() | SMALL.keys()
    if different := graph.keys() ^ placed:
        raise ValueError(f"rooms and boxes differ: {', '.join(sorted(different))}")
    for room in SMALL:
        if above := graph[room] - SMALL.keys():
            raise ValueError(
                f"{room} imports {', '.join(sorted(above))}, which are not small rooms"
            )


def draw(graph: Graph) -> str:
    """The drawing, as SVG."""
    check(graph)
    ways = arrows(graph)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-2 -2 {WIDTH + 4} {HEIGHT + 4}" '
        'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">',
        "<title>The rooms of univg_jax and what they import</title>",
        # Gray in the middle between black and white is seen on light and on dark pages.
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#808890"/></marker>',
    ]
    lines += [_arrow(start, end, ways) for start, end in ways]
    lines += [_box(name, box) for name, box in BOXES.items()]
    data = BOXES["data_pipelines"]
    for i, text in enumerate(DATA_LINES):
        lines.append(_text(data.x + (24 if text[0] == " " else 10), data.y + 44 + 20 * i, text))
    lines += _small_rooms()
    return "\n".join([*lines, "</svg>"]) + "\n"


def _arrow(start: str, end: str, ways: list[tuple[str, str]]) -> str:
    """A curve from the lower side of a box to the upper side of another.

    Arrows at one side of a box are spread over it, in the order of what is at their other ends.
    """
    a, b = BOXES[start], BOXES[end]
    out = sorted((e for s, e in ways if s == start), key=_middle)
    into = sorted((s for s, e in ways if e == end), key=_middle)
    # Straight down where the smaller box lies within the other one, and has one arrow there.
    x0 = a.x + a.width * (out.index(end) + 1) / (len(out) + 1)
    x1 = b.x + b.width * (into.index(start) + 1) / (len(into) + 1)
    if a.x <= _middle(end) <= a.x + a.width and len(into) == 1:
        x0 = x1 = _middle(end)
    elif b.x <= _middle(start) <= b.x + b.width and len(out) == 1:
        x0 = x1 = _middle(start)
    y0, y1 = a.y + a.height, b.y - 2
    bend = min((y1 - y0) / 2, 40)
    return (
        f'<path d="M{x0:.0f} {y0} C{x0:.0f} {y0 + bend:.0f} {x1:.0f} {y1 - bend:.0f} '
        f'{x1:.0f} {y1}" fill="none" stroke="#808890" stroke-width="1.5" marker-end="url(#head)"/>'
    )


def _middle(room: str) -> float:
    return BOXES[room].x + BOXES[room].width / 2


def _box(name: str, box: Box) -> str:
    rect = (
        f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="6" '
        f'fill="{box.color}" stroke="#808890"/>'
    )
    title = _text(box.x + 10, box.y + 21, name, size=14, bold=True)
    return rect + title + (_text(box.x + 10, box.y + 39, box.purpose) if box.purpose else "")


def _small_rooms() -> list[str]:
    lines = [_box("", Box(0, TOP, WIDTH, "", BASE, SMALL_HEIGHT))]
    lines.append(_text(10, TOP + 20, "Many rooms import these. No arrows to them are drawn."))
    for i, (name, purpose) in enumerate(SMALL.items()):
        x, y = 10 + i % COLUMNS * 330, TOP + 46 + i // COLUMNS * ROW_HEIGHT
        lines.append(
            f'<text x="{x}" y="{y}" font-size="12" fill="{INK}"><tspan font-size="14" '
            f'font-weight="bold">{name}</tspan><tspan dx="8">{escape(purpose)}</tspan></text>'
        )
    return lines


def _text(x: float, y: float, text: str, *, size: int = 12, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    content = escape(text.strip())
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}"{weight} fill="{INK}">{content}</text>'


def main() -> None:
    """Writes the drawing."""
    DRAWING.write_text(draw(import_graph()))


if __name__ == "__main__":
    main()
