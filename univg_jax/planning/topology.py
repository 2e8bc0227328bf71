"""TPU slices by name: the devices that libtpu describes on a machine that has none."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from univg_jax import tpu
from univg_jax.errors import NotFoundError, UserError, check_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for: `v5p:4x4x4`, or `v6e:16x16*2` for two slices joined by DCN."""

    name: str
    chip: tpu.Chip
    slices: int
    devices: Sequence[jax.Device]


def num_chips(name: str) -> int:
    """How many chips `GENERATION:AxBxC*N` has; libtpu is not asked. Raises UserError."""
    _, shape, slices = _parse(name)
    return math.prod(int(side) for side in shape.split("x")) * slices


def open_topology(name: str) -> Topology:
    """The devices of `GENERATION:AxBxC`, or of N slices of them, `GENERATION:AxBxC*N`.

    Raises UserError for any other name, and where libtpu is not installed.
    """
    generation, shape, slices = _parse(name)
    chip = tpu.CHIPS[generation]
    tpu.silence_if_absent()
    options = {"chip_config_name": chip.libtpu_config} if chip.libtpu_config else {}
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise NotFoundError(
            "planning needs libtpu, the compiler: pip install 'univg_jax[tpu]' (Linux)"
        )
    try:
        described = topologies.get_topology_desc(
            f"{generation}:{shape}", platform="tpu", num_slices=slices, **options
        )
    except Exception as error:  # libtpu's class of errors differs by version
        message = str(error).splitlines()[0]
        raise UserError(f"libtpu knows no topology {name}: {message}") from None
    return Topology(name=name, chip=chip, slices=slices, devices=described.devices)


def _parse(name: str) -> tuple[str, str, int]:
    """The generation, the shape and the number of slices of a topology's name."""
    if (found := re.fullmatch(r"(\w+):(\d+(?:x\d+)+)(?:\*(\d+))?", name)) is None:
        raise UserError(
            f"topology {name!r} should read GENERATION:AxB or AxBxC, as v5p:4x4x4, "
            "with *N for N slices"
        )
    generation, shape, slices = found[1], found[2], int(found[3] or 1)
    chip = tpu.CHIPS[check_name(generation, tpu.CHIPS, what="TPU generation")]
    if len(shape.split("x")) != chip.sides:
        sides = "AxBxC"[: 2 * chip.sides - 1]
        raise UserError(
            f"topology {name!r}: a slice of {generation} is {sides}; "
            f"N slices are {generation}:{sides}*N"
        )
    return generation, shape, slices
