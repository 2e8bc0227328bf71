"""Bytes that a compiled program moves between devices.

wire   (n - 1) / n of each array that a group of n devices gathers or scatters,
       twice that for an all-reduce, which does both
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from univg_jax.planning.parse import Computation, Instruction, Module

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# The span of a transfer over the data center network: more than any slice has devices.
BETWEEN_SLICES = 2**31


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
