"""What a client may ask for and what it gets: the models behind the OpenAPI schema.

A body is JSON, with pictures in base64, or a form (multipart), with pictures as files and all else
as text. Both are read by one model. An unknown field is an error.
"""

import base64
import binascii
import json
import re
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pydantic
from jaxtyping import Num
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from univg_jax.settings import MAX_SEED, SOLVERS

MAX_TEXT = 10_000  # characters
MAX_PICTURES = 10  # of one request
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
PICTURE = {"type": "string", "contentEncoding": "base64", "format": "picture"}


def _decode(value: object) -> object:
    """The bytes of base64, or of a data URL."""
    if not isinstance(value, str):
        return value
    _, _, text = value.rpartition(";base64,") if value.startswith("data:") else ("", "", value)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("expected a picture in base64") from None


def _from_text(value: object) -> object:
    """What a form's text says, where the field is a list."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("expected JSON") from None


def _read_size(text: str) -> str:
    if text != "auto" and not re.fullmatch(SIZE, text):
        raise ValueError("expected WIDTHxHEIGHT, such as 64x48")
    return text


def _one_of(**kinds: dict[str, Any]) -> pydantic.ConfigDict:
    """For readers of the schema: exactly one of these fields is given, and is such."""
    choices = [{"required": [name], "properties": {name: schema}} for name, schema in kinds.items()]
    return pydantic.ConfigDict(json_schema_extra={"oneOf": choices})


SIZE = "[1-9][0-9]{0,4}x[1-9][0-9]{0,4}"
RATIO = r"(0\.[0-9]{0,3}[1-9]|[1-9][0-9]{0,3}(\.[0-9]{1,4})?)"
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Prompt = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Picture = Annotated[bytes, BeforeValidator(_decode), WithJsonSchema(PICTURE)]
Scale = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Size = Annotated[
    str,
    AfterValidator(_read_size),
    WithJsonSchema({"type": "string", "pattern": f"^(auto|{SIZE})$"}),
]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Corners = Annotated[list[Fraction], Field(min_length=4, max_length=4)]
Pixels = Annotated[int, Field(ge=0, le=10_000)]
Margins = Annotated[list[Pixels], Field(min_length=4, max_length=4)]


class Body(pydantic.BaseModel):
    """What every request may say."""

    model_config = pydantic.ConfigDict(extra="forbid", hide_input_in_errors=True)
    pictures: ClassVar[tuple[str, ...]] = ()  # the fields that are files of a form

    n: int = Field(1, ge=1, le=MAX_PICTURES, description="pictures, with seeds from `seed` on")
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED - MAX_PICTURES, description="of the noise; by default a random one"
    )
    steps: int | None = Field(None, ge=1, le=10_000, description="of the solver; the server's")
    solver: Literal[SOLVERS] | None = Field(None, description="of the flow; the server's")
    output_format: Literal[tuple(FORMATS)] = "png"

    def options(self) -> dict[str, Any]:
        """Those of `Pipeline.with_options`."""
        names = ("guidance", "image_guidance", "steps", "solver", "negative_prompt")
        given = {name: getattr(self, name, None) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def inputs(self) -> dict[str, Any]:
        """Those of `inputs.make_request`."""
        names = ("prompt", "image", "mask", "face", "margins", "aspect", "size", "boxes")
        given = {name: getattr(self, name, None) for name in names}
        if given["size"] is not None:
            sides = given["size"].split("x")
            given["size"] = None if sides == ["auto"] else (int(sides[0]), int(sides[1]))
        if isinstance(given["margins"], list):
            given["margins"] = tuple(given["margins"])
        if given["boxes"] is not None:
            given["boxes"] = [(box.name, tuple(box.corners)) for box in given["boxes"]]
        return {name: value for name, value in given.items() if value is not None}


class Guided(Body):
    """What a request with a text may say."""

    guidance: Scale | None = Field(None, description="scale of the text; the checkpoint's")
    negative_prompt: Text | None = Field(None, description="what guidance leads away from")


class Generate(Guided):
    """Text to image."""

    prompt: Prompt = Field(examples=["a pig on grass"])
    size: Size | None = Field(None, description="WIDTHxHEIGHT; the model's square")


class Edit(Guided):
    """The image changed as the prompt says; the answer has its size."""

    pictures = ("image",)
    image: Picture
    prompt: Prompt = Field(examples=["remove the pig"])
    image_guidance: Scale | None = Field(None, description="scale of the image")


class Inpaint(Guided):
    """The image with what is white in the mask made anew. Without a prompt: background."""

    pictures = ("image", "mask")
    image: Picture
    mask: Picture = Field(description="white where to generate, of the image's shape")
    prompt: Text = Field("", examples=["a pig on grass"])
    image_guidance: Scale | None = Field(None, description="scale of the image")


class Outpaint(Guided):
    """The image on a larger canvas, by one of margins, aspect and size."""

    model_config = _one_of(
        margins={"type": "array"},
        aspect={"type": "string"},
        size={"type": "string", "pattern": f"^{SIZE}$"},
    )
    pictures = ("image",)
    image: Picture
    prompt: Text = Field("", examples=["a pig on grass"])
    margins: Annotated[Margins | None, BeforeValidator(_from_text)] = Field(
        None, description="left, top, right and bottom, in pixels"
    )
    aspect: Annotated[str, Field(pattern=f"^{RATIO}:{RATIO}$")] | None = Field(
        None, description="width to height, such as 3:2"
    )
    size: Size | None = Field(None, description="WIDTHxHEIGHT, with the image in the middle")
    image_guidance: Scale | None = Field(None, description="scale of the image")

    @pydantic.model_validator(mode="after")
    def _is_one(self) -> "Outpaint":
        given = (self.margins, self.aspect, None if self.size == "auto" else self.size)
        if sum(value is not None for value in given) != 1:
            raise ValueError("outpainting needs one of margins, aspect and size")
        return self


class Box(pydantic.BaseModel):
    """Where something of the prompt stands."""

    model_config = pydantic.ConfigDict(extra="forbid", hide_input_in_errors=True)
    name: Prompt = Field(description="a phrase of the prompt")
    corners: Corners = Field(description="left, top, right and bottom, in fractions of the picture")


Boxes = Annotated[list[Box], Field(min_length=1, max_length=64)]


class Layout(Guided):
    """A picture laid out as a canvas of colored blocks, or as boxes."""

    model_config = _one_of(image={"type": "string"}, boxes={"type": "array"})
    pictures = ("image",)
    prompt: Prompt = Field(examples=["a pig (red block) on grass"])
    image: Picture | None = Field(None, description="the canvas of blocks")
    boxes: Annotated[Boxes | None, BeforeValidator(_from_text)] = Field(
        None, description="instead of the canvas"
    )
    size: Size | None = Field(None, description="WIDTHxHEIGHT, with boxes")
    image_guidance: Scale | None = Field(None, description="scale of the canvas")

    @pydantic.model_validator(mode="after")
    def _is_one(self) -> "Layout":
        if (self.image is None) == (self.boxes is None):
            raise ValueError("a layout needs an image or boxes")
        return self


class Depth(Body):
    """The depth of the image: near is bright. The answer is float32 in meters."""

    pictures = ("image",)
    image: Picture


class Pose(Depth):
    """The skeleton in the image. The answer is COCO's 17 joints: x, y in fractions, confidence."""


