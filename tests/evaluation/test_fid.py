"""FID: exact sums, the distance against SciPy's formula, and what the network is given."""

import cv2
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.torch_metrics import torchmetrics_of
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import fid
from univg_jax.evaluation.fid import FeatureSums, frechet_distance
from univg_jax.models import inception

seeds = st.integers(0, 2**32 - 1)


def sums(features):
    return FeatureSums.of(features, convention="tf1")


def gaussian(features):
    return sums(features).gaussian()


def pair(seed, n, d, *, mean=0.3):
    """Features of two sets, correlated, in float32 as of a network."""
    rng = np.random.default_rng(seed)
    maps = rng.standard_normal((2, d, d)) / np.sqrt(d)
    sets = rng.standard_normal((2, n, d)) @ maps + mean * rng.random((2, 1, d))
    return sets.astype(np.float32)


# --- sums ---


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 60), st.lists(st.integers(0, 60), max_size=5))
def test_shards_of_any_sizes_in_any_order_have_the_same_bits(seed, n, cuts):
    rng = np.random.default_rng(seed)
    # Of very different sizes, so that plain float64 sums would depend on the order.
    x = (rng.standard_normal((n, 3)) * 10.0 ** rng.integers(-6, 3, (n, 3))).astype(np.float32)
    whole = sums(x)
    # Uneven, and some are empty.
    shards = [sums(part) for part in np.split(x[rng.permutation(n)], sorted(cuts))]
    merged = fid.merge(shards[i] for i in rng.permutation(len(shards)))
    assert merged.count == whole.count == n
    np.testing.assert_array_equal(merged.sums, whole.sums)
    np.testing.assert_array_equal(merged.products, whole.products)
    for got, want in zip(gaussian_parts(merged), gaussian_parts(whole)):
        np.testing.assert_array_equal(got, want)


def gaussian_parts(shard):
    found = shard.gaussian()
    return found.mean, found.covariance


@pytest.mark.parametrize("n", [2, 9, 300])
def test_mean_and_covariance_are_those_of_the_features(n):
    x = pair(0, n, 20)[0].astype(float)
    found = gaussian(x)
    # Features are rounded to 2^-28, so a product of two of about 1 is off by 4e-9 at most.
    np.testing.assert_allclose(found.mean, x.mean(axis=0), atol=2e-9)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), atol=2e-8)
    np.testing.assert_array_equal(found.covariance, found.covariance.T)


def test_a_large_mean_takes_no_digits_from_a_small_variance():
    # On the grid of 2^-28, so that nothing is rounded; sum x^2 - (sum x)^2 / n alone would have an
    # error of 1e-16 * 200^2, a hundred times this variance's last digits.
    steps = np.random.default_rng(0).integers(-1000, 1000, (100, 4)) * 2.0**-24
    found = gaussian(200 + steps)
    np.testing.assert_allclose(found.covariance, np.cov(steps.T), rtol=1e-12, atol=0)


def test_features_without_exact_sums_are_refused():
    with pytest.raises(UserError, match=r"features for FID \(tf1\) are not finite: damaged weigh"):
        sums(np.array([[1.0, np.nan]]))
    with pytest.raises(UserError, match="FID of 2 features with sums of squares up to 2e"):
        sums(np.full((2, 3), 1e6))
    large = sums(np.full((1, 3), 1e4))
    with pytest.raises(UserError, match=r"sums are exact up to 2097152 and 1.34e"):
        fid.merge([large, large])
    with pytest.raises(UserError, match="needs the features of two images or more, not 1"):
        large.gaussian()


def test_conventions_do_not_mix():
    x = pair(0, 5, 3)[0]
    other = FeatureSums.of(x, convention="clean-fid")
    for mix in (
        lambda: sums(x) + other,
        lambda: frechet_distance(gaussian(x), other.gaussian()),
    ):
        with pytest.raises(UserError, match="features by 'tf1' and by 'clean-fid' do not compare"):
            mix()


# --- files ---


def test_sums_go_through_a_file(tmp_path):
    x = pair(0, 7, 5)[0]
    FeatureSums.of(x, convention="pytorch-fid").save(tmp_path / "some" / "sums.npz")
    loaded = FeatureSums.load(tmp_path / "some" / "sums.npz")
    assert (loaded.convention, loaded.count) == ("pytorch-fid", 7)
    np.testing.assert_array_equal(loaded.sums, sums(x).sums)
    np.testing.assert_array_equal(loaded.products, sums(x).products)


def test_published_statistics_are_read(tmp_path):
    a, b = pair(0, 50, 4).astype(float)
    np.savez(tmp_path / "r.npz", mu=a.mean(axis=0), sigma=np.cov(a.T))
    reference = fid.read_reference(tmp_path / "r.npz", convention="tf1")
    assert frechet_distance(reference, gaussian(b)) == pytest.approx(
        frechet_distance(gaussian(a), gaussian(b)), abs=1e-7
    )


