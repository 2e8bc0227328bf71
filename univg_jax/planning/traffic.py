"""Bytes that a compiled program moves to and from a device's HBM, by part of the step and by cause.

    HBM    sum over instructions of (operands read + results written), those in HBM only

An array has the size that its tiles take in memory (`Shape.stored_bytes`). Inside a fusion nothing
is written to memory: only its own operands and results count, and of those only what it touches.
No instruction is charged more than its operands and results hold, but for Pallas kernels, which may
read an operand several times (`planning.kernels`).
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator

from univg_jax.planning import kernels
from univg_jax.planning.collectives import COLLECTIVES
from univg_jax.planning.parse import Computation, Execution, Instruction, Module, Shape

# The parts of a step by what the names of their instructions have in them: the first that matches.
# Names are paths of JAX transformations, Flax modules and primitives.
PARTS = {
    "collectives": r"all_gather|psum|reduce_scatter|all_to_all|ppermute",
    "attention": r"splash|flash|attention|attend|blocks?/transpose|blocks?/slice|blocks?/split"
    r"|blocks?/shard_map/(jit\(_)?pad|blocks?/concatenate",
    "norms": r"norm(?!al)",
    "modulations": r"modulat",
    "MLP": r"/mlp/",
    "projections": r"\.project/|attn_out",
    "gates": r"/gate/|\.update/|blocks?/(mul|add)",
    "residuals": r"backbone/(while|broadcast_in_dim)$|dynamic_(update_)?index_in_dim",
    "model, other": r"jvp\(",
    "optimizer": "",  # what is outside of the gradient, with the sum of micro-batches
}
CAUSES = ("read", "write", "copy", "transpose", "pad", "fill")

# These name memory or pass control; the bytes are moved by the instructions that they refer to.
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "while", "conditional", "call", "send", "recv", "opt-barrier",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
_SLICES_DONE = ("slice-done", "dynamic-slice-done")
_UPDATE = "dynamic-update-slice"
# What gives the same bytes another place, by its cause.
_MOVES = {
    "copy": "copy", "slice": "copy", "dynamic-slice": "copy", _UPDATE: "copy", "reshape": "copy",
    "transpose": "transpose", "pad": "pad", "concatenate": "pad", "broadcast": "fill",
}  # fmt: skip
# Computes nothing either.
_PASSES = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one part of a program moves for one cause."""

    part: str
    cause: str
    bytes: float


def by_part(module: Module, executions: Iterable[Execution] | None = None) -> tuple[Traffic, ...]:
    """What one run moves, or these of its instructions, the most bytes first."""
    totals: dict[tuple[str, str], float] = collections.defaultdict(float)
    for run in module.executions if executions is None else executions:
        if not run.fused:
            read, written = _moved(run.instruction, run.computation, module)
            if read or written:
                part = part_of(run.instruction, run.computation)
                cause = _cause(run.instruction, run.computation, module)
                totals[part, cause or "read"] += run.times * read
                totals[part, cause or "write"] += run.times * written
    found = [Traffic(part=p, cause=c, bytes=size) for (p, c), size in totals.items() if size]
    return tuple(sorted(found, key=lambda one: -one.bytes))


def _moved(
    instruction: Instruction, computation: Computation, module: Module
) -> tuple[float, float]:
    """Bytes that an instruction outside fusions reads and writes."""
    opcode = instruction.opcode
    operands = computation.operand_shapes(instruction)
    if opcode == "copy-start":  # (destination, source, context); one of them may be on the chip
        return _size(instruction.shapes[1]), _size(instruction.shapes[0])
    is_start = opcode.endswith("-start")
    if is_start and opcode.removesuffix("-start") in COLLECTIVES:
        # (operands, results, contexts), or the results alone
        count, shapes = len(operands), instruction.shapes
        results = shapes[count : 2 * count] if len(shapes) >= 2 * count else shapes
        return _sizes(operands), _sizes(results)
    if opcode in _SLICES_DONE:  # asynchronous: the slice is what its end gives
        source = computation.operand_shapes(computation.operands(instruction)[0])[:1]
        read = _whole(instruction.shapes) if all(shape.in_hbm for shape in source) else 0.0
        return read, _sizes(instruction.shapes)
    if opcode in (_UPDATE, f"{_UPDATE}-start"):
        # In place: the update is read and written, the rest of the array stays where it is.
        return _size(operands[1]), operands[1].stored_bytes if operands[0].in_hbm else 0.0
    if opcode in _NO_TRAFFIC or is_start or opcode.endswith("-done"):
        return 0.0, 0.0
    if opcode == "fusion":
        return _moved_by_fusion(instruction, module)
    if opcode == "custom-call":
        return _moved_by_kernel(instruction, operands)
    if opcode in _SLICES:
        size = _whole(instruction.shapes) if operands[0].in_hbm else 0.0
        return min(size, _size(operands[0])), _sizes(instruction.shapes)
    once = dataclasses.replace(instruction, operands=tuple(dict.fromkeys(instruction.operands)))
    return _sizes(computation.operand_shapes(once)), _sizes(instruction.shapes)


