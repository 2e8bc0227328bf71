"""What a user gives a trained model: read, checked, and fitted to the shapes of its training.

A `Request` is one picture to make. The user's picture may have any size: it is put without
distortion into the nearest of the run's shapes, and what the model makes of it comes back at the
picture's own size. Needs the settings of a run, not its model.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines import layouts
from data_pipelines.labels import lay_on
from data_pipelines.letterbox import Letterbox
from data_pipelines.tasks import TASKS, Example
from univg_jax import buckets, fields
from univg_jax.batch import BatchShape
from univg_jax.errors import UnsupportedError, UserError, quote
from univg_jax.images import WHOLE_PIXELS, Picture, open_any, to_mask, to_rgb
from univg_jax.settings import MAX_SEED, Config, Data, Guidance, Sampler

# Name, (x0, y0, x1, y1) as fractions of the picture.
Boxes = Sequence[tuple[str, Sequence[float | int]]]
Margins = int | tuple[int, int, int, int]  # pixels on every side, or left, top, right, bottom
Size = tuple[int, int]  # width, height in pixels, as PIL has them
Callback = Callable[[int, int], object]  # step, total

SCALES = {"guidance": "text", "image_guidance": "image"}  # options -> scales of guidance
_SETTINGS = {
    **{option: Guidance.__dataclass_fields__[scale] for option, scale in SCALES.items()},
    **{name: Sampler.__dataclass_fields__[name] for name in ("steps", "solver")},
}


class RunOptions(TypedDict, total=False):
    """What every method takes beside its inputs; see `Pipeline.run`."""

    seed: int | Sequence[int]
    guidance: float | int | None
    image_guidance: float | int | None
    steps: int | None
    solver: str | None
    negative_prompt: str | Sequence[str]
    callback: Callback | None


class SizedOptions(RunOptions, total=False):
    """`RunOptions`, and the size of an answer that no picture gives a size."""

    size: Size | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One picture to make: what the model is given, and how its picture becomes the user's."""

    task: str
    example: Example  # of the shape `letterbox.canvas`
    letterbox: Letterbox
    # Of inpainting, at the picture's own size: what keeps its pixels, and where it does not.
    image: UInt8[np.ndarray, "h w 3"] | None = None
    hole: UInt8[np.ndarray, "h w"] | None = None

    @classmethod
    def of_example(cls, task: str, example: Example) -> "Request":
        """That of an example of the data, which has a shape of the model."""
        height, width = example.target.shape[:2]
        return cls(
            task=task,
            example=example,
            letterbox=Letterbox((height, width), (height, width)),
            image=example.source,
            hole=None if example.mask is None else example.mask[..., 0],
        )

    def finish(self, made: UInt8[np.ndarray, "h w 3"]) -> tuple[Image.Image, np.ndarray | None]:
        """The user's picture of what the model made, and what it says in a dense task."""
        task, answer = TASKS[self.task], None
        record = {"image": made}
        if task.answers == "joints" and task.decode is not None:
            # Before the lines are resized: how wide they are tells where they end.
            record["joints"] = task.decode(made)[None]
        record = self.letterbox.restore(record)
        pixels = record["image"]
        if self.image is not None and self.hole is not None:  # what is kept has its own pixels
            pixels = np.where(self.hole[..., None] > 0, pixels, self.image)
        if task.decode is not None:
            answer = record["joints"][0] if "joints" in record else task.decode(pixels)
        return Image.fromarray(pixels), answer


def make_request(
    task: str,
    *,
    data: Data,
    prompt: str = "",
    image: Picture | None = None,
    mask: Picture | None = None,
    face: Picture | None = None,
    boxes: Boxes | None = None,
    margins: Margins | None = None,
    aspect: float | int | str | None = None,
    size: Size | None = None,
) -> Request:
    """A user's inputs as a request to a model with these settings of `data`.

    `boxes` draw the canvas of task lg. `margins`, `aspect`, or `size` make an outpainting of task
    ip, whose mask they are. Of a task without a picture, and of `boxes`, `size` is that of the
    answer; by default it is the square of `data.resolution`.

    Raises UnsupportedError for an input that the task does not take, NotFoundError for a file that
    does not exist, and UserError for what is missing, cannot be read, or does not fit.
    """
    prompt = check_text("prompt", prompt)
    rgb, face_rgb = read_input("image", image), read_input("face", face)
    plane = read_input("mask", mask)
    square = BatchShape.of(data)
    own = (square.width, square.height) if size is None else check_size("size", size)
    takes = {
        "boxes": (boxes, task == "lg"),
        "margins": (margins, task == "ip"),
        "aspect": (aspect, task == "ip"),
        "size": (size, task == "ip" or boxes is not None or "image" not in TASKS[task].inputs),
    }
    for name, (value, is_taken) in takes.items():
        if value is not None and not is_taken:
            why = ": its answer has that of the image" if name == "size" else ""
            raise UnsupportedError(f"task {task!r} takes no {name}{why}")
    if boxes is not None:
        if rgb is not None:
            raise UserError("boxes and a canvas: give one or the other")
        prompt, rgb = layouts.draw(prompt, boxes, height=own[1], width=own[0])
    elif task == "ip" and any(value is not None for value in (margins, aspect, size)):
        if plane is not None:
            raise UserError("outpainting needs no mask: leave it out")
        if rgb is not None:  # without one, `from_inputs` says that it is missing
            rgb, plane = extend(rgb, margins=margins, aspect=aspect, size=size)
    elif task == "ip" and plane is None and rgb is not None:
        raise UserError("task 'ip' needs a mask, or margins, aspect or size to extend the image by")
    return _fitted(task, prompt, data=data, size=own, image=rgb, mask=plane, face=face_rgb)