class Segment(Guided):
    """The mask of what the prompt refers to. The answer is uint8, 1 where the mask is."""

    pictures = ("image",)
    image: Picture
    prompt: Prompt = Field(examples=["the pig"])
    image_guidance: Scale | None = Field(None, description="scale of the image")


class Identity(Guided):
    """A picture of the person with this face, who is <p> in the prompt."""

    pictures = ("face",)
    face: Picture
    # The pattern is for readers of the schema: what is said of a prompt without it is clearer.
    prompt: Prompt = Field(examples=["a portrait of <p>"], json_schema_extra={"pattern": "<p>"})
    size: Size | None = Field(None, description="WIDTHxHEIGHT; the model's square")


# Routes by the names of the pipeline's methods, and the tasks that they are of.
ROUTES: dict[str, tuple[str, type[Body]]] = {
    "generate": ("t2i", Generate),
    "edit": ("ie", Edit),
    "inpaint": ("ip", Inpaint),
    "outpaint": ("ip", Outpaint),
    "layout": ("lg", Layout),
    "depth": ("depth", Depth),
    "pose": ("pose", Pose),
    "segment": ("seg", Segment),
    "identity": ("id", Identity),
}


class _OpenAI(Guided):
    """Fields of OpenAI's API that have one meaning here, and ours beside them."""

    prompt: Prompt = Field(examples=["a pig on grass"])
    size: Size | None = Field(None, description="WIDTHxHEIGHT, or auto")
    model: str | None = Field(None, description="a name of /v1/models")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="base64; url: a data URL, since the server keeps no files"
    )
    background: Literal["auto", "opaque"] | None = None
    quality: Literal["auto"] | None = None
    moderation: Literal["auto"] | None = None
    stream: Literal[False] | None = None
    user: Text | None = Field(None, description="not used")


