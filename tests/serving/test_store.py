"""Files in memory, and what visitors send."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from univg_jax.errors import NotFoundError, UserError
from univg_jax.images import png_bytes
from univg_jax.serving import store as stores
from univg_jax.serving.store import Store, read_mask, read_upload


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def bomb():
    """A small PNG that says that it has 60,000 x 60,000 pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = zlib.compress(b"\0" * 100_000)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


def test_a_file_comes_back_by_a_name_of_its_content():
    store, other = Store(), Store()
    name = store.add(b"abc", ".npy")
    assert store.read(name) == b"abc"
    assert name == other.add(b"abc", ".npy")
    assert name != store.add(b"abd", ".npy")
    with pytest.raises(NotFoundError, match=r"'nothing\.png' is not here any more"):
        store.read("nothing.png")


def test_the_least_used_files_go_and_kept_ones_stay():
    store = Store(capacity=25)
    kept = store.add(b"k" * 100, ".png", keep=True)
    first, second = store.add(b"1" * 10, ".png"), store.add(b"2" * 10, ".png")
    store.read(first)
    third = store.add(b"3" * 10, ".png")
    with pytest.raises(NotFoundError):
        store.read(second)
    for name in (kept, first, third):
        store.read(name)
    for _ in range(5):  # the same file counts once
        store.add(b"3" * 10, ".png")
    store.read(first)


def test_a_picture_is_read_upright_and_no_larger_than_needed(monkeypatch):
    monkeypatch.setattr(stores, "MOST_SIDE", 64)
    small = picture(20, 30)
    np.testing.assert_array_equal(read_upload("a.png", png_bytes(small)), small)
    assert read_upload("a.png", png_bytes(picture(100, 200))).shape == (32, 64, 3)
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(20, 30)).save(turned, "JPEG", exif=exif)
    assert read_upload("a.jpg", turned.getvalue()).shape == (30, 20, 3)


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("notes.png", b"Dear diary", "notes.png is not a readable image: none of PNG, JPEG"),
        ("empty.png", b"", "empty.png is not a readable image: it is empty"),
        ("bomb.png", bomb(), "60000 x 60000 pixels are more than"),
        ("dot.png", png_bytes(picture(1, 1)), "dot.png has 1 x 1 pixels: expected at least 8 x 8"),
        ("cut.png", png_bytes(picture(64, 64))[:500], "cut.png is not a readable image"),
        ("large.png", bytes(2**26 + 1), "large.png is too large: it has more than 64 MB"),
        ("a" * 300 + ".png", b"x", "aaa...aaa"),
        ("a\n\x1b[31mb.png", b"x", r"a\n\x1b[31mb.png is not a readable image"),
    ],
    ids=["text", "empty", "bomb", "tiny", "cut", "large", "long name", "strange name"],
)
def test_a_bad_upload_is_one_readable_line(name, data, line):
    with pytest.raises(UserError) as error:
        read_upload(name, data)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_mask_comes_from_a_data_url():
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8] = 255
    address = "data:image/png;base64," + base64.b64encode(png_bytes(mask)).decode()
    np.testing.assert_array_equal(read_mask(address), mask)


@pytest.mark.parametrize("address", ["", "data:", "data:image/png;base64,AAAA", "data:,%%%"])
def test_what_is_no_mask_is_one_line(address):
    with pytest.raises(UserError, match=r"^the mask is not a readable image: "):
        read_mask(address)
