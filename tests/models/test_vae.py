"""The VAE beside its numerics (tests/interop/test_vae.py): its two scales, sampling, tiling, dtype,
remat, errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univg_jax.errors import UserError
from univg_jax.models.vae import AutoencoderKL, Moments, map_tiles

TINY = AutoencoderKL(
    latent_channels=3, widths=(8, 12), depth=1, groups=4, quant_conv=True, post_quant_conv=True
)


def images(height, width, batch=2, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def smooth_images(height, width):
    """Waves of about 12 pixels: every tile has the same statistics, as norms assume."""
    y, x = np.mgrid[:height, :width] / 2
    return np.stack([np.sin(x + y / 3), np.cos(y - x / 2), np.sin(x / 2) * np.cos(y)], -1)[
        None
    ].astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(TINY.init)(jax.random.key(0), images(4, 4))["params"]


def apply(model, params, x, method):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, x)


def test_encode_and_decode_are_normalized_raw_ones(params):
    raw, moments = (
        apply(TINY, params, images(6, 8), method) for method in ("encode_raw", "encode")
    )
    assert moments.mean.shape == (2, 3, 4, 3)
    np.testing.assert_allclose(moments.mode, (raw.mean - 0.0609) * 1.5305, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(TINY.denormalize(moments.mean), raw.mean, rtol=1e-5, atol=1e-6)
    noise = np.random.default_rng(1).normal(size=raw.mean.shape).astype(np.float32)
    np.testing.assert_allclose(
        moments.sample(noise), TINY.normalize(raw.sample(noise)), rtol=1e-5, atol=1e-6
    )
    decoded = apply(TINY, params, moments.mode, "decode")
    assert decoded.shape == (2, 6, 8, 3)
    # entries of order 1
    np.testing.assert_allclose(decoded, apply(TINY, params, raw.mean, "decode_raw"), atol=1e-5)


def test_samples_have_the_moments():
    moments = Moments(
        mean=jnp.full((1, 1, 1, 1), 2.0), logvar=jnp.full((1, 1, 1, 1), 2 * np.log(3.0))
    )
    assert moments.mode == 2
    np.testing.assert_allclose(moments.sample(jnp.full((1, 1, 1, 1), -1.0)), -1, atol=1e-6)
    assert len(jax.tree.leaves(moments)) == 2


@pytest.mark.parametrize(("bias", "expected"), [(99.0, 20.0), (-99.0, -30.0)])
def test_log_variances_are_clipped(params, bias, expected):
    spoiled = params | {"quant": params["quant"] | {"bias": jnp.full(6, bias)}}
    assert (apply(TINY, spoiled, images(4, 4), "encode_raw").logvar == expected).all()


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"),
    [(10, 7, 4, 1), (5, 16, 8, 3), (9, 9, 6, 5), (23, 3, 4, 2)],
)
@pytest.mark.parametrize(("cell_in", "cell_out"), [(2, 1), (1, 2)])
def test_tiling_changes_nothing_of_a_local_function(
    height, width, tile, overlap, cell_in, cell_out
):
    def f(x):
        if cell_in == 1:
            return 2 * x.repeat(2, 1).repeat(2, 2)
        return x.reshape(len(x), x.shape[1] // 2, 2, -1, 2, 3).mean((2, 4))

    x = images(height * cell_in, width * cell_in)
    tiled = map_tiles(f, x, tile=tile, overlap=overlap, cell_in=cell_in, cell_out=cell_out)
    np.testing.assert_allclose(tiled, f(jnp.asarray(x)), atol=1e-6)  # the weights' rounding


def test_tiles_are_blended_linearly():
    """Each tile returns its first value, so the result shows the weights: two tiles of 4 cells that
    share 2.
    """
    x = jnp.arange(6.0).reshape(1, 1, 6, 1)
    y = map_tiles(
        lambda t: jnp.full(t.shape, t[0, 0, 0, 0]), x, tile=4, overlap=2, cell_in=1, cell_out=1
    )
    # tile 2 enters with 1/4, then 3/4
    np.testing.assert_allclose(y.ravel(), [0, 0, 0.5, 1.5, 2, 2])


def test_one_tile_is_the_plain_result(params):
    tiled = TINY.clone(tile_size=8, tile_overlap=4)
    x = images(8, 6)
    plain, same = apply(TINY, params, x, "encode"), apply(tiled, params, x, "encode")
    np.testing.assert_array_equal(plain.mean, same.mean)
    z = np.asarray(plain.mean)
    np.testing.assert_array_equal(
        apply(TINY, params, z, "decode"), apply(tiled, params, z, "decode")
    )


def test_tiled_results_are_close_on_smooth_images(params):
    # What differs is what norms and attention see, and the zeros that convolutions pad a tile with;
    # diffusers' own tiling differs more (tests/interop/test_vae.py). That the tiles are put
    # together rightly is tested above.
    tiled = TINY.clone(tile_size=32, tile_overlap=16)
    x = smooth_images(64, 48)
    plain, blended = (apply(model, params, x, "encode").mean for model in (TINY, tiled))
    assert np.abs(blended - plain).mean() < 0.15 * plain.std()
    latents = np.asarray(plain)
    plain, blended = (apply(model, params, latents, "decode") for model in (TINY, tiled))
    assert np.abs(blended - plain).mean() < 0.2 * plain.std()


def test_tiles_are_one_loop(params):
    """However many tiles there are, the program holds one: 2 of its size and 60 make the same
    number of operations.
    """
    tiled = TINY.clone(tile_size=8, tile_overlap=4)

    def convolutions(height, width):
        program = jax.make_jaxpr(lambda x: tiled.apply({"params": params}, x, method="encode").mean)
        return str(program(images(height, width))).count("conv_general_dilated[")

    assert convolutions(8, 12) == convolutions(64, 24) > 0


def test_tiling_bounds_memory(params):
    x = images(256, 256, batch=1)

    def temporary_bytes(model):
        compiled = (
            jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode").mean)
            .lower(params, x)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(TINY.clone(tile_size=32, tile_overlap=8)) < temporary_bytes(TINY) / 4


def test_compute_dtype_is_a_field(params):
    half = TINY.clone(dtype=jnp.bfloat16)
    full, moments = (apply(model, params, images(8, 8), "encode") for model in (TINY, half))
    assert moments.mean.dtype == jnp.float32
    # entries of order 1; bfloat16 has 8 bits
    np.testing.assert_allclose(moments.mean, full.mean, atol=0.1)
    decoded = apply(half, params, full.mean, "decode")
    assert decoded.dtype == jnp.float32
    np.testing.assert_allclose(decoded, apply(TINY, params, full.mean, "decode"), atol=0.1)


def test_remat_changes_no_gradient(params):
    x = images(4, 4)

    def gradient(model):
        return jax.jit(
            jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x, method="encode").mean ** 2))
        )

    program = jax.make_jaxpr(gradient(TINY.clone(remat=True)))(params)
    assert "remat" in str(program) or "checkpoint" in str(program)
    plain, recomputed = gradient(TINY)(params), gradient(TINY.clone(remat=True))(params)
    # the gradient of a key's bias is zero
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), plain, recomputed
    )


def test_impossible_fields_and_sizes(params):
    with pytest.raises(
        UserError, match=r"images of 6x5 are not divisible into latent cells of 2 pixels"
    ):
        apply(TINY, params, images(6, 5), "encode")
    with pytest.raises(UserError, match=r"widths \[10\] do not divide into 4 groups"):
        TINY.clone(widths=(8, 10))
    with pytest.raises(
        UserError, match="tile_size 9 and tile_overlap 4 must be multiples of the downsampling 2"
    ):
        TINY.clone(tile_size=9, tile_overlap=4)
    with pytest.raises(UserError, match="tile_overlap 8 is not between 0 and tile_size 8"):
        TINY.clone(tile_size=8, tile_overlap=8)
