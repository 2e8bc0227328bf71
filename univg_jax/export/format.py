"""What a format is: how a folder of it is written, and how it is read back to be compared.

A format is one module of `export/formats/` with a `FORMAT`. The command knows nothing else of it.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtyping import UInt8
from numpy import ndarray

from univg_jax.errors import check_name
from univg_jax.export import formats
from univg_jax.export.compare import Case
from univg_jax.export.job import Job

# Answers cases, each with its picture.
Answer = Callable[[Sequence[Case]], Sequence[UInt8[ndarray, "h w 3"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """A format.

    `check(job)` raises UserError for a run that it does not serve; only files' headers are read.
    `num_bytes(job)` is about what it writes. `write(job, folder)` writes its files into an empty
    local folder, tensor by tensor. `reload(job, folder)` opens what was written as its users do,
    where the library at hand can, else by what the same files say; its pictures may differ by
    `tolerance` levels of 255 from those of the `Pipeline`, because of `tolerance_reason`.
    `limits(job)` are sentences for the model card: what the format cannot express. `usage(job)` is
    code that makes a picture, in Python, and `opened_by` are its readers. `holds_encoders`: the
    weights of pretrained encoders are in the folder whether or not they are to be copied.
    """

    title: str
    opened_by: str
    write: Callable[[Job, Path], None]
    reload: Callable[[Job, Path], Answer]
    usage: Callable[[Job], str]
    num_bytes: Callable[[Job], int]
    check: Callable[[Job], None] = lambda job: None
    limits: Callable[[Job], Sequence[str]] = lambda job: ()
    holds_encoders: bool = False
    dtypes: tuple[str, ...] = ("f32", "bf16")
    tolerance: int = 1
    tolerance_reason: str = "a device may sum in another order when the program is compiled again"


def open_format(name: str) -> Format:
    """The format of that name. Raises UserError with the nearest one."""
    check_name(name, formats.FORMATS, what="format")
    return importlib.import_module(f"{formats.__name__}.{name}").FORMAT
