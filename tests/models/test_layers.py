"""Layers whose gradients are written by hand, against their equations and the gradients that JAX
derives of them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univg_jax.models.layers import (
    Linear,
    add_bias,
    add_gated,
    gelu_tanh,
    modulated_norm,
    rms_norm,
)


def plain_gelu(x):
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def plain_rms_norm(x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale[None, None]


def plain_modulated_norm(x, scale, shift):
    normal = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return normal * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize(
    ("layer", "plain", "shapes"),
    [
        (gelu_tanh, plain_gelu, [(2, 3, 40)]),
        (lambda x, scale: rms_norm(x, scale, 1e-6), plain_rms_norm, [(2, 3, 40), (40,)]),
        (modulated_norm, plain_modulated_norm, [(2, 3, 40), (2, 40), (2, 40)]),
        (add_bias, lambda x, bias: x + bias[None], [(6, 40), (40,)]),
        (add_gated, lambda x, g, y: x + g[:, None] * y, [(2, 3, 40), (2, 40), (2, 3, 40)]),
    ],
    ids=["gelu_tanh", "rms_norm", "modulated_norm", "add_bias", "add_gated"],
)
def test_value_and_gradients_are_the_equations(layer, plain, shapes):
    rng = np.random.default_rng(0)
    inputs = [jnp.asarray(2 * rng.normal(size=shape), jnp.float32) for shape in shapes]
    direction = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)

    def output_and_gradients(f):
        out, backward = jax.vjp(f, *inputs)
        return out, *backward(direction)

    for got, want in zip(output_and_gradients(layer), output_and_gradients(plain), strict=True):
        # float32 sums of tens of terms in another order; the norms' gradients are differences of
        # such sums
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def test_gradients_of_biases_and_gates_are_sums_in_float32():
    rng = np.random.default_rng(0)
    rows = 20_000
    wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)  # noqa: E731

    def draw(*shape):
        # around one, as gradients of one sign are: a sum in bfloat16 stops growing at 256 terms
        return jnp.asarray(1 + rng.normal(size=shape), jnp.bfloat16)

    x, direction = draw(rows, 8), draw(rows, 8)
    _, backward = jax.vjp(add_bias, x, jnp.zeros(8))
    np.testing.assert_allclose(backward(direction)[1], wide(direction).sum(0), rtol=1e-5)

    x, y, direction = (v.reshape(1, rows, 8) for v in (x, draw(rows, 8), direction))
    _, backward = jax.vjp(add_gated, x, jnp.zeros((1, 8), jnp.bfloat16), y)
    # The gate is bfloat16, and so is its gradient, rounded once: 2^-8.
    np.testing.assert_allclose(
        wide(backward(direction)[1]), (wide(direction) * wide(y)).sum(1), rtol=2**-8
    )


def test_gelu_is_finite_with_its_gradient_far_from_zero():
    x = jnp.array([-1e4, -30.0, 0.0, 30.0, 1e4])
    np.testing.assert_array_equal(gelu_tanh(x), jnp.array([0.0, 0.0, 0.0, 30.0, 1e4]))
    np.testing.assert_array_equal(
        jax.vmap(jax.grad(gelu_tanh))(x), jnp.array([0.0, 0.0, 0.5, 1.0, 1.0])
    )


def test_linear_takes_a_hosts_array():
    x = np.ones((2, 3, 4), np.float32)
    params = Linear(5).init(jax.random.key(0), x)
    expected = x @ np.asarray(params["params"]["kernel"])  # its bias starts at zero
    np.testing.assert_allclose(
        jax.jit(lambda p: Linear(5).apply(p, x))(params), expected, rtol=1e-6
    )
