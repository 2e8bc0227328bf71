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

A task is served by any record that has its `needs` (`data_pipelines.records` lists the fields),
and reads its `uses` where they are there. Several `captions` serve as a `caption`: one is drawn.
What of the target counts in the loss is the loss mask: what the `ignore_mask` of a record leaves
(crowds without labels, bars that lie outside the picture), of depth only where it is known.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from data_pipelines import examples, labels, letterbox, renderings, transforms
from data_pipelines.examples import PLACEHOLDER, Example, UnsuitableRecord, blank_hole
from data_pipelines.labels import check, lay_on
from data_pipelines.transforms import Record
from univg_jax.errors import UnsupportedError, UserError, quote

__all__ = ["PLACEHOLDER", "TASKS", "Example", "Task", "UnsuitableRecord", "check"]
# The pictures that a user may give a task, and what each shows.
INPUTS = {
    "image": "the picture to change or to read, or a canvas of colored blocks",
    "mask": "white (255, or 1) where to generate, black where the image stays",
    "face": "a picture of the person",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a task needs of a record or of a user, and how it makes an example of either."""

    name: str
    title: str  # what it does, in the field's words
    aliases: tuple[str, ...] = ()  # other names that a user may call it by
    needs: tuple[str, ...]  # fields of a record
    uses: tuple[str, ...] = ()  # fields that are read where a record has them
    make: Callable[[Record, np.random.Generator], Example]  # of a record of the final size
    # Whether caption k of several can be the text.
    suits: Callable[[Record, int], bool] = lambda record, k: True
    inputs: tuple[str, ...] = ()  # the INPUTS that a user gives
    # Whether the source is drawn anew for every row (holes, colors): no cache then has it.
    draws_source: bool = False
    prompt: Literal["needed", "optional", "none"] = "needed"  # whether a user gives one
    prompt_says: str = "what to paint"
    prompt_example: str = "a pig on grass"
    # What fills a canvas around a user's picture of another shape.
    around: letterbox.Around = "edge"
    # What a generated picture says, by the field of a record, and how it is read.
    answers: Literal["depth", "joints", "mask"] | None = None
    decode: Callable[[UInt8[np.ndarray, "h w 3"]], np.ndarray] | None = None

    def fields(self, available: Collection[str], extra: Collection[str] = ()) -> tuple[str, ...]:
        """The fields to read of records that have those `available`: `needs`, `uses` and `extra`.

        One that is needed, or is extra, is among them even where it is not available. Every task
        uses the `ignore_mask`.
        """
        needs = _present((*self.needs, *extra), available)
        uses = _present((*self.uses, "ignore_mask"), available)
        return tuple(dict.fromkeys((*needs, *(name for name in uses if name in available))))

    def check(self, record: Record, *, where: str, extra: Collection[str] = ()) -> Record:
        """The record, its `fields` checked as `labels.check` does. Raises UserError."""
        needs = _present((*self.needs, *extra), record)
        uses = [name for name in self.fields(record) if name not in needs]
        return labels.check(record, needs, uses=uses, where=where)

    def with_caption(
        self, record: Record, rng: np.random.Generator, weights: Mapping[str, float]
    ) -> Record:
        """The record with one `caption` of its `captions`, and the boxes and phrases of it alone.

        A caption is drawn with the weight of its kind, 1 for a kind without one. The draw leaves
        the numbers that `rng` gives next as they are, and a record of one caption, too. Raises
        UnsuitableRecord if the task needs a caption, and none suits it or has a weight.
        """
        if "captions" not in record:
            return record
        texts = [text.strip() for text in record["captions"]]
        kinds = record.get("caption_kinds") or [""] * len(texts)
        chances = [
            weights.get(kinds[k], 1.0) if texts[k] and self.suits(record, k) else 0.0
            for k in range(len(texts))
        ]
        several = ("captions", "caption_kinds", "phrase_captions")
        single = {name: value for name, value in record.items() if name not in several}
        if not any(chances):
            if "caption" not in self.needs:
                return single
            raise UnsuitableRecord(
                f"none of its captions can be drawn: of {len(texts)}, {sum(map(bool, texts))} have "
                f"text; their kinds are {', '.join(sorted(set(kinds))) or 'none'} "
                "(data.caption_weights)"
            )
        possible = [k for k, chance in enumerate(chances) if chance]
        if len(possible) == 1:
            k = possible[0]
        else:
            ends = np.cumsum(chances)
            k = int(np.searchsorted(ends, rng.spawn(1)[0].random() * ends[-1], side="right"))
        if len(of := record.get("phrase_captions", ())):
            kept = np.flatnonzero(of == k)
            single["boxes"] = record["boxes"][kept]
            single["phrases"] = [record["phrases"][i] for i in kept]
        return single | {"caption": texts[k]}

    def example(
        self,
        record: Record,
        rng: np.random.Generator,
        resolution: int | transforms.Shape,
        *,
        caption_weights: Mapping[str, float] | None = None,
        where: str = "record",
        center: bool = False,
    ) -> Example:
        """A record, checked and cropped to a square (at random or the `center`), as an example.

        `caption_weights` are those of kinds of captions, as `with_caption` takes them. What does
        not count in the loss shows the nearest pixel that does.

        Raises:
          UnsuitableRecord: the record is sound but holds nothing for this task.
          UserError: a field is missing or wrong; the message begins with `where`.
        """
        record = self.check(record, where=where)
        record = {field: record[field] for field in self.fields(record)}
        if isinstance(resolution, int) or resolution[0] == resolution[1]:
            transforms.tell_crop(f"the image of {where}", record["image"], at_random=not center)
        try:
            record = self.with_caption(record, rng, caption_weights or {})
            record = transforms.resize_and_crop(
                record, resolution=resolution, rng=None if center else rng
            )
            made = _masked(self.make(record, rng), record.get("ignore_mask"))
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
        resolution: int | transforms.Shape,
    ) -> Example:
        """A user's inputs as the example that the task was trained on, with a blank target.

        Pictures are RGB of any size, of which the centered window of the target's shape is taken,
        and of a face the centered square. `resolution` is the side of a square, or (height, width).
        `mask` is 1 where to generate, and lies on the image: it has its shape, in any size.
        `prompt` has no tag; for task id it has `<p>` where the person stands.

        Raises UnsupportedError for a prompt or a picture that the task does not take, and UserError
        for a prompt, a picture or a `<p>` that is missing, and for a mask that marks nothing or has
        another shape than the image.
        """
        prompt = prompt.strip()
        self._check_prompt(prompt)
        given = {"image": image, "mask": mask, "face": face}
        for name, picture in given.items():
            if picture is None and name in self.inputs:
                article = "an" if name == "image" else "a"
                raise UserError(f"task {self.name!r} needs {article} {name}")
            if picture is not None and name not in self.inputs:
                raise UnsupportedError(f"task {self.name!r} takes no {name}")
        source, hole = None, None
        height, width = (resolution,) * 2 if isinstance(resolution, int) else resolution
        if image is not None:
            if height == width:
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
        blank = np.zeros((height, width, 3), np.uint8)
        made = Example(target=blank, source=source, mask=hole, text=prompt)
        return made if face is None else _with_face(made, face)

    def _check_prompt(self, prompt: str) -> None:
        if self.prompt == "needed" and not prompt:
            raise UserError(f"task {self.name!r} needs a prompt")
        if self.prompt == "none" and prompt:
            raise UnsupportedError(f"task {self.name!r} takes no prompt, but has {quote(prompt)}")
        if "face" in self.inputs and PLACEHOLDER not in prompt:
            raise UserError(
                f"prompt {quote(prompt)} has no {PLACEHOLDER}: "
                f"task {self.name!r} puts the person there"
            )


def _present(names: Collection[str], available: Collection[str]) -> list[str]:
    """The names, with those of several captions for `caption` where there are several."""
    several = [name for name in ("captions", "caption_kinds") if name in available]
    if "captions" not in available:
        return list(names)
    return [stored for name in names for stored in (several if name == "caption" else [name])]


def _masked(example: Example, ignored: UInt8[np.ndarray, "h w"] | None) -> Example:
    """The example whose loss also leaves out what is `ignored`, its target filled there."""
    counts = example.loss_mask
    if ignored is not None:
        counts = (1 - ignored[..., None]) * (1 if counts is None else counts)
    if counts is None or counts.all():
        return dataclasses.replace(example, loss_mask=None)
    if not counts.any():
        raise UnsuitableRecord("nothing of the target counts: all of it is without a label")
    target = renderings.fill_unknown(example.target, counts)
    return dataclasses.replace(example, target=target, loss_mask=counts)


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


# `Batch.task` is an index into this order, also in checkpoints' data: append, never reorder.
_TASKS = (
    Task(
        name="t2i",
        title="text-to-image",
        aliases=("generate", "generation"),
        needs=("image", "caption"),
        make=examples.make_text_to_image,
    ),
    Task(
        name="ie",
        title="instruction editing",
        aliases=("edit", "editing"),
        needs=("image", "source", "instruction"),
        make=examples.make_edit,
        inputs=("image",),
        prompt_says="what to change",
        prompt_example="remove the pig",
    ),
    Task(
        name="ip",
        title="in- and outpainting",
        aliases=("inpaint", "inpainting", "outpaint", "outpainting"),
        needs=("image",),
        uses=("caption", "masks"),
        make=examples.make_inpainting,
        inputs=("image", "mask"),
        draws_source=True,
        prompt="optional",
        prompt_says="the whole picture; without one, background is filled in",
    ),
    Task(
        name="lg",
        title="layout-guided generation",
        aliases=("layout",),
        needs=("image", "caption", "boxes", "phrases"),
        uses=("phrase_captions",),
        make=examples.make_layout,
        suits=examples.layout_suits,
        inputs=("image",),
        draws_source=True,
        around="gray",
        prompt_says="what to paint, with '(red block)' after what stands in that block",
        prompt_example="a pig (red block) on grass",
    ),
    Task(
        name="depth",
        title="depth estimation",
        needs=("image", "depth"),
        make=examples.make_depth,
        inputs=("image",),
        prompt="none",
        answers="depth",
        decode=renderings.decode_depth,
    ),
    Task(
        name="pose",
        title="pose estimation",
        needs=("image", "joints"),
        make=examples.make_pose,
        inputs=("image",),
        prompt="none",
        answers="joints",
        decode=renderings.decode_pose,
    ),
    Task(
        name="seg",
        title="referring segmentation",
        aliases=("segment", "segmentation"),
        needs=("image", "masks", "expressions"),
        uses=("expression_masks",),
        make=examples.make_segmentation,
        inputs=("image",),
        prompt_says="what to find",
        prompt_example="the pig",
        answers="mask",
        decode=renderings.decode_mask,
    ),
    Task(
        name="id",
        title="a picture of a given person",
        aliases=("identity", "face", "person"),
        needs=("image", "caption", "face"),
        make=examples.make_identity,
        suits=examples.identity_suits,
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


def _spelling(name: object) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
