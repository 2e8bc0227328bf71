"""TASKS: what every task makes of a record, what it takes from a user, and its prompt format.

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
import difflib
import re
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from data_pipelines import renderings, transforms
from data_pipelines.labels import check, lay_on
from data_pipelines.transforms import Record
from univg_jax.errors import UserError, quote

PLACEHOLDER = "<p>"
# The pictures that a user may give a task, and what each shows.
INPUTS = {
    "image": "the picture to change or to read, or a canvas of colored blocks",
    "mask": "white (255, or 1) where to generate, black where the image stays",
    "face": "a picture of the person",
}
_BLOCKS = re.compile(r"\(([^()]*\bblocks?)\)", re.IGNORECASE)  # how lg names colors in a prompt
BACKGROUND_FRACTION = 0.5  # of ip's examples: no caption, so that it learns to fill in background


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a batch before collation; `text` has no tag, `mask` None is all ones.

    What `Task.make` gives as `face` may have any shape; `Task.example` takes its centered square.
    """

    target: UInt8[np.ndarray, "h w 3"]
    source: UInt8[np.ndarray, "h w 3"] | None = None
    mask: UInt8[np.ndarray, "h w 1"] | None = None
    text: str = ""
    face: UInt8[np.ndarray, "face_h face_w 3"] | None = None


class UnsuitableRecord(UserError):
    """A sound record that cannot serve a task, such as one without any unambiguous expression."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a task needs of a record or of a user, and how it makes an example of either."""

    name: str
    title: str  # what it does, in the field's words
    aliases: tuple[str, ...] = ()  # other names that a user may call it by
    needs: tuple[str, ...]  # fields of a record
    make: Callable[[Record, np.random.Generator], Example]  # of a record of the final size
    inputs: tuple[str, ...] = ()  # the INPUTS that a user gives
    prompt: Literal["needed", "optional", "none"] = "needed"  # whether a user gives one
    prompt_says: str = "what to paint"
    prompt_example: str = "a pig on grass"

    def example(
        self,
        record: Record,
        rng: np.random.Generator,
        resolution: int | transforms.Shape,
        *,
        where: str = "record",
        center: bool = False,
    ) -> Example:
        """A record, checked and cropped to a square (at random or the `center`), as an example.

        Raises:
          UnsuitableRecord: the record is sound but holds nothing for this task.
          UserError: a field is missing or wrong; the message begins with `where`.
        """
        record = check(record, self.needs, where=where)
        record = {field: record[field] for field in self.needs}
        if isinstance(resolution, int) or resolution[0] == resolution[1]:
            transforms.tell_crop(f"the image of {where}", record["image"], at_random=not center)
        record = transforms.resize_and_crop(
            record, resolution=resolution, rng=None if center else rng
        )
        try:
            made = self.make(record, rng)
        except UserError as error:
            raise type(error)(f"{where}: {error}") from None
        return made if made.face is None else _with_face(made, made.face)

    def from_inputs(
        self,
        *,
        prompt: str = "",
        image: UInt8[np.ndarray, "image_h image_w 3"] | None = None,
        mask: UInt8[np.ndarray, "mask_h mask_w"] | None = None,
        face: UInt8[np.ndarray, "face_h face_w 3"] | None = None,
        resolution: int,
    ) -> Example:
        """A user's inputs as the example that the task was trained on, with a blank target.

        Pictures are RGB of any size, of which the centered square is taken. `mask` is 1 where to
        generate, and lies on the image: it has its shape, in any size. `prompt` has no tag; for
        task id it has `<p>` where the person stands.

        Raises UserError for a prompt, a picture or a `<p>` that is missing, for a prompt or a
        picture that the task does not take, and for a mask that marks nothing or has another shape
        than the image.
        """
        prompt = prompt.strip()
        self._check_prompt(prompt)
        given = {"image": image, "mask": mask, "face": face}
        for name, picture in given.items():
            if picture is None and name in self.inputs:
                article = "an" if name == "image" else "a"
                raise UserError(f"task {self.name!r} needs {article} {name}")
            if picture is not None and name not in self.inputs:
                raise UserError(f"task {self.name!r} takes no {name}")
        source, hole = None, None
        if image is not None:
            transforms.tell_crop("the image", image)
            planes = {"image": image}
            if mask is not None:
                planes["edit_mask"] = lay_on(mask, image)
            planes = transforms.resize_and_crop(planes, resolution=resolution)
            source = planes["image"]
            if mask is not None:
                hole = planes["edit_mask"][..., None]
                if not hole.any():
                    raise UserError("the mask has no white pixel: nothing to generate")
                source = blank_hole(source, hole)
        blank = np.zeros((resolution, resolution, 3), np.uint8)
        made = Example(target=blank, source=source, mask=hole, text=prompt)
        return made if face is None else _with_face(made, face)

    def _check_prompt(self, prompt: str) -> None:
        if self.prompt == "needed" and not prompt:
            raise UserError(f"task {self.name!r} needs a prompt")
        if self.prompt == "none" and prompt:
            raise UserError(f"task {self.name!r} takes no prompt, but has {quote(prompt)}")
        if "face" in self.inputs and PLACEHOLDER not in prompt:
            raise UserError(
                f"prompt {quote(prompt)} has no {PLACEHOLDER}: "
                f"task {self.name!r} puts the person there"
            )


