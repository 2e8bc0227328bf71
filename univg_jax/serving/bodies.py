"""A request's bytes to its model of the schema, and its pictures; each fault is one line."""

from typing import TypeVar

import numpy as np
import pydantic
from fastapi import HTTPException, Request
from jaxtyping import UInt8
from PIL import Image
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile

from univg_jax import images
from univg_jax.errors import UserError, quote, suggestion
from univg_jax.serving.schema import MAX_TEXT, Body

Known = TypeVar("Known", bound=Body)
KINDS = ("application/json", "multipart/form-data")


class FieldError(UserError):
    """A field of a request that cannot be used."""

    def __init__(self, message: str, *, field: str | None):
        super().__init__(message)
        self.field = field


async def read_body(request: Request, model: type[Known]) -> Known:
    """The body as `model`. Raises FieldError, and HTTPException for another media type."""
    header = request.headers.get("content-type", "")
    kind = header.partition(";")[0].strip().lower()
    charset = parse_options_header(header)[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise HTTPException(415, f"content-type: charset {quote(charset)}: expected utf-8")
    if kind not in KINDS:
        raise HTTPException(415, f"content-type {quote(kind)}: expected {' or '.join(KINDS)}")
    try:
        if kind == KINDS[0]:
            return model.model_validate_json(await request.body(), strict=True)
        # Fields of text have at most four bytes a character, those of boxes some more.
        async with request.form(max_files=8, max_fields=64, max_part_size=8 * MAX_TEXT) as form:
            return model.model_validate(await _fields(form, model))
    except pydantic.ValidationError as error:
        raise _in_one_line(error, model) from None


async def _fields(form: FormData, model: type[Body]) -> dict[str, str | bytes]:
    """A form's fields: files for pictures, text for all else."""
    found: dict[str, str | bytes] = {}
    for name, value in form.multi_items():
        name = name.removesuffix("[]")  # how OpenAI's client names the items of a list
        if name in found:
            raise FieldError(f"{quote(name)} is there twice", field=name)
        if isinstance(value, UploadFile):
            if name in model.model_fields and name not in model.pictures:
                raise FieldError(f"{name}: expected text, not a file", field=name)
            value = await value.read()
        found[name] = value
    return found


def _in_one_line(error: pydantic.ValidationError, model: type[Body]) -> FieldError:
    """One fault of a body, a wrong name before all others, and how many others there are."""
    faults = error.errors(include_url=False, include_context=False)
    first = min(faults, key=lambda fault: fault["type"] != "extra_forbidden")
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    where = f"{quote(path, most=100)[1:-1]}: " if path else ""
    if first["type"] == "extra_forbidden":
        message = "no such field"
        if len(first["loc"]) == 1:
            message += suggestion(path, model.model_fields)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return FieldError(f"{where}{message}{more}", field=path.partition(".")[0][:100] or None)


def open_picture(name: str, data: bytes, *, max_pixels: int) -> Image.Image:
    """The picture of a field. Raises FieldError for what is none, or has too many pixels."""
    try:
        height, width = images.size_of(data)
        if height * width > max_pixels:
            raise UserError(f"has {width} x {height} pixels: expected at most {max_pixels}")
        return images.open_picture(data)
    except UserError as error:
        raise FieldError(f"{name} {error}", field=name) from None


def transparent_hole(mask: Image.Image) -> Image.Image | UInt8[np.ndarray, "h w"]:
    """OpenAI's mask, transparent where to generate, as ours. One without transparency is ours."""
    if "A" in mask.getbands() or "transparency" in mask.info:
        alpha = np.asarray(mask.convert("RGBA").getchannel("A"))
        if alpha.min() < 128:
            return np.where(alpha < 128, 255, 0).astype(np.uint8)
    return mask
