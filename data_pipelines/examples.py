"""What each task makes of a record: the `make` and `suits` of `tasks.TASKS`.

A `make_*(record, rng)` takes a checked record of the final size that has one caption, and returns
its example, or raises UnsuitableRecord. A `*_suits(record, k)` says whether the task can use
caption k of several.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from data_pipelines import renderings, transforms
from data_pipelines.transforms import Record
from univg_jax.errors import UserError, quote

PLACEHOLDER = "<p>"
BACKGROUND_FRACTION = 0.5  # of ip's examples: no caption, so that it learns to fill in background
# Of the others, where a record has masks of objects: the hole is one of them. Our choice, as are
# the areas and the border below.
OBJECT_FRACTION = 0.5
_OBJECT_AREA = (0.01, 0.5)  # least and most of the picture that the hole of an object covers
_OBJECT_BORDER = 0.02  # of the shorter side: the hole is so much larger than its object
_BLOCKS = re.compile(r"\(([^()]*\bblocks?)\)", re.IGNORECASE)  # how lg names colors in a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a batch before collation; `text` has no tag, `mask` None is all ones.

    `loss_mask` is 1 where the target counts in the loss; None is all ones. `Task.example` also
    leaves the record's `ignore_mask` out, and takes the centered square of a `face`, which is of
    any shape where `Task.make` gives it.
    """

    target: UInt8[np.ndarray, "h w 3"]
    source: UInt8[np.ndarray, "h w 3"] | None = None
    mask: UInt8[np.ndarray, "h w 1"] | None = None
    loss_mask: UInt8[np.ndarray, "h w 1"] | None = None
    text: str = ""
    face: UInt8[np.ndarray, "face_h face_w 3"] | None = None


class UnsuitableRecord(UserError):
    """A sound record that cannot serve a task, such as one without any unambiguous expression.

    `place` is where it is (`data_pipelines.reader.Place`), once its reader says so.
    """

    place: Any = None


def make_text_to_image(record: Record, rng: np.random.Generator) -> Example:
    return Example(target=record["image"], text=record["caption"])


def make_edit(record: Record, rng: np.random.Generator) -> Example:
    return Example(target=record["image"], source=record["source"], text=record["instruction"])