class OpenAIGeneration(_OpenAI):
    """OpenAI's `images.generate`: text to image."""


class OpenAIEdit(_OpenAI):
    """OpenAI's `images.edit`: editing, or with a mask inpainting of what is transparent in it."""

    pictures = ("image", "mask")
    image: Picture
    mask: Picture | None = Field(
        None, description="transparent where to generate; without transparency, white there"
    )
    image_guidance: Scale | None = Field(None, description="scale of the image")


class Array(pydantic.BaseModel):
    """An array: `np.frombuffer(base64.b64decode(data), dtype).reshape(shape)`."""

    dtype: str = Field(description="NumPy's name, little-endian")
    shape: list[int]
    data: str = Field(description="base64, the last axis fastest")

    @classmethod
    def of(cls, array: Num[np.ndarray, "..."]) -> "Array":
        """The array as it travels."""
        array = array.astype(array.dtype.newbyteorder("<"))
        data = base64.b64encode(array.tobytes()).decode()
        return cls(dtype=array.dtype.name, shape=list(array.shape), data=data)


class Image(pydantic.BaseModel):
    """One picture."""

    b64_json: str | None = Field(description="the file, in base64")
    url: str | None = Field(description="instead, if response_format=url: the file as a data URL")
    seed: int
    prompt: str = Field(description="as the model got it, without the task's tag")
    size: str
    answer: Array | None = Field(None, description="what the picture of a dense task says")


class Answer(pydantic.BaseModel):
    """The answer to a request: OpenAI's, and what is needed to make the pictures again."""

    created: int = Field(description="seconds since 1970")
    data: list[Image]
    output_format: Literal[tuple(FORMATS)]
    task: str
    settings: dict[str, Any] = Field(description="of the sampling, and the checkpoint")


class Problem(pydantic.BaseModel):
    """What is wrong."""

    message: str = Field(description="one line")
    type: str
    param: str | None = Field(description="the field that is meant, if it is one")
    code: str | None


class Refusal(pydantic.BaseModel):
    """The answer to what cannot be answered."""

    error: Problem


class State(pydantic.BaseModel):
    """Of the server."""

    status: str


class Model(pydantic.BaseModel):
    """A model as OpenAI's API lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "univg_jax"
    tasks: list[str]


class Models(pydantic.BaseModel):
    """The models of a server: one."""

    object: Literal["list"] = "list"
    data: list[Model]


def form_schema(body: type[Body], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a form, from that of JSON: pictures are files."""
    file = {"type": "string", "format": "binary"}
    properties = dict(schema["properties"])
    for name in body.pictures:
        about = {k: v for k, v in properties[name].items() if k == "description"}
        properties[name] = file | about
    return {**schema, "title": f"{schema['title']}Form", "properties": properties}