def _with_face(example: Example, face: UInt8[np.ndarray, "h w 3"]) -> Example:
    """The example with the centered square of a picture of a face."""
    transforms.tell_crop("the face", face)
    return dataclasses.replace(example, face=transforms.center_square(face))


def prompt(task: str, text: str) -> str:
    """The text for the encoder: the task's tag, then `text`. The tag alone is the null text.

    A text may come from anywhere, and must not look as if it were of another task: tags in it get
    round brackets.
    """
    # With spaces or in capitals it would be the same tag to some tokenizers.
    tags = rf"<\s*({'|'.join(map(re.escape, TASKS))})\s*>"
    plain = re.sub(tags, r"(\1)", text, flags=re.IGNORECASE)
    return f"<{task}> {plain}" if plain else f"<{task}>"


def tag_of(prompt: str) -> str:
    """The tag at the start of a prompt, empty if none is there."""
    tag = prompt[: prompt.find(">") + 1]
    return tag if tag[1:-1] in TASKS else ""


def has_face(prompt: str) -> bool:
    """Whether a prompt is of a task with a face, and its `<p>` therefore the person's place."""
    tag = tag_of(prompt)
    return bool(tag) and "face" in TASKS[tag[1:-1]].inputs


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
    text = "" if rng.random() < BACKGROUND_FRACTION else record["caption"]
    return Example(target=image, source=blank_hole(image, hole), mask=hole, text=text)


def _layout(record: Record, rng: np.random.Generator) -> Example:
    text, boxes, resolution = record["caption"], record["boxes"], record["image"].shape[0]
    text = _BLOCKS.sub(r"\1", text)  # a caption must not name a block that is none
    sides = boxes[:, 2:] - boxes[:, :2]
    places = _places(text, record["phrases"])
    # The crop may have cut a box away, or down to less than half a pixel.
    shown = [
        k
        for k in range(len(boxes))
        if (sides[k] * resolution >= 0.5).all() and places[k] is not None
    ]
    if not shown:
        raise UnsuitableRecord("no box inside the image whose phrase stands in the caption")
    # A color names one block. Of more boxes than colors the largest are shown, in stored order.
    shown = sorted(sorted(shown, key=lambda k: -sides[k].prod())[: len(renderings.PALETTE)])
    colors = rng.permutation(list(renderings.PALETTE))[: len(shown)].tolist()
    named: dict[int, list[str]] = {}
    for k, color in zip(shown, colors, strict=True):
        named.setdefault(places[k], []).append(color)
    # From the end of the caption to its start, so that an insertion moves no later place.
    for end in sorted(named, reverse=True):
        *others, last = named[end]
        block = f"{', '.join(others)} and {last} blocks" if others else f"{last} block"
        text = f"{text[:end]} ({block}){text[end:]}"
    canvas = renderings.render_layout(boxes[shown], colors, resolution=resolution)
    return Example(target=record["image"], source=canvas, text=text)


