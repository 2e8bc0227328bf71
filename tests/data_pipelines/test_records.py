"""Stored fields decode to one form whatever the file, or say which is wrong."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines import records
from univg_jax import images
from univg_jax.errors import UserError


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_decode_makes_rgb_of_any_picture():
    red = Image.new("RGB", (6, 4), (255, 0, 0))
    palette = red.quantize(4)
    clear = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    deep = Image.fromarray(np.full((4, 6), 0x8080, np.uint16))
    cases = {
        "rgb": (encoded(red), (255, 0, 0)),
        "palette": (encoded(palette), (255, 0, 0)),
        "alpha over white": (encoded(clear), (255, 255, 255)),
        "gray with alpha": (encoded(Image.new("LA", (6, 4), (10, 255))), (10, 10, 10)),
        "16 bit": (encoded(deep), (128, 128, 128)),
        "cmyk": (encoded(red.convert("CMYK"), "JPEG", quality=100), (254, 0, 0)),
    }
    for name, (data, color) in cases.items():
        image = records.decode({"image": data})["image"]
        assert image.shape == (4, 6, 3), name
        assert image.dtype == np.uint8
        # JPEG rounds in another color space: two steps.
        assert np.abs(image.astype(int) - color).max() <= (2 if name == "cmyk" else 0), name


def test_decode_turns_upright_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert records.decode({"image": encoded(Image.new("RGB", (6, 4)), "JPEG", exif=exif)})[
        "image"
    ].shape == (6, 4, 3)


def test_decode_names_what_is_wrong():
    data = encoded(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8))
    )
    for broken in (data[: len(data) // 2], b"", b"not an image", None):
        with pytest.raises(UserError, match="'source' is not a readable image"):
            records.decode({"source": broken})
    with pytest.raises(UserError, match="'joints' has shape"):
        records.decode({"joints": np.zeros((15, 3))})
    with pytest.raises(UserError, match="'depth' has mode RGB"):
        records.decode({"depth": encoded(Image.new("RGB", (4, 4)))})
    with pytest.raises(UserError, match="did you mean 'caption'"):
        records.decode({"capton": "a pig"})
    for scale in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(UserError, match="'depth_scale' is"):
            records.decode({"depth_scale": scale})
    with pytest.raises(UserError, match="'expression_masks' is float64"):
        records.decode({"expression_masks": np.zeros(2)})


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(records.FIELDS)), value=JUNK)
def test_any_value_is_decoded_or_refused_in_one_line(name, value):
    try:
        records.decode({name: value})
    except UserError as error:
        assert name in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("farthest", [3, 80, 300])
def test_depth_comes_back_to_half_a_level(farthest):
    meters = np.random.default_rng(0).uniform(0.5, farthest, (30, 40))
    stored = records.encode_depth(meters)
    level = stored["depth_scale"]
    assert level == pytest.approx(max(0.001, meters.max() / 65535))
    depth = records.decode(stored)["depth"]
    assert depth.dtype == np.float32
    assert np.abs(depth - meters).max() <= 0.51 * level


def test_unknown_depth_is_zero_and_the_far_and_the_near_are_not():
    stored = records.encode_depth(np.array([[0, -1, np.nan, np.inf], [1e-9, 2, 99, 1e9]]))
    unknown, known = records.decode(stored)["depth"]
    assert not unknown.any()
    assert known[0] > 0
    assert (np.diff(known) > 0).all()
    assert known[3] == pytest.approx(records.MAX_METERS)
    assert not records.decode(records.encode_depth(np.zeros((2, 3))))["depth"].any()


def test_levels_stay_exact():
    levels = np.arange(2**16).astype(np.uint16).reshape(256, 256)
    depth = records.decode(records.encode_levels(levels, 1 / 256))["depth"]
    np.testing.assert_array_equal(depth * 256, levels)
    millimeters = records.decode({"depth": images.png_bytes(levels)})["depth"]
    np.testing.assert_array_equal(millimeters, levels / np.float32(1000))


def test_joints_are_of_any_number_of_people():
    one = np.arange(51, dtype=np.float32).reshape(17, 3)
    for stored, people in ((one, 1), (one[None], 1), (np.stack([one, one]), 2), ([], 0)):
        joints = records.decode({"joints": stored})["joints"]
        assert (joints.shape, joints.dtype) == ((people, 17, 3), np.float32)


def test_features_hold_empty_lists():
    empty = dict(captions=[], caption_kinds=[], phrase_captions=[], masks=[], expressions=[])
    empty |= dict(expression_masks=[], boxes=np.float32([]).reshape(0, 4))
    empty |= dict(joints=np.float32([]).reshape(0, 17, 3))
    features = records.family_features(empty)
    raw = features.deserialize_example_np(features.serialize_example(empty))
    decoded = records.decode(raw)
    assert {name: len(value) for name, value in decoded.items()} == dict.fromkeys(empty, 0)


def test_features_cover_every_field():
    features = records.family_features(records.FIELDS)
    assert set(features) == set(records.FIELDS)