def test_other_files_are_told(tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere.npz does not exist: expected sums of feat"):
        FeatureSums.load(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("mu sigma")
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", m=np.zeros(3))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:-9])
    for name in ("text.npz", "array.npy", "other.npz", "torn.npz"):
        with pytest.raises(UserError, match=rf"{name} has no .*: expected an .npz file with mu, s"):
            fid.read_reference(tmp_path / name, convention="tf1")
        with pytest.raises(UserError, match=rf"{name} has no sums of features: expected an .npz"):
            FeatureSums.load(tmp_path / name)
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(UserError, match=r"shapes.npz: mu has shape \(3,\) and sigma \(2, 2\)"):
        fid.read_reference(tmp_path / "shapes.npz", convention="tf1")


# --- the distance ---


@pytest.mark.parametrize(("n", "d"), [(200, 1), (500, 16), (3000, 64)])
def test_the_distance_is_scipys(n, d):
    a, b = (x.astype(float) for x in pair(1, n, d))
    A, B = np.cov(a.T).reshape(d, d), np.cov(b.T).reshape(d, d)
    gap = a.mean(axis=0) - b.mean(axis=0)
    root = scipy.linalg.sqrtm(A @ B)
    want = gap @ gap + np.trace(A + B - 2 * root.real)
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(want, rel=1e-6)


def test_the_distance_of_normal_distributions_by_hand():
    deviations = np.array([[1.0, 2.0, 0.0], [3.0, 0.5, 4.0]])  # one of them singular
    means = np.array([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    a, b = (fid.Gaussian("tf1", m, np.diag(s**2)) for m, s in zip(means, deviations))
    want = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_fewer_images_than_features_have_a_distance():
    """Where the covariances are singular: of sets that differ by a shift it is the shift's."""
    x = pair(2, 10, 50)[0].astype(float)
    shift = np.linspace(0, 1, 50)
    distance = frechet_distance(gaussian(x), gaussian(x + shift))
    assert distance == pytest.approx(shift @ shift, rel=1e-7)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 20), st.integers(1, 12))
def test_the_distance_is_symmetric_and_zero_of_a_set_to_itself(seed, n, d):
    a, b = map(gaussian, pair(seed, n, d))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9, abs=1e-9)
    assert frechet_distance(a, b) >= 0
    assert frechet_distance(a, a) <= 1e-9


@pytest.mark.parity
@pytest.mark.parametrize("shards", [1, 4])
def test_the_distance_is_torchmetrics(shards):
    torch, image = torchmetrics_of("image.fid")
    sets = pair(3, 400, 32)

    class Identity(torch.nn.Module):
        num_features = 32

    metric = image.FrechetInceptionDistance(feature=Identity(), normalize=True)
    metric.set_dtype(torch.float64)
    for real, x in zip((True, False), sets):
        # It would round pictures to 8 bits; these are features already.
        metric.inception.forward = lambda _, x=x: torch.tensor(x.astype(float))
        metric.update(torch.zeros(len(x), 3, 4, 4), real=real)
    ours = [fid.merge(sums(part) for part in np.array_split(x, shards)).gaussian() for x in sets]
    assert frechet_distance(*ours) == pytest.approx(metric.compute().item(), rel=1e-6)


# --- what the network is given ---

SIZES = [(299, 299), (32, 47), (640, 301), (598, 150)]


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("convention", fid.CONVENTIONS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_black_and_white_are_the_ends_of_the_range(convention, height, width):
    for level, end in ((0, -1.0), (255, 1.0 if convention == "pytorch-fid" else 127 / 128)):
        flat = np.full((height, width, 3), level, np.uint8)
        got = fid.preprocess(flat, convention=convention)
        assert got.shape == (299, 299, 3)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, end, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_tf1_is_what_the_device_computes(height, width):
    x = picture(height, width)
    want = inception.preprocess(x[None])[0]
    # float32, of weights that are rounded otherwise by a few units
    np.testing.assert_allclose(fid.preprocess(x, convention="tf1"), want, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pytorch_fid_is_opencvs_bilinear(height, width):
    x = picture(height, width)
    want = cv2.resize(x.astype(np.float32), (299, 299), interpolation=cv2.INTER_LINEAR)
    got = fid.preprocess(x, convention="pytorch-fid")
    np.testing.assert_allclose(got, want / 127.5 - 1, atol=3e-4)  # places are in float32


def test_clean_fid_is_antialiased_clipped_and_not_rounded():
    stripes = np.zeros((598, 598, 3), np.uint8)
    stripes[:, ::2] = 255
    got = fid.preprocess(stripes, convention="clean-fid")
    inside = got[20:-20, 20:-20]
    # The mean of black and white, where the others take every second stripe or both by half.
    np.testing.assert_allclose(inside, (127.5 - 128) / 128, atol=0.02)
    edge = np.zeros((40, 40, 3), np.uint8)
    edge[:, 20:] = 255
    got = fid.preprocess(edge, convention="clean-fid")
    assert got.min() == -1  # where a bicubic filter swings over
    assert got.max() == np.float32(127 / 128)
    levels = got * 128 + 128
    assert (np.abs(levels - np.rint(levels)) > 0.1).any()


def test_an_unknown_convention_is_told():
    with pytest.raises(UserError, match="unknown convention of FID 'cleanfid'; did you mean 'clea"):
        fid.preprocess(picture(8, 8), convention="cleanfid")


@pytest.mark.parity
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pytorch_fid_is_torchs(height, width):
    torch = pytest.importorskip("torch")
    x = picture(height, width)
    unit = torch.tensor(x.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    want = torch.nn.functional.interpolate(
        unit, size=(299, 299), mode="bilinear", align_corners=False
    )
    want = (2 * want[0] - 1).numpy().transpose(1, 2, 0)
    got = fid.preprocess(x, convention="pytorch-fid")
    np.testing.assert_allclose(got, want, atol=2e-5)  # float32