def _size(shape: Shape) -> float:
    return shape.stored_bytes if shape.in_hbm else 0.0


def _sizes(shapes: Iterable[Shape]) -> float:
    return sum(map(_size, shapes), 0.0)


def _whole(shapes: Iterable[Shape]) -> float:
    """The size of arrays, wherever they are."""
    return sum((shape.stored_bytes for shape in shapes), 0.0)


def _moved_by_kernel(instruction: Instruction, operands: list[Shape]) -> tuple[float, float]:
    if "AllocateBuffer" in instruction.attributes:  # memory that others will fill
        return 0.0, 0.0
    if (kernel := kernels.read_kernel(instruction.attributes)) is None:
        return _sizes(operands), _sizes(instruction.shapes)
    tables, arrays = operands[: kernel.prefetched], operands[kernel.prefetched :]
    moved = [
        window.fetched(array) if array.in_hbm else 0.0
        for window, array in zip(kernel.windows, [*arrays, *instruction.shapes], strict=True)
    ]
    return _sizes(tables) + sum(moved[: len(arrays)], 0.0), sum(moved[len(arrays) :], 0.0)


def _moved_by_fusion(instruction: Instruction, module: Module) -> tuple[float, float]:
    """What a fusion reads and writes.

    An asynchronous collective is a chain of fusions (`collectives`): its start is charged all of
    it, and each step only the work that it does beside it. They hand its arrays on to each other.
    """
    inner = module.computations[instruction.called("calls")]
    if instruction.name.startswith("async-collective-done"):
        return 0.0, 0.0
    if instruction.name.startswith("async-collective-start"):
        inside = [one for one in inner.values() if one.opcode in COLLECTIVES]
        read = sum((_sizes(inner.operand_shapes(one)) for one in inside), 0.0)
        return read, sum((_sizes(one.shapes) for one in inside), 0.0)
    results = list(zip(_results(inner), instruction.shapes, strict=True))
    if instruction.called("calls").startswith("async_collective_fusion"):
        handed_on = (*COLLECTIVES, "parameter")
        results = [(result, s) for result, s in results if result[0].opcode not in handed_on]
        inner = Computation(
            (name, one)
            for name, one in inner.items()
            if one.opcode not in COLLECTIVES and not (one.is_root and one.opcode == "tuple")
        )
    written = sum((_written(*result, shape, inner, module) for result, shape in results), 0.0)
    return _read_by_fusion(inner, module), written


def _read_by_fusion(inner: Computation, module: Module) -> float:
    """What a fusion reads of its operands, of which it may touch slices only.

    A scan over layers passes the stack of all layers to each iteration's fusion, which reads one
    layer of it. Counting the stack would count it as often as there are layers.
    """
    total = 0.0
    for parameter in inner.values():
        if parameter.opcode == "parameter" and (size := _sizes(parameter.shapes)):
            total += size * _touched(parameter, inner, module)
    return total


def _touched(
    value: Instruction, inner: Computation, module: Module, *, is_updated: bool = False
) -> float:
    """The share of an array that the instructions of a fused computation read, 1 for all of it.

    What only moves or converts elements passes the question on to those that use its result, and a
    fusion inside a fusion to its own parameter. So does an update in place, which does not read the
    array; nor does it where it is (`is_updated`) a result.
    """
    total = 0.0
    for user in inner.users(value):
        for position in (i for i, name in enumerate(user.operands) if name == value.name):
            if user.opcode in _SLICES and position == 0:
                total += _elements(user) / _elements(value)
            elif is_updated and user.is_root and user.opcode in ("tuple", "bitcast", "copy"):
                total += 0.0
            elif user.opcode == _UPDATE and position == 0:
                total += 0.0 if user.is_root else _touched(user, inner, module, is_updated=True)
            elif user.opcode in ("bitcast", "convert", "copy") and not user.is_root:
                total += _touched(user, inner, module, is_updated=is_updated)
            elif user.opcode == "fusion":
                nested = module.computations[user.called("calls")]
                total += _touched(nested.parameter(position), nested, module)
            else:
                return 1.0
    return min(total, 1.0)


