"""Depth from ONNX files, run by the real onnxruntime."""

import json

import numpy as np
import pytest

from tests.evaluation.onnx_model import onnx_model
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.scorers.opening import open_scorers

pytest.importorskip("onnxruntime")


@pytest.fixture
def write(tmp_path):
    def write_both(outputs, spec, *, shape=(1, 3, "h", "w")):
        path = tmp_path / "depth.onnx"
        path.write_bytes(onnx_model(outputs, inputs={"pixels": ("float32", shape)}))
        (tmp_path / "depth.json").write_text(
            json.dumps({"size": [4, 6], "larger": "nearer"} | spec)
        )
        return path

    return write_both


def opened(path):
    return open_scorers({"depth": f"{path}"}, answers="unused")["depth"]


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (1, 1, 4, 6)])
@pytest.mark.parametrize("larger", ["nearer", "farther"])
def test_larger_is_nearer_at_the_size_of_the_picture(write, shape, larger):
    plane = np.arange(24, dtype=np.float32).reshape(shape)
    scorer = opened(write({"d": plane}, {"larger": larger}))
    found = scorer(np.zeros((8, 12, 3), np.uint8))
    assert found.shape == (8, 12)
    assert found.dtype == np.float32
    # Where the centers of pixels lie between four of the network's, they have the mean of those.
    sign = 1 if larger == "nearer" else -1
    small = sign * plane.reshape(4, 6)
    inner = found[1:-1, 1:-1].reshape(3, 2, 5, 2).mean((1, 3))
    means = (small[:-1, :-1] + small[1:, :-1] + small[:-1, 1:] + small[1:, 1:]) / 4
    np.testing.assert_allclose(inner, means, atol=1e-5)


def test_the_network_sees_the_resized_picture_as_described(write):
    """This one answers with its input: the three channels of one pixel, as a plane of 1 x 3."""
    spec = {"color": "bgr", "layout": "hwc", "size": [1, 1], "mean": [0, 0.5, 0], "std": [1, 1, 2]}
    scorer = opened(write({"d": "pixels"}, spec, shape=(1, 1, 3)))
    image = np.full((1, 3, 3), (204, 102, 51), np.uint8)
    np.testing.assert_allclose(scorer(image), [[0.2, 0.4 - 0.5, 0.8 / 2]], atol=1e-6)


def test_another_size_than_the_network_takes_is_one_line(write):
    path = write({"d": "pixels"}, {}, shape=(1, 3, 8, 6))
    with pytest.raises(UserError, match="takes pictures of 8 x 6 alone"):
        opened(path)


def test_its_digest_is_of_model_and_description(write):
    plane = np.ones((1, 4, 6), np.float32)
    first = opened(write({"d": plane}, {})).digest
    assert opened(write({"d": plane}, {})).digest == first
    assert opened(write({"d": plane}, {"larger": "farther"})).digest != first
    assert opened(write({"d": 2 * plane}, {})).digest != first


@pytest.mark.parametrize(
    ("outputs", "spec", "message"),
    [
        ({"d": np.ones((2, 4, 6), np.float32)}, {}, r"gives \[2, 4, 6\]: expected one plane"),
        ({"d": np.ones(6, np.float32)}, {}, r"gives \[6\]: expected one plane"),
        ({"d": np.full((4, 6), np.nan, np.float32)}, {}, "depth are not finite"),
        ({"d": np.ones((4, 6), np.float32)}, {"larger": "near"}, "did you mean 'nearer'"),
        ({"d": np.ones((4, 6), np.float32)}, {"sise": 3}, "did you mean 'size'"),
        ({"d": np.ones((4, 6), np.float32)}, {"output": "e"}, "has no output 'e'"),
    ],
)
def test_what_cannot_be_used_is_one_line(write, outputs, spec, message):
    with pytest.raises(UserError, match=message) as error:
        opened(write(outputs, spec))
    assert str(error.value).startswith("--scorer=depth: ")


def test_a_missing_file_is_named(write, tmp_path):
    path = write({"d": np.ones((4, 6), np.float32)}, {})
    (tmp_path / "depth.json").unlink()
    with pytest.raises(NotFoundError, match=r"depth.json does not exist: expected a description"):
        opened(path)
    with pytest.raises(NotFoundError, match=r"no.onnx does not exist"):
        opened(tmp_path / "no.onnx")
