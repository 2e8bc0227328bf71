"""Batch -> conditions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import (
    ENCODERS,
    ENCODERS_WITH_FACES,
    fake_batch,
    images,
    prepare_encoders,
    unused,
)
from tests.sd3_folder import write_image_encoder, write_sd3
from univg_jax import encoders, sharding
from univg_jax.batch import BatchShape, Latents
from univg_jax.errors import UserError
from univg_jax.settings import Conditioning

SHAPE = BatchShape(height=16, width=16, num_tokens=10, face=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    prepared = prepare_encoders(ENCODERS_WITH_FACES, tmp_path_factory.mktemp("run"))
    return prepared.conditioner, prepared.frozen


@pytest.fixture(scope="module")
def batch():
    batch = fake_batch(shape=SHAPE, batch_size=4)
    face = np.random.default_rng(1).integers(0, 256, batch.face.shape, dtype=np.uint8)
    return dataclasses.replace(batch, face=face, has_face=np.array([True, False, True, False]))


@pytest.fixture(scope="module")
def conditions(run, batch):
    conditioner, frozen = run
    return jax.jit(conditioner.conditions)(frozen, batch)


def test_shapes_follow_the_properties(run, batch, conditions):
    c, frozen = run
    assert conditions.cond_latents.shape == (
        4,
        16 // c.downsampling,
        16 // c.downsampling,
        c.latent_channels,
    )
    assert conditions.mask.shape == (4, 4, 4, 1)
    assert conditions.text_emb.shape == (4, 10, c.text_dim)
    assert conditions.pooled_emb.shape == (4, c.pooled_dim)
    assert conditions.face_emb.shape == (4, c.face_dim)
    assert jax.jit(c.target_latents)(frozen, batch).shape == conditions.cond_latents.shape


def test_shapes_are_known_without_parameters_or_data(run, batch, conditions):
    c, frozen = run
    planned = encoders.abstract(Conditioning(**ENCODERS_WITH_FACES)).frozen
    expected = jax.eval_shape(lambda: (c.target_latents(frozen, batch), conditions))
    assert c.encoded_spec(planned, SHAPE.spec(4)) == expected
    assert c.encoded_spec(frozen, batch) == expected


def test_absent_parts_are_zero_and_present_ones_are_not(run, batch, conditions):
    c, frozen = run
    absent = ~batch.has_source
    assert (np.asarray(conditions.cond_latents)[absent] == 0).all()
    # A black source is something else than no source.
    assert np.abs(c.encode(frozen, batch.source[absent])).max() > 0.1
    present = c.encode(frozen, batch.source[~absent])
    # The compiled and the eager matmul may sum in another order.
    np.testing.assert_allclose(np.asarray(conditions.cond_latents)[~absent], present, atol=1e-5)
    norms = np.linalg.norm(conditions.face_emb, axis=-1)
    np.testing.assert_allclose(norms, batch.has_face, atol=1e-5)  # unit vectors in float32
    assert (np.asarray(conditions.text_emb)[~batch.text_mask] == 0).all()
    assert (np.abs(np.asarray(conditions.text_emb)[batch.text_mask]).max(-1) > 0).all()


def test_a_latent_cell_touched_by_the_hole_is_generated(run, batch):
    c, frozen = run
    mask = np.zeros((4, 16, 16, 1), np.uint8)
    mask[0, 5, 3] = 1
    mask[1, 4:8, 8:12] = 1
    result = np.asarray(jax.jit(c.conditions)(frozen, dataclasses.replace(batch, mask=mask)).mask)
    expected = np.zeros((4, 4, 4, 1))
    expected[0, 1, 0] = expected[1, 1, 2] = 1
    np.testing.assert_array_equal(result, expected)


def test_bytes_and_floats_encode_alike_and_decode_stays_in_range(run):
    c, frozen = run
    x = images()[:2]
    a, b = c.encode(frozen, x), c.encode(frozen, jnp.asarray(x, jnp.float32) / 127.5 - 1)
    np.testing.assert_array_equal(a, b)
    assert np.abs(c.decode(frozen, 100 * a)).max() == 1


def with_latents(c, frozen, batch, *, target_missing=None, source_missing=None):
    """The batch with latents from a cache; those that are missing there are no numbers."""

    def stored(images, missing):
        latents = np.array(c.encode(frozen, images))
        latents[np.zeros(len(images), bool) if missing is None else missing] = np.nan
        return latents

    latents = Latents(
        target=stored(batch.target, target_missing),
        source=stored(batch.source, source_missing),
        target_missing=target_missing,
        source_missing=source_missing,
    )
    return dataclasses.replace(batch, latents=latents)


def num_of(batch, seed):
    return np.random.default_rng(seed).random(batch.size) < 0.5


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("seed", [0, None, "all"])
def test_what_a_cache_lacks_is_encoded_on_any_devices(run, devices, seed):
    """Two rows a device or eight on one, whichever of them are missing."""
    c, frozen = run
    batch = fake_batch(shape=SHAPE, batch_size=8)
    missing = np.full(8, seed == "all") if isinstance(seed, str | None) else num_of(batch, seed)
    given = with_latents(c, frozen, batch, target_missing=missing, source_missing=missing)

    def encode(batch):
        shown = jnp.asarray(batch.has_source)[:, None, None, None]
        source = jnp.where(shown, c.source_latents(frozen, batch), 0)
        return c.target_latents(frozen, batch), source

    want = jax.jit(encode)(batch)
    mesh = sharding.make_mesh(data=devices, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        found = jax.jit(encode)(sharding.shard_batch(given, mesh))
    # One row at a time is another product than all of them: float32 sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, want)


def test_a_step_of_which_all_is_cached_has_no_encoder(run, batch):
    """It takes neither the codec's parameters nor the pixels."""
    c, frozen = run
    given = with_latents(c, frozen, batch)
    given = dataclasses.replace(given, text=c.embed_text(frozen, batch.tokens, batch.text_mask))

    def encode(codec, target, source, batch):
        batch = dataclasses.replace(batch, target=target, source=source)
        return c.target_latents({"codec": codec}, batch), c.source_latents({"codec": codec}, batch)

    program = jax.jit(encode, keep_unused=False)
    text = program.lower(frozen["codec"], batch.target, batch.source, given).as_text()
    assert "dot_general" not in text
    assert "ui8" not in text
    drawn = with_latents(c, frozen, batch, source_missing=np.ones(4, bool))
    text = program.lower(frozen["codec"], batch.target, batch.source, drawn).as_text()
    assert text.count("dot_general") == 1  # of the sources, one row at a time


