"""The identity encoder on portraits of persons that its fit has not seen."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.datasets.emoji_scenes.portraits import render_portrait, sample_portraits
from univg_jax.errors import UserError
from univg_jax.models.identity import IdentityEncoder, fit_identity_encoder

DIM = 32


def portraits(persons: range) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = [p for person in persons for p in sample_portraits(rng, person)]
    images = np.stack([render_portrait(p, seed=0, resolution=48) for p in drawn])
    return images, np.array([p.person for p in drawn])


@pytest.fixture(scope="module")
def params():
    return fit_identity_encoder(zip(*portraits(range(40)), strict=True), dim=DIM)


@pytest.fixture(scope="module")
def held_out():
    return portraits(range(40, 70))


def embed(params, images: np.ndarray) -> np.ndarray:
    x = jnp.asarray(images, jnp.float32) / 127.5 - 1
    return np.asarray(IdentityEncoder(dim=DIM).apply({"params": params}, x))


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The chance that a positive pair is more similar than a negative one."""
    return float((positive[:, None] > negative[None]).mean())


def test_held_out_persons_are_told_apart(params, held_out):
    images, persons = held_out
    e = embed(params, images)
    np.testing.assert_allclose(np.linalg.norm(e, axis=-1), 1, rtol=1e-5)  # float32
    similarity = e @ e.T
    pairs = np.triu(np.ones_like(similarity, bool), 1)
    same = (persons[:, None] == persons[None]) & pairs
    # Measured 0.9995 with 40 persons to learn from; expressions, clothes and walls differ within a
    # person.
    assert auc(similarity[same], similarity[pairs & ~same]) > 0.99
    assert similarity[same].mean() > 0.9
    assert abs(similarity[pairs & ~same].mean()) < 0.1


def test_survives_what_generation_does_to_a_picture(params, held_out):
    images, persons = held_out
    rng = np.random.default_rng(0)
    moved = np.roll(images, (1, 1), axis=(1, 2))
    blurred = [
        Image.fromarray(i).resize((20, 20), Image.BOX).resize((48, 48), Image.BICUBIC)
        for i in moved
    ]
    noisy = np.clip(np.stack(blurred) + rng.normal(0, 15, images.shape), 0, 255).astype(np.uint8)
    similarity = embed(params, noisy) @ embed(params, images).T
    same = persons[:, None] == persons[None]
    assert auc(similarity[same], similarity[~same]) > 0.98  # measured 0.9987


def test_any_resolution_serves(params, held_out):
    images = held_out[0][:8]
    doubled = images.repeat(2, axis=1).repeat(2, axis=2)
    similarity = (embed(params, images) * embed(params, doubled)).sum(-1)
    assert similarity.min() > 0.95  # antialiased resampling smears edges a little


def test_few_persons_leave_the_rest_of_the_embedding_zero():
    images, persons = portraits(range(3))
    e = embed(fit_identity_encoder(zip(images, persons, strict=True), dim=DIM), images)
    assert np.abs(e[:, 2:]).max() == 0
    np.testing.assert_allclose(np.linalg.norm(e, axis=-1), 1, rtol=1e-5)


def test_the_fit_is_deterministic():
    images, persons = portraits(range(4))
    first, again = (
        fit_identity_encoder(zip(images, persons, strict=True), dim=DIM) for _ in range(2)
    )
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])


@pytest.mark.parametrize("persons", [[0, 0, 0], [0, 1, 2]])
def test_too_little_to_learn_from(persons):
    with pytest.raises(
        UserError, match=r"at least 2 persons with several portraits each; got 3 portraits"
    ):
        fit_identity_encoder([(np.zeros((16, 16, 3), np.uint8), p) for p in persons], dim=4)
