"""What a compiled program does, counted from its HLO text: FLOPs, bytes of memory, bytes of
collectives.

XLA's own `cost_analysis` counts the body of a loop once and knows nothing of Pallas kernels. Here a
computation counts as often as it runs: a `while` multiplies its body by the trip count of its
condition. All counts are of one device.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = 2**31  # the span of what goes over the data center network
BITS = {
    "pred": 8,
    "bf16": 16,
    "f16": 16,
    "f32": 32,
    "f64": 64,
    "s4": 4,
    "u4": 4,
    "token": 0,
    "opaque": 0,
}

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%(\S+) = ")
_OPCODE = re.compile(r" ?([a-z][a-z0-9-]*)\(")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "conditional", "call", "send", "recv",
}  # fmt: skip
# from HBM into the chip's memory, or within HBM
_COPIES = {"copy-done", "slice-done", "dynamic-slice-done"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over groups of one size and stride: how many run, and their
    bytes.

    `bytes` is the whole array's: what an all-gather makes, what an all-reduce or a reduce-scatter
    takes.
    """

    kind: str
    group: int  # devices; 0 of a permute
    span: int  # how far apart the numbers of a group's devices are
    count: int
    bytes: float

    @property
    def wire_bytes(self) -> float:
        """What a device receives, at best: (n-1)/n of the array, twice that for an all-reduce."""
        once = self.bytes * (self.group - 1) / self.group if self.group else self.bytes
        return 2 * once if self.kind == "all-reduce" else once

    def crosses(self, size: int) -> bool:
        """Whether it leaves slices of so many devices, numbered one after another."""
        return self.span >= size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Of one run of a program on one device."""

    flops: float  # of matrix products, convolutions and attention kernels; 2 per multiply-add
    memory_bytes: float  # to and from HBM
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Shape:
    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def bytes(self) -> float:
        # f8e4m3 is 8
        bits = BITS[self.dtype] if self.dtype in BITS else int(re.search(r"\d+", self.dtype)[0])
        return math.prod(self.dims) * bits / 8

    @property
    def in_hbm(self) -> bool:
        return "S(" not in self.layout  # other memory spaces are on the chip, or the host's


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shapes: tuple[_Shape, ...]  # of the result, a tuple's parts one after another
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def calls(self, attribute: str) -> str | None:
        found = re.search(rf"\b{attribute}=%([^\s,)}}]+)", self.attributes)
        return found[1] if found else None


def count(text: str) -> Counts:
    """Counts of what `compiled.as_text()` prints. Raises ValueError for a loop whose trip count is
    not constant.
    """
    return _Counter(text).counts()


def _shapes(text: str) -> tuple[_Shape, ...]:
    return tuple(
        _Shape(dtype, tuple(int(d) for d in dims.split(",") if d), layout or "")
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]}")


def _parse(line: str) -> _Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    close = _closing(rest, opcode.end() - 1)
    operands = tuple(re.findall(r"%([^\s,)]+)", rest[opcode.end() : close - 1]))
    return _Instruction(
        head[2], opcode[1], _shapes(rest[:end]), operands, rest[close:], bool(head[1])
    )


class _Counter:
    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.constants: dict[str, int] = {}
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                current = self.computations.setdefault(header[2], {})
                if header[1]:
                    self.entry = header[2]
            elif instruction := _parse(line):
                current[instruction.name] = instruction
                if instruction.opcode == "constant" and (
                    value := re.search(r"constant\((-?\d+)\)", line)
                ):
                    self.constants[instruction.name] = int(value[1])
        if not hasattr(self, "entry"):
            raise ValueError("no HLO module: no ENTRY computation")

    def counts(self) -> Counts:
        flops = memory = 0.0
        collectives: dict[tuple[str, int, int], list[float]] = collections.defaultdict(
            lambda: [0, 0.0]
        )
        for computation, times, fused in self._walk(self.entry, 1, fused=False):
            for instruction in self.computations[computation].values():
                flops += times * self._flops(instruction, computation)
                if not fused:
                    memory += times * self._memory(instruction, computation)
                    for *key, size in self._collectives(instruction, computation):
                        collectives[tuple(key)][0] += times
                        collectives[tuple(key)][1] += times * size
        return Counts(
            flops=flops,
            memory_bytes=memory,
            collectives=tuple(
                Collective(kind=kind, group=group, span=span, count=int(n), bytes=size)
                for (kind, group, span), (n, size) in sorted(
                    collectives.items(), key=lambda item: -item[1][1]
                )
            ),
        )

    def _walk(self, name: str, times: int, *, fused: bool) -> Iterator[tuple[str, int, bool]]:
        """Every computation that runs from `name` on, how often, and whether inside a fusion."""
        yield name, times, fused
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                trips = self._trips(instruction, name)
                yield from self._walk(instruction.calls("body"), times * trips, fused=fused)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                inner = instruction.calls("calls") or instruction.calls("to_apply")
                yield from self._walk(inner, times, fused=fused or instruction.opcode == "fusion")
            elif instruction.opcode == "conditional":
                for branch in re.findall(r"%([^\s,}]+)", instruction.attributes.split("}")[0]):
                    if branch in self.computations:
                        yield from self._walk(branch, times, fused=fused)

    def _trips(self, loop: _Instruction, computation: str) -> int:
        """How often a counter in steps of 1 goes from its first value to the constant that it is
        compared with.
        """
        condition = self.computations[loop.calls("condition")]
        for instruction in condition.values():
            inner = (
                self.computations[instruction.calls("calls")]
                if instruction.opcode == "fusion"
                else {}
            )
            is_less = any(
                "direction=LT" in i.attributes
                for i in (instruction, *inner.values())
                if i.opcode == "compare"
            )
            bounds = [
                self.constants[name]
                for name in (*instruction.operands, *inner)
                if name in self.constants
            ]
            if is_less and len(bounds) == 1:
                counter = next(o for o in instruction.operands if o not in self.constants)
                return bounds[0] - self._initial(condition.get(counter), loop, computation)
        raise ValueError(f"no constant trip count in HLO computation {loop.calls('condition')}")

    def _initial(self, counter: _Instruction | None, loop: _Instruction, computation: str) -> int:
        """The constant that a loop's counter begins with: not 0 where iterations were peeled off."""
        index = re.search(r"index=(\d+)", counter.attributes) if counter is not None else None
        known = self.computations[computation]
        state = known.get(loop.operands[0])
        if index is None or state is None or state.opcode != "tuple":
            return 0
        name = state.operands[int(index[1])]
        while (
            name not in self.constants
            and name in known
            and known[name].opcode in ("copy", "bitcast")
        ):
            name = known[name].operands[0]
        return self.constants.get(name, 0)

    def _operand_shapes(
        self, instruction: _Instruction, computation: str
    ) -> list[tuple[_Shape, ...]]:
        known = self.computations[computation]
        return [known[name].shapes for name in instruction.operands if name in known]

    def _flops(self, instruction: _Instruction, computation: str) -> float:
        if instruction.opcode == "dot":
            left = self._operand_shapes(instruction, computation)[0][0]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
            depth = math.prod(left.dims[int(i)] for i in contracted.split(",") if i)
            return 2.0 * math.prod(instruction.shapes[0].dims) * depth
        if instruction.opcode == "convolution":
            left, right = (shapes[0] for shapes in self._operand_shapes(instruction, computation))
            return _convolution_flops(instruction, left, right)
        if instruction.opcode == "custom-call":
            return self._kernel_flops(instruction, computation)
        return 0.0

    def _kernel_flops(self, instruction: _Instruction, computation: str) -> float:
        """Splash attention: two products of queries x keys x head forwards, five backwards (scores
        are made again).
        """
        found = re.match(r"splash_mha_(fwd|dkv|dq)", instruction.name)
        arrays = [
            s[0]
            for s in self._operand_shapes(instruction, computation)
            if s and s[0].dtype in ("bf16", "f32")
        ]
        if found is None or len(arrays) < 2:
            return 0.0
        q, k = arrays[:2]
        products = {"fwd": 2, "dkv": 5, "dq": 3}[found[1]]
        return 2.0 * products * math.prod(q.dims) * k.dims[-2]

    def _memory(self, instruction: _Instruction, computation: str) -> float:
        """Bytes that an instruction outside fusions reads and writes; a slice of an array counts as
        the slice.
        """
        if instruction.opcode in _COPIES:
            return sum(
                (shape.bytes * (2 if shape.in_hbm else 1) for shape in instruction.shapes), 0.0
            )
        if instruction.opcode in _NO_TRAFFIC or instruction.opcode.endswith(("-start", "-done")):
            return 0.0
        written = sum((shape.bytes for shape in instruction.shapes if shape.in_hbm), 0.0)
        if instruction.opcode == "fusion":
            return self._fusion_memory(instruction)
        operands = self._operand_shapes(instruction, computation)
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * written
        if instruction.opcode == "dynamic-update-slice":
            return 2 * sum((shape.bytes for shape in operands[1] if shape.in_hbm), 0.0)
        return written + sum(shape.bytes for shapes in operands for shape in shapes if shape.in_hbm)

    def _fusion_memory(self, fusion: _Instruction) -> float:
        inner = self.computations[fusion.calls("calls")]
        users: dict[str, list[_Instruction]] = collections.defaultdict(list)
        for instruction in inner.values():
            for name in instruction.operands:
                users[name].append(instruction)
        total = 0.0
        for parameter in inner.values():
            if parameter.opcode != "parameter" or not all(
                shape.in_hbm for shape in parameter.shapes
            ):
                continue
            reads = users[parameter.name]
            if reads and all(self._is_part(reader, parameter.name) for reader in reads):
                total += sum(r.shapes[0].bytes for r in reads if r.opcode != "dynamic-update-slice")
            else:
                total += sum(shape.bytes for shape in parameter.shapes)
        root = next(i for i in inner.values() if i.is_root)
        parts = (
            [inner[name] for name in root.operands if name in inner]
            if root.opcode == "tuple"
            else [root]
        )
        for part, shape in zip(parts, fusion.shapes):
            if not shape.in_hbm:
                continue
            if part.opcode == "dynamic-update-slice" and part.operands[1] in inner:
                total += 2 * inner[part.operands[1]].shapes[0].bytes
            else:
                total += shape.bytes
        return total

    @staticmethod
    def _is_part(reader: _Instruction, name: str) -> bool:
        return reader.operands[:1] == (name,) and reader.opcode in (
            "dynamic-slice", "slice", "gather", "dynamic-update-slice",
        )  # fmt: skip

    def _collectives(
        self, instruction: _Instruction, computation: str
    ) -> Iterator[tuple[str, int, int, float]]:
        """(kind, size of a group, its span, bytes) of what an instruction outside fusions
        communicates.

        TPU programs wrap collectives into fusions: a reduce-scatter as an all-reduce with its
        slice; an asynchronous one as a start, steps that share time with other work, and a done, of
        which the start counts. Between slices the host sends.
        """
        if instruction.opcode == "fusion":
            called = instruction.calls("calls")
            if called.startswith("async_collective_fusion") or instruction.name.startswith(
                "async-collective-done"
            ):
                return
            for inner in self.computations[called].values():
                for kind, *rest in self._collectives(inner, called):
                    scattered = kind == "all-reduce" and "all-reduce-scatter" in called
                    yield "reduce-scatter" if scattered else kind, *rest
            return
        if instruction.opcode == "send" and (
            slices := re.search(r'megascale_target="\{([\d,]+)\}', instruction.attributes)
        ):
            kind = (
                re.search(r'megascale_transfer_type="(\w+)"', instruction.attributes)[1]
                .lower()
                .replace("_", "-")
            )
            yield kind, len(slices[1].split(",")), BETWEEN_SLICES, instruction.shapes[0].bytes
            return
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return
        operands = sum(
            s.bytes for shapes in self._operand_shapes(instruction, computation) for s in shapes
        )
        group = _group(instruction.attributes)
        yield (
            kind,
            len(group),
            max(group, default=0) - min(group, default=0),
            operands * max(len(group) if kind == "all-gather" else 1, 1),
        )