def test_encoders_are_frozen(run, batch):
    c, frozen = run

    def loss(frozen):
        leaves = [*jax.tree.leaves(c.conditions(frozen, batch)), c.target_latents(frozen, batch)]
        return sum(jnp.sum(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))

    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(frozen)))


def test_without_an_identity_encoder_faces_have_no_width(tmp_path, batch):
    prepared = prepare_encoders(ENCODERS, tmp_path, portraits=unused)
    c, frozen = prepared.conditioner, prepared.frozen
    assert c.face_dim is None
    assert set(frozen) == {"text", "codec"}
    assert jax.eval_shape(c.conditions, frozen, batch).face_emb.shape == (4, 0)
    with pytest.raises(UserError, match="no identity encoder"):
        c.identify(frozen, batch.face)


def test_faces_through_clip(tmp_path, batch):
    folder = write_sd3(tmp_path / "sd3")
    write_image_encoder(folder / "image_encoder")
    config = {**ENCODERS, "folder": str(folder), "identity": dict(kind="clip")}
    prepared = prepare_encoders(config, tmp_path / "run", portraits=unused)
    conditioner, frozen = prepared.conditioner, prepared.frozen
    assert conditioner.face_dim == 6
    faces = np.random.default_rng(2).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    found = np.asarray(conditioner.identify(frozen, faces))
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    emb = jax.jit(conditioner.conditions)(frozen, batch).face_emb
    np.testing.assert_array_equal(np.abs(emb).sum(-1) > 0, batch.has_face)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_not_clipped_to_white(run, value):
    conditioner, frozen = run
    latents = jnp.zeros((1, 4, 4, conditioner.latent_channels)).at[0, 1, 1, 0].set(value)
    decoded = jax.jit(conditioner.decode)(frozen, latents)
    bad = np.isnan(decoded).any((0, 3))
    f = conditioner.downsampling
    assert bad[f : 2 * f, f : 2 * f].any()
    assert np.isfinite(decoded[:, :f]).all()
    assert np.abs(decoded[:, :f]).max() <= 1
