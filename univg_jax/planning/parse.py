"""HLO text as objects: a module's computations, their instructions, and how often each runs.

HLO is the language of XLA's programs. A module is a list of computations, and a computation a list
of instructions. One computation is the entry. The others are called by instructions: the body and
the condition of a loop, the branches of a conditional, the inside of a fusion.

    %layer.7 = bf16[16,384]{1,0:T(8,128)} dot(%x, %w), lhs_contracting_dims={1}, ...
     name      shape and layout           opcode operands  attributes
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bits of the types whose names do not tell them, as the names of bf16, s4 and f8e4m3 do.
_BITS = {"pred": 8, "token": 0, "opaque": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%(\S+) = ")
_OPCODE = re.compile(r" ?([a-z][a-z0-9-]*)\(")
_TILES = re.compile(r":T((?:\([\d,]+\))+)")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's type, and how it is stored."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def _bits(self) -> int:
        return _BITS[self.dtype] if self.dtype in _BITS else int(re.search(r"\d+", self.dtype)[0])

    @property
    def bytes(self) -> float:
        """The array's size without padding; a fraction for types of less than a byte."""
        return math.prod(self.dims) * self._bits / 8

    @property
    def order(self) -> tuple[int, ...]:
        """The dimensions from the minor one, whose elements are neighbors, to the major one."""
        order, *_ = self.layout.strip("{}").split(":")
        return tuple(int(i) for i in order.split(",") if i) or tuple(range(len(self.dims))[::-1])

    @property
    def stored_bytes(self) -> float:
        """The array's size in memory, with the padding of its tiles.

        `{1,0:T(8,128)(2,1)}` lists dimensions from the minor one on, then tiles: the last
        dimensions are cut into pieces of 8 x 128, the last piece is filled up, and each piece is
        cut by the next tile in turn.
        """
        dims = [self.dims[i] for i in reversed(self.order)]
        tiles = _TILES.search(self.layout)
        for text in tiles[1].strip("()").split(")(") if tiles else ():
            tile = [int(n) for n in text.split(",")]
            dims = [1] * (len(tile) - len(dims)) + dims
            kept, cut = dims[: -len(tile)], dims[-len(tile) :]
            dims = kept + [-(-dim // size) for dim, size in zip(cut, tile)] + tile
        return math.prod(dims) * self._bits / 8

    @property
    def in_hbm(self) -> bool:
        """Whether it is in HBM: layouts name other memories, S(1) on the chip, S(5) the host's."""
        return "S(" not in self.layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result: several for a tuple, nested ones flattened
    operands: tuple[str, ...]
    attributes: str  # the text after the operands
    value: int | None  # of an integer constant
    number: int | None  # of a parameter
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """The name of the computation that is called as `attribute`, such as `body` or `calls`."""
        found = re.search(rf"\b{attribute}=%([^\s,)}}]+)", self.attributes)
        return found[1] if found else None


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order of the text."""

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.values() if i.is_root)

    @functools.cached_property
    def _users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.values():
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users

    def users(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that have the result of one among their operands."""
        return self._users.get(instruction.name, [])

    def parameter(self, number: int) -> Instruction:
        """The parameter of that number."""
        parameters = (i for i in self.values() if i.opcode == "parameter")
        return next(i for i in parameters if i.number == number)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that compute the operands of one."""
        return [self[name] for name in instruction.operands if name in self]

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """The shapes of all operands, those of a tuple one after another."""
        return [shape for operand in self.operands(instruction) for shape in operand.shapes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """An instruction, and how often one run of the program executes it where it stands."""

    instruction: Instruction
    computation: Computation
    times: int
    fused: bool  # inside a fusion, where results stay on the chip


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and which of them is the entry."""

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def executions(self) -> tuple[Execution, ...]:
        """Every instruction that runs, once for each call of its computation.

        Raises ValueError for a loop whose trip count is not constant.
        """
        return tuple(self._walk(self.entry, times=1, fused=False))

    def _walk(self, name: str, *, times: int, fused: bool) -> Iterator[Execution]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Execution(
                instruction=instruction, computation=computation, times=times, fused=fused
            )
        for instruction in computation.values():
            if instruction.opcode == "while":
                trips = self._trips(instruction, computation)
                yield from self._walk(instruction.called("body"), times=times * trips, fused=fused)
            elif instruction.opcode in ("fusion", "call", "call-start", "async-start"):
                inner = instruction.called("calls") or instruction.called("to_apply")
                inside = fused or instruction.opcode == "fusion"
                yield from self._walk(inner, times=times, fused=inside)
            elif instruction.opcode == "conditional":
                # All branches count: which one runs is not known before the program does.
                for branch in re.findall(r"%([^\s,}]+)", instruction.attributes.split("}")[0]):
                    if branch in self.computations:
                        yield from self._walk(branch, times=times, fused=fused)

    def _trips(self, loop: Instruction, computation: Computation) -> int:
        """How often a loop runs: the bound of its counter, less the counter's first value.

        `lax.scan` and `fori_loop` become `while (i < n)`, where i grows by 1 and n is a constant
        inside the condition. Only some backends print the trip count itself, so it is read off
        that comparison. A TPU's compiler often puts the comparison into a fusion, with the constant
        either inside it or among its operands: both places are searched. Exactly one constant must
        be found, since with two it would be a guess which one is the bound.
        """
        condition = self.computations[loop.called("condition")]
        for instruction in condition.values():
            is_fusion = instruction.opcode == "fusion"
            inner = self.computations[instruction.called("calls")] if is_fusion else Computation()
            is_less = any(
                i.opcode == "compare" and "direction=LT" in i.attributes
                for i in (instruction, *inner.values())
            )
            operands = condition.operands(instruction)
            bounds = [i.value for i in (*operands, *inner.values()) if i.value is not None]
            if is_less and len(bounds) == 1:
                counter = next(i for i in operands if i.value is None)
                return bounds[0] - self._initial(counter, loop, computation)
        raise ValueError(f"no constant trip count in HLO computation {loop.called('condition')}")

    def _initial(self, counter: Instruction, loop: Instruction, computation: Computation) -> int:
        """The value that a loop's counter begins with.

        It is not 0 where the compiler peeled iterations off, that is, wrote them out before the
        loop. The state of a loop is a tuple, and the counter is the element `index` of it: the
        element's value is sought where the tuple is made, behind copies, which the compiler adds
        to give the loop a buffer of its own. What is no constant there counts as 0.
        """
        index = re.search(r"index=(\d+)", counter.attributes)
        state = computation.get(loop.operands[0])
        if index is None or state is None or state.opcode != "tuple":
            return 0
        value = computation.get(state.operands[int(index[1])])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = computation.get(value.operands[0])
        return (value and value.value) or 0


def parse(text: str) -> Module:
    """The module that `compiled.as_text()` prints. Raises ValueError if it has no entry."""
    computations: dict[str, Computation] = {}
    current, entry = Computation(), None
    for line in _lines(text):
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], Computation())
            entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("no HLO module: no ENTRY computation")
    return Module(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """Headers and instructions; an attribute with line breaks does not end an instruction."""
    whole: list[str] = []
    for line in text.splitlines():
        if _COMPUTATION.match(line) or _INSTRUCTION.match(line) or line == "}":
            yield "\n".join(whole)
            whole = []
        whole.append(line)
    yield "\n".join(whole)


def _instruction(line: str) -> Instruction | None:
    if (head := _INSTRUCTION.match(line)) is None:
        return None
    text = line[head.end() :]
    # The shape of a tuple is in parentheses and may hold spaces; any other has none.
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    if (opcode := _OPCODE.match(text, end)) is None:
        return None
    close = _closing(text, opcode.end() - 1)
    arguments = text[opcode.end() : close - 1]
    is_integer = opcode[1] == "constant" and re.fullmatch(r"-?\d+", arguments)
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        shapes=tuple(
            Shape(dtype, tuple(int(d) for d in dims.split(",") if d), layout)
            for dtype, dims, layout in _SHAPE.findall(text[:end])
        ),
        operands=tuple(re.findall(r"%([^\s,)]+)", arguments)),
        attributes=text[close:],
        value=int(arguments) if is_integer else None,
        number=int(arguments) if opcode[1] == "parameter" else None,
        is_root=bool(head[1]),
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]}")
