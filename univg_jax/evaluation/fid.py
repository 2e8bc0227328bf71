"""The Frechet distance (FID) between two sets of pictures, from sums of their features that merge.

    FID = |m_a - m_b|² + tr(A + B - 2 (A B)^(1/2))        m: mean, A and B: covariance, ddof 1

Heusel et al. (arXiv 1706.08500). Sums over images are exact, so they do not depend on the order of
the images: one shard, k shards and uneven shards give the same bits. For that a feature x is
rounded to 2^-28, far below what a network in float32 resolves, and split into h, a multiple of
2^-12, and the rest l. Then

    sum x x^T = sum h h^T + sum h l^T + (sum h l^T)^T + sum l l^T

where each sum on the right is of integers times a power of 2, and fits into 53 bits.

What the features are of differs between implementations, by the resizing alone. Three conventions
are common, and distances of different ones do not compare:

    pytorch-fid   bilinear, half-pixel centers, no antialiasing; 2 x / 255 - 1
    clean-fid     Pillow's bicubic of each channel in float, antialiased, clipped; (x - 128) / 128
    tf1           bilinear as in TensorFlow 1, no half-pixel centers; (x - 128) / 128
                  (torch-fidelity, torchmetrics with `antialias=False`, which is not its default;
                  `models.inception.preprocess` is the same on a device)
"""

import dataclasses
import functools
import hashlib
import math
import zipfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float, Float32, Float64
from PIL import Image as PIL

from univg_jax.errors import NotFoundError, UserError, check_name, quote
from univg_jax.evaluation.metrics import Image
from univg_jax.files import write_streamed

SIDE = 299  # of Inception's input
_COARSE, _FINE = 2.0**-12, 2.0**-28
# Within these all sums are exact, with two bits to spare for `covariance`.
MAX_COUNT, MAX_SQUARES = 2**21, 2.0**27

Input = Float32[np.ndarray, "299 299 3"]


# --- what the network is given ---


def _bilinear(image: Image, *, center: np.float32) -> Input:
    """Between the two nearest pixels on each axis; `center` is where in a pixel its value is."""
    x = image.astype(np.float32)
    for axis, size in enumerate(image.shape[:2]):
        place = (np.arange(SIDE, dtype=np.float32) + center) * np.float32(size / SIDE) - center
        place = np.maximum(place, np.float32(0))
        low = place.astype(int)
        fraction = np.expand_dims(place - low.astype(np.float32), (1 - axis, 2))
        start, end = (x.take(i, axis=axis) for i in (low, np.minimum(low + 1, size - 1)))
        x = start + (end - start) * fraction
    return x


def _bicubic(image: Image) -> Input:
    planes = [PIL.fromarray(plane) for plane in np.moveaxis(image.astype(np.float32), -1, 0)]
    resized = [plane.resize((SIDE, SIDE), PIL.Resampling.BICUBIC) for plane in planes]
    return np.clip(np.stack([np.asarray(plane) for plane in resized], axis=-1), 0, 255)


CONVENTIONS: dict[str, Callable[[Image], Input]] = {
    "pytorch-fid": lambda x: _bilinear(x, center=np.float32(0.5)) / np.float32(127.5) - 1,
    "clean-fid": lambda x: (_bicubic(x) - 128) / 128,
    "tf1": lambda x: (_bilinear(x, center=np.float32(0)) - 128) / 128,
}


def preprocess(image: Image, *, convention: str) -> Input:
    """What FID's Inception (`models.inception.InceptionV3`) is given of a picture.

    Raises UserError for a convention that is none of CONVENTIONS.
    """
    return CONVENTIONS[check_convention(convention)](image)


def check_convention(name: str) -> str:
    """The name of one of CONVENTIONS. Raises UserError for another, with the nearest one."""
    return check_name(name, CONVENTIONS, what="convention of FID")


