"""A file is written whole or not at all, and read as what it should be or named."""

import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from univg_jax import files, images
from univg_jax.errors import AlreadyExistsError, NotFoundError, UserError
from univg_jax.trained import open_trained


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


JSON = st.recursive(
    st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=50, deadline=None)
@given(value=st.dictionaries(st.text(), JSON, max_size=3), cut=st.floats(0, 0.999))
def test_an_object_is_read_back_and_a_torn_one_is_named(value, cut):
    content = json.dumps(value).encode()
    assert files.parse_json(content, where="a.json") == value
    with pytest.raises(UserError, match=r"^a\.json is not "):
        files.parse_json(content[: int(len(content) * cut)], where="a.json")


@settings(max_examples=50, deadline=None)
@given(content=st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_in_a_file_is_an_object_or_one_line(content):
    try:
        found = files.parse_json(content, where="a.json")
    except UserError as error:
        found = str(error)
    assert isinstance(found, dict) or found.startswith("a.json ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "a": 2}', "the name 'a' is there twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the name 'b' is there twice"),
        (b'{"a": ' + b"[" * 10**6, "nested too deeply"),
        (b'{"a": ' + b"9" * 10**5 + b"}", "not JSON: Exceeds the limit"),
        (b'{"a": "\xff"}', "not JSON: 'utf-8'"),
        (b"[]", "not a JSON object, but a list"),
        (b"{}" + b" " * files.MAX_JSON_BYTES, "has more than"),
    ],
    ids=["twice", "twice-inside", "deep", "digits", "utf-8", "list", "large"],
)
def test_json_that_is_none_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json .*{message}"):
        files.read_json(tmp_path / "a.json")


def test_no_flipped_bit_of_a_sealed_file_is_read_back(tmp_path):
    value = {"b": [1, {"c": "text"}], "a": None}
    path = tmp_path / "a.json"
    files.write_sealed(path, value)
    assert files.read_sealed(path) == value
    content = path.read_bytes()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = files.read_sealed(path)
        except UserError as error:
            found = str(error)
        # White space carries nothing. A changed name of the checksum itself leaves one more name.
        assert found == value or "a.json is " in found or set(found) - set(value), flipped
    path.write_text('{"a": 1}')  # of an earlier version
    assert files.read_sealed(path) == {"a": 1}


def test_what_is_no_file_is_said_so(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"a": "does not exist", ".": "not a file", "pipe": "not a file"}.items():
        with pytest.raises(NotFoundError, match=message):
            files.read_json(tmp_path / name)


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


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "folder", "message"),
    [
        ("folder", False, "is a folder: expected a file"),
        ("new/", False, "is a folder: expected a file"),
        ("file/a.png", False, "file is not a folder"),
        ("file/a/b", True, "file is not a folder"),
        ("file", True, "file is not a folder"),
        ("a" * 300, False, "cannot be written: File name too long"),
        ("/proc/nowhere/a.png", False, "cannot be written"),
        ("/proc/nowhere", True, "cannot be written"),
        ("", False, "--out is empty: expected a file"),
        ("", True, "--out is empty: expected a folder"),
        ("a.jpg", False, r"a\.jpg should end in \.png"),
    ],
)
def test_an_output_that_cannot_be_is_one_line_and_nothing_is_left(places, path, folder, message):
    path = path and (path if path.startswith("/") else f"{places}/{path}")
    suffixes = (".png",) if path.endswith(".jpg") else ()
    with pytest.raises(UserError, match=message) as error:
        files.check_output(path, flag="--out", folder=folder, suffixes=suffixes)
    assert "\n" not in str(error.value)
    assert sorted(p.name for p in places.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("path", "folder"),
    [("file", False), ("a.PNG", False), ("a/b/c.png", False), ("folder", True), ("a/b/", True)],
)
def test_an_output_that_can_be_is_not_made_yet(places, path, folder):
    suffixes = (".png",) if path.lower().endswith(".png") else ()
    files.check_output(f"{places}/{path}", flag="--out", folder=folder, suffixes=suffixes)
    assert sorted(p.name for p in places.iterdir()) == ["file", "folder"]
    files.check_output("gs://bucket/a.png", flag="--out", suffixes=suffixes)


