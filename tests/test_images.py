"""A picture's file means one thing, whatever its format; a mask is white where something is."""

import base64
import io
import json
import os
import pathlib
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from univg_jax import images
from univg_jax.errors import UserError
from univg_jax.images import (
    decode_rgb,
    open_picture,
    size_of,
    to_integers,
    to_mask,
    to_rgb,
    verify,
)

ROOT = pathlib.Path(__file__).parents[1]
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
GRAY = PIXELS[..., 0]
SHAPE = np.zeros((20, 30), bool)
SHAPE[4:9, 3:21] = True


def file(picture: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data: bytes) -> np.ndarray:
    return to_rgb(open_picture(data))


def mask(data: bytes) -> np.ndarray:
    return to_mask(open_picture(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "PPM"])
def test_lossless_formats_keep_every_pixel(kind):
    options = dict(lossless=True) if kind == "WEBP" else {}
    np.testing.assert_array_equal(rgb(file(PIXELS, kind, **options)), PIXELS)


def test_of_several_pictures_in_a_file_the_first_counts():
    first, second = Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)
    for kind in ("TIFF", "PNG"):
        data = file(first, kind, save_all=True, append_images=[second])
        np.testing.assert_array_equal(rgb(data), PIXELS)
    animated = dict(save_all=True, append_images=[second], duration=50)
    moving = rgb(file(first, "WEBP", lossless=True, **animated))
    np.testing.assert_array_equal(moving, PIXELS)
    # 256 colors at most
    still = rgb(file(first, "GIF"))
    np.testing.assert_array_equal(rgb(file(first, "GIF", **animated)), still)
    many = rgb(file(first, "MPO", save_all=True, append_images=[second], quality=95))
    np.testing.assert_array_equal(many, rgb(file(first, "JPEG", quality=95)))


TURNS = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: np.rot90(PIXELS, 1),
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(PIXELS, -1),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if kind == "WEBP" else {}
    stored = np.ascontiguousarray(TURNS[orientation])
    np.testing.assert_array_equal(rgb(file(stored, kind, exif=exif, **options)), PIXELS)


def test_damaged_exif_turns_nothing():
    np.testing.assert_array_equal(rgb(file(PIXELS, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), PIXELS)


@given(st.integers(0, 2**16 - 1))
def test_sixteen_bits_are_scaled_to_eight(value):
    data = file(np.full((1, 1), value, np.uint16))
    assert rgb(data).tolist() == [[[round(value / 257)] * 3]]
    assert to_integers(open_picture(data)).tolist() == [[value]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GRAY / 255, GRAY),
        (GRAY / 255 * 1.1 - 0.05, np.clip(np.rint(GRAY * 1.1 - 12.75), 0, 255)),
        (GRAY.astype(float), GRAY),
        (np.zeros((2, 2)), np.zeros((2, 2))),
    ],
)
def test_floats_are_read_by_their_range(values, expected):
    found = rgb(file(values.astype(np.float32), "TIFF"))[..., 0]
    assert np.abs(found - expected.astype(int)).max() <= 1  # float32 next to a half


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 5, 1000, -20])
def test_floats_of_another_range_are_refused(value):
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 2] = value
    with pytest.raises(UserError, match=r"floats from .* to .*, expected \[0, 1\] or \[0, 255\]"):
        rgb(file(values, "TIFF"))


def test_integers_of_more_than_sixteen_bits_are_refused():
    with pytest.raises(UserError, match="values 0 to 70000, expected 16 bits"):
        rgb(file(np.array([[0, 70000]], np.int32), "TIFF"))


def test_what_is_transparent_shows_white():
    opaque = np.where(SHAPE, 255, 0).astype(np.uint8)
    expected = np.where(SHAPE[..., None], PIXELS, 255)
    np.testing.assert_array_equal(rgb(file(np.dstack([PIXELS, opaque]))), expected)
    gray = np.repeat(GRAY[..., None], 3, axis=2)
    np.testing.assert_array_equal(
        rgb(file(Image.fromarray(np.dstack([GRAY, opaque]), "LA"))),
        np.where(SHAPE[..., None], gray, 255),
    )
    deep = np.where(SHAPE, 40 * 257, 7).astype(np.uint16)
    data = file(Image.fromarray(deep), transparency=7)
    np.testing.assert_array_equal(rgb(data)[..., 0], np.where(SHAPE, 40, 255))


def test_cmyk_and_gray_jpegs():
    for mode in ("CMYK", "L"):
        picture = Image.new("RGB", (16, 16), (200, 40, 90)).convert(mode)
        expected = np.asarray(picture.convert("RGB"))
        found = rgb(file(picture, "JPEG", quality=100)).astype(int)
        assert np.abs(found - expected).max() <= 3  # JPEG's rounding


