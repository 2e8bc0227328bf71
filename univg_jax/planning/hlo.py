"""What one run of a compiled program does on a device, counted from its HLO text.

XLA's own `cost_analysis` counts the body of a loop once and knows nothing of Pallas kernels. Here
an instruction counts as often as it runs (`planning.parse`). FLOPs are counted in this file, bytes
in `planning.traffic`.
"""

import dataclasses
import math
import re

import numpy as np

from univg_jax.planning import traffic
from univg_jax.planning.parse import Computation, Instruction, Module, Shape, parse

# Products of queries x keys x head in the kernels of splash attention. Forwards there are two,
# q k^T and p v. Backwards the scores are computed again (q k^T), then dp = do v^T and dv, dk and dq
# where they are fused into one kernel (dkv); dq has a kernel of its own otherwise.
_SPLASH_PRODUCTS = {"fwd": 2, "dkv": 5, "dq": 3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What one run of a program does on one device."""

    flops: float  # of matrix products, convolutions and attention kernels; 2 per multiply-add
    memory_bytes: float  # to and from HBM
    collectives: tuple[traffic.Collective, ...]


def count(text: str) -> Counts:
    """Counts what `compiled.as_text()` prints.

    Raises ValueError for a text without an entry computation, and for a loop whose trip count is
    not constant.
    """
    module = parse(text)
    return Counts(
        flops=flops(module),
        memory_bytes=traffic.hbm_bytes(module),
        collectives=traffic.collectives(module),
    )


def flops(module: Module) -> float:
    """FLOPs of one run; 2 per multiply-add. Elementwise operations are left out, as in MFU."""
    return sum(
        run.times * _instruction_flops(run.instruction, run.computation)
        for run in module.executions
    )


def _instruction_flops(instruction: Instruction, computation: Computation) -> float:
    if instruction.opcode == "dot":
        left = computation.operand_shapes(instruction)[0]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
        depth = math.prod(left.dims[int(i)] for i in contracted.split(",") if i)
        return 2.0 * math.prod(instruction.shapes[0].dims) * depth
    if instruction.opcode == "convolution":
        left, right = computation.operand_shapes(instruction)
        return _convolution_flops(instruction, left, right)
    if instruction.opcode == "custom-call":
        return _kernel_flops(instruction, computation)
    return 0.0


def _kernel_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of splash attention, the only Pallas kernel that programs have."""
    kernel = re.match(r"splash_mha_(fwd|dkv|dq)", instruction.name)
    # Before q and k there may be integers: which blocks of the mask are to be computed.
    shapes = computation.operand_shapes(instruction)
    arrays = [shape for shape in shapes if shape.dtype in ("bf16", "f32")]
    if kernel is None or len(arrays) < 2:
        return 0.0
    q, k = arrays[:2]
    return 2.0 * _SPLASH_PRODUCTS[kernel[1]] * math.prod(q.dims) * k.dims[-2]


def _convolution_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
    """2 x (features in and out) x (pairs of an input and an output position that a tap joins).

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
    joined = 1
    for i in range(spatial):
        length = left.dims[left_labels.index(str(i))]
        taps = right.dims[right_labels.index(str(i))]
        outputs = out.dims[out_labels.index(str(i))]
        (stride,), (pad, _) = strides[i], pads[i]
        (lhs_dilate,), (rhs_dilate,) = lhs_dilates[i], rhs_dilates[i]
        at = np.arange(outputs)[:, None] * stride - pad + np.arange(taps)[None] * rhs_dilate
        inside = (at >= 0) & (at <= (length - 1) * lhs_dilate)
        joined *= int((inside & (at % lhs_dilate == 0)).sum())
    features = out.dims[out_labels.index("b")] * out.dims[out_labels.index("f")]
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    depth = right.dims[right_labels.index("i")] / (int(groups[1]) if groups else 1)
    return 2.0 * joined * features * depth