def _group(attributes: str) -> list[int]:
    """The devices of a collective's first group; empty for the pairs of a permute."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(n) for n in listed[1].split(",")]
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        grid = np.arange(math.prod(int(n) for n in sizes.values())).reshape(
            [int(n) for n in sizes.values()]
        )
        chosen = re.findall(r"'(\w+)'", mesh[2])
        return grid[tuple(slice(None) if axis in chosen else 0 for axis in sizes)].ravel().tolist()
    if iota := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
    ):
        dims = [int(n) for n in iota[3].split(",")]
        grid = np.arange(math.prod(dims)).reshape(dims)
        if iota[4]:
            grid = grid.transpose([int(n) for n in iota[4].split(",")])
        return grid.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    return []


def _convolution_flops(instruction: _Instruction, left: _Shape, right: _Shape) -> float:
    """2 x (pairs of input and output that a tap joins). Batched products of matrices are
    convolutions on a TPU.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    out = instruction.shapes[0]

    def numbers(name: str, default: str) -> list[list[int]]:
        spatial = sum(c.isdigit() for c in labels[2])
        text = fields.get(name) or "x".join([default] * spatial)
        return [[int(n) for n in part.split("_")] for part in text.split("x")] if spatial else []

    joined = 1
    for i, (stride, pad, lhs_dilate, rhs_dilate) in enumerate(
        zip(
            numbers("stride", "1"),
            numbers("pad", "0_0"),
            numbers("lhs_dilate", "1"),
            numbers("rhs_dilate", "1"),
        )
    ):
        digit = str(i)
        length, taps = left.dims[labels[1].index(digit)], right.dims[labels[2].index(digit)]
        outputs = out.dims[labels[3].index(digit)]
        at = (
            np.arange(outputs)[:, None] * stride[0] - pad[0] + np.arange(taps)[None] * rhs_dilate[0]
        )
        joined *= int(
            ((at % lhs_dilate[0] == 0) & (at >= 0) & (at < (length - 1) * lhs_dilate[0] + 1)).sum()
        )
    features = out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return (
        2.0
        * joined
        * features
        * right.dims[labels[2].index("i")]
        / (int(groups[1]) if groups else 1)
    )