def test_a_mask_in_a_mode_that_pillow_converts_to_color_only():
    """LAB, where a picture of the brightest and the darkest is no other than in gray."""
    levels = np.repeat(np.where(SHAPE, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    levels[..., 1:] = 0
    data = file(Image.fromarray(levels, "LAB"), "TIFF")
    np.testing.assert_array_equal(images.to_mask(images.open_picture(data)), SHAPE)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (b"not a picture", "none of PNG, JPEG"),
        (file(PIXELS)[:-400], "truncated"),
        (file(PIXELS, "JPEG")[:-100], "truncated"),
        (file(Image.fromarray(PIXELS), "EPS"), "none of PNG, JPEG"),
        (file(Image.fromarray(PIXELS), "PDF"), "none of PNG, JPEG"),
        (file(Image.new("RGB", (64, 64)), "ICO"), "none of PNG, JPEG"),
        (b"P5 20000 20000 255 ", "20000 x 20000 pixels are more than 134217728 (268435456 in"),
    ],
    # Of their own, because a PDF's bytes have the time.
    ids=["empty", "text", "cut PNG", "cut JPEG", "EPS", "PDF", "ICO", "huge"],
)
def test_what_is_no_picture_is_said_in_a_line(data, why):
    with pytest.raises(UserError) as error:
        open_picture(data)
    message = str(error.value)
    assert message.startswith("is not a readable image: ")
    assert why in message
    assert "\n" not in message
    assert " at 0x" not in message


