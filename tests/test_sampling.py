"""Solvers against closed forms, and guidance as arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univg_jax import sampling
from univg_jax.settings import Config, Guidance, Sampler


def gaussian_velocity(mean, std):
    """E[noise - x0 | x_t] for x0 ~ N(mean, std^2): the exact flow between Gaussians."""

    def v(x, t):
        variance = (1 - t) ** 2 * std**2 + t**2
        centered = x - (1 - t) * mean
        return t / variance * centered - (mean + (1 - t) * std**2 / variance * centered)

    return v


def endpoint(noise, mean, std):
    return mean + std * noise  # the flow is the monotone map between the two Gaussians


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solver_recovers_a_gaussian_at_its_order(solver, order, shift):
    noise = jax.random.normal(jax.random.key(0), (8, 2, 2, 1))
    mean, std = 1.5, 0.6

    def error(steps):
        x = sampling.solve(
            gaussian_velocity(mean, std), noise, Sampler(solver=solver, steps=steps, shift=shift)
        )
        return float(jnp.abs(x - endpoint(noise, mean, std)).max())

    coarse, fine = error(32), error(64)
    # Halving the step divides the error by 2^order; 15% for terms of higher order.
    assert coarse / fine == pytest.approx(2**order, rel=0.15)
    assert fine < 0.1  # well below the distribution's own width of 0.6


def test_a_straight_flow_is_solved_in_one_step():
    noise, x0 = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 3))
    x = sampling.solve(lambda x, t: noise - x0, noise, Sampler(steps=1))
    np.testing.assert_allclose(x, x0, atol=1e-6)  # one float32 subtraction


def constant_passes(values):
    """A model whose velocity in pass i is values[i] everywhere."""

    def predict(x, t):
        rows = x.shape[0] // len(values)
        return jnp.tile(jnp.array(values), rows)[:, None, None, None] * jnp.ones_like(x)

    return predict


@pytest.mark.parametrize(
    ("scales", "values", "expected"),
    [
        ({}, (2.0,), 2.0),
        ({"text": 3.0}, (2.0, 1.0), 1.0 + 3.0 * (2.0 - 1.0)),
        ({"text": 4.0, "image": 1.5}, (5.0, 3.0, 2.0), 2.0 + 1.5 * (3.0 - 2.0) + 4.0 * (5.0 - 3.0)),
    ],
)
def test_guidance_is_the_equation(scales, values, expected):
    weights = jnp.array(sampling.guidance_weights(Guidance(**scales)))
    v = sampling.guided_velocity(constant_passes(values), weights, Sampler())
    np.testing.assert_allclose(v(jnp.zeros((2, 2, 2, 1)), jnp.float32(0.5)), expected, rtol=1e-6)
    assert sum(sampling.guidance_weights(Guidance(**scales))) == pytest.approx(1)


def test_guidance_of_scale_one_is_the_conditional_model():
    weights = jnp.array(sampling.guidance_weights(Guidance(text=1.0, image=1.0)))
    v = sampling.guided_velocity(constant_passes((5.0, 3.0, 2.0)), weights, Sampler())
    np.testing.assert_allclose(v(jnp.zeros((1, 2, 2, 1)), jnp.float32(0.5)), 5.0)


def test_guidance_acts_inside_its_interval_only():
    weights = jnp.array(sampling.guidance_weights(Guidance(text=3.0)))
    v = sampling.guided_velocity(constant_passes((2.0, 1.0)), weights, Sampler(interval=(0.2, 0.8)))
    x = jnp.zeros((1, 2, 2, 1))
    assert float(v(x, jnp.float32(0.5))[0, 0, 0, 0]) == 4.0
    assert float(v(x, jnp.float32(0.9))[0, 0, 0, 0]) == 2.0
    assert float(v(x, jnp.float32(0.1))[0, 0, 0, 0]) == 2.0


def test_rescaled_guidance_has_the_conditional_standard_deviation():
    base = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))

    def predict(x, t):
        return jnp.stack([base, 0.1 * base], axis=1).reshape(-1, *base.shape[1:])

    weights = jnp.array(sampling.guidance_weights(Guidance(text=5.0)))
    guided = sampling.guided_velocity(predict, weights, Sampler(rescale=1.0))(
        jnp.zeros_like(base), jnp.float32(0.5)
    )
    np.testing.assert_allclose(guided.std((1, 2, 3)), base.std((1, 2, 3)), rtol=1e-5)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="did you mean 'euler'"):
        Config.of({"sampling": {"solver": "eulr"}})
    with pytest.raises(ValueError, match=r"sampling\.steps=0: expected a whole number >= 1"):
        Config.of({"sampling": {"steps": 0}})
    with pytest.raises(ValueError, match="needs a text scale"):
        Config.of({"sampling": {"guidance": {"ie": {"image": 1.5}}}})