# --- sums of features, and the normal distribution that they describe ---


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and covariance (ddof 1) of features, and by which convention they were made."""

    convention: str
    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]


@dataclasses.dataclass(frozen=True)
class FeatureSums:
    """How many features, and the exact sums of them and of their products; `+` merges.

    `sums` are those of h and l, `products` of h h^T, h l^T and l l^T (see above). It is as large as
    three covariances, so make one of some hundred features rather than of each.
    """

    convention: str
    count: int
    sums: Float64[np.ndarray, "2 d"]
    products: Float64[np.ndarray, "3 d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"], *, convention: str) -> "FeatureSums":
        """The sums of n rows, of which there may be none.

        Raises UserError for features that are not finite, or too large for exact sums.
        """
        x = features.astype(float)
        if not np.isfinite(x).all():
            raise UserError(f"features for FID ({convention}) are not finite: damaged weights?")
        high = np.rint(x / _COARSE) * _COARSE
        low = np.rint((x - high) / _FINE) * _FINE
        products = np.stack([high.T @ high, high.T @ low, low.T @ low])
        sums = np.stack([high.sum(axis=0), low.sum(axis=0)])
        return cls(convention, len(x), sums, products)._checked()

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        _check_same(self.convention, other.convention)
        return FeatureSums(
            self.convention,
            self.count + other.count,
            self.sums + other.sums,
            self.products + other.products,
        )._checked()

    def _checked(self) -> "FeatureSums":
        squares = float(np.diagonal(self.products[0]).max(initial=0))
        if self.count > MAX_COUNT or squares > MAX_SQUARES:
            raise UserError(
                f"FID of {self.count} features with sums of squares up to {squares:.3g}: sums are "
                f"exact up to {MAX_COUNT} and {MAX_SQUARES:.3g}; give fewer, or scale them down"
            )
        return self

    @property
    def digest(self) -> str:
        """16 hex digits that name the set of features: equal sums have equal ones."""
        content = self.sums.tobytes() + self.products.tobytes()
        return hashlib.sha256(f"{self.convention} {self.count} ".encode() + content).hexdigest()[
            :16
        ]

    def gaussian(self) -> Gaussian:
        """Mean and covariance. Raises UserError for fewer than two features."""
        if self.count < 2:
            raise UserError(f"FID needs the features of two images or more, not {self.count}")
        # Around a center on h's grid, near the mean, all sums are still exact: a large mean does
        # not take digits from a small variance.
        center = np.rint(self.sums[0] / self.count / _COARSE) * _COARSE
        high = np.outer(center, self.sums[0])
        squares = self.products[0] - high - high.T + self.count * np.outer(center, center)
        mixed = self.products[1] - np.outer(center, self.sums[1])
        products = squares + (mixed + mixed.T) + self.products[2]
        offset = (self.sums[0] - self.count * center + self.sums[1]) / self.count
        covariance = (products - self.count * np.outer(offset, offset)) / (self.count - 1)
        return Gaussian(self.convention, center + offset, covariance)

    def save(self, path: epath.PathLike) -> None:
        """Writes an .npz file, whole or not at all; makes its folder."""
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_streamed(path, lambda file: np.savez(file, **dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: epath.PathLike) -> "FeatureSums":
        """What `save` wrote. Raises UserError for any other file, NotFoundError for none."""
        names = [field.name for field in dataclasses.fields(cls)]
        convention, count, sums, products = _read(path, names, what="sums of features")
        d = sums.shape[-1]
        if count.shape or sums.shape != (2, d) or products.shape != (3, d, d):
            shapes = f"{count.shape}, {sums.shape} and {products.shape}"
            raise UserError(f"{path}: shapes {shapes}; expected (), (2, {d}), (3, {d}, {d})")
        return cls(str(convention), int(count), sums, products)._checked()


def merge(shards: Iterable[FeatureSums]) -> FeatureSums:
    """The sums of all shards, of which there is at least one; the same bits in any order."""
    return functools.reduce(FeatureSums.__add__, shards)


def read_reference(path: epath.PathLike, *, convention: str) -> Gaussian:
    """A reference set's published statistics: an .npz file with `mu` and `sigma`.

    The file does not say by which convention they were made: `convention` does. Raises UserError
    for a file without them, NotFoundError for none.
    """
    mean, covariance = _read(path, ("mu", "sigma"), what="statistics of a reference set")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}; expected (d,), (d, d)"
        )
    return Gaussian(convention, mean.astype(float), covariance.astype(float))


def _read(path: epath.PathLike, names: Sequence[str], *, what: str) -> list[np.ndarray]:
    path = epath.Path(path)
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: expected {what}, an .npz file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} has no {what}: expected an .npz file with {', '.join(names)} "
            f"({quote(str(error))})"
        ) from None


def _check_same(convention: str, other: str) -> None:
    if convention != other:
        raise UserError(
            f"features by {convention!r} and by {other!r} do not compare: make both by one"
        )


# --- the distance ---


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance, at least 0. Raises UserError for different conventions.

    With A = R R^T and B = S S^T the trace of (A B)^(1/2) is the sum of the singular values of
    R^T S. No root of a matrix that may be singular is taken, as with fewer images than features.
    """
    _check_same(a.convention, b.convention)
    overlap = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False)
    gap, traces = a.mean - b.mean, np.trace(a.covariance) + np.trace(b.covariance)
    return max(float(gap @ gap + traces - 2 * overlap.sum()), 0.0)


def distance(a: FeatureSums | None, b: FeatureSums | None) -> float:
    """The distance of two sets of pictures; NaN where one has fewer than two."""
    if a is None or b is None or min(a.count, b.count) < 2:
        return math.nan
    return frechet_distance(a.gaussian(), b.gaussian())


def _factor(covariance: Float64[np.ndarray, "d d"]) -> Float64[np.ndarray, "d d"]:
    """R with R R^T = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    # What rounding left of a zero must not become its root, which is far larger.
    threshold = len(values) * np.finfo(float).eps * values.max(initial=0)
    return vectors * np.sqrt(np.where(values > threshold, values, 0))
