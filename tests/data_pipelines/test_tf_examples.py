"""Stored records are read as TFDS reads them, and only the fields that are asked for."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines import records, tf_examples
from univg_jax.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FILE = st.binary()


def numbers(shape, dtype=np.float32):
    finite = dict(allow_nan=False, allow_infinity=False) if dtype == np.float32 else {}
    lengths = st.integers(0, 3)
    return lengths.flatmap(lambda n: arrays.arrays(dtype, (n, *shape), elements=finite or None))


VALUES = {
    "image": FILE,
    "source": FILE,
    "caption": TEXT,
    "captions": st.lists(TEXT),
    "caption_kinds": st.lists(TEXT),
    "instruction": TEXT,
    "edit_mask": FILE,
    "depth": FILE,
    "depth_scale": st.floats(0, 1, width=32).map(np.float32),
    "boxes": numbers((4,)),
    "phrases": st.lists(TEXT),
    "phrase_captions": numbers((), np.int64),
    "masks": st.lists(FILE),
    "expressions": st.lists(TEXT),
    "expression_masks": numbers((), np.int64),
    "joints": numbers((17, 3)),
    "ignore_mask": FILE,
    "face": FILE,
    "person": st.integers(-(2**63), 2**63 - 1),
}


def layouts_of(features) -> dict:
    return {name: tf_examples.Layout.of(feature) for name, feature in features.items()}


def plain(value):
    """Comparable: what TFDS has as an array of bytes is a list of them."""
    if isinstance(value, np.ndarray) and value.dtype == object:
        return value.tolist()
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    return value


def test_every_field_is_tried():
    assert set(VALUES) == set(records.FIELDS)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_field_is_what_tfds_reads(data):
    names = data.draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, unique=True))
    record = {name: data.draw(VALUES[name], label=name) for name in names}
    features = records.family_features(names)
    serialized = features.serialize_example(record)
    decoders = {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    expected = features.deserialize_example_np(serialized, decoders=decoders)
    found = tf_examples.parse(serialized, layouts_of(features))
    assert {n: plain(v) for n, v in found.items()} == {n: plain(v) for n, v in expected.items()}
    some = data.draw(st.lists(st.sampled_from(names), unique=True))
    part = tf_examples.parse(serialized, layouts_of(features), some)
    assert {n: plain(v) for n, v in part.items()} == {n: plain(found[n]) for n in some}


def test_joints_of_old_builds_keep_their_shape():
    old = tfds.features.FeaturesDict(
        dict(joints=tfds.features.Tensor(shape=(17, 3), dtype=np.float32))
    )
    joints = np.arange(51, dtype=np.float32).reshape(17, 3)
    found = tf_examples.parse(old.serialize_example(dict(joints=joints)), layouts_of(old))
    np.testing.assert_array_equal(found["joints"], joints)


def example(**fields) -> bytes:
    made = tf_example_pb2.Example()
    for name, (kind, values) in fields.items():
        getattr(made.features.feature[name], kind).value.extend(values)
    return made.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff\xff\xff", "is no tf.Example"),
        (b"", "field 'caption' is missing"),
        (example(boxes=("float_list", [0] * 4)), "field 'caption' is missing"),
        (example(caption=("int64_list", [1])), "'caption' is stored as a int64_list"),
        (example(caption=("bytes_list", [b"a", b"b"])), "'caption' has 2 values; expected one"),
        (
            example(caption=("bytes_list", [b"a"]), boxes=("float_list", [0] * 5)),
            r"'boxes' has 5 values; expected \(any number, 4\)",
        ),
    ],
    ids=["no example", "empty", "a field missing", "another type", "two values", "another shape"],
)
def test_what_is_no_such_record_is_said_by_field(record, message):
    layouts = layouts_of(records.family_features(("caption", "boxes")))
    with pytest.raises(UserError, match=message):
        tf_examples.parse(record, layouts)


@pytest.mark.parametrize(
    "feature",
    [
        tfds.features.Tensor(shape=(None, 4), dtype=np.float32, encoding="zlib"),
        tfds.features.Sequence(tfds.features.Sequence(tfds.features.Text())),
        tfds.features.Sequence(tfds.features.Image()),
    ],
    ids=str,
)
def test_what_is_stored_in_another_form_has_no_layout(feature):
    assert tf_examples.Layout.of(feature) is None
