"""Opens ONNX files, and mends those that onnxruntime refuses, without the package onnx.

OpenCV's block-quantized models (`*_int8bq.onnx`) state a block size also where one scale is for a
whole tensor. ONNX has no meaning for that; OpenCV ignores it, and onnxruntime ends with an error.
An ONNX file is a protocol buffer (onnx.proto): fields, each with a number and a wire type.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from univg_jax.errors import NotFoundError, UserError, needs_extra

# Numbers of fields in onnx.proto.
_GRAPH, _NODE, _INITIALIZER, _INPUT = 7, 1, 5, 11
_NODE_INPUT, _NODE_OP, _NODE_ATTRIBUTE = 1, 4, 5
_TENSOR_DIMS, _TENSOR_NAME = 1, 8
_INPUT_NAME = 1
_ATTRIBUTE_NAME, _ATTRIBUTE_INT = 1, 3
_QUANTIZED = {b"DequantizeLinear", b"QuantizeLinear"}


def open_session(
    path: str,
    *,
    what: str,
    threads: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Any:
    """onnxruntime's session of a file, which gives the same each time.

    0 threads are as many as there are cores; `providers` are onnxruntime's. Raises NotFoundError
    where `what` is missing, and UserError for a file that is none.
    """
    with needs_extra("data", what):
        import onnxruntime
    if not os.path.isfile(path):
        raise NotFoundError(f"{path} does not exist: expected {what}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.use_deterministic_compute = True
    try:
        with open(path, "rb") as file:
            content = file.read()
        mended = without_idle_block_sizes(content)
        # By its path where it can be: large weights lie in files beside it.
        model = path if mended == content else mended
        return onnxruntime.InferenceSession(model, options, providers=list(providers))
    except Exception as error:  # onnxruntime's own kinds
        raise UserError(f"{path} is not {what}: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """An error of onnxruntime in one line."""
    return " ".join(str(error).split())[:200]


def without_idle_block_sizes(content: bytes) -> bytes:
    """The model with a block size of 0 wherever one scale is for a whole tensor.

    Raises UserError for what is no protocol buffer.
    """
    mended = bytearray(content)
    for graph in _inside(content, (0, len(content)), _GRAPH):
        single = {
            content[slice(*name)]
            for tensor in _inside(content, graph, _INITIALIZER)
            if _dims(content, tensor) in ([], [1])
            for name in _inside(content, tensor, _TENSOR_NAME)
        }
        for node in _inside(content, graph, _NODE):
            inputs = [content[slice(*name)] for name in _inside(content, node, _NODE_INPUT)]
            operations = [content[slice(*name)] for name in _inside(content, node, _NODE_OP)]
            if set(operations) <= _QUANTIZED and len(inputs) > 1 and inputs[1] in single:
                for start, end in _block_sizes(content, node):
                    mended[start:end] = b"\x80" * (end - start - 1) + b"\x00"  # 0, as long
    return bytes(mended)


def idle_inputs(content: bytes) -> set[str]:
    """Inputs that no node takes: quantized models keep those of the weights that they replaced.

    onnxruntime wants values for them. Raises UserError for what is no protocol buffer.
    """
    named, taken = set(), set()
    for graph in _inside(content, (0, len(content)), _GRAPH):
        for given in _inside(content, graph, _INPUT):
            named |= {content[slice(*name)] for name in _inside(content, given, _INPUT_NAME)}
        for node in _inside(content, graph, _NODE):
            taken |= {content[slice(*name)] for name in _inside(content, node, _NODE_INPUT)}
    return {name.decode(errors="replace") for name in named - taken}


def _block_sizes(content: bytes, node: tuple[int, int]) -> Iterator[tuple[int, int]]:
    for attribute in _inside(content, node, _NODE_ATTRIBUTE):
        names = [content[slice(*name)] for name in _inside(content, attribute, _ATTRIBUTE_NAME)]
        if names == [b"block_size"]:
            yield from _inside(content, attribute, _ATTRIBUTE_INT)


def _dims(content: bytes, tensor: tuple[int, int]) -> list[int]:
    """The shape of a tensor, whose dims are one a field, or several packed into one."""
    dims = []
    for number, wire, (at, end) in _fields(content, tensor):
        while number == _TENSOR_DIMS and wire in (0, 2) and at < end:
            size, at = _varint(content, at, end)
            dims.append(size)
    return dims


def _inside(content: bytes, span: tuple[int, int], number: int) -> Iterator[tuple[int, int]]:
    """Where the values of a message's field are."""
    return (place for found, _, place in _fields(content, span) if found == number)


def _fields(content: bytes, span: tuple[int, int]) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """The number, wire type and place of the value of each field of a message."""
    at, end = span
    while at < end:
        tag, at = _varint(content, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == 2:
            size, at = _varint(content, at, end)
        elif wire == 0:
            size = _varint(content, at, end)[1] - at
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            size = end
        if size > end - at:
            raise UserError("is no ONNX file")
        yield number, wire, (at, at + size)
        at += size


def _varint(content: bytes, at: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise UserError("is no ONNX file")
