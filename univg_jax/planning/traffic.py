"""Bytes that a compiled program moves: to and from a device's HBM, and between devices.

    HBM    sum over instructions of (operands read + results written), those in HBM only
    wire   (n - 1) / n of each array that a group of n devices gathers or scatters,
           twice that for an all-reduce, which does both

Inside a fusion nothing is written to memory: only its own operands and results count.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from univg_jax.planning.parse import Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# The span of a transfer over the data center network: more than any slice has devices.
BETWEEN_SLICES = 2**31

# These name memory or pass control; the bytes are moved by the instructions that they refer to.
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "while", "conditional", "call", "send", "recv",
}  # fmt: skip
# The ends of asynchronous copies, from HBM to memory on the chip or within HBM.
_COPIES = {"copy-done", "slice-done", "dynamic-slice-done"}
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over groups of one size and span: their number and bytes.

    `bytes` is the size of the whole array: what an all-gather makes, what an all-reduce or a
    reduce-scatter takes.
    """

    kind: str
    group: int  # devices; 0 for a permute, which has pairs instead of groups
    span: int  # largest minus smallest device number of a group
    count: int
    bytes: float

    @property
    def wire_bytes(self) -> float:
        """What a device receives at least: (n-1)/n of the array, twice that for an all-reduce."""
        once = self.bytes * (self.group - 1) / self.group if self.group else self.bytes
        return 2 * once if self.kind == "all-reduce" else once

    def crosses(self, size: int) -> bool:
        """Whether it leaves slices of `size` devices; devices are numbered slice by slice."""
        return self.span >= size


def hbm_bytes(module: Module) -> float:
    """Bytes that one run reads from a device's HBM and writes to it."""
    return sum(
        run.times * _instruction_bytes(run.instruction, run.computation, module)
        for run in module.executions
        if not run.fused
    )


def collectives(module: Module) -> tuple[Collective, ...]:
    """What one run communicates, the most bytes first."""
    totals: dict[tuple[str, int, int], Collective] = {}
    for run in module.executions:
        if not run.fused:
            for one in _collectives(run.instruction, run.computation, module):
                key = (one.kind, one.group, one.span)
                total = totals.get(key, dataclasses.replace(one, count=0, bytes=0.0))
                count, size = total.count + run.times, total.bytes + run.times * one.bytes
                totals[key] = dataclasses.replace(one, count=count, bytes=size)
    return tuple(sorted(totals.values(), key=lambda collective: -collective.bytes))


def _instruction_bytes(instruction: Instruction, computation: Computation, module: Module) -> float:
    """What an instruction outside fusions reads and writes; a slice counts as the slice alone."""
    opcode = instruction.opcode
    if opcode in _COPIES:
        return sum((s.bytes * (2 if s.in_hbm else 1) for s in instruction.shapes), 0.0)
    if opcode in _NO_TRAFFIC or opcode.endswith(("-start", "-done")):
        return 0.0
    if opcode == "fusion":
        return _fusion_bytes(instruction, module.computations[instruction.called("calls")])
    written = sum((s.bytes for s in instruction.shapes if s.in_hbm), 0.0)
    if opcode in _SLICES:
        return 2 * written
    operands = computation.operand_shapes(instruction)
    if opcode == "dynamic-update-slice":
        # In place: the update is read and written, the rest of the array stays where it is.
        return 2 * operands[1].bytes if operands[1].in_hbm else 0.0
    return written + sum(s.bytes for s in operands if s.in_hbm)


