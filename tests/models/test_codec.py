"""The linear codec: what it keeps, how it scales its latents, and the laws of a projection."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from univg_jax.errors import UserError
from univg_jax.models.codec import PatchCodec, fit_patch_codec


def natural_images(n: int, size: int, seed: int) -> np.ndarray:
    """Pictures with the amplitude spectrum of natural images, 1/frequency, colors strongly
    correlated.
    """
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    f[0, 0] = 1 / size
    spectrum = np.fft.fft2(rng.normal(size=(n, 3, size, size))) / f
    x = np.fft.ifft2(spectrum).real.transpose(0, 2, 3, 1)
    x = x @ np.array([[1.0, 0.9, 0.8], [0.2, 0.0, -0.2], [0.05, -0.1, 0.05]])
    return np.clip(127 + 45 * x / x.std(), 0, 255).astype(np.uint8)


def to_float(images: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


IMAGES = natural_images(64, 32, seed=0)
HELD_OUT = to_float(natural_images(32, 32, seed=1))


def codec(**options):
    options = dict(patch=4, channels=16, whiten=0.5) | options
    params = {"params": fit_patch_codec(IMAGES, **options)}
    module = PatchCodec(patch=options["patch"], channels=options["channels"])
    return (
        lambda x: module.apply(params, x, method="encode"),
        lambda z: module.apply(params, z, method="decode"),
    )


def test_sixteen_components_keep_the_variance_of_new_images():
    encode, decode = codec()
    latents = encode(HELD_OUT)
    assert latents.shape == (32, 8, 8, 16)
    error = jnp.mean((decode(latents) - HELD_OUT) ** 2)
    assert 1 - error / HELD_OUT.var() >= 0.97


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_whiten_sets_the_proportions_and_the_mean_variance_is_one(whiten):
    encode, _ = codec(whiten=whiten)
    plain, _ = codec(whiten=0.0)
    z, z0 = (np.asarray(f(to_float(IMAGES))).reshape(-1, 16) for f in (encode, plain))
    assert z.var(0).mean() == pytest.approx(1, rel=1e-3)  # float32 sums over 4096 patches
    # Variances are those of the orthonormal components to the power 1 - whiten.
    np.testing.assert_allclose(
        np.log(z.var(0) / z.var(0)[0]), (1 - whiten) * np.log(z0.var(0) / z0.var(0)[0]), atol=1e-3
    )
    np.testing.assert_allclose(z.mean(0), 0, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(patch=st.sampled_from([2, 4, 8]), whiten=st.floats(0, 1), seed=st.integers(0, 99))
def test_decoding_then_encoding_gives_the_latents_back(patch, whiten, seed):
    encode, decode = codec(patch=patch, channels=6, whiten=whiten)
    latents = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3, 5, 6)), jnp.float32)
    # small scales divide float32 errors
    np.testing.assert_allclose(encode(decode(latents)), latents, atol=1e-3)


def test_all_components_lose_nothing():
    encode, decode = codec(channels=48)
    # float32 on values of order 1
    np.testing.assert_allclose(decode(encode(HELD_OUT)), HELD_OUT, atol=1e-5)


def test_the_fit_is_deterministic_and_its_signs_are_fixed():
    first, again = (fit_patch_codec(IMAGES, patch=4, channels=16, whiten=0.5) for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    basis = first["basis"]
    # float32 rounding of unit vectors
    np.testing.assert_allclose(basis.T @ basis, np.eye(16), atol=1e-6)
    assert (basis[np.abs(basis).argmax(0), np.arange(16)] > 0).all()


@pytest.mark.parametrize("whiten", [0.0, 1.0])
def test_flat_images_stay_finite(whiten):
    flat = np.full((2, 8, 8, 3), 200, np.uint8)
    params = {"params": fit_patch_codec(flat, patch=4, channels=16, whiten=whiten)}
    module = PatchCodec()
    latents = module.apply(params, to_float(flat), method="encode")
    np.testing.assert_allclose(latents, 0, atol=1)
    np.testing.assert_allclose(
        module.apply(params, latents, method="decode"), to_float(flat), atol=1e-5
    )


def test_errors():
    with pytest.raises(UserError, match=r"codec\.channels=49: a patch of 4 px has 1 to 48"):
        fit_patch_codec(IMAGES, patch=4, channels=49, whiten=0.5)
    with pytest.raises(UserError, match=r"codec\.whiten=1\.5: expected 0 to 1"):
        fit_patch_codec(IMAGES, patch=4, channels=16, whiten=1.5)
    with pytest.raises(UserError, match="needs images"):
        fit_patch_codec(IMAGES[:0], patch=4, channels=16, whiten=0.5)
    encode, _ = codec()
    with pytest.raises(UserError, match="image of 30 x 32 px: both sides must be a multiple"):
        encode(HELD_OUT[:, :30])