def _fitted(
    task: str,
    prompt: str,
    *,
    data: Data,
    size: Size,
    image: UInt8[np.ndarray, "h w 3"] | None,
    mask: UInt8[np.ndarray, "mask_h mask_w"] | None,
    face: UInt8[np.ndarray, "face_h face_w 3"] | None,
) -> Request:
    """The request with its pictures on the canvas of a shape that the model was trained on."""
    shapes = [shape.size for shape in BatchShape.buckets(data)]
    picture = size[::-1] if image is None else image.shape[:2]
    shape = BatchShape.of(data).size
    if image is not None or picture != shape:
        (k,) = buckets.nearest(shapes, *(np.array([side]) for side in picture))
        shape = shapes[k]
    letterbox = Letterbox(picture, shape)
    canvas, hole, hole_canvas = image, None, mask
    if image is not None:
        canvas = letterbox.place(image, around=TASKS[task].around)
        if mask is not None and "mask" in TASKS[task].inputs:
            hole = lay_on(mask, image)
            if not hole.any():
                raise UserError("the mask has no white pixel: nothing to generate")
            hole_canvas = letterbox.place_hole(hole)
    example = TASKS[task].from_inputs(
        prompt=prompt, image=canvas, mask=hole_canvas, face=face, resolution=shape
    )
    return Request(
        task=task,
        example=example,
        letterbox=letterbox,
        image=None if hole is None else image,
        hole=hole,
    )


