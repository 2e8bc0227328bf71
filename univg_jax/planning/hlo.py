"""What one run of a compiled program does on a device, counted from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once and knows nothing of Pallas kernels. Here
an instruction counts as often as it runs (`planning.parse`). FLOPs are counted in this file, bytes
in
`planning.traffic` and `planning.collectives`.
"""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from univg_jax.planning.collectives import Collective, collectives
from univg_jax.planning.parse import Computation, Instruction, Module, Shape, parse
from univg_jax.planning.traffic import Traffic, by_part

# Products of queries x keys x head in the kernels of attention, splash's and ours: those that
# contract the head, and those that contract queries or keys. Forwards there are q k^T and p v.
# Backwards the scores are computed again (q k^T), then dp = do v^T and dv, dk and dq where one
# kernel has all; splash's dq may have a kernel of its own.
_KERNEL_PRODUCTS = {
    "splash_mha_fwd": (1, 1), "splash_mha_dkv": (2, 3), "splash_mha_dq": (2, 1),
    "flash_forward": (1, 1), "flash_backward": (2, 3),
}  # fmt: skip
_COMPUTED = re.compile(r"blocks_(\d+)_of_(\d+)")


def computed_blocks(number: int, *, of: int) -> contextlib.AbstractContextManager[None]:
    """A scope for attention kernels that skip blocks of their mask, as causal ones do.

    Which blocks a kernel skips is in a constant that the text of a program leaves out, so the
    scope's name says how many it computes. Its bytes are still those of all blocks.
    """
    return jax.named_scope(f"blocks_{number}_of_{of}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What one run of a program does on one device."""

    flops: float  # of matrix products, convolutions and attention kernels; 2 per multiply-add
    unit_flops: float  # what the matrix unit could do in the time that it is busy with these
    traffic: tuple[Traffic, ...]  # to and from HBM
    collectives: tuple[Collective, ...]

    @property
    def memory_bytes(self) -> float:
        """What it moves to and from HBM in all."""
        return sum((one.bytes for one in self.traffic), 0.0)


def count(text: str, *, unit: int = 128) -> Counts:
    """Counts what `compiled.as_text()` prints; the device's matrix unit has `unit` x `unit` cells.

    Raises ValueError for a text without an entry computation, and for a loop whose trip count is
    not constant.
    """
    module = parse(text)
    found = list(products(module))
    return Counts(
        flops=sum((one.flops for one in found), 0.0),
        unit_flops=sum((one.unit_flops(unit) for one in found), 0.0),
        traffic=by_part(module),
        collectives=collectives(module),
    )


@dataclasses.dataclass(frozen=True)
class Product:
    """`count` products of matrices, [rows, depth] by [depth, columns]."""

    count: int | float
    rows: int | float
    depth: int | float
    columns: int | float

    @property
    def flops(self) -> float:
        """2 per multiply-add."""
        return 2.0 * self.count * self.rows * self.depth * self.columns

    def unit_flops(self, unit: int) -> float:
        """What a matrix unit of `unit` x `unit` cells could do in the time that it is busy.

        It holds a matrix of [depth, narrower side of the result] in pieces of its own size, while
        the rows of the other one stream through. A product with heads of 64 fills half of a unit
        of 128.
        """
        held, streamed = sorted((self.rows, self.columns))
        whole = math.ceil(self.depth / unit) * math.ceil(held / unit) * unit**2
        return 2.0 * self.count * streamed * whole


def products(module: Module) -> Iterator[Product]:
    """The matrix products, convolutions and attention kernels of one run.

    Elementwise operations are left out, as in MFU.
    """
    for run in module.executions:
        for one in _products(run.instruction, run.computation):
            yield dataclasses.replace(one, count=run.times * one.count)


def _products(instruction: Instruction, computation: Computation) -> Iterator[Product]:
    if instruction.opcode == "dot":
        yield _dot(instruction, *computation.operand_shapes(instruction))
    elif instruction.opcode == "convolution":
        yield _convolution(instruction, *computation.operand_shapes(instruction))
    elif instruction.opcode == "custom-call":
        yield from _kernel_products(instruction, computation)


def _dot(instruction: Instruction, left: Shape, right: Shape) -> Product:
    def size(shape: Shape, name: str) -> int:
        found = re.search(rf"{name}_dims=\{{([\d,]*)\}}", instruction.attributes)
        return math.prod(shape.dims[int(i)] for i in found[1].split(",") if i) if found else 1

    depth, count = size(left, "lhs_contracting"), size(left, "lhs_batch")
    rows, columns = (math.prod(x.dims) / (depth * count) for x in (left, right))
    return Product(count, rows, depth, columns)


def _kernel_products(instruction: Instruction, computation: Computation) -> Iterator[Product]:
    """Those of kernels of attention, the only Pallas kernels with products that programs have."""
    kernel = re.search("|".join(_KERNEL_PRODUCTS), instruction.name)
    if kernel is None:
        return
    over_head, over_tokens = _KERNEL_PRODUCTS[kernel[0]]
    shapes = computation.operand_shapes(instruction)
    sizes = _splash_sizes if kernel[0].startswith("splash") else _flash_sizes
    computed = _COMPUTED.search(instruction.attributes)
    share = int(computed[1]) / int(computed[2]) if computed else 1
    for count, queries, head, keys in sizes(shapes):
        count *= share
        yield Product(over_head * count, queries, head, keys)
        # Its depth is the queries in the gradients of keys and values; both are whole blocks.
        yield Product(over_tokens * count, queries, keys, head)


def _splash_sizes(shapes: Sequence[Shape]) -> Iterator[tuple[int, int, int, int]]:
    """(products, queries, head, keys) by the operands of a kernel."""
    # Before q and k there may be integers: which blocks of the mask are to be computed.
    arrays = [shape for shape in shapes if shape.dtype in ("bf16", "f32")]
    if len(arrays) > 1:
        (*heads, queries, head), keys = arrays[0].dims, arrays[1].dims[-2]
        yield math.prod(heads), queries, head, keys


def _flash_sizes(shapes: Sequence[Shape]) -> Iterator[tuple[int, int, int, int]]:
    """The same, of each stream that has queries: see `models.flash`."""
    (_, head), (rows, n, width) = shapes[0].dims, shapes[2].dims
    m, operands = shapes[4].dims[1], shapes[6:]
    queries = [n, m] if any(shape.dims == (rows, m, width) for shape in operands) else [n]
    for size in queries:
        yield rows * width // head, size, head, n + m


def _convolution(instruction: Instruction, left: Shape, right: Shape) -> Product:
    """Features in x features out, for each pair of an input and an output position of a tap.

    The pairs must be counted one by one, not as outputs x taps. On a TPU a batched product of
    matrices is written as a convolution whose spatial dimension is the batch: padding and dilation
    are such that of the many taps only one meets an input, and the others meet padding or the
    zeros between dilated inputs. Output position o and tap k read position

        p = o stride - pad + k rhs_dilate

    of the dilated input, which holds an input where p is in it and divides by lhs_dilate.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    left_labels, right_labels, out_labels = labels.groups()
    out = instruction.shapes[0]
    # window={size=3x3 stride=1x1 ...}: fields that are left out have defaults.
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=(\S+)", found[1])) if found else {}
    spatial = sum(label.isdigit() for label in right_labels)

    def numbers(name: str, default: str) -> list[list[int]]:
        """A field of the window for each spatial dimension: `1x2` or, for padding, `0_0x1_1`."""
        fields = window[name].split("x") if name in window else [default] * spatial
        return [[int(n) for n in field.split("_")] for field in fields]

    strides, pads = numbers("stride", "1"), numbers("pad", "0_0")
    lhs_dilates, rhs_dilates = numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1")
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    count, rows = 1.0, out.dims[out_labels.index("b")]
    depth = right.dims[right_labels.index("i")] / (int(groups[1]) if groups else 1)
    for i in range(spatial):
        length = left.dims[left_labels.index(str(i))]
        taps = right.dims[right_labels.index(str(i))]
        outputs = out.dims[out_labels.index(str(i))]
        (stride,), (pad, _) = strides[i], pads[i]
        (lhs_dilate,), (rhs_dilate,) = lhs_dilates[i], rhs_dilates[i]
        at = np.arange(outputs)[:, None] * stride - pad + np.arange(taps)[None] * rhs_dilate
        inside = (at >= 0) & (at <= (length - 1) * lhs_dilate)
        joined = int((inside & (at % lhs_dilate == 0)).sum())
        if taps > 1 and joined == outputs:  # a product for each position
            count *= outputs
        else:
            rows, depth = rows * outputs, depth * joined / outputs
    return Product(count, rows, depth, out.dims[out_labels.index("f")])
