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
from collections.abc import Iterator, Sequence

from jax._src.lib import tpu as tpu_dialect  # no public module has it
from jax._src.lib.mlir import ir

from univg_jax.planning.parse import Shape

_BODY = re.compile(r'"body":"([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Window:
    """A window's size, and on which dimensions of the grid each coordinate of its place depends."""

    bounds: tuple[int, ...]
    depends: tuple[frozenset[int], ...]

    def fetched(self, array: Shape, grid: Sequence[int]) -> float:
        """Bytes that one run moves through it, between the array and the chip."""
        blocks = [-(-dim // bound) for dim, bound in zip(array.dims, self.bounds, strict=True)]
        # A coordinate of which there is one value does not move, whatever it is computed from.
        moved = [places for places, count in zip(self.depends, blocks) if count > 1]
        dimensions = [i for i in frozenset().union(*moved) if grid[i] > 1]
        times = math.prod(grid[: max(dimensions, default=-1) + 1])
        return times * dataclasses.replace(array, dims=self.bounds).stored_bytes


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
            depends = tuple(_depends(place, len(grid)))
            windows.append(Window(_numbers(entry["window_bounds"]), depends))
        prefetched = ir.IntegerAttr(main.attributes["scalar_prefetch"]).value
        return Kernel(grid, prefetched, tuple(windows))


def _numbers(attribute: ir.Attribute) -> tuple[int, ...]:
    return tuple(ir.DenseI64ArrayAttr(attribute))


def _depends(function: ir.Operation, dimensions: int) -> Iterator[frozenset[int]]:
    """For each result of a function of a step, the dimensions of the grid that it is computed of.

    What it loads from a table depends on where it loads.
    """
    (block,) = function.regions[0].blocks
    known = {
        argument: frozenset([i] if i < dimensions else [])
        for i, argument in enumerate(block.arguments)
    }
    *_, end = block.operations
    for operation in block.operations:
        of = frozenset().union(*(known[operand] for operand in operation.operands))
        known |= dict.fromkeys(operation.results, of)
    yield from (known[operand] for operand in end.operands)