def read_input(
    name: str, given: Picture | None, *, label: str = ""
) -> UInt8[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w"] | None:
    """What a user gives as one of INPUTS: RGB, or of a mask 1 where it is white; None for None.

    Raises UserError, where `label` (`name` without one) says which input cannot be read.
    """
    if given is None:
        return None
    try:
        return (to_mask if name == "mask" else to_rgb)(open_any(given))
    except UserError as error:
        where = label or name
        if isinstance(given, str | os.PathLike):
            path = os.fspath(given)
            where += f"={path if len(path) <= 200 else quote(path, most=200)}"
        raise type(error)(f"{where} {error}") from None


def each_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each picture, where those of a call are lists, or stand for every picture.

    Raises UserError for lists of different lengths.
    """
    lists = {name: values for name, values in given.items() if _is_list(name, values)}
    count = len(next(iter(lists.values()))) if lists else 1
    if any(len(values) != count for values in lists.values()):
        lengths = ", ".join(f"{name} {len(values)}" for name, values in lists.items())
        raise UserError(f"lists of different lengths: {lengths}")
    return [{k: v[i] if k in lists else v for k, v in given.items()} for i in range(count)]


def _is_list(name: str, values: object) -> bool:
    if not isinstance(values, list | tuple):
        return False
    if name != "boxes":
        return True
    # The boxes of one picture are a list of pairs, too, and begin with a name.
    is_pairs = [isinstance(v, list | tuple) and len(v) and isinstance(v[0], str) for v in values]
    return bool(is_pairs) and not any(is_pairs)


def check_text(name: str, text: object) -> str:
    """The text. Raises UserError for what is none, and for half a character of UTF-16."""
    found = fields.read(str, text, name)
    try:
        found.encode()
    except UnicodeEncodeError as error:
        wrong = quote(found[error.start])
        raise UserError(f"{name}={quote(found)}: {wrong} is no character") from None
    return found


def check_size(name: str, size: object) -> Size:
    """(width, height) of a picture to make. Raises UserError for what is none, or too large."""
    found = fields.read(tuple[int, int], size, name, fields.Rule(least=1))
    if found[0] * found[1] > WHOLE_PIXELS:
        raise UserError(
            f"{name}={found[0]}x{found[1]}: expected at most {WHOLE_PIXELS / 2**20:.0f} x 2^20 "
            "pixels"
        )
    return found


def extend(
    image: UInt8[np.ndarray, "h w 3"],
    *,
    margins: Margins | None = None,
    aspect: float | int | str | None = None,
    size: Size | None = None,
) -> tuple[UInt8[np.ndarray, "h2 w2 3"], UInt8[np.ndarray, "h2 w2"]]:
    """The picture on a larger canvas, and the mask of what is new there.

    By `margins`, or in the middle of the `size`, or of the smallest canvas of the `aspect` (width
    to height, such as 1.5 or "3:2"). Raises UserError if not one of them is given, or nothing is
    new.
    """
    height, width = image.shape[:2]
    if sum(value is not None for value in (margins, aspect, size)) != 1:
        raise UserError("outpainting needs one of margins, aspect and size")
    if margins is not None:
        each = (margins,) * 4 if isinstance(margins, int) else margins
        rule = fields.Rule(least=0)
        left, top, right, bottom = fields.read(tuple[int, int, int, int], each, "margins", rule)
    else:
        if aspect is not None:
            ratio = _ratio(aspect)
            wide, high = max(width, round(height * ratio)), max(height, round(width / ratio))
        else:
            wide, high = check_size("size", size)
        if wide < width or high < height:
            raise UserError(
                f"size={wide}x{high}: the picture has {width}x{height} pixels, "
                "and outpainting only adds to it"
            )
        left, top = (wide - width) // 2, (high - height) // 2
        right, bottom = wide - width - left, high - height - top
    if not any((left, top, right, bottom)):
        raise UserError("the picture has this shape already: nothing to generate")
    check_size("the extended picture", (width + left + right, height + top + bottom))
    margin = ((top, bottom), (left, right))
    mask = np.pad(np.zeros((height, width), np.uint8), margin, constant_values=1)
    return np.pad(image, (*margin, (0, 0)), mode="edge"), mask


def _ratio(aspect: float | int | str) -> float:
    """Width to height. Raises UserError for what is none, or beyond 100:1."""
    found: Any = aspect
    if isinstance(aspect, str) and (match := re.fullmatch(r"([\d.]+)[:/x]([\d.]+)", aspect)):
        try:
            found = float(match[1]) / float(match[2])
        except (ValueError, ZeroDivisionError):
            found = aspect
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0.01 <= found <= 100:
        raise UserError(f"aspect={quote(aspect)}: expected width to height, such as 1.5 or '3:2'")
    return float(found)


def sampling_options(
    config: Config,
    task: str,
    *,
    guidance: float | int | None = None,
    image_guidance: float | int | None = None,
    steps: int | None = None,
    solver: str | None = None,
    negative_prompt: str | Sequence[str] = "",
) -> dict[str, Any]:
    """The `sampling` settings that options of `Pipeline.run` replace; raises what it raises."""
    has_text, has_image = TASKS[task].prompt != "none", "image" in TASKS[task].inputs
    takes = {"guidance": has_text, "negative_prompt": has_text, "image_guidance": has_image}
    given = {
        "guidance": guidance,
        "negative_prompt": negative_prompt or None,
        "image_guidance": image_guidance,
        "steps": steps,
        "solver": solver,
    }
    found = {}
    for name, value in given.items():
        if value is not None and not takes.get(name, True):
            raise UnsupportedError(f"task {task!r} takes no {name}")
        if value is not None and name in _SETTINGS:
            field = _SETTINGS[name]
            found[name] = fields.read(field.type, value, name, fields.rule_of(field))
    scales = {SCALES[name]: found.pop(name) for name in SCALES if name in found}
    stored = config.to_dict()["sampling"]["guidance"]
    made = fields.make(Guidance, {**stored.get(task, {}), **scales}, f"task {task!r}")
    if scales:
        found["guidance"] = {**stored, task: dataclasses.asdict(made)}
    if negative_prompt and made.text in (None, 1) and made.image in (None, 1):
        raise UserError(
            f"task {task!r} is sampled with guidance={made.text}, so a negative prompt changes "
            "nothing: give another guidance, too"
        )
    return found


def check_seeds(seeds: Sequence[object]) -> list[int]:
    """The seeds. Raises UserError for what is none."""
    return [fields.read(int, seed, "seed", fields.Rule(least=0, most=MAX_SEED)) for seed in seeds]
