"""Stored fields decode to one form whatever the file, or say which is wrong."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines import records
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
        records.decode({"captions": "a pig"})


def test_features_cover_every_field():
    features = records.family_features(records.FIELDS)
    assert set(features) == set(records.FIELDS)