def test_ghostscript_is_never_started(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(UserError):
        open_picture(file(Image.fromarray(PIXELS), "EPS"))


def test_pictures_are_opened_at_one_place_only():
    folders = ("univg_jax", "data_pipelines", "experiments", "tools")  # benchmarks do as others do
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    opened = [path.name for path in files if "Image.open(" in path.read_text()]
    assert opened == ["images.py"]


# --- large pictures: as the limits are powers of two, small ones take their place ---


@pytest.fixture
def small_limits(monkeypatch):
    monkeypatch.setattr(images, "WHOLE_PIXELS", 300)
    monkeypatch.setattr(images, "MAX_PIXELS", 1200)
    monkeypatch.setattr(images, "MAX_JPEG_PIXELS", 2400)


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize("size", [(20, 30), (21, 31), (33, 35), (17, 70)])
def test_what_lay_on_one_another_still_does_in_a_large_picture(size):
    """In every form that a file has, and however it is reduced."""
    y, x = np.mgrid[: size[0], : size[1]]
    shape = (x >= size[1] // 2) & (y >= size[0] // 2)
    levels = np.where(shape, 200, 20).astype(np.uint8)
    color = np.repeat(levels[..., None], 3, axis=2)
    expected = rgb(file(color)) > 100
    fraction = size[0] / len(expected)
    assert fraction > 1.9
    forms = dict(
        jpeg=file(color, "JPEG", quality=100),
        gray=file(levels),
        alpha=file(np.dstack([color, np.full_like(levels, 255)])),
        palette=file(Image.fromarray(color).quantize(4)),
        deep=file(levels.astype(np.uint16) * 257),
        floats=file(levels.astype(np.float32), "TIFF"),
    )
    for name, data in forms.items():
        found = rgb(data)
        assert found.shape == expected.shape, name
        # Only cells that the edge crosses may differ.
        assert ((found > 100) != expected)[..., 0].sum() <= sum(expected.shape[:2]), name
    for found in (mask(forms["gray"]), to_integers(open_picture(forms["deep"])) > 100 * 257):
        assert found.shape == expected.shape[:2]
        assert (found.astype(bool) != expected[..., 0]).sum() <= sum(expected.shape[:2])


@pytest.mark.usefixtures("small_limits")
def test_a_jpeg_may_be_larger_because_it_is_decoded_smaller():
    large = Image.new("RGB", (60, 40), (10, 200, 30))
    assert rgb(file(large, "JPEG")).shape == (10, 15, 3)
    with pytest.raises(UserError, match="60 x 40 pixels are more than 1200"):
        open_picture(file(large, "PNG"))
    with pytest.raises(UserError, match="70 x 40 pixels are more than 1200"):
        open_picture(file(large.resize((70, 40)), "JPEG"))


def test_a_phones_picture_is_read():
    """101 megapixels, as JPEG decoded at half its size, with the turn of its EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file(Image.new("L", (11648, 8736), 90), "JPEG", exif=exif)
    found = rgb(data)
    assert found.shape == (5824, 4368, 3)
    assert abs(int(found.mean()) - 90) <= 1


def test_a_deep_picture_needs_little_memory():
    """No temporary of float64, which alone has 8 bytes a pixel; the result has 3."""
    size = 2048
    picture = open_picture(file(np.full((size, size), 2570, np.uint16), compress_level=1))
    tracemalloc.start()
    assert (to_rgb(picture) == 10).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 11 * size**2


# --- masks ---


def color_mask(back: int, front: int | tuple[int, ...]) -> np.ndarray:
    return np.where(SHAPE[..., None], front, back * np.ones(3, int)).astype(np.uint8)


ALPHA = np.where(SHAPE, 255, 0).astype(np.uint8)
PALETTE = Image.fromarray(SHAPE.astype(np.uint8), "P")
PALETTE.putpalette([0, 0, 0, 128, 0, 0])  # as segmentation datasets color their first class


@pytest.mark.parametrize(
    "data",
    {
        "0 and 255": file(ALPHA),
        "0 and 1": file(SHAPE.astype(np.uint8)),
        "one bit": file(SHAPE),
        "two grays": file(np.where(SHAPE, 128, 0).astype(np.uint8)),
        "color": file(color_mask(0, 255)),
        "red on black": file(color_mask(0, (255, 0, 0))),
        "palette": file(PALETTE),
        "opaque": file(np.dstack([color_mask(0, 255), np.full_like(ALPHA, 255)])),
        "white where opaque": file(np.dstack([np.full_like(PIXELS, 255), ALPHA])),
        "in color and alpha": file(np.dstack([color_mask(0, 255), ALPHA])),
        "16 bits": file(SHAPE.astype(np.uint16) * np.uint16(65535)),
        "16 bits, 0 and 255": file(SHAPE.astype(np.uint16) * np.uint16(255)),
        "floats": file(SHAPE.astype(np.float32), "TIFF"),
        "jpeg": file(ALPHA, "JPEG", quality=95),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_mask_is_read_by_its_meaning(data):
    np.testing.assert_array_equal(mask(data[1]), SHAPE)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1, 1), (255, 1)])
def test_a_mask_of_one_value(value, expected):
    assert (mask(file(np.full((4, 6), value, np.uint8))) == expected).all()


def test_the_edge_of_a_smooth_mask_is_cut_at_half():
    ramp = np.clip(np.arange(64) * 32 - 30 * 32, 0, 255).astype(np.uint8)
    found = mask(file(np.tile(ramp, (4, 1))))
    np.testing.assert_array_equal(found, np.tile(ramp > 127, (4, 1)))


@pytest.mark.parametrize(
    ("pixels", "why"),
    [
        (PIXELS, "of its pixels are gray, not black or white"),
        (np.full((4, 4), 128, np.uint8), "100% of its pixels are gray"),
        (np.arange(16, dtype=np.uint8).reshape(4, 4), "values 0 to 15, expected black and white"),
    ],
)
def test_what_is_no_mask_is_said_in_a_line(pixels, why):
    with pytest.raises(UserError) as error:
        mask(file(pixels))
    assert str(error.value).startswith("is no mask: ")
    assert why in str(error.value)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_two_valued_mask_is_itself(height, width, seed):
    rng = np.random.default_rng(seed)
    truth = rng.random((height, width)) < 0.5
    truth.flat[0], truth.flat[-1] = False, True
    low, high = sorted(rng.choice(256, 2, replace=False))
    if truth.size > 1:
        found = mask(file(np.where(truth, high, low).astype(np.uint8)))
        np.testing.assert_array_equal(found, truth)


SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "")) / "images"


@pytest.mark.skipif("UNIVG_SAMPLES" not in os.environ, reason="real files: not in the project")
def test_awkward_pictures_of_other_projects():
    """Each is read as Pillow reads it alone, or refused in a line, as its EXPECTED.json says."""
    for name, expected in json.loads((SAMPLES / "EXPECTED.json").read_text())["files"].items():
        data = (SAMPLES / name).read_bytes()
        if not expected["readable"]:
            for read in (open_picture, decode_rgb, verify):
                with pytest.raises(UserError, match=r"^is not a readable image: "):
                    read(data)
            continue
        picture = open_picture(data)
        pixels = to_rgb(picture)
        assert list(pixels.shape[1::-1]) == expected["size_after_exif"], name
        assert verify(data) == size_of(data) == pixels.shape[:2], name
        np.testing.assert_array_equal(decode_rgb(data), pixels, name)
        is_opaque = "A" not in picture.getbands() and "transparency" not in picture.info
        if "rgb_mean" in expected and is_opaque:
            error = np.abs(pixels.mean((0, 1)) - expected["rgb_mean"]).max()
            assert error < 0.02, name  # the file says two decimals
        if expected.get("rgb") == "convert would lose bits":
            np.testing.assert_array_equal(to_integers(picture).max(), expected["array"][3], name)


# --- decoding for training: the same pixels in less time ---


def verdict(read, data: bytes):
    """What `read` makes of a file, or None where it refuses it."""
    try:
        return read(data)
    except UserError:
        return None


def assert_same(data: bytes) -> bool:
    """Whether the file is read; by all ways alike."""
    expected, found, size = (verdict(read, data) for read in (rgb, decode_rgb, verify))
    assert (expected is None) == (found is None) == (size is None)
    if expected is not None:
        np.testing.assert_array_equal(found, expected)
        assert size == size_of(data) == expected.shape[:2]
    return expected is not None


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


SMOOTH = np.asarray(Image.fromarray(PIXELS).resize((60, 44), Image.Resampling.BICUBIC))
JPEGS = {
    "plain": dict(),
    "progressive": dict(progressive=True),
    "4:4:4": dict(subsampling=0),
    "4:2:2": dict(subsampling=1),
    "restarts": dict(restart_marker_blocks=2),
    "comment": dict(comment=b"\xff\xda"),
    "profile": dict(icc_profile=b"no profile" * 7000),
    "XMP": dict(xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'),
    **{f"orientation {k}": dict(exif=exif(k)) for k in range(10)},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_decoded_as_pillow_does(mode, options):
    assert assert_same(file(Image.fromarray(SMOOTH).convert(mode), "JPEG", **options))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "TIFF", "JPEG2000"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_other_formats_are_verified_and_sized_upright(kind, orientation):
    options = {} if kind == "JPEG2000" else dict(exif=exif(orientation))
    assert assert_same(file(Image.fromarray(SMOOTH), kind, **options))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", dict(progressive=True)), ("PNG", {}), ("WEBP", {}), ("GIF", {})],
)
def test_a_file_that_is_cut_anywhere_is_refused(kind, options):
    data = file(Image.fromarray(SMOOTH).resize((30, 20)), kind, **options)
    # The last bytes of these formats are no pixels, and of an old camera's file often missing.
    tail = {"JPEG": 2, "PNG": 30, "GIF": 16, "WEBP": 2}[kind]
    for size in range(len(data)):
        assert not assert_same(data[:size]) or size >= len(data) - tail, size


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_header_is_judged_as_by_pillow(data):
    whole = bytearray(file(Image.fromarray(SMOOTH), "JPEG", exif=exif(6)))
    place = data.draw(st.integers(0, whole.index(b"\xff\xda") + 12))
    whole[place] = data.draw(st.integers(0, 255))
    assert_same(bytes(whole))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_may_be_decoded_smaller_but_has_what_is_asked(orientation):
    few = Image.fromarray(PIXELS[:4, :6])
    large = few.resize((400, 208), Image.Resampling.BICUBIC)
    data = file(large, "JPEG", quality=95, exif=exif(orientation))
    whole = rgb(data)
    height, width = whole.shape[:2]
    for least, factor in {(height, width): 1, (1, 1): 8, (52, 52): 4, (104, 104): 2}.items():
        found = decode_rgb(data, least=least)
        assert found.shape[:2] == (-(-height // factor), -(-width // factor))
        expected = Image.fromarray(whole).resize(found.shape[1::-1], Image.Resampling.BOX)
        assert np.abs(found - np.asarray(expected, np.float32)).mean() < 3


def test_bombs_are_refused_by_their_header():
    side = 65535
    frame = (
        b"\xff\xc0\x00\x11\x08" + side.to_bytes(2) * 2 + b"\x03\x01\x11\x00\x02\x11\x01\x03\x11\x01"
    )
    whole = file(PIXELS, "JPEG")
    at = whole.index(b"\xff\xc0")
    jpeg = whole[:at] + frame + whole[at + len(frame) :]
    png = file(PIXELS)
    header = b"IHDR" + (50_000).to_bytes(4) * 2 + png[24:29]
    png = png[:12] + header + zlib.crc32(header).to_bytes(4) + png[33:]
    for data in (jpeg, png):
        for read in (decode_rgb, verify, size_of, open_picture):
            with pytest.raises(UserError, match="taken for a decompression bomb"):
                read(data)


def test_a_phones_heic_file_is_told_from_garbage():
    with pytest.raises(UserError, match="HEIC files need to be converted"):
        decode_rgb(b"\x00\x00\x00\x18ftypheic" + bytes(40))


def test_a_picture_travels_as_an_address():
    jpeg = images.jpeg_bytes(PIXELS, quality=75)
    assert jpeg == file(PIXELS, "JPEG")  # Pillow's own default, in which official scripts send
    head, data = images.data_uri(jpeg, kind="jpeg").split(",")
    assert head == "data:image/jpeg;base64"
    assert base64.b64decode(data) == jpeg
    assert images.data_uri(images.png_bytes(PIXELS)).startswith("data:image/png;base64,")
