"""A layout of named boxes as task lg has it: a canvas of colored blocks, and a prompt that names
the color of each.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from data_pipelines.examples import name_blocks, places
from data_pipelines.renderings import PALETTE, render_layout
from univg_jax.errors import UserError, quote, suggestion

_BLOCKS_AFTER = re.compile(r"\s*\(([^()]*)\bblocks?\)", re.IGNORECASE)
_WORDS = re.compile(r"[a-z]+")


def draw(
    prompt: str, boxes: Sequence[Any], *, height: int, width: int
) -> tuple[str, UInt8[np.ndarray, "{height} {width} 3"]]:
    """The prompt with the colors of all boxes, and the canvas with their blocks.

    A box is (name, (x0, y0, x1, y1)), in fractions of the picture. Its name is a phrase of the
    prompt, and its color the one that the prompt names behind it, as in "a pig (red block)". Where
    none is named, a free color is taken, and named in the prompt. The name may also be one of the
    colors that the prompt names.

    Raises UserError for a box that is none, for a name that the prompt does not have, and for more
    boxes than colors.
    """
    if not isinstance(boxes, Sequence):
        expected = "a list of (name, (left, top, right, bottom))"
        raise UserError(f"boxes={quote(boxes)}: expected {expected}")
    corners = np.array([_corners(k, box) for k, box in enumerate(boxes)], np.float32)
    if not len(corners):
        raise UserError("boxes: expected one at least")
    names = [str(box[0]).strip() for box in boxes]
    ends = places(prompt, names)
    said = {end: _colors_after(prompt, end) for end in ends if end is not None}
    everywhere = [c for match in _BLOCKS_AFTER.finditer(prompt) for c in _colors(match[1])]
    left = {end: list(colors) for end, colors in said.items()}
    free = [color for color in PALETTE if color not in everywhere]
    chosen: list[str] = []
    added: dict[int, list[str]] = {}
    for name, end in zip(names, ends, strict=True):
        if name.lower() in PALETTE and name.lower() in everywhere:
            color = name.lower()
        elif end is None:
            raise UserError(f"boxes: {quote(name)} does not stand in the prompt {quote(prompt)}")
        elif said[end]:
            if not left[end]:
                raise UserError(
                    f"boxes: the prompt names {len(said[end])} blocks behind {quote(name)}, "
                    "and more boxes have that name"
                )
            color = left[end].pop(0)
        else:
            if not free:
                raise UserError(f"boxes: expected at most {len(PALETTE)}, as there are colors")
            color = free.pop(0)
            added.setdefault(end, []).append(color)
        chosen.append(color)
    canvas = render_layout(corners, chosen, height=height, width=width)
    return name_blocks(prompt, added), canvas


def _corners(index: int, box: Any) -> list[float]:
    where = f"boxes[{index}]"
    try:
        name, corners = box
        x0, y0, x1, y1 = (float(x) for x in corners)
    except (TypeError, ValueError):
        raise UserError(
            f"{where}={quote(box)}: expected (name, (left, top, right, bottom))"
        ) from None
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{where}={quote(box)}: expected a name from the prompt")
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise UserError(
            f"{where}={quote(box)}: expected left < right and top < bottom, in fractions of the "
            "picture from 0 to 1"
        )
    return [x0, y0, x1, y1]


def _colors_after(prompt: str, end: int) -> list[str]:
    """The colors that the prompt names from there on."""
    match = _BLOCKS_AFTER.match(prompt, end)
    return _colors(match[1]) if match else []


def _colors(text: str) -> list[str]:
    """The colors in what stands between brackets. Raises UserError for one that is unknown."""
    words = [word for word in _WORDS.findall(text.lower()) if word != "and"]
    for word in words:
        if word not in PALETTE:
            raise UserError(f"unknown color {quote(word)}{suggestion(word, PALETTE)}")
    return words