@pytest.mark.parametrize("address", ["s3://b/x", "http://x/y", "az://b/x"])
def test_what_is_no_bucket_of_ours_is_refused_before_its_library_is_looked_for(address):
    scheme = address.partition(":")[0]
    with pytest.raises(UserError, match=rf"--out={address}: expected a local path or gs://, not "):
        files.check_output(address, flag="--out", folder=True)
    with pytest.raises(UserError, match=rf"^{address}: expected .* not {scheme}://"):
        open_trained(address)


@pytest.mark.parametrize("is_linked", [False, True])
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/99", "checkpoints/new/x"])
def test_nothing_is_written_between_the_checkpoints_of_a_run(tmp_path, name, folder, is_linked):
    """`checkpoints/99` would be the newest step for every reader."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to("run")
    path = tmp_path / ("link" if is_linked else "run") / f"{name}{'' if folder else '.png'}"
    files.check_output(path, flag="--out", folder=folder)  # no run yet
    (tmp_path / "run" / "config.json").write_text("{}")
    if folder or "/" in name:
        with pytest.raises(UserError, match=r"is in the checkpoints of the run .*/run, where"):
            files.check_output(path, flag="--out", folder=folder)
    files.check_output(tmp_path / "run" / "evaluation", flag="--out", folder=folder)


def test_what_the_system_refuses_is_one_line(places):
    with pytest.raises(UserError, match=r"file/a cannot be written: "):
        files.write_whole(places / "file" / "a", "text")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_picture_that_is_not_finite_is_named(value):
    """It would be written as black, or as what the processor makes of it."""
    pictures = np.zeros((3, 4, 4, 3), np.float32)
    pictures[1, 2, 0, 1] = value
    with pytest.raises(UserError, match=r"^b is not finite, as 1 of 3 pictures"):
        images.check_finite(pictures, ["a", "b", "c"], what="picture")
    images.check_finite(pictures[[0, 2]], ["a", "c"], what="picture")


def test_a_folder_is_whole_or_not_there(tmp_path):
    out = tmp_path / "new" / "folder"
    with pytest.raises(UserError, match="nowhere"), files.write_folder(out, seal="sums") as folder:
        files.write_streamed(folder / "nowhere" / "a", lambda file: None)
    assert not list((tmp_path / "new").iterdir())
    out.mkdir()  # an empty folder is none
    with files.write_folder(out, seal="sums") as folder:
        (folder / "below").mkdir()
        (folder / "below" / "a").write_text("a")
        assert not list(out.iterdir())
    assert (out / "below" / "a").read_text() == "a"
    with pytest.raises(AlreadyExistsError, match="exists"), files.write_folder(out, seal="sums"):
        raise AssertionError
    assert [child.name for child in (tmp_path / "new").iterdir()] == ["folder"]


KILLED_IN_A_FOLDER = """
import os, signal, sys
from univg_jax.files import write_folder

with write_folder(sys.argv[1], seal="sums") as folder:
    (folder / "a").write_text("a")
    (folder / "sums").write_text("a")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_leaves_no_folder(tmp_path):
    command = [sys.executable, "-c", KILLED_IN_A_FOLDER, str(tmp_path / "out")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    assert left.name.endswith(".partial")
    with files.write_folder(tmp_path / "out", seal="sums"):
        pass
    assert (tmp_path / "out").is_dir()


def test_a_disk_that_is_too_full_is_told_beforehand(tmp_path):
    files.check_space(tmp_path / "not" / "yet", 10)
    with pytest.raises(UserError, match=r"needs 1073741824.00 GiB, and .* has .* GiB left"):
        files.check_space(tmp_path / "not" / "yet", 2**60)
