"""DINO beside its parity with transformers (tests/interop/test_encoders.py)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univg_jax.models.dino import DINO, MEAN, STD, preprocess
from univg_jax.models.vit import resize_positions

TINY = DINO(image_size=8, patch_size=4, hidden_dim=12, depth=2, num_heads=3, mlp_dim=20)


def test_defaults_are_the_published_network():
    """ViT-S/16 has 21,665,664 parameters without a classifier (arXiv 2104.14294, table 1: 21M)."""
    params = jax.eval_shape(DINO().init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(params)) == 21_665_664


def test_pooled_is_the_class_token_at_any_size():
    x = np.random.default_rng(0).normal(size=(2, 12, 20, 3)).astype(np.float32)
    params = jax.jit(TINY.init)(jax.random.key(0), x)["params"]
    out = jax.jit(TINY.apply)({"params": params}, x)
    assert out.last_hidden.shape == (2, 1 + 3 * 5, 12)
    np.testing.assert_array_equal(out.pooled, out.last_hidden[:, 0])
    with pytest.raises(
        ValueError, match="image of 12 x 10 px: both sides must be a multiple of the patch of 4 px"
    ):
        TINY.apply({"params": params}, x[:, :, :10])


def test_positions_are_interpolated():
    table = np.random.default_rng(0).normal(size=(5, 5, 3)).astype(np.float32)
    assert resize_positions(table, height=5, width=5) is table
    np.testing.assert_allclose(
        resize_positions(np.ones_like(table), height=9, width=3), 1, atol=1e-6
    )
    # A cubic kernel keeps a ramp straight where the border does not reach: two cells.
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None, None], (8, 8, 1))
    row = np.arange(6, 26)
    got = resize_positions(ramp, height=32, width=8)[row, 4, 0]
    assert np.abs(got - ((row + 0.5) / 4 - 0.5)).max() < 0.05


def test_preprocess_normalizes_and_crops():
    image = np.zeros((1, 32, 64, 3), np.uint8)
    image[:, 8:24, 24:40] = 255
    pixels = preprocess(image, size=28)  # resized to 32 x 64, so not at all; then cropped
    np.testing.assert_allclose(
        pixels,
        ((image[:, 2:30, 18:46] / 255 - np.array([[[MEAN]]])) / np.array([[[STD]]])),
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="a crop of 28 px does not fit into images of 20 px"):
        preprocess(image, size=28, shorter=20)
