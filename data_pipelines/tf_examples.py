"""Stored records out of tf.Examples, without TFDS's own parser.

The same values, in a third of the time, and of the fields that are asked for alone: a record may
have megabytes of masks that the task at hand does not look at.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf import message
from tensorflow_datasets import features as tfds_features
from tensorflow_datasets.proto import tf_example_pb2

from univg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the values of a field lie in a tf.Example."""

    kind: str  # of the list: "bytes_list", "float_list" or "int64_list"
    dtype: np.dtype
    shape: tuple[int, ...] | None  # -1: any number; None: one value

    @classmethod
    def of(cls, feature: tfds_features.FeatureConnector) -> "Layout | None":
        """That of a feature whose values are stored as they are; None for any other.

        A picture's values are the bytes of its file.
        """
        stored, shown = feature.get_serialized_info(), feature.get_tensor_info()
        is_known = isinstance(stored, tfds_features.TensorInfo) and stored.sequence_rank <= 1
        if not is_known or stored.shape.count(None) > 1:
            return None
        is_as_shown = (stored.shape, stored.np_dtype) == (shown.shape, shown.np_dtype)
        if not is_as_shown and not isinstance(feature, tfds_features.Image):  # it is compressed
            return None
        dtype = np.dtype(stored.np_dtype)
        kinds = {"O": "bytes_list", "S": "bytes_list", "f": "float_list", "i": "int64_list"}
        if dtype.kind not in kinds:
            return None
        shape = tuple(-1 if side is None else side for side in stored.shape) or None
        return cls(kinds[dtype.kind], dtype, shape)


def parse(
    record: bytes, layouts: Mapping[str, Layout], fields: Sequence[str] | None = None
) -> dict[str, Any]:
    """The `fields` of a serialized record that have a layout, by default all, in stored form.

    Raises UserError for what is no tf.Example, and for a field that is missing or of another kind
    or shape.
    """
    try:
        stored = tf_example_pb2.Example.FromString(record).features.feature
    except message.DecodeError:
        raise UserError("is no tf.Example: the record is damaged") from None
    names = layouts if fields is None else [name for name in fields if name in layouts]
    return {name: _values(stored, name, layouts[name]) for name in names}


def _values(stored: Any, name: str, layout: Layout) -> Any:
    if name not in stored:  # to ask for it would put it there
        raise UserError(f"record field {name!r} is missing")
    feature = stored[name]
    if (kind := feature.WhichOneof("kind")) != layout.kind:
        raise UserError(f"record field {name!r} is stored as a {kind}; expected a {layout.kind}")
    values = getattr(feature, layout.kind).value
    if layout.shape is None:
        if len(values) != 1:
            raise UserError(f"record field {name!r} has {len(values)} values; expected one")
        return values[0]
    if layout.kind == "bytes_list":
        return list(values)
    try:
        return np.array(values, layout.dtype).reshape(layout.shape)
    except ValueError:
        expected = ", ".join("any number" if side < 0 else str(side) for side in layout.shape)
        raise UserError(
            f"record field {name!r} has {len(values)} values; expected ({expected})"
        ) from None
