"""TASKS: the prompt format of every task, and what it makes of a record.

All tasks share one input format (UniVG, arXiv 2503.12652): a target image, a source image, a mask
(1 = generate, 0 = keep), a text after the task's tag, a face. What a task has no use for is None.

| task | source | mask | text after the tag | target |
|---|---|---|---|---|
| t2i | - | all 1 | caption | image |
| ie | image before | all 1 | instruction | image after |
| ip | image, hole blanked | 1 in the hole | caption, or nothing (background variant) | image |
| lg | canvas of colored blocks | all 1 | caption naming each object's block | image |
| depth | image | all 1 | - | depth, near bright |
| pose | image | all 1 | - | skeleton |
| seg | image | all 1 | referring expression | its mask, white on black |
| id | - | all 1, face given | caption with `<p>` | image of the person |

A task is served by any record that has its `needs` (`data_pipelines.records` lists the fields).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import UInt8

from data_pipelines import renderings, transforms
from data_pipelines.transforms import Record
from univg_jax.errors import check_name

PLACEHOLDER = "<p>"
BACKGROUND_FRACTION = 0.5  # of ip: no caption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a batch before collation; `text` has no tag, `mask` None is all ones."""

    target: UInt8[np.ndarray, "h w 3"]
    source: UInt8[np.ndarray, "h w 3"] | None = None
    mask: UInt8[np.ndarray, "h w 1"] | None = None
    text: str = ""
    face: UInt8[np.ndarray, "f f 3"] | None = None


