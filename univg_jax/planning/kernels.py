"""What a Pallas kernel reads and writes, by the block specs in its compiled program.

A kernel runs over a grid, the last dimension innermost, and has a window into each array. Before a
step of the grid it fetches the windows whose place has changed, and it writes a window of a result
back when it has left it:

    bytes = size of the window x steps at which its place changes

So splash attention reads keys and values once for each block of queries. The custom call of a
kernel holds its program in MLIR; windows, grid and the functions from a step to a window's place
are attributes of that.
"""

import base64
import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np
from jax._src.lib import tpu as tpu_dialect  # no public module has it
from jax._src.lib.mlir import ir
from jaxtyping import Int

from univg_jax.planning.parse import Shape

_BODY = re.compile(r'"body":"([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Window:
    """A window's size, and its place at each step of the grid, in windows along each dimension."""

    bounds: tuple[int, ...]
    places: Int[np.ndarray, "steps dims"]

    def fetched(self, array: Shape) -> float:
        """Bytes that one run moves through it, between the array and the chip."""
        pairs = zip(array.dims, self.bounds, strict=True)
        blocks = np.array([-(-dim // bound) for dim, bound in pairs])
        # A coordinate of which there is one value does not move, whatever it is computed from.
        places = self.places[:, blocks > 1]
        times = 1 + np.any(places[1:] != places[:-1], axis=1).sum()
        return float(times) * dataclasses.replace(array, dims=self.bounds).stored_bytes


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The grid of a kernel, and a window for each operand and result after the first few.

    `prefetched` operands come before those with windows: small tables, which are read once.
    """

    grid: tuple[int, ...]
    prefetched: int
    windows: tuple[Window, ...]


@functools.lru_cache(maxsize=256)
def read_kernel(attributes: str) -> Kernel | None:
    """The kernel of a custom call with these attributes; None if it is none, or has no grid."""
    if (body := _BODY.search(attributes)) is None:
        return None
    with ir.Context() as context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        tpu_dialect.register_dialect(context)
        module = ir.Module.parse(base64.b64decode(body[1]))
        functions = {
            ir.StringAttr(op.operation.attributes["sym_name"]).value: op.operation
            for op in module.body.operations
        }
        main = next((f for f in functions.values() if "iteration_bounds" in f.attributes), None)
        if main is None or "window_params" not in main.attributes:
            return None
        grid = _numbers(main.attributes["iteration_bounds"])
        windows = []
        for entry in ir.ArrayAttr(main.attributes["window_params"]):
            entry = ir.DictAttr(entry)
            place = functions[ir.FlatSymbolRefAttr(entry["transform_indices"]).value]
            windows.append(Window(_numbers(entry["window_bounds"]), _places(place, grid)))
        prefetched = ir.IntegerAttr(main.attributes["scalar_prefetch"]).value
        return Kernel(grid, prefetched, tuple(windows))


def _numbers(attribute: ir.Attribute) -> tuple[int, ...]:
    return tuple(ir.DenseI64ArrayAttr(attribute))


# What functions from a step to a place compute with. Steps and places are not negative.
_ARITHMETIC = {
    "arith.addi": np.add, "arith.subi": np.subtract, "arith.muli": np.multiply,
    "arith.minsi": np.minimum, "arith.maxsi": np.maximum, "arith.divsi": np.floor_divide,
    "arith.remsi": np.remainder, "arith.index_cast": np.array, "arith.extsi": np.array,
}  # fmt: skip


def _places(function: ir.Operation, grid: Sequence[int]) -> Int[np.ndarray, "steps dims"]:
    """What a function of a step gives for each step of the grid, in their order.

    What it loads from a table is not known. It gets a number for each place that it is loaded from:
    then it changes when that does. So does the result of any other operation.
    """
    steps = np.indices(grid).reshape(len(grid), math.prod(grid))
    same = np.zeros(steps.shape[1], int)
    (block,) = function.regions[0].blocks
    known = dict(zip(block.arguments, [*steps, *[same] * (len(block.arguments) - len(grid))]))
    *operations, end = block.operations
    for operation in operations:
        name = operation.operation.name.removeprefix("stable_mosaic.")
        operands = [known[operand] for operand in operation.operands]
        if name == "arith.constant":
            found = same + ir.IntegerAttr(operation.attributes["value"]).value
        elif name in _ARITHMETIC:
            found = _ARITHMETIC[name](*operands)
        else:
            _, found = np.unique([same, *operands], axis=1, return_inverse=True)
        known |= dict.fromkeys(operation.results, found.reshape(-1))
    return np.stack([known[operand] for operand in end.operands], axis=1)
