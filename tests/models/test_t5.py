"""The T5 encoder by itself: positions, padding, precision, recomputation. Its numbers:
tests/interop/test_t5.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univg_jax.models.t5 import T5Encoder, position_buckets

TINY = T5Encoder(vocab_size=40, hidden_dim=12, depth=2, num_heads=3, head_dim=5, mlp_dim=20)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: (rng.normal(size=s.shape) / s.shape[-1] ** 0.5).astype(np.float32), shapes
    )


def apply(module, params, *inputs):
    return jax.jit(lambda p, *x: module.apply({"params": p}, *x))(params, *inputs)


def test_position_buckets():
    """T5's 32 rows: 0 .. 7 one offset each, then 8 of growing width up to 128, and 16 more for
    later keys.
    """
    far = np.array([7, 8, 11, 12, 15, 16, 22, 23, 31, 32, 45, 46, 63, 64, 90, 91, 128, 10**6])
    rows = np.array([7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15, 15])
    found = lambda offsets: position_buckets(offsets, num_buckets=32, max_distance=128)  # noqa: E731
    np.testing.assert_array_equal(found(-far), rows)
    np.testing.assert_array_equal(found(far), rows + 16)
    np.testing.assert_array_equal(found(np.arange(-3, 4)), [3, 2, 1, 0, 17, 18, 19])


def test_layers_are_one_stack_by_the_names_that_are_sharded(params):
    shapes = jax.tree.map(np.shape, params)
    linear = lambda *shape: {"kernel": shape}  # noqa: E731
    assert shapes["blocks"] == {
        "attn_norm": {"scale": (2, 12)},
        "q": linear(2, 12, 15),
        "k": linear(2, 12, 15),
        "v": linear(2, 12, 15),
        "attn_out": linear(2, 15, 12),
        "mlp_norm": {"scale": (2, 12)},
        "mlp": {"gate": linear(2, 12, 20), "in": linear(2, 12, 20), "out": linear(2, 20, 12)},
    }
    assert shapes["relative_bias"] == (32, 3)


def test_padding_has_no_influence(params):
    tokens = np.arange(14, dtype=np.int32).reshape(2, 7)
    mask = np.arange(7)[None] < np.array([[7], [4]])
    want = apply(TINY, params, tokens, mask)
    junk = np.where(mask, tokens, 33).astype(np.int32)
    np.testing.assert_array_equal(want[mask], apply(TINY, params, junk, mask)[mask])
    alone = apply(TINY, params, tokens[1:, :4])  # no mask: attends to all
    # outputs of about 0.3; another reduction length
    np.testing.assert_allclose(want[1, :4], alone[0], atol=1e-5)


def test_order_matters_by_relative_position_only(params):
    """The first layer's bias is the only sense of order: without it, permuted tokens give permuted
    outputs.
    """
    tokens, order = np.arange(6, dtype=np.int32)[None], np.array([3, 0, 5, 1, 4, 2])
    out, moved = apply(TINY, params, tokens), apply(TINY, params, tokens[:, order])
    assert np.abs(out[:, order] - moved).max() > 0.01
    blind = params | {"relative_bias": np.zeros((32, 3), np.float32)}
    out, moved = apply(TINY, blind, tokens), apply(TINY, blind, tokens[:, order])
    # outputs of about 0.3; sums in another order
    np.testing.assert_allclose(out[:, order], moved, atol=1e-5)


def test_compute_dtype_is_a_field_and_sums_stay_in_float32(params):
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    full, half = apply(TINY, params, tokens), apply(TINY.clone(dtype=jnp.bfloat16), params, tokens)
    assert half.dtype == jnp.bfloat16
    # outputs of about 0.3, 8 bits
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.02)
    # The float32 sum of the blocks holds what float16 cannot; the final norm brings it back.
    large = params | {"word_embeddings": 1e6 * params["word_embeddings"]}
    assert np.isfinite(
        apply(TINY.clone(dtype=jnp.float16), large, tokens).astype(jnp.float32)
    ).all()


def test_remat_changes_no_gradient(params):
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4)
    grads = [
        jax.jit(jax.grad(lambda p, m=m: m.apply({"params": p}, tokens).sum()))(params)
        for m in (TINY, TINY.clone(remat=True))
    ]
    # fused otherwise
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)