def blank_hole(
    image: UInt8[np.ndarray, "h w 3"], hole: UInt8[np.ndarray, "h w 1"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The source of in/outpainting: mid-gray where the hole is 1."""
    return np.where(hole > 0, np.uint8(renderings.GRAY), image)


def make_inpainting(record: Record, rng: np.random.Generator) -> Example:
    image = record["image"]
    if "ignore_mask" in record:  # its pixels would be in the source, where the target has none
        image = renderings.fill_unknown(image, 1 - record["ignore_mask"][..., None])
    hole = transforms.sample_hole(rng, height=image.shape[0], width=image.shape[1])
    text = "" if rng.random() < BACKGROUND_FRACTION else record.get("caption", "").strip()
    # Without a text an object's hole would teach to paint an object that nobody asked for.
    if text and len(masks := record.get("masks", ())) and rng.random() < OBJECT_FRACTION:
        hole = _object_hole(masks, rng, otherwise=hole)
    return Example(target=image, source=blank_hole(image, hole), mask=hole, text=text)


def _object_hole(
    masks: UInt8[np.ndarray, "k h w"],
    rng: np.random.Generator,
    *,
    otherwise: UInt8[np.ndarray, "h w 1"],
) -> UInt8[np.ndarray, "h w 1"]:
    """One of the objects of a sensible area, made a little larger; or `otherwise`."""
    border = max(1, round(_OBJECT_BORDER * min(masks.shape[1:])))
    disk = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * border + 1, 2 * border + 1))
    holes = [cv2.dilate(mask, disk) for mask in masks if mask.any()]
    least, most = _OBJECT_AREA
    holes = [hole for hole in holes if least <= hole.mean() <= most]
    return holes[rng.integers(len(holes))][..., None] if holes else otherwise


def make_layout(record: Record, rng: np.random.Generator) -> Example:
    text, boxes = record["caption"], record["boxes"]
    height, width = record["image"].shape[:2]
    text = _BLOCKS.sub(r"\1", text)  # a caption must not name a block that is none
    sides = boxes[:, 2:] - boxes[:, :2]
    ends = places(text, record["phrases"])
    # The crop may have cut a box away, or down to less than half a pixel.
    shown = [
        k
        for k in range(len(boxes))
        if (sides[k] * [width, height] >= 0.5).all() and ends[k] is not None
    ]
    if not shown:
        raise UnsuitableRecord("no box inside the image whose phrase stands in the caption")
    # A color names one block, and equal boxes ("a girl", "her") are one. Of more blocks than colors
    # the largest are shown, in stored order.
    by_size = sorted(shown, key=lambda k: -sides[k].prod())
    largest = list(dict.fromkeys(tuple(boxes[k]) for k in by_size))[: len(renderings.PALETTE)]
    shown = [k for k in shown if tuple(boxes[k]) in largest]
    blocks = list(dict.fromkeys(tuple(boxes[k]) for k in shown))
    colors = rng.permutation(list(renderings.PALETTE))[: len(blocks)].tolist()
    named: dict[int, list[str]] = {}
    for k in shown:
        color, others = colors[blocks.index(tuple(boxes[k]))], named.setdefault(ends[k], [])
        if color not in others:
            others.append(color)
    text = name_blocks(text, named)
    canvas = renderings.render_layout(
        np.array(blocks, np.float32), colors, height=height, width=width
    )
    return Example(target=record["image"], source=canvas, text=text)


def name_blocks(text: str, colors: Mapping[int, Sequence[str]]) -> str:
    """The text with the blocks of these colors named at each place: "a pig (red block)"."""
    # From the end of the text to its start, so that an insertion moves no later place.
    for end in sorted(colors, reverse=True):
        *others, last = colors[end]
        block = f"{', '.join(others)} and {last} blocks" if others else f"{last} block"
        text = f"{text[:end]} ({block}){text[end:]}"
    return text


def layout_suits(record: Record, k: int) -> bool:
    """Whether a phrase of a box stands in caption k."""
    if len(record.get("phrase_captions", ())):
        return k in record["phrase_captions"]
    return any(place is not None for place in places(record["captions"][k], record["phrases"]))


def places(caption: str, phrases: list[str]) -> list[int | None]:
    """Where in the caption each phrase ends, None for a phrase that is not there.

    Longer phrases take their places first: "a dog" must not take the start of "a dog house". Equal
    phrases take successive places. If there are more of them than places (two boxes for one "two
    pigs"), they share the last place.
    """
    taken = np.zeros(len(caption) + 1, bool)
    last: dict[str, int] = {}
    ends: list[int | None] = [None] * len(phrases)
    for k in sorted(range(len(phrases)), key=lambda k: -len(phrases[k])):
        phrase = phrases[k].lower()
        for match in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", caption, re.IGNORECASE):
            if phrase and not taken[match.start() : match.end()].any():
                taken[match.start() : match.end()] = True
                last[phrase] = match.end()
                break
        ends[k] = last.get(phrase)
    return ends


def make_depth(record: Record, rng: np.random.Generator) -> Example:
    is_known = renderings.is_known_depth(record["depth"])
    if not is_known.any():
        raise UnsuitableRecord("no known depth")
    target = renderings.render_depth(record["depth"])
    loss_mask = is_known[..., None].astype(np.uint8)
    return Example(target=target, source=record["image"], loss_mask=loss_mask)


def make_pose(record: Record, rng: np.random.Generator) -> Example:
    image = record["image"]
    if not record["joints"][..., 2].any():
        raise UnsuitableRecord("no visible joint")
    height, width = image.shape[:2]
    skeletons = renderings.render_pose(record["joints"], height=height, width=width)
    return Example(target=skeletons, source=image)


def make_segmentation(record: Record, rng: np.random.Generator) -> Example:
    expressions, masks = record["expressions"], record["masks"]
    of = record.get("expression_masks", ())
    of = of if len(of) else range(len(expressions))
    named = [k for k, text in enumerate(expressions) if text and masks[of[k]].any()]
    if not named:
        raise UnsuitableRecord("no expression refers to a visible mask")
    k = named[rng.integers(len(named))]
    target = renderings.render_mask(masks[of[k]])
    return Example(target=target, source=record["image"], text=expressions[k])


def identity_suits(record: Record, k: int) -> bool:
    """Whether caption k says where the person is."""
    return PLACEHOLDER in record["captions"][k]


def make_identity(record: Record, rng: np.random.Generator) -> Example:
    if PLACEHOLDER not in record["caption"]:
        raise UserError(f"field 'caption' has no {PLACEHOLDER}: {quote(record['caption'])}")
    return Example(target=record["image"], text=record["caption"], face=record["face"])