def _elements(instruction: Instruction) -> int:
    return max(sum(math.prod(shape.dims) for shape in instruction.shapes), 1)


def _written(
    result: Instruction, index: int, shape: Shape, inner: Computation, module: Module
) -> float:
    """What a fusion writes of one of its results, which it may update in place."""
    share = min(_updated(result, index, inner, module) / max(math.prod(shape.dims), 1), 1.0)
    return share * _size(shape)


def _results(inner: Computation) -> list[tuple[Instruction, int]]:
    """The instruction that gives each result, and the number of the result among its own.

    One instruction may give several: a maximum and its place.
    """
    root = inner.root
    if root.opcode == "tuple":
        return [(operand, 0) for operand in inner.operands(root)]
    return [(root, index) for index in range(len(root.shapes))]


def _updated(result: Instruction, index: int, inner: Computation, module: Module) -> int:
    """How many elements of a result are written: those of updates in place, or all."""
    while result.opcode in ("bitcast", "copy") and result.operands[0] in inner:
        result = inner[result.operands[0]]
    if result.opcode == "get-tuple-element":
        index = int(re.search(r"index=(\d+)", result.attributes)[1])
        result = inner[result.operands[0]]
    if result.opcode == "fusion":
        nested = module.computations[result.called("calls")]
        return _updated(*_results(nested)[index], nested, module)
    if result.opcode == _UPDATE:
        array, update = inner.operands(result)[:2]
        while array.opcode == "bitcast":
            array = inner[array.operands[0]]
        if array.opcode == "parameter":
            return _elements(update)
        if array.opcode == _UPDATE:
            return min(_elements(update) + _updated(array, 0, inner, module), _elements(result))
    return _elements(result)


def part_of(instruction: Instruction, computation: Computation) -> str:
    """The part of the step that an instruction belongs to: by its name, or that of its operands.

    The compiler adds copies without a name. What is fetched to the chip belongs to what uses it.
    """
    is_start = instruction.name.startswith("async-collective-start")
    if is_start or instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return "collectives"
    is_transfer = instruction.opcode.endswith(("-start", "-done"))
    ways = [_sources(instruction, computation), _uses(instruction, computation)]
    if is_transfer and not instruction.shapes[0].in_hbm:
        ways.reverse()
    for one in itertools.chain(*ways):
        if name := re.search(r'op_name="([^"]*)"', one.attributes):
            return next(part for part, pattern in PARTS.items() if re.search(pattern, name[1]))
    return "no name"


def _sources(instruction: Instruction, computation: Computation) -> Iterator[Instruction]:
    """An instruction, and what its first operands are computed from, the nearest first."""
    while instruction is not None:
        yield instruction
        first = instruction.operands[:1]
        instruction = computation.get(first[0]) if first else None


def _uses(instruction: Instruction, computation: Computation) -> Iterator[Instruction]:
    """What uses an instruction, what uses that, and so on, the first of each, the nearest first."""
    while users := computation.users(instruction):
        instruction = users[0]
        yield instruction


def _cause(instruction: Instruction, computation: Computation, module: Module) -> str | None:
    """What an instruction moves bytes for, if it does nothing else with them."""
    if instruction.opcode == "copy-start":  # to or from the chip it is a read or a write
        return "copy" if all(shape.in_hbm for shape in instruction.shapes[:2]) else None
    if instruction.opcode == "fusion":
        inside = list(_inside(module.computations[instruction.called("calls")], module))
    else:
        inside = [instruction]
    causes = set()
    for one in inside:
        if one.opcode not in _PASSES:
            if one.opcode not in _MOVES:
                return None
            causes.add(_MOVES[one.opcode])
    for cause in ("transpose", "pad", "copy"):
        if cause in causes:
            if cause == "copy" and instruction.opcode == "copy":
                source = computation.operand_shapes(instruction)
                if source and source[0].order != instruction.shapes[0].order:
                    return "transpose"
            return cause
    return "fill" if causes else None


def _inside(inner: Computation, module: Module) -> Iterator[Instruction]:
    for instruction in inner.values():
        if instruction.opcode == "fusion":
            yield from _inside(module.computations[instruction.called("calls")], module)
        else:
            yield instruction
