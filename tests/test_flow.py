"""The flow's maths: path, velocity, times, loss and its independence of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from univg_jax import flow
from univg_jax.models.vae import AutoencoderKL
from univg_jax.settings import Config, Flow


def latents(seed, shape=(4, 3, 5, 2)):
    return jax.random.normal(jax.random.key(seed), shape)


def test_path_ends_at_data_and_noise():
    x0, noise = latents(0), latents(1)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, jnp.zeros(4)), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, jnp.ones(4)), noise)


def test_velocity_is_the_paths_derivative():
    x0, noise, t = latents(0), latents(1), jnp.array([0.1, 0.3, 0.6, 0.9])
    _, derivative = jax.jvp(lambda t: flow.interpolate(x0, noise, t), (t,), (jnp.ones(4),))
    # The path is linear in t: the derivative is exact but for one rounding of -x0 + noise.
    np.testing.assert_allclose(derivative, flow.velocity(x0, noise), atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(t=st.floats(0, 1, width=32), a=st.floats(0.125, 8, width=32))
def test_shift_keeps_the_ends_and_is_undone_by_its_inverse(t, a):
    shifted = float(flow.shift_times(jnp.float32(t), a))
    assert 0 <= shifted <= 1
    # a and 1/a are inverse maps; float32 loses at most a few ulp times the slope, which is <= 8.
    assert float(flow.shift_times(jnp.float32(shifted), 1 / a)) == pytest.approx(t, abs=1e-5)


def test_shift_moves_towards_noise():
    assert float(flow.shift_times(jnp.float32(0.5), 2.0)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("times", "mean_logit", "std_logit"),
    [
        (Flow(), 0.0, 1.0),
        (Flow(mean=0.5, std=0.7), 0.5, 0.7),
        # The shift adds log(a) to the logit.
        (Flow(shift=3.0), np.log(3.0), 1.0),
        # The logit of a uniform variable is logistic: mean 0, standard deviation pi / sqrt(3).
        (Flow(distribution="uniform"), 0.0, np.pi / np.sqrt(3)),
    ],
)
def test_times_have_the_declared_distribution(times, mean_logit, std_logit):
    n = 20_000
    t = np.asarray(
        flow.sample_times(jax.random.key(0), jnp.arange(n, dtype=jnp.uint32), times), np.float64
    )
    assert ((t > 0) & (t < 1)).all()
    logit = np.log(t) - np.log1p(-t)
    # Five standard errors of a mean and of a standard deviation over n draws (kurtosis below 4.2).
    assert logit.mean() == pytest.approx(mean_logit, abs=5 * std_logit / n**0.5)
    assert logit.std() == pytest.approx(std_logit, abs=5 * std_logit / n**0.5)


def test_draws_depend_on_the_sample_id_not_on_the_place():
    key, ids = jax.random.key(3), jnp.array([7, 1, 9, 4], jnp.uint32)
    order = jnp.array([2, 0, 3, 1])
    noise = flow.sample_noise(key, ids, (2, 2, 3))
    np.testing.assert_array_equal(flow.sample_noise(key, ids[order], (2, 2, 3)), noise[order])
    times = flow.sample_times(key, ids, Flow())
    np.testing.assert_array_equal(flow.sample_times(key, ids[order], Flow()), times[order])
    assert len(np.unique(np.asarray(times))) == 4


def test_loss_is_zero_for_the_true_velocity_and_its_mean_square_for_zero():
    x0, ids, times = latents(0), jnp.arange(4, dtype=jnp.uint32), Flow()

    def oracle(x_t, t):
        # x_t - x0 = t (noise - x0)
        return (x_t - x0) / t[:, None, None, None]

    key = jax.random.key(0)
    # Dividing by t amplifies float32 rounding; t > 0.02 for these four draws.
    np.testing.assert_allclose(
        flow.loss(oracle, x0, key=key, sample_id=ids, times=times), 0, atol=1e-8
    )
    _, noise_key = jax.random.split(key)
    noise = flow.sample_noise(noise_key, ids, x0.shape[1:])
    zero = flow.loss(lambda x_t, t: jnp.zeros_like(x_t), x0, key=key, sample_id=ids, times=times)
    np.testing.assert_allclose(zero, jnp.mean((noise - x0) ** 2, axis=(1, 2, 3)), rtol=1e-6)


def test_loss_is_float32_for_a_bfloat16_model():
    x0, ids = latents(0), jnp.arange(4, dtype=jnp.uint32)
    value = flow.loss(
        lambda x_t, t: x_t.astype(jnp.bfloat16),
        x0,
        key=jax.random.key(0),
        sample_id=ids,
        times=Flow(),
    )
    assert value.dtype == jnp.float32


def test_change_weights_favor_small_edits():
    x = latents(0, (2, 4, 4, 3))
    edited = x.at[0, 0, 0].add(1.0).at[1].add(5.0)
    changed = jnp.any(edited != x, axis=-1, keepdims=True)
    weight = flow.change_weights(edited, x, changed)
    mean_square = 3 * 1.0 / (4 * 4 * 3)  # one cell of three channels changed by one
    assert float(weight[0, 0, 0, 0]) == pytest.approx(1 / mean_square, rel=1e-4)
    np.testing.assert_array_equal(weight[0].ravel()[1:], 1.0)  # unchanged cells
    np.testing.assert_array_equal(weight[1], 1.0)  # a change of everything is not weighted down


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), share=st.floats(0.02, 1))
def test_the_loss_is_the_mean_over_what_counts(seed, share):
    mask = np.random.default_rng(seed).random((4, 12, 20, 1)) < share
    mask[:, 0, 0] = True
    shares = mask.reshape(4, 3, 4, 5, 4).mean((2, 4))[..., None]
    weights = flow.valid_weights(jnp.asarray(mask, jnp.uint8), cell=4)
    np.testing.assert_allclose(weights.mean((1, 2, 3)), 1, rtol=1e-5)
    x0, noise, t = latents(0), latents(1), jnp.full(4, 0.5)
    predict = lambda x_t, t: jnp.sin(3 * x_t)  # noqa: E731
    got = flow.loss_at(predict, x0, noise=noise, t=t, weight=weights)
    errors = (np.asarray(jnp.sin(3 * (x0 + noise) / 2)) - np.asarray(noise - x0)) ** 2
    expected = (shares * errors).sum((1, 2)).mean(-1) / shares.sum((1, 2, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_a_loss_mask_of_ones_changes_nothing():
    for shape in ((4, 12, 20, 1), (4, 28, 36, 1)):
        weights = flow.valid_weights(jnp.ones(shape, jnp.uint8), cell=4)
        np.testing.assert_array_equal(weights, 1.0)
    x0, noise, t = latents(0), latents(1), jnp.array([0.1, 0.3, 0.6, 0.9])

    @jax.jit
    def loss(mask):
        predict = lambda x_t, t: jnp.sin(3 * x_t)  # noqa: E731
        weight = None if mask is None else flow.valid_weights(mask, cell=4)
        return flow.loss_at(predict, x0, noise=noise, t=t, weight=weight)

    # Each term is the same; XLA may add them in another order.
    np.testing.assert_allclose(loss(jnp.ones((4, 12, 20, 1), jnp.uint8)), loss(None), rtol=1e-6)


def test_a_row_without_a_pixel_that_counts_has_no_loss():
    mask = jnp.zeros((2, 8, 8, 1), jnp.uint8).at[1, 3, 3].set(1)
    weights = flow.valid_weights(mask, cell=4)
    assert not weights[0].any()
    np.testing.assert_array_equal(weights[1, ..., 0], [[4, 0], [0, 0]])


def test_an_edit_changes_the_cells_that_it_touches_whatever_the_encoder_sees():
    rng = np.random.default_rng(0)
    source = rng.integers(20, 235, (3, 64, 64, 3), np.uint8)
    target = source.copy()
    target[0, 8:16, 24:32] += 20  # one cell of 64: 1.6% of the pixels
    target[1] += rng.integers(-4, 5, target[1].shape).astype(np.uint8)  # as compression does
    target[2] = 255 - target[2]
    vae = AutoencoderKL(latent_channels=4, widths=(8, 8, 8, 8), depth=1, groups=4)
    params = vae.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    encode = lambda x: vae.apply({"params": params}, x / 127.5 - 1, method="encode").mode  # noqa: E731
    moved = jnp.abs(encode(target) - encode(source)).max(-1)[0]
    assert (moved > 0).all()  # the encoder's normalization and attention reach every cell
    changed = np.asarray(
        flow.changed_cells(jnp.asarray(target), jnp.asarray(source), cell=vae.downsampling)
    )
    assert np.argwhere(changed[0, ..., 0]).tolist() == [[1, 3]]
    assert not changed[1].any()
    assert changed[2].all()


def test_unknown_distribution_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'logit_normal'"):
        Config.of({"flow": {"distribution": "logitnormal"}})