class UnsuitableRecord(ValueError):
    """A sound record that cannot serve a task, such as one without any unambiguous expression."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a task needs of a record, and how it draws an example from one of the final size."""

    needs: tuple[str, ...]
    draw: Callable[[Record, np.random.Generator], Example]

    def example(
        self,
        record: Record,
        rng: np.random.Generator,
        resolution: int,
        *,
        where: str = "record",
        center: bool = False,
    ) -> Example:
        """A checked record, cropped to a square (at random or the `center`), as an example.

        Raises:
          UnsuitableRecord: the record is sound but holds nothing for this task.
          ValueError: a field is missing or wrong; the message begins with `where`.
        """
        check(record, self.needs, where=where)
        record = {field: record[field] for field in self.needs}
        record = transforms.resize_and_crop(
            record, resolution=resolution, rng=None if center else rng
        )
        try:
            return self.draw(record, rng)
        except UnsuitableRecord as error:
            raise UnsuitableRecord(f"{where}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def prompt(task: str, text: str) -> str:
    """The text given to the encoder: the task's tag, then the text; the tag alone is the null text."""
    return f"<{task}> {text}" if text else f"<{task}>"


def find(name: str) -> Task:
    """The task called `name`.

    Raises:
      ValueError: there is none; names the nearest.
    """
    return TASKS[check_name(name, TASKS, what="task")]


def check(record: Record, needs: Iterable[str], *, where: str) -> None:
    """Holds a decoded record against the needed fields: present, in range, of one size.

    Raises:
      ValueError: one line: where, which field, what is wrong.
    """

    def fail(field: str, fault: str) -> None:
        raise ValueError(f"{where}: field {field!r} {fault}")

    needs = tuple(needs)
    for field in needs:
        if field not in record:
            fail(field, f"is missing (has {', '.join(sorted(record))})")
    size = record["image"].shape[:2]
    for field in ("source", "edit_mask", "depth"):
        if field in needs and record[field].shape[:2] != size:
            fail(field, f"is {_by(record[field].shape[:2])} pixels but the image {_by(size)}")
    if "masks" in needs and len(record["masks"]) and record["masks"].shape[1:] != size:
        fail("masks", f"are {_by(record['masks'].shape[1:])} pixels but the image {_by(size)}")
    for field in ("caption", "instruction"):
        if field in needs and not record[field].strip():
            fail(field, "is empty")
    if "boxes" in needs:
        boxes = record["boxes"]
        for k in np.flatnonzero(~((boxes >= 0) & (boxes <= 1)).all(axis=1)):
            fail(
                "boxes",
                f"has box {k} outside the image: {_numbers(boxes[k])}, expected x0 y0 x1 y1 in [0, 1]",
            )
        for k in np.flatnonzero((boxes[:, 0] >= boxes[:, 2]) | (boxes[:, 1] >= boxes[:, 3])):
            fail(
                "boxes",
                f"has box {k} inverted or empty: {_numbers(boxes[k])}, expected x0 < x1 and y0 < y1",
            )
    for field, partner in (("phrases", "boxes"), ("expressions", "masks")):
        if field in needs and len(record[field]) != len(record[partner]):
            fail(field, f"has {len(record[field])} entries for {len(record[partner])} {partner}")
    if "joints" in needs and record["joints"].shape != (17, 3):
        fail("joints", f"has shape {record['joints'].shape}, expected (17, 3)")


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{v:g}" for v in values)


def _text_to_image(record: Record, rng: np.random.Generator) -> Example:
    return Example(target=record["image"], text=record["caption"])


def _edit(record: Record, rng: np.random.Generator) -> Example:
    return Example(target=record["image"], source=record["source"], text=record["instruction"])


def blank_hole(
    image: UInt8[np.ndarray, "h w 3"], hole: UInt8[np.ndarray, "h w 1"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The source of in/outpainting: mid-gray where the hole is 1."""
    return np.where(hole > 0, np.uint8(renderings.GRAY), image)


def _inpaint(record: Record, rng: np.random.Generator) -> Example:
    image = record["image"]
    hole = transforms.sample_hole(rng, height=image.shape[0], width=image.shape[1])
    source = blank_hole(image, hole)
    text = "" if rng.random() < BACKGROUND_FRACTION else record["caption"]
    return Example(target=image, source=source, mask=hole, text=text)


def _layout(record: Record, rng: np.random.Generator) -> Example:
    resolution = record["image"].shape[0]
    boxes = record["boxes"]
    sides = boxes[:, 2:] - boxes[:, :2]
    places = _places(record["caption"], record["phrases"])
    # A crop may have cut a box away; a block is at least a pixel wide.
    shown = [
        k
        for k in range(len(boxes))
        if (sides[k] * resolution >= 0.5).all() and places[k] is not None
    ]
    if not shown:
        raise UnsuitableRecord("no box inside the image whose phrase stands in the caption")
    shown = sorted(sorted(shown, key=lambda k: -sides[k].prod())[: len(renderings.PALETTE)])
    colors = rng.permutation(list(renderings.PALETTE))[: len(shown)].tolist()
    named: dict[int, list[str]] = {}
    for k, color in zip(shown, colors, strict=True):
        named.setdefault(places[k], []).append(color)
    text = record["caption"]
    for end in sorted(named, reverse=True):
        *others, last = named[end]
        block = f"{', '.join(others)} and {last} blocks" if others else f"{last} block"
        text = f"{text[:end]} ({block}){text[end:]}"
    canvas = renderings.render_layout(boxes[shown], colors, resolution=resolution)
    return Example(target=record["image"], source=canvas, text=text)


def _places(caption: str, phrases: list[str]) -> list[int | None]:
    """Where in the caption each phrase ends: the longest choose first, equal ones take successive
    places.

    Where equal phrases outnumber their places ("two pigs" of two boxes), the last is shared.
    """
    taken = np.zeros(len(caption) + 1, bool)
    last: dict[str, int] = {}
    ends: list[int | None] = [None] * len(phrases)
    for k in sorted(range(len(phrases)), key=lambda k: -len(phrases[k])):
        phrase = phrases[k].lower()
        for match in (
            re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", caption, re.IGNORECASE)
            if phrase
            else ()
        ):
            if not taken[match.start() : match.end()].any():
                taken[match.start() : match.end()] = True
                last[phrase] = match.end()
                break
        ends[k] = last.get(phrase)
    return ends


def _depth(record: Record, rng: np.random.Generator) -> Example:
    return Example(target=renderings.render_depth(record["depth"]), source=record["image"])


def _pose(record: Record, rng: np.random.Generator) -> Example:
    image = record["image"]
    if not record["joints"][:, 2].any():
        raise UnsuitableRecord("no visible joint")
    return Example(
        target=renderings.render_pose(record["joints"], resolution=image.shape[0]), source=image
    )


def _segment(record: Record, rng: np.random.Generator) -> Example:
    named = [k for k, text in enumerate(record["expressions"]) if text and record["masks"][k].any()]
    if not named:
        raise UnsuitableRecord("no expression refers to a visible mask")
    k = named[rng.integers(len(named))]
    target = renderings.render_mask(record["masks"][k])
    return Example(target=target, source=record["image"], text=record["expressions"][k])


def _identity(record: Record, rng: np.random.Generator) -> Example:
    if PLACEHOLDER not in record["caption"]:
        raise ValueError(f"field 'caption' has no {PLACEHOLDER}: {record['caption']!r}")
    return Example(target=record["image"], text=record["caption"], face=record["face"])


# The order is that of `Batch.task`: append, never reorder.
TASKS: dict[str, Task] = {
    "t2i": Task(needs=("image", "caption"), draw=_text_to_image),
    "ie": Task(needs=("image", "source", "instruction"), draw=_edit),
    "ip": Task(needs=("image", "caption"), draw=_inpaint),
    "lg": Task(needs=("image", "caption", "boxes", "phrases"), draw=_layout),
    "depth": Task(needs=("image", "depth"), draw=_depth),
    "pose": Task(needs=("image", "joints"), draw=_pose),
    "seg": Task(needs=("image", "masks", "expressions"), draw=_segment),
    "id": Task(needs=("image", "caption", "face"), draw=_identity),
}
