"""FID's Inception-v3 against torch-fidelity's: live where torch is there (marker `parity`), stored
elsewhere.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import record_parity
from univg_jax.errors import UserError
from univg_jax.interop.inception import load_inception
from univg_jax.models.inception import InceptionV3, preprocess
from univg_jax.sharding import make_mesh
from univg_jax.trees import named_leaves

REFERENCE = Path(__file__).parents[1] / "data" / "inception_reference.npz"
EVERY = 16  # of the features and logits is stored

# (batch, height, width) of the network's input; None: of uint8 images that go through `preprocess`
# to 299x299
CONFIGS = {
    "smallest": (3, 75, 75, False),
    "odd": (2, 107, 90, False),
    "wide": (1, 80, 211, False),
    "small-images": (1, 64, 48, True),
    "large-images": (2, 320, 301, True),
}


def images(batch, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def to_float(x):
    return (x.astype(np.float32) - 128) / 128


def random_tensors(shapes, seed=1):
    """A file's tensors, by their names in order: maps that keep the size of activations, moments
    near (0, 1).
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        value = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            value *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        else:
            value = (
                np.float32(name.endswith(("bn.weight", "running_var"))) + np.float32(0.1) * value
            )
        tensors[name] = value
    return tensors


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    shapes = json.loads(str(np.load(REFERENCE)["shapes"]))
    file = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(random_tensors(shapes), file)
    return file


def forward(model, params, x):
    """(features, logits)"""

    def f(p, x):
        features = model.apply({"params": p}, x)
        return features, model.apply({"params": p}, features, method="logits")

    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})(params, x)


def test_equals_the_stored_torch_features(file):
    """`inception_reference.npz` is torch-fidelity's output: see
    `test_the_stored_features_are_current`.
    """
    model, params = load_inception(file)
    want = np.load(REFERENCE)
    for got, name in zip(
        forward(model, params, to_float(images(2, 75, 107))), ("features", "logits")
    ):
        error = np.abs(got[:, ::EVERY] - want[name]).max()
        assert error <= 2e-5 * want[name].std(), name  # float32 through 94 convolutions


@pytest.mark.parametrize(("height", "width"), [(299, 299), (32, 47), (640, 301)])
def test_preprocess(height, width):
    x = images(1, height, width)
    got = jax.jit(preprocess)(x)
    assert got.shape == (1, 299, 299, 3)
    assert got.dtype == jnp.float32
    if height == width == 299:
        np.testing.assert_array_equal(got, to_float(x))
    row, column = np.arange(299) * height / 299, np.arange(299) * width / 299
    y, x0 = row.astype(int), column.astype(int)
    fy, fx = (row - y)[:, None, None], (column - x0)[None, :, None]
    padded = np.pad(x[0].astype(float), ((0, 1), (0, 1), (0, 0)), mode="edge")
    top = padded[y][:, x0] * (1 - fx) + padded[y][:, x0 + 1] * fx
    bottom = padded[y + 1][:, x0] * (1 - fx) + padded[y + 1][:, x0 + 1] * fx
    want = (top * (1 - fy) + bottom * fy - 128) / 128
    # A place of up to 640 pixels is a float32: it is off by 3e-5, times a step of up to 2 between
    # pixels, twice.
    np.testing.assert_allclose(got[0], want, atol=1.3e-4)