def _places(caption: str, phrases: list[str]) -> list[int | None]:
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


def _depth(record: Record, rng: np.random.Generator) -> Example:
    if not (np.isfinite(record["depth"]) & (record["depth"] > 0)).any():
        raise UnsuitableRecord("no known depth")
    return Example(target=renderings.render_depth(record["depth"]), source=record["image"])


def _pose(record: Record, rng: np.random.Generator) -> Example:
    image = record["image"]
    if not record["joints"][:, 2].any():
        raise UnsuitableRecord("no visible joint")
    skeleton = renderings.render_pose(record["joints"], resolution=image.shape[0])
    return Example(target=skeleton, source=image)


def _segment(record: Record, rng: np.random.Generator) -> Example:
    named = [k for k, text in enumerate(record["expressions"]) if text and record["masks"][k].any()]
    if not named:
        raise UnsuitableRecord("no expression refers to a visible mask")
    k = named[rng.integers(len(named))]
    target = renderings.render_mask(record["masks"][k])
    return Example(target=target, source=record["image"], text=record["expressions"][k])


def _identity(record: Record, rng: np.random.Generator) -> Example:
    if PLACEHOLDER not in record["caption"]:
        raise UserError(f"field 'caption' has no {PLACEHOLDER}: {quote(record['caption'])}")
    return Example(target=record["image"], text=record["caption"], face=record["face"])


# `Batch.task` is an index into this order, also in checkpoints' data: append, never reorder.
_TASKS = (
    Task(
        name="t2i",
        title="text-to-image",
        aliases=("generate", "generation"),
        needs=("image", "caption"),
        make=_text_to_image,
    ),
    Task(
        name="ie",
        title="instruction editing",
        aliases=("edit", "editing"),
        needs=("image", "source", "instruction"),
        make=_edit,
        inputs=("image",),
        prompt_says="what to change",
        prompt_example="remove the pig",
    ),
    Task(
        name="ip",
        title="in- and outpainting",
        aliases=("inpaint", "inpainting", "outpaint", "outpainting"),
        needs=("image", "caption"),
        make=_inpaint,
        inputs=("image", "mask"),
        prompt="optional",
        prompt_says="the whole picture; without one, background is filled in",
    ),
    Task(
        name="lg",
        title="layout-guided generation",
        aliases=("layout",),
        needs=("image", "caption", "boxes", "phrases"),
        make=_layout,
        inputs=("image",),
        prompt_says="what to paint, with '(red block)' after what stands in that block",
        prompt_example="a pig (red block) on grass",
    ),
    Task(
        name="depth",
        title="depth estimation",
        needs=("image", "depth"),
        make=_depth,
        inputs=("image",),
        prompt="none",
    ),
    Task(
        name="pose",
        title="pose estimation",
        needs=("image", "joints"),
        make=_pose,
        inputs=("image",),
        prompt="none",
    ),
    Task(
        name="seg",
        title="referring segmentation",
        aliases=("segment", "segmentation"),
        needs=("image", "masks", "expressions"),
        make=_segment,
        inputs=("image",),
        prompt_says="what to find",
        prompt_example="the pig",
    ),
    Task(
        name="id",
        title="a picture of a given person",
        aliases=("identity", "face", "person"),
        needs=("image", "caption", "face"),
        make=_identity,
        inputs=("face",),
        prompt_says=f"what to paint, with {PLACEHOLDER} for the person",
        prompt_example=f"a portrait of {PLACEHOLDER} smiling",
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """The task with a name in TASKS, a title or an alias, however it is spelled: `Text to Image`.

    Raises UserError with the nearest one, and with all tasks and their titles.
    """
    known = {
        _spelling(spelled): task
        for task in TASKS.values()
        for spelled in (task.name, task.title, *task.aliases)
    }
    if found := known.get(_spelling(name)):
        return found
    near = difflib.get_close_matches(_spelling(name), known, n=1)
    meant = f"; did you mean {known[near[0]].name!r}?" if near else ""
    listed = ", ".join(f"{task.name}: {task.title}" for task in TASKS.values())
    raise UserError(f"unknown task {quote(name)}{meant} ({listed})")


def _spelling(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
