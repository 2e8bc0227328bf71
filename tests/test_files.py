"""A file is written whole or not at all."""

import threading

import numpy as np
import pytest
from PIL import Image

from univg_jax import files, images


def test_the_folder_is_made_and_nothing_else_is_left(tmp_path):
    files.write_whole(tmp_path / "a" / "b.txt", "text")
    files.write_whole(tmp_path / "a" / "b.txt", b"bytes")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"bytes"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.txt"]


def test_a_failure_leaves_what_was_there(tmp_path):
    files.write_whole(tmp_path / "a", "before")
    with pytest.raises(Exception, match="content"):
        files.write_whole(tmp_path / "a", None)
    assert (tmp_path / "a").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_writers_at_once_do_not_mix(tmp_path):
    contents = [bytes([i]) * 100_000 for i in range(8)]
    threads = [
        threading.Thread(target=files.write_whole, args=(tmp_path / "a", content))
        for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a").read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 6)])
def test_a_png_keeps_every_pixel(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images.write_png(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)


def test_uint8_and_floats_are_inverse():
    levels = np.arange(256, dtype=np.uint8)
    floats = images.to_float(levels)
    assert (floats.dtype, floats.min(), floats.max()) == (np.float32, -1.0, 1.0)
    np.testing.assert_array_equal(images.to_uint8(floats), levels)
    assert images.to_float(floats) is floats
