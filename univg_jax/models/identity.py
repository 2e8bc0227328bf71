"""Identity encoders: portraits -> unit vectors whose dot product measures likeness.

`ClipIdentity` is CLIP's image embedding. `IdentityEncoder` is a linear discriminant over color and
gradient features, small enough to run in every training step:

    e = normalize(P (phi(image) - mean))

phi is the image at low resolution beside histograms of oriented gradients. P first whitens what
varies between pictures of one person (expression, clothes, background, small shifts), then keeps
the directions that tell persons apart (Fisher's LDA; Belhumeur et al. 1997, "Fisherfaces"). Persons
unseen in the fit are compared by the cosine of their embeddings.
"""

import collections
import itertools
from collections.abc import Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from univg_jax.batch import Array
from univg_jax.errors import UserError
from univg_jax.images import to_float
from univg_jax.models.clip import CLIPVision, preprocess
from univg_jax.models.layers import unit_vectors

SIZE = 48  # pixels a side: every portrait is resized to it first
COLOR_CELL, GRADIENT_CELL, ORIENTATIONS = 4, 6, 8
NUM_FEATURES = 3 * (SIZE // COLOR_CELL) ** 2 + ORIENTATIONS * (SIZE // GRADIENT_CELL) ** 2


def features(images: Float[Array, "b h w 3"]) -> Float[Array, "b p"]:
    """phi: cell means of color, and per cell the square root of gradient energy by direction."""
    b = images.shape[0]
    x = jax.image.resize(images.astype(jnp.float32), (b, SIZE, SIZE, 3), "linear")
    gray = jnp.pad(x.mean(-1), ((0, 0), (1, 1), (1, 1)), mode="edge")
    dx = gray[:, 1:-1, 2:] - gray[:, 1:-1, :-2]
    dy = gray[:, 2:, 1:-1] - gray[:, :-2, 1:-1]
    angles = np.arange(ORIENTATIONS) * (2 * np.pi / ORIENTATIONS)
    directions = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    along = jnp.stack([dx, dy], axis=-1) @ directions
    energy = _cell_means(jnp.maximum(along, 0) ** 2, GRADIENT_CELL)
    color = _cell_means(x, COLOR_CELL)
    return jnp.concatenate([color.reshape(b, -1), jnp.sqrt(energy + 1e-4).reshape(b, -1)], axis=-1)


def _cell_means(x: Float[Array, "b s s c"], cell: int) -> Float[Array, "b n n c"]:
    b, s, _, c = x.shape
    return x.reshape(b, s // cell, cell, s // cell, cell, c).mean((2, 4))


class ClipIdentity(nn.Module):
    """Portraits in [-1, 1] -> CLIP's image embedding, a unit vector."""

    clip: CLIPVision

    @property
    def dim(self) -> int:
        return self.clip.projection_dim or self.clip.hidden_dim

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        levels = jnp.round((images + 1) * 127.5).astype(jnp.uint8)
        out = self.clip(preprocess(levels, size=self.clip.image_size))
        e = (out.pooled if out.projected is None else out.projected).astype(jnp.float32)
        return unit_vectors(e)


class IdentityEncoder(nn.Module):
    """Portraits in [-1, 1] of any size -> unit vectors; `p` comes from `fit_identity_encoder`."""

    dim: int = 64

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b d"]:
        mean = self.param("mean", nn.initializers.zeros, (NUM_FEATURES,))
        projection = self.param(
            "projection", nn.initializers.orthogonal(), (NUM_FEATURES, self.dim)
        )
        e = (features(images) - mean[None]) @ projection
        return unit_vectors(e)


def fit_identity_encoder(
    portraits: Iterable[tuple[UInt8[np.ndarray, "f f 3"], int]],
    *,
    dim: int,
    shrinkage: float = 0.05,
) -> dict[str, Float[np.ndarray, "..."]]:
    """Parameters of `IdentityEncoder` in closed form, float64 and deterministic.

    `portraits` are of one size, each with the number of the person that it shows; they may come one
    by one.

    With scatter matrices S_w (within persons, shrunk towards a multiple of the identity matrix) and
    S_b (between their means), P holds the `dim` leading eigenvectors of S_w^-1 S_b, scaled so that
    P^T S_w P = 1. With k persons only k - 1 directions exist; the rest of the embedding is then
    zero. Raises UserError unless there are two persons and several portraits of one.
    """
    moment = np.zeros((NUM_FEATURES, NUM_FEATURES))
    sums: dict[int, np.ndarray] = {}
    number: collections.Counter[int] = collections.Counter()  # of each person's portraits
    remaining = iter(portraits)
    while chunk := list(itertools.islice(remaining, 256)):
        pictures, persons = zip(*chunk, strict=True)
        x = np.asarray(_features_of_views(np.stack(pictures)), np.float64)
        for person, mean in zip(persons, x.mean(0), strict=True):
            sums[person] = sums.get(person, 0) + mean
        number.update(persons)
        flat = x.reshape(-1, NUM_FEATURES)
        moment += flat.T @ flat / len(x)  # the mean over the views, of which there are len(x)
    total = number.total()
    if len(number) < 2 or max(number.values()) < 2:
        raise UserError(
            f"the identity encoder needs at least 2 persons with several portraits each; "
            f"got {total} portraits of {len(number)} persons"
        )
    counts = np.array([number[person] for person in sorted(sums)])
    centers = np.stack([sums[person] for person in sorted(sums)]) / counts[:, None]
    within = (moment - (centers.T * counts) @ centers) / total
    # Shrinkage keeps S_w invertible where there are fewer portraits than features.
    multiple = shrinkage * np.trace(within) / NUM_FEATURES
    within = (1 - shrinkage) * within + multiple * np.eye(NUM_FEATURES)
    values, vectors = np.linalg.eigh(within)
    whitening = vectors / np.sqrt(values)
    mean = counts @ centers / total
    _, _, directions = np.linalg.svd((centers - mean) @ whitening, full_matrices=False)
    rank = min(dim, len(counts) - 1)
    projection = np.zeros((NUM_FEATURES, dim))
    projection[:, :rank] = whitening @ directions[:rank].T
    return {"mean": mean.astype(np.float32), "projection": projection.astype(np.float32)}


@jax.jit
def _features_of_views(portraits: UInt8[Array, "n f f 3"]) -> Float[Array, "v n p"]:
    """Features of each portrait: as it is, at half resolution, and shifted by a pixel in 4 ways.

    Pictures that a model generates are blurred and inexact; the fit learns to ignore that.
    """
    x = to_float(portraits)
    n, f = x.shape[:2]
    half = jax.image.resize(x, (n, f // 2, f // 2, 3), "linear")
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    moved = [padded[:, i : i + f, j : j + f] for i in (0, 2) for j in (0, 2)]
    return jnp.stack([features(view) for view in (x, half, *moved)])
