"""Networks of pictures as scorers: their own vectors, whatever else is in the batch."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.interop.test_lpips_weights import their_convs, their_heads
from tests.interop.torch_file import torch_zip
from tests.models.test_lpips import random_params
from univg_jax.errors import UserError
from univg_jax.evaluation import fid
from univg_jax.evaluation.scorers import dino, inception, lpips, network
from univg_jax.interop.inception import TENSORS, load_inception
from univg_jax.interop.lpips import load_lpips
from univg_jax.interop.transformers import load_dino
from univg_jax.models.inception import InceptionV3
from univg_jax.models.lpips import LPIPS
from univg_jax.trees import named_leaves

RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((40, 64), (90, 33), (32, 32))]
D, MLP, SIDE, PATCH = 8, 16, 32, 8


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    """A ViTModel of two layers, in Hugging Face's names."""
    folder = tmp_path_factory.mktemp("dino")
    config = dict(
        **dict(model_type="vit", image_size=SIDE, patch_size=PATCH, hidden_size=D),
        **dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=MLP),
    )
    (folder / "config.json").write_text(json.dumps(config))
    linear = {"embeddings.patch_embeddings.projection": (D, 3, PATCH, PATCH)}
    norms = ["layernorm"]
    for k in range(2):
        layer = f"encoder.layer.{k}."
        names = [f"attention.attention.{name}" for name in ("query", "key", "value")]
        linear |= {layer + name: (D, D) for name in (*names, "attention.output.dense")}
        linear |= {f"{layer}intermediate.dense": (MLP, D), f"{layer}output.dense": (D, MLP)}
        norms += [f"{layer}layernorm_{place}" for place in ("before", "after")]
    shapes = {
        "embeddings.cls_token": (1, 1, D),
        "embeddings.position_embeddings": (1, 1 + (SIDE // PATCH) ** 2, D),
        **{f"{name}.weight": shape for name, shape in linear.items()},
        **{f"{name}.bias": shape[:1] for name, shape in linear.items()},
        **{f"{name}.{kind}": (D,) for name in norms for kind in ("weight", "bias")},
    }
    tensors = {name: RNG.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_dino_gives_the_class_token(dino_folder):
    found = dino.open_dino(str(dino_folder))(IMAGES)
    module, params = load_dino(dino_folder)
    for image, vector in zip(IMAGES, found, strict=True):
        pixels = dino.pixels(image, size=SIDE)[None]
        expected = module.apply({"params": params}, pixels).pooled[0]
        np.testing.assert_allclose(vector, expected, atol=1e-5)  # float32, batches of two sizes


def test_a_vector_does_not_depend_on_its_batch(dino_folder):
    scorer = dino.open_dino(str(dino_folder))
    many = scorer(IMAGES * 12)
    assert len(many) == 36 > network.BATCH_SIZE
    for k in range(3):  # float32, batches of several sizes
        np.testing.assert_allclose(scorer([IMAGES[k]])[0], many[k], atol=1e-5)
        np.testing.assert_allclose(many[33 + k], many[k], atol=1e-5)
    np.testing.assert_allclose(scorer(IMAGES), many[:3], atol=1e-5)


def test_dinos_square_is_the_middle_one():
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, 20:44] = 255
    pixels = dino.pixels(wide, size=28)  # of 32 x 64, the middle 28
    white = (1 - np.float32(dino.MEAN)) / np.float32(dino.STD)
    np.testing.assert_allclose(pixels[:, 4:24], np.broadcast_to(white, (28, 20, 3)), atol=1e-6)
    assert (pixels[:, [0, -1]] < 0).all()


def test_a_digest_names_the_weights_wherever_they_lie(dino_folder, tmp_path):
    first = dino.open_dino(str(dino_folder)).digest
    for file in dino_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert dino.open_dino(str(tmp_path)).digest == first
    changed = {name: x + 1 for name, x in load_file(dino_folder / "model.safetensors").items()}
    save_file(changed, tmp_path / "model.safetensors")
    assert dino.open_dino(str(tmp_path)).digest != first


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the names of pt_inception."""
    image = jax.ShapeDtypeStruct((1, 75, 75, 3), np.float32)
    abstract = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    tensors = {}
    for name, leaf in named_leaves(abstract).items():
        *modules, kind = name.split("/")
        shape = (
            np.transpose(np.empty(leaf.shape), (3, 2, 0, 1)[: leaf.ndim]).shape
            if (leaf.ndim == 4)
            else leaf.shape[::-1]
        )
        width = np.prod(shape[1:], dtype=float)
        values = np.ones(shape) if kind == "var" else RNG.normal(0, (1 / width) ** 0.5, shape)
        tensors[".".join([*modules, TENSORS[kind]])] = values.astype(np.float32)
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(tensors, file)
    return file


def test_inception_gives_the_features_of_a_convention(inception_file):
    scorer = inception.open_inception(str(inception_file), convention="tf1")
    (found,) = scorer(IMAGES[:1])
    module, params = load_inception(inception_file)
    pixels = fid.preprocess(IMAGES[0], convention="tf1")[None]
    expected = np.asarray(jax.jit(module.apply)({"params": params}, pixels)[0])
    assert found.shape == (2048,)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    other = inception.open_inception(str(inception_file), convention="clean-fid")
    assert other.digest != scorer.digest
    assert other.opened_with == {"convention": "clean-fid"}


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """A backbone and its heads in PyTorch's names."""
    folder = tmp_path_factory.mktemp("lpips")
    params = random_params(LPIPS("alex"))
    (folder / "net.pth").write_bytes(torch_zip(their_convs("alex", params)))
    (folder / "heads.pth").write_bytes(torch_zip(their_heads(params)))
    return folder / "net.pth", folder / "heads.pth"


def test_lpips_of_pictures(lpips_files):
    net, heads = map(str, lpips_files)
    scorer = lpips.Lpips(net, heads=heads)
    a, b = RNG.integers(0, 256, (2, 40, 33, 3), np.uint8)
    module, params = load_lpips(lpips_files)
    pixels = (x[None].astype(np.float32) / 127.5 - 1 for x in (a, b))
    expected = jax.jit(module.apply)({"params": params}, *pixels)[0]
    assert scorer(a, b) == pytest.approx(float(expected), rel=1e-5)
    assert scorer(a, b) > 1e-3
    assert abs(scorer(a, a)) < 1e-9
    assert scorer.opened_with == {"lpips": "alex"}
    with pytest.raises(UserError, match="pictures of 33 x 30: LPIPS's alex needs 31 a side"):
        scorer(a[:30], b[:30])


def test_a_digest_of_lpips_names_both_files(lpips_files, tmp_path):
    net, heads = lpips_files
    params = random_params(LPIPS("alex"), seed=1)
    (tmp_path / "heads.pth").write_bytes(torch_zip(their_heads(params)))
    first = lpips.Lpips(str(net), heads=str(heads)).digest
    assert lpips.Lpips(str(net), heads=str(tmp_path / "heads.pth")).digest != first
    (tmp_path / "heads.pth").write_bytes(heads.read_bytes())
    assert lpips.Lpips(str(net), heads=str(tmp_path / "heads.pth")).digest == first
