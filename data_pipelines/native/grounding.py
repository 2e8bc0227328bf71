"""Pictures whose captions have phrases with boxes: from pixels and spans to a record.

A region is a box of pixels and a span of characters in a native caption. In a record the phrase of
a box is a text, and the task of layout finds it in the caption: so each phrase here is where its
span was, or it is left out.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.native.tables import text_of
from univg_jax.errors import UserError, quote

FIELDS = ("image", "captions", "caption_kinds", "boxes", "phrases", "phrase_captions")
_Number = int | float
# x0 y0 x1 y1, continuous pixels from the top left corner.
Box = tuple[_Number, _Number, _Number, _Number]


@dataclasses.dataclass(frozen=True)
class Region:
    """The characters `start` to before `end` of native caption `caption`, and where that is."""

    caption: int
    start: int
    end: int
    box: Box


def record(
    image: bytes,
    captions: Sequence[tuple[str, Any]],
    regions: Sequence[Region],
    size: tuple[int, int],
) -> dict[str, Any]:
    """The record of a picture of `size` (height, width), its (kind, native caption)s and regions.

    Captions are cleaned, and empty ones left out. Left out are also boxes that are inverted, empty
    or more than a pixel outside the picture, and those whose phrase would be found elsewhere in the
    caption than it was. Raises UserError if no box or no caption is left.
    """
    texts = [text_of(text) for _, text in captions]
    if not any(texts):
        raise UserError("it has no caption")
    kept: list[tuple[int, str, Box]] = []
    for k, text in enumerate(texts):
        kept += [(k, *found) for found in _phrases(captions[k][1], text, k, regions, size)]
    if not kept:
        raise UserError("no phrase of its captions has a box inside the picture")
    numbers = np.cumsum([bool(text) for text in texts]) - 1
    return dict(
        image=image,
        captions=[text for text in texts if text],
        caption_kinds=[kind for (kind, _), text in zip(captions, texts, strict=True) if text],
        boxes=np.array([box for _, _, box in kept], np.float32),
        phrases=[phrase for _, phrase, _ in kept],
        phrase_captions=np.array([numbers[k] for k, _, _ in kept], np.int64),
    )


def _phrases(
    native: Any, text: str, k: int, regions: Sequence[Region], size: tuple[int, int]
) -> Iterator[tuple[str, Box]]:
    """The phrases and boxes of a caption, in its order."""
    found: list[tuple[int, str, Box]] = []  # where it ends in the clean text
    for region in sorted((r for r in regions if r.caption == k), key=lambda r: r.end):
        if not 0 <= region.start < region.end <= len(native):
            continue
        phrase = text_of(native[region.start : region.end])
        end = len(text_of(native[: region.end]))
        box = fractions(region.box, *size)
        if phrase and box and text[:end].endswith(phrase):
            found.append((end, phrase, box))
    found = list(dict.fromkeys(found))
    yield from ((phrase, box) for _, phrase, box in _findable(text, found))


def _findable(text: str, found: list[tuple[int, str, Box]]) -> list[tuple[int, str, Box]]:
    """Those whose phrase is found at a place with that box. To leave one out may move others."""
    from data_pipelines.examples import places

    there = {(end, box) for end, _, box in found}
    while True:
        ends = places(text, [phrase for _, phrase, _ in found])
        kept = [one for one, end in zip(found, ends, strict=True) if (end, one[2]) in there]
        if len(kept) == len(found):
            return kept
        found = kept


def fractions(box: Box, height: int, width: int) -> Box | None:
    """A box of pixels as fractions of the picture's width and height.

    It is clipped if it leaves the picture by at most a pixel. None if it leaves it by more, or has
    no area.
    """
    x0, y0, x1, y1 = box
    if not (x0 >= -1 and y0 >= -1 and x1 <= width + 1 and y1 <= height + 1):
        return None
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if not (x0 < x1 and y0 < y1):
        return None
    return x0 / width, y0 / height, x1 / width, y1 / height


def box_of(bbox: Any) -> Box:
    """COCO's `bbox` (x, y, width, height) as a Box. Raises UserError for what is none."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_number, bbox)):
        raise UserError(f"a bbox is {quote(bbox)}: expected x, y, width, height")
    x, y, width, height = map(float, bbox)
    return x, y, x + width, y + height


def spans_of(tokens_positive: Any, caption: str) -> list[tuple[int, int]]:
    """`tokens_positive`, spans of characters [start, end) of a caption, in order.

    Spans with nothing but white space between them are one phrase. Raises UserError for what is
    none.
    """
    if not isinstance(tokens_positive, list):
        raise UserError(f"tokens_positive is {quote(tokens_positive)}: expected [[start, end]]")
    if len(tokens_positive) == 2 and all(map(_is_whole, tokens_positive)):
        tokens_positive = [tokens_positive]
    spans: list[tuple[int, int]] = []
    for span in tokens_positive:
        if not isinstance(span, list) or len(span) != 2 or not all(map(_is_whole, span)):
            raise UserError(f"a span of tokens_positive is {quote(span)}: expected [start, end]")
    for start, end in sorted(map(tuple, tokens_positive)):
        if spans and (start <= spans[-1][1] or not caption[spans[-1][1] : start].strip()):
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and abs(value) < 1e9
