"""LPIPS: its formula on any weights, and beside the same network in PyTorch (marker `parity`)."""

import jax
import numpy as np
import pytest

from tests.helpers import record_parity
from univg_jax.interop.lpips import load_lpips
from univg_jax.models.lpips import BACKBONES, LPIPS, MEAN, SMALLEST, STD
from univg_jax.trees import map_named


def random_params(module, seed=0):
    """Weights that keep the size of activations; those of layers are positive, as learned."""
    rng = np.random.default_rng(seed)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    abstract = jax.eval_shape(module.init, jax.random.key(0), image, image)["params"]

    def make(name, leaf):
        value = rng.normal(size=leaf.shape).astype(np.float32)
        if name.startswith("weights"):
            return np.abs(value)
        return value * np.float32((2 / np.prod(leaf.shape[:-1], dtype=float)) ** 0.5)

    return map_named(make, abstract)


def pairs(batch, height, width, seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, batch, height, width, 3)
    return rng.uniform(-1, 1, shape).astype(np.float32)


def forward(module, params, a, b):
    return np.asarray(jax.jit(module.apply)({"params": params}, a, b))


@pytest.fixture(scope="module")
def alex():
    module = LPIPS("alex")
    return module, random_params(module)


def test_a_distance_is_symmetric_and_zero_of_the_same(alex):
    a, b = pairs(2, 40, 33)
    there, back = forward(*alex, a, b), forward(*alex, b, a)
    assert (there > 1e-3).all()
    np.testing.assert_allclose(there, back, rtol=1e-5)  # float32
    np.testing.assert_allclose(forward(*alex, a, a), 0, atol=1e-9)


@pytest.mark.parametrize("network", SMALLEST)
def test_the_smallest_pictures_leave_a_pixel_of_the_last_layer(network):
    module = LPIPS(network)
    for size, is_enough in ((SMALLEST[network], True), (SMALLEST[network] - 1, False)):
        a, b = pairs(1, size, size)
        found = forward(module, random_params(module), a, b)  # NaN is the mean of no pixels
        assert np.isfinite(found).all() == is_enough


def test_weights_are_of_layers(alex):
    """The distance is a sum over layers."""
    module, params = alex
    a, b = pairs(1, 40, 40)
    names = [f"weights{k}" for k in range(5)]
    parts = []
    for kept in names:
        alone = {name: params[name] * (name == kept) for name in names}
        parts.append(forward(module, {**params, **alone}, a, b))
    np.testing.assert_allclose(sum(parts), forward(module, params, a, b), rtol=1e-5)
    assert all(part > 0 for part in parts)


# (network, batch, height, width)
CONFIGS = {
    "alex-smallest": ("alex", 2, 31, 31),
    "alex-wide": ("alex", 1, 64, 150),
    "vgg-smallest": ("vgg", 2, 16, 16),
    "vgg-high": ("vgg", 1, 70, 37),
}


def their_network(torch, name):
    """A list of layers as torchvision has it, and which of them LPIPS compares."""
    from torch.nn import Conv2d, MaxPool2d, ReLU, Sequential

    if name == "alex":
        layers = [
            *(Conv2d(3, 64, 11, 4, 2), ReLU(), MaxPool2d(3, 2)),
            *(Conv2d(64, 192, 5, padding=2), ReLU(), MaxPool2d(3, 2)),
            *(Conv2d(192, 384, 3, padding=1), ReLU(), Conv2d(384, 256, 3, padding=1), ReLU()),
            *(Conv2d(256, 256, 3, padding=1), ReLU()),
        ]
        return Sequential(*layers), (1, 4, 7, 9, 11)
    layers, before = [], 3
    for channels, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        layers += [MaxPool2d(2, 2)] if layers else []
        for _ in range(count):
            layers += [Conv2d(before, channels, 3, padding=1), ReLU()]
            before = channels
    return Sequential(*layers), (3, 8, 15, 22, 29)


def their_distances(torch, network, outputs, heads, a, b):
    """The same formula in PyTorch."""
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
    features = []
    for x in (a, b):
        x, layers = (torch.tensor(x.transpose(0, 3, 1, 2)) - mean) / std, []
        for place, layer in enumerate(network):
            x = layer(x)
            if place in outputs:
                layers.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        features.append(layers)
    layers = zip(*features, heads, strict=True)
    maps = [torch.nn.functional.conv2d((x - y) ** 2, weights) for x, y, weights in layers]
    return sum(layer.mean((1, 2, 3)) for layer in maps).numpy()


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_torch(name, tmp_path, record_property):
    torch = pytest.importorskip("torch")
    name, *size = CONFIGS[name]
    torch.manual_seed(0)
    network, outputs = their_network(torch, name)
    heads = [torch.rand(1, layer.convs[-1][0], 1, 1) for layer in BACKBONES[name]]
    torch.save({f"features.{k}": x for k, x in network.state_dict().items()}, tmp_path / "net.pth")
    named = {f"lin{k}.model.1.weight": weights for k, weights in enumerate(heads)}
    torch.save(named, tmp_path / "heads.pth", _use_new_zipfile_serialization=False)
    module, params = load_lpips([tmp_path / "net.pth", tmp_path / "heads.pth"])
    a, b = pairs(*size)
    with torch.no_grad():
        theirs = their_distances(torch, network, outputs, heads, a, b)
    error = np.abs(forward(module, params, a, b) / theirs - 1).max()
    batch, height, width = size
    configuration = f"{name}: {height}x{width} px, batch {batch}; relative to the distance"
    record_parity(record_property, network="LPIPS", configuration=configuration, forward=error)
    assert error <= 2e-5  # float32 roundings
