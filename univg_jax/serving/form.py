"""What a visitor of the page asks for: checked like settings, and written as a link."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from data_pipelines.tasks import TASKS
from univg_jax import fields
from univg_jax.errors import UserError, check_name
from univg_jax.fields import setting
from univg_jax.settings import MAX_SEED, SOLVERS

MAX_STEPS = 200
MAX_GUIDANCE = 30.0
MAX_SIDE = 2048  # of a picture, in pixels
MAX_MARGIN = 200  # in percent
SIDES = ("left", "top", "right", "bottom")
MAX_TEXT = 2000  # characters of a prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
    """A block of a layout: what stands in it, and where, in fractions of the picture."""

    name: str = setting("", "a phrase of the prompt")
    left: float = setting(0.0, "", least=0, most=1)
    top: float = setting(0.0, "", least=0, most=1)
    right: float = setting(1.0, "", least=0, most=1)
    bottom: float = setting(1.0, "", least=0, most=1)

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """One picture to make. What is None, or is not given, is the model's default.

    Pictures are names in a `Store`.
    """

    task: str = setting(help="one of TASKS", names=tuple(TASKS))
    prompt: str = setting("", "what the task's prompt says")
    negative_prompt: str = setting("", "what to avoid")
    image: str = setting("", "the picture")
    mask: str = setting("", "white where the picture is made anew")
    margins: tuple[int, int, int, int] = setting(
        (0, 0, 0, 0),
        "left, top, right, bottom: what is added to the picture, in percent of its sides",
        least=0,
        most=MAX_MARGIN,
    )
    face: str = setting("", "a picture of the person")
    boxes: tuple[Box, ...] = setting((), "the layout")
    width: int | None = setting(None, "of the answer", least=8, most=MAX_SIDE)
    height: int | None = setting(None, "of the answer", least=8, most=MAX_SIDE)
    guidance: float | None = setting(None, "scale of the text", least=0, most=MAX_GUIDANCE)
    image_guidance: float | None = setting(None, "of the picture", least=0, most=MAX_GUIDANCE)
    steps: int | None = setting(None, "of the solver", least=1, most=MAX_STEPS)
    solver: str | None = setting(None, "of the flow", names=SOLVERS)
    seed: int = setting(0, "of the noise", least=0, most=MAX_SEED)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Form":
        """The form with these values. Raises UserError for what cannot be."""
        form = fields.make(cls, values, "")
        for name in values:
            check_name(name, form.taken(), what=f"input of task {form.task!r}:")
        for name in ("prompt", "negative_prompt"):
            if (length := len(getattr(form, name))) > MAX_TEXT:
                raise UserError(f"{name} has {length} characters: expected at most {MAX_TEXT}")
        return form

    @classmethod
    def of_query(cls, query: Mapping[str, str]) -> "Form":
        """The form of a link's query. Raises UserError for what cannot be."""
        known = {field.name: field for field in fields.settings_of(cls)}
        for name in query:
            check_name(name, known, what="setting in the link:")
        texts = ("task", "prompt", "negative_prompt", "image", "mask", "face", "solver")
        return cls.of(
            {name: value if name in texts else _parse(value) for name, value in query.items()}
        )

    def taken(self) -> tuple[str, ...]:
        """The fields that the task takes."""
        return fields_of(self.task)

    def query(self) -> str:
        """The query of a link to this form."""
        values = {}
        for field in fields.settings_of(Form):
            value = getattr(self, field.name)
            if value != fields.default_of(field):
                is_text = isinstance(value, str)
                values[field.name] = value if is_text else json.dumps(_plain(value))
        return urlencode(values)


def fields_of(name: str) -> tuple[str, ...]:
    """The fields of a form that a task takes, in the order of the class."""
    task = TASKS[name]
    is_layout = name == "lg"
    has_picture = "image" in task.inputs and not is_layout
    taken = {
        **dict.fromkeys(("task", "steps", "solver", "seed"), True),
        **dict.fromkeys(("prompt", "negative_prompt", "guidance"), task.prompt != "none"),
        "image": has_picture,
        "mask": "mask" in task.inputs,
        "margins": "mask" in task.inputs,
        "face": "face" in task.inputs,
        "boxes": is_layout,
        **dict.fromkeys(("width", "height"), not has_picture),
        "image_guidance": "image" in task.inputs and task.prompt != "none",
    }
    return tuple(field.name for field in dataclasses.fields(Form) if taken[field.name])


def _parse(text: str) -> Any:
    """What JSON says, or the text itself, of which a setting's rule then says what is wrong."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _plain(value: object) -> object:
    """As JSON has it."""
    if isinstance(value, Box):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