def _fusion_bytes(fusion: Instruction, inner: Computation) -> float:
    """What a fusion reads and writes: parameters and results, of which it may touch slices only.

    A scan over layers passes the stack of all layers to each iteration's fusion, which reads one
    layer of it. Counting the stack would count it as often as there are layers.
    """
    readers: dict[str, list[Instruction]] = collections.defaultdict(list)
    for instruction in inner.values():
        for name in instruction.operands:
            readers[name].append(instruction)
    total = 0.0
    for parameter in inner.values():
        if parameter.opcode != "parameter" or not all(s.in_hbm for s in parameter.shapes):
            continue
        users = readers[parameter.name]
        if users and all(_touches_slice(user, parameter.name) for user in users):
            # An update in place does not read the array; what it writes counts as a result below.
            total += sum(u.shapes[0].bytes for u in users if u.opcode != "dynamic-update-slice")
        else:
            total += sum(s.bytes for s in parameter.shapes)
    root = next(i for i in inner.values() if i.is_root)
    results = inner.operands(root) if root.opcode == "tuple" else [root]
    for result, shape in zip(results, fusion.shapes):
        if shape.in_hbm:
            is_update = result.opcode == "dynamic-update-slice" and result.operands[1] in inner
            total += 2 * inner[result.operands[1]].shapes[0].bytes if is_update else shape.bytes
    return total


def _touches_slice(user: Instruction, name: str) -> bool:
    is_array = user.operands[:1] == (name,)  # not one of the indices
    return is_array and user.opcode in (*_SLICES, "dynamic-update-slice")


def _collectives(
    instruction: Instruction, computation: Computation, module: Module
) -> Iterator[Collective]:
    """What an instruction outside fusions communicates, each with a count of 1.

    TPU programs wrap collectives into fusions. A reduce-scatter is an all-reduce fused with the
    slice of its result. An asynchronous collective is a chain of three kinds of fusions: its start,
    steps that share time with other work, and its end. All of them contain the collective, so only
    the start counts. Between slices there are no collectives: the host sends, and the instruction
    says what for.
    """
    if instruction.opcode == "fusion":
        called = instruction.called("calls")
        is_step = called.startswith("async_collective_fusion")
        if is_step or instruction.name.startswith("async-collective-done"):
            return
        inner = module.computations[called]
        for inside in inner.values():
            for one in _collectives(inside, inner, module):
                is_scatter = one.kind == "all-reduce" and "all-reduce-scatter" in called
                yield dataclasses.replace(one, kind="reduce-scatter") if is_scatter else one
    elif instruction.opcode == "send":
        yield from _send(instruction)
    elif (kind := instruction.opcode.removesuffix("-start")) in COLLECTIVES:
        group = replica_group(instruction.attributes)
        size = sum(s.bytes for s in computation.operand_shapes(instruction))
        # Operands are a device's own: of an all-gather a part of the array, else the whole.
        whole = size * max(len(group), 1) if kind == "all-gather" else size
        span = max(group, default=0) - min(group, default=0)
        yield Collective(kind=kind, group=len(group), span=span, count=1, bytes=whole)


def _send(instruction: Instruction) -> Iterator[Collective]:
    if slices := re.search(r'megascale_target="\{([\d,]+)\}', instruction.attributes):
        kind = re.search(r'megascale_transfer_type="(\w+)"', instruction.attributes)[1]
        kind, group = kind.lower().replace("_", "-"), len(_numbers(slices[1]))
        size = instruction.shapes[0].bytes
        yield Collective(kind=kind, group=group, span=BETWEEN_SLICES, count=1, bytes=size)


def replica_group(attributes: str) -> list[int]:
    """The devices of a collective's first group; empty for the pairs of a permute.

    XLA writes groups in three ways; these three are the same, two groups of four devices:

        replica_groups={{0,2,4,6},{1,3,5,7}}
        replica_groups=[2,4]<=[4,2]T(1,0)
        replica_groups=mesh['data'=4,'fsdp'=2] {'data'}

    The second is an iota: number the devices 0, 1, ... in an array of shape [4,2], transpose its
    axes by (1,0) if there is a T, and reshape to [2,4]: each row is a group. The third names the
    axes of the mesh over which a group extends.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return _numbers(listed[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        chosen = re.findall(r"'(\w+)'", mesh[2])
        first = tuple(slice(None) if axis in chosen else 0 for axis in sizes)
        return _iota(list(sizes.values()))[first].ravel().tolist()
    iota = r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(iota, attributes):
        grid = _iota(_numbers(found[3])).transpose(_numbers(found[4]) if found[4] else None)
        return grid.reshape(int(found[1]), int(found[2]))[0].tolist()
    return []


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(shape: list[int]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)