def test_parameters_go_where_they_are_asked(file):
    mesh = make_mesh(fsdp=8)
    model, params = load_inception(file, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, mesh=mesh)
    assert model.dtype == jnp.bfloat16
    for leaf in named_leaves(params).values():
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding.mesh == mesh
    kernel = params["Mixed_7c"]["branch3x3dbl_2"]["conv"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    want = (
        load_file(file)["Mixed_7c.branch3x3dbl_2.conv.weight"]
        .transpose(2, 3, 1, 0)
        .astype(jnp.bfloat16)
    )
    np.testing.assert_array_equal(kernel, want)


def test_a_folder_is_searched(file, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"weights.pth is a pickle; convert it once, without running what it asks for",
    ):
        load_inception(tmp_path)
    with pytest.raises(UserError, match="is a pickle"):
        load_inception(tmp_path / "weights.pth")
    (tmp_path / "a.safetensors").symlink_to(file)
    assert isinstance(load_inception(tmp_path)[0], InceptionV3)
    (tmp_path / "b.safetensors").symlink_to(file)
    with pytest.raises(
        UserError, match=r"several safetensors files \(a.safetensors, b.safetensors\): name one"
    ):
        load_inception(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: expected a .safetensors file, or a folder with one"
    ):
        load_inception(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither c.safetensors"):
        load_inception(tmp_path / "c.safetensors")


def test_wrong_tensors_are_listed(file, tmp_path):
    tensors = load_file(file)
    tensors["fc.weight"] = np.zeros((1000, 2048), np.float32)  # torchvision's own classes
    tensors["AuxLogits.fc.bias"] = np.zeros(1000, np.float32)
    tensors["Conv2d_1a_3x3.bn.num_batches_tracked"] = np.zeros((), np.int64)  # ignored
    del tensors["Mixed_6e.branch_pool.bn.running_var"]
    save_file(tensors, tmp_path / "x.safetensors")
    message = (
        r"missing: Mixed_6e.branch_pool.bn.running_var; extra: AuxLogits.fc.bias; "
        r"misshaped: fc.weight \(expected"
    )
    with pytest.raises(UserError, match=message):
        load_inception(tmp_path / "x.safetensors")


def test_images_that_are_too_small():
    with pytest.raises(ValueError, match="images of 75x74: Inception-v3 needs 75x75 or more"):
        jax.eval_shape(InceptionV3().init, jax.random.key(0), jnp.zeros((1, 75, 74, 3)))


@pytest.fixture
def theirs(monkeypatch):
    """torch-fidelity's network with `random_tensors`, its names and shapes; `resize=False` skips
    its resizing.
    """
    torch = pytest.importorskip("torch")
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch_fidelity is not installed")
    # The package imports torchvision, which its Inception-v3 does not need: a bare package has the
    # same modules.
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        monkeypatch.delitem(sys.modules, name)
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    network_class, shapes = module.FeatureExtractorInceptionV3, {}

    def load(self, _):
        shapes.update(
            (name, list(value.shape)) for name, value in self.state_dict().items() if value.ndim
        )
        tensors = {name: torch.tensor(value) for name, value in random_tensors(shapes).items()}
        torch.nn.Module.load_state_dict(self, tensors)

    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(network_class, "load_state_dict", load)
    network = network_class("inception", ["2048", "logits"])
    resize = module.interpolate_bilinear_2d_like_tensorflow1x

    def features(x, *, resized):
        monkeypatch.setattr(
            module,
            "interpolate_bilinear_2d_like_tensorflow1x",
            resize if resized else lambda x, **_: x,
        )
        return [y.numpy() for y in network(torch.tensor(x.transpose(0, 3, 1, 2)))]

    return types.SimpleNamespace(shapes=shapes, features=features)


@pytest.mark.parity
def test_the_stored_features_are_current(theirs):
    """Fails where the reference is out of date; delete the file to write it anew."""
    features, logits = (y[:, ::EVERY] for y in theirs.features(images(2, 75, 107), resized=False))
    if not REFERENCE.exists():
        np.savez_compressed(
            REFERENCE, shapes=json.dumps(theirs.shapes), features=features, logits=logits
        )
    stored = np.load(REFERENCE)
    assert json.loads(str(stored["shapes"])) == theirs.shapes
    for name, want in (("features", features), ("logits", logits)):
        # other torch kernels
        np.testing.assert_allclose(stored[name], want, atol=1e-5 * want.std())


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_torch_fidelity(file, theirs, name, record_property):
    *size, resized = CONFIGS[name]
    x = images(*size)
    model, params = load_inception(file)
    got = forward(model, params, preprocess(x) if resized else to_float(x))
    wanted = theirs.features(x, resized=resized)
    error = max(np.abs(a - b).max() / b.std() for a, b in zip(got, wanted))
    batch, height, width = size
    configuration = (
        f"{height}x{width} px{' resized to 299' if resized else ''}, batch {batch}; "
        "features and logits"
    )
    record_parity(
        record_property, network="Inception-v3 (FID)", configuration=configuration, forward=error
    )
    assert error <= 2e-5  # float32 roundings
