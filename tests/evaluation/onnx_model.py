"""Tiny ONNX files. The lock has no package `onnx`, and a protocol buffer is a few bytes: fields,
each with a number and a wire type (onnx.proto).
"""

from collections.abc import Mapping, Sequence

import numpy as np

TYPES = {"float32": 1, "uint8": 2, "int64": 7, "float16": 10}


def varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(field(1, size) for size in array.shape)
    kind = field(2, TYPES[str(array.dtype)])
    return dims + kind + field(8, name) + field(9, np.ascontiguousarray(array).tobytes())


def value_info(name: str, dtype: str, shape: Sequence[int | str] | None) -> bytes:
    """An int is a fixed size, a name any size, and no shape none at all."""
    content = field(1, TYPES[dtype])
    if shape is not None:
        dims = [field(1 if isinstance(size, int) else 2, size) for size in shape]
        content += field(2, b"".join(field(1, dim) for dim in dims))
    return field(1, name) + field(2, field(1, content))


def onnx_model(
    outputs: Mapping[str, np.ndarray | str],
    *,
    inputs: Mapping[str, tuple[str, Sequence[int | str]]],
    operation: str = "Identity",
) -> bytes:
    """A model whose outputs are constants, or `operation` of the input of that name.

    `inputs` have a dtype and a shape.
    """
    nodes, constants, results = [], [], []
    for name, value in outputs.items():
        is_input = isinstance(value, str)
        dtype = inputs[value][0] if is_input else str(value.dtype)
        source = value if is_input else f"{name}_constant"
        if not is_input:
            constants.append(field(5, tensor(source, value)))
        node = field(1, source) + field(2, name) + field(4, operation if is_input else "Identity")
        nodes.append(field(1, node))
        results.append(field(12, value_info(name, dtype, None)))
    given = [field(11, value_info(name, *kind)) for name, kind in inputs.items()]
    graph = b"".join([*nodes, field(2, "tiny"), *constants, *given, *results])
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))
