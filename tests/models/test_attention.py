"""The kernels against the plain formula. On a CPU the TPU's kernel is interpreted; what a TPU makes
of it, `tests/test_plan.py` compiles.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from univg_jax import sharding
from univg_jax.models import attention
from univg_jax.models.attention import (
    cpu_attention,
    splash,
    splash_block,
    xla_attention,
)

interpreted = functools.partial(splash, interpret=True)


def inputs(b=2, n=40, s=40, k=2, c=64, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q, k_, v = (jax.random.normal(key, (b, m, k, c), dtype) for key, m in zip(keys, (n, s, s)))
    mask = np.ones((b, s), bool)
    mask[0, s - 5 :] = False  # padded text at the end
    return q, k_, v, jnp.asarray(mask)


def value_and_gradients(function, q, k, v, mask):
    """The output, and the gradient of a loss that reads rows that count: those whose own key is not
    masked.
    """
    weight = jax.random.normal(jax.random.key(9), q.shape) * (
        mask[:, : q.shape[1], None, None] if mask is not None else 1
    )

    def loss(q, k, v):
        out = function(q, k, v, mask)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out * (weight != 0), gradients


# 40 and 130 are no multiples of a block; in the last block of the model queries are fewer than
# keys.
@pytest.mark.parametrize(("n", "s"), [(40, 40), (130, 130), (128, 160)])
@pytest.mark.parametrize("masked", [True, False])
def test_splash_is_attention(n, s, masked):
    q, k, v, mask = inputs(n=n, s=s)
    mask = mask if masked else None
    ours, ours_gradients = value_and_gradients(interpreted, q, k, v, mask)
    plain, plain_gradients = value_and_gradients(xla_attention, q, k, v, mask)
    # float32 sums of up to 160 terms, in another order.
    np.testing.assert_allclose(ours, plain, atol=2e-6)
    for mine, theirs in zip(ours_gradients, plain_gradients):
        np.testing.assert_allclose(mine, theirs, atol=2e-5)


def test_splash_in_bfloat16_is_as_near_to_float32_as_the_formula_is():
    q, k, v, mask = inputs(dtype=jnp.bfloat16)
    exact = xla_attention(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    error = lambda out: float(jnp.abs(out.astype(jnp.float32) - exact)[1].max())  # noqa: E731
    out = interpreted(q, k, v, mask)
    assert out.dtype == jnp.bfloat16
    # Both round the output to 8 bits; the formula also rounds its weights, which the kernel does
    # not.
    assert error(out) <= 1.5 * error(xla_attention(q, k, v, mask))


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=4), dict(data=1, fsdp=4, tensor=2)])
def test_splash_on_a_mesh_is_splash_on_one_device(axes):
    q, k, v, mask = inputs(b=8)
    alone = interpreted(q, k, v, mask)
    jax.set_mesh(sharding.make_mesh(**axes))
    together = jax.jit(interpreted)(q, k, v, mask)
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_a_batch_that_does_not_divide_over_the_mesh_is_attended_without_the_kernel():
    q, k, v, mask = inputs(b=1)
    alone = xla_attention(q, k, v, mask)
    jax.set_mesh(sharding.make_mesh(data=8))
    np.testing.assert_allclose(jax.jit(splash)(q, k, v, mask), alone, atol=1e-6)


@given(length=st.integers(1, 20_000), largest=st.sampled_from([512, 2048]))
@settings(deadline=None)
def test_blocks_are_lanes_wide_and_pad_little(length, largest):
    block = splash_block(length, largest=largest)
    assert block % attention.LANES == 0
    assert block <= largest
    padded, least = -(-length // block) * block, -(-length // attention.LANES) * attention.LANES
    assert padded <= attention.MAX_PADDING * least


@pytest.mark.parametrize(("kind", "platform", "dtype", "expected"), [
    ("TPU v5", "tpu", jnp.float32, "splash"),
    ("NVIDIA H100", "gpu", jnp.bfloat16, "cudnn_attention"),
    ("NVIDIA H100", "gpu", jnp.float32, "xla_attention"),
    ("cpu", "cpu", jnp.bfloat16, "cpu_attention"),
])  # fmt: skip
def test_auto_follows_the_platform_that_it_is_compiled_for(
    monkeypatch, kind, platform, dtype, expected
):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh(
        (1, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device
    )
    called = []
    for name in ("splash", "cudnn_attention", "cpu_attention", "xla_attention"):
        monkeypatch.setattr(
            attention, name, lambda q, k, v, mask, name=name: called.append(name) or q
        )
    with jax.sharding.use_abstract_mesh(mesh):
        attention.auto(*inputs(dtype=dtype))
    assert called == [expected]


def output_and_gradients(attention, mask, dtype):
    rng = np.random.default_rng(0)
    # more keys than queries
    q, k, v, g = (jnp.asarray(rng.normal(size=(3, n, 2, 8)), dtype) for n in (5, 7, 7, 5))
    out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
    return out, *backward(g)


# Unit normal inputs: float32 sums of tens of terms in another order; bfloat16 rounds to 2^-9, some
# times in a row.
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-6), (jnp.bfloat16, 4e-2)])
@pytest.mark.parametrize("lengths", [None, (7, 3, 1), (7, 3, 0)], ids=str)
def test_the_cpus_attention_is_attention(lengths, dtype, atol):
    mask = None if lengths is None else jnp.asarray(np.arange(7) < np.array(lengths)[:, None])
    got, want = (
        output_and_gradients(attention, mask, dtype) for attention in (cpu_attention, xla_attention)
    )
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert x.dtype == y.dtype == dtype
        np.testing.assert_allclose(
            x.astype(jnp.float32), y.astype(jnp.float32), atol=atol, err_msg=name
        )
        assert jnp.abs(y).max() > 0.1, name
