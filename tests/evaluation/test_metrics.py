"""Metrics against numbers worked out by hand, and the laws they promise."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.torch_metrics import torchmetrics_of
from univg_jax.evaluation import metrics
from univg_jax.evaluation.metrics import Ratio

# float64 arithmetic of a few thousand terms; anything larger is a wrong formula.
EXACT = 1e-12

masks = st.integers(0, 2**32 - 1).map(
    lambda s: np.random.default_rng(s).random((2, 9, 7)) < [[[0.3]], [[0.6]]]
)
seeds = st.integers(0, 2**32 - 1)


BOX_NAMES = ("cat", "dog", "cow")


def noisy_pair(seed, height=40, width=33):
    """A smooth picture, and the same with noise."""
    rng = np.random.default_rng(seed)
    waves = np.sin(np.arange(height)[:, None, None] / 5 + np.arange(width)[None, :, None] / 7)
    target = 127 + 90 * waves + rng.normal(0, 4, (height, width, 3))
    prediction = target + rng.normal(0, 25, target.shape)
    return tuple(np.clip(x, 0, 255).astype(np.uint8) for x in (prediction, target))


def image(value: int, size: int = 4) -> np.ndarray:
    return np.full((size, size, 3), value, np.uint8)


def test_l1_whole_and_region():
    prediction, target = image(0), image(0)
    prediction[0, 0] = 255
    region = np.zeros((4, 4), np.uint8)
    region[0, :2] = 1
    assert metrics.l1(prediction, target).value == pytest.approx(1 / 16, abs=EXACT)
    assert metrics.l1(prediction, target, region).value == pytest.approx(1 / 2, abs=EXACT)
    empty = metrics.l1(prediction, target, np.zeros((4, 4), np.uint8))
    assert empty.count.sum() == 0
    assert np.isnan(empty.value)


def test_psnr_of_one_level_everywhere():
    assert metrics.psnr(image(10), image(11)).value == pytest.approx(20 * np.log10(255), abs=EXACT)
    assert metrics.psnr(image(10), image(10)).value == np.inf
    other = image(10)
    other[0, 0, 0] += 1
    expected = 10 * np.log10(255**2 * other.size)
    assert metrics.psnr(image(10), other).value == pytest.approx(expected, abs=EXACT)


def test_ssim_by_hand():
    x, y = noisy_pair(0)
    assert metrics.ssim(x, x).value == pytest.approx(1, abs=EXACT)
    assert metrics.ssim(x, y).value == pytest.approx(metrics.ssim(y, x).value, abs=EXACT)
    # Of two flat pictures only the means differ.
    c1 = (0.01 * 255) ** 2
    want = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert metrics.ssim(image(100, 11), image(150, 11)).value == pytest.approx(want, abs=EXACT)
    # The window of a picture of 11 pixels, written out.
    x, y = (v[:11, :11].astype(float) for v in (x, y))
    weight = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    weight = np.outer(weight, weight)[..., None] / weight.sum() ** 2
    mx, my = ((weight * v).sum(axis=(0, 1)) for v in (x, y))
    vx, vy = (weight * (x - mx) ** 2).sum(axis=(0, 1)), (weight * (y - my) ** 2).sum(axis=(0, 1))
    cov = (weight * (x - mx) * (y - my)).sum(axis=(0, 1))
    c2 = (0.03 * 255) ** 2
    want = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    got = metrics.ssim(x.astype(np.uint8), y.astype(np.uint8)).value
    assert got == pytest.approx(want.mean(), abs=1e-11)
    with pytest.raises(ValueError, match="its window has 11 pixels"):
        metrics.ssim(image(0, 10), image(0, 10))


def test_ssim_may_mirror_edges():
    x, y = noisy_pair(2)
    mirrored = [np.pad(v, ((5, 5), (5, 5), (0, 0)), mode="reflect") for v in (x, y)]
    got = metrics.ssim(x, y, edges="mirrored").value
    assert got == pytest.approx(metrics.ssim(*mirrored).value, abs=EXACT)
    assert abs(got - metrics.ssim(x, y).value) > 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(40, 33), (11, 64)], ids=str)
def test_ssim_and_psnr_are_torchmetrics(shape):
    torch, functional = torchmetrics_of("functional.image")
    x, y = noisy_pair(1, *shape)
    tensors = [torch.tensor(v.astype(float).transpose(2, 0, 1)[None]) for v in (x, y)]
    for name, ours in (
        (
            "structural_similarity_index_measure",
            functools.partial(metrics.ssim, edges="mirrored"),
        ),
        ("peak_signal_noise_ratio", metrics.psnr),
    ):
        theirs = getattr(functional, name)(*tensors, data_range=255.0).item()
        assert ours(x, y).value == pytest.approx(theirs, abs=1e-6), name


def test_mean_and_overall_iou_differ_as_they_should():
    small = np.zeros((4, 4), bool)
    small[0, 0] = True
    pairs = [(small, small), (np.ones((4, 4), bool), small)]
    mean = metrics.merge(metrics.mean_iou(p, t) for p, t in pairs)
    overall = metrics.merge(metrics.overall_iou(p, t) for p, t in pairs)
    assert mean.value == pytest.approx((1 + 1 / 16) / 2, abs=EXACT)
    assert overall.value == pytest.approx(2 / 17, abs=EXACT)
    nothing = np.zeros((4, 4), bool)
    assert metrics.mean_iou(nothing, nothing).value == 0


@given(masks)
def test_iou_is_symmetric_and_bounded(pair):
    a, b = pair
    for iou in (metrics.mean_iou, metrics.overall_iou):
        assert iou(a, b).value == iou(b, a).value
        assert 0 <= iou(a, b).value <= 1
        assert iou(a, a).value == 1


def test_precision_counts_masks_of_enough_iou():
    target, prediction = np.zeros((2, 10, 1), bool)
    target[:10], prediction[:7] = True, True  # IoU 0.7, exactly
    for at, reached, exceeded in ((0.6, 1, 1), (0.7, 1, 0), (0.8, 0, 0)):
        assert metrics.precision(prediction, target, at=at).value == reached
        assert metrics.precision(prediction, target, at=at, exceed=True).value == exceeded
    nothing = np.zeros((10, 1), bool)
    assert metrics.precision(nothing, nothing, at=0.5).value == 0


@pytest.mark.parity
def test_iou_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    for seed in range(5):
        a, b = np.random.default_rng(seed).random((2, 9, 7)) < 0.4
        want = sklearn.jaccard_score(b.ravel(), a.ravel())
        assert metrics.mean_iou(a, b).value == pytest.approx(want, abs=EXACT)


def test_choice_by_hand():
    objects = np.zeros((3, 4, 4), bool)
    objects[0, 0], objects[1, 1], objects[2, 2:] = True, True, True
    assert metrics.choice(objects[1], objects, right=1).value == 1
    assert metrics.choice(objects[1], objects, right=0).value == 0
    two = objects[0] | objects[1]  # as much of either
    assert metrics.choice(two, objects, right=1).value == 1 / 2
    assert metrics.choice(np.zeros((4, 4), bool), objects, right=1).value == 0
    assert metrics.choice(objects[0], objects[:1], right=0).count.sum() == 0, "there was no choice"


@given(masks, st.integers(2, 5), seeds)
def test_an_answer_that_does_not_know_the_object_is_right_in_one_of_k_cases_at_most(pair, k, seed):
    objects = np.random.default_rng(seed).random((k, 9, 7)) < 0.3
    scores = [metrics.choice(pair[0], objects, right=right).value for right in range(k)]
    assert sum(scores) <= 1 + EXACT


def test_box_iou_by_hand():
    a, b = np.array([0.0, 0, 2, 2]), np.array([1.0, 1, 3, 3])
    assert metrics.box_iou(a, b) == pytest.approx(1 / 7, abs=EXACT)
    assert metrics.box_iou(a, a) == 1
    assert metrics.box_iou(a, np.array([5.0, 5, 6, 6])) == 0
    best = metrics.best_box_iou(np.stack([a, b]), [np.stack([b, a]), np.zeros((0, 4))])
    np.testing.assert_array_equal(best, [1, 0])


def test_layout_over_boxes_and_over_classes():
    whole, half = np.array([[0.0, 0, 1, 1]]), np.array([[0.0, 0, 1, 0.5]])
    far = np.array([[0.9, 0.9, 1, 1]])
    boxes = np.concatenate([whole, whole, whole])
    found = {"cat": np.concatenate([far, half]), "dog": whole, "cow": whole}
    scores = metrics.layout(boxes, ["cat", "cat", "dog"], found, classes=BOX_NAMES)
    # A half of a box fills it by 0.5, which is a success. There is no box of a cow.
    assert scores["layout_miou"].value == pytest.approx((0.5 + 0.5 + 1) / 3, abs=EXACT)
    assert scores["layout_miou_by_class"].value == pytest.approx((0.5 + 1) / 2, abs=EXACT)
    np.testing.assert_array_equal(scores["layout_success_by_class"].total, [2, 1, 0])
    np.testing.assert_array_equal(scores["layout_success_by_class"].count, [2, 1, 0])
    lost = metrics.layout(boxes, ["cat", "cat", "dog"], {"cow": whole})
    assert lost["layout_miou"].value == lost["layout_success"].value == 0
    none = metrics.layout(np.zeros((0, 4)), [], found, classes=BOX_NAMES)
    assert all(score.count.sum() == 0 for score in none.values())


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 12))
def test_layout_of_all_boxes_is_the_merge_of_each(seed, n):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((n + 6, 2, 2)), axis=1).reshape(-1, 4)
    boxes, found = corners[:n], dict(zip(BOX_NAMES, corners[n:].reshape(3, 2, 4)))
    names = list(rng.choice(BOX_NAMES, n))
    whole = metrics.layout(boxes, names, found, classes=BOX_NAMES)
    rows = [
        metrics.layout(boxes[i : i + 1], names[i : i + 1], found, classes=BOX_NAMES)
        for i in range(n)
    ]
    for name, score in whole.items():
        merged = metrics.merge(row[name] for row in rows)
        np.testing.assert_allclose(merged.total, score.total, atol=EXACT)
        np.testing.assert_array_equal(merged.count, score.count)


def test_depth_by_hand():
    target = np.array([[1.0, 2.0], [4.0, 0.0]])  # the last pixel is invalid
    # constant on the valid ones: aligns to the mean, 7/3
    prediction = np.array([[1.5, 1.5], [1.5, 9.0]])
    errors = metrics.depth_errors(prediction, target, limits=(0.0, 10.0))
    mean = 7 / 3
    assert errors["abs_rel"].value == pytest.approx(
        ((mean - 1) + (mean - 2) / 2 + (4 - mean) / 4) / 3, abs=EXACT
    )
    # only 2 against 7/3 is within 1.25
    assert errors["delta1"].value == pytest.approx(1 / 3, abs=EXACT)


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.1, 50), st.floats(-20, 20))
def test_aligned_depth_ignores_scale_and_shift(seed, scale, shift):
    rng = np.random.default_rng(seed)
    target = rng.uniform(1, 10, (6, 5))
    prediction = target + rng.normal(0, 1, (6, 5))
    limits = (0.5, 10.5)
    reference = metrics.depth_errors(prediction, target, limits=limits)
    moved = metrics.depth_errors(scale * prediction + shift, target, limits=limits)
    # Cancellation of the mean costs up to |shift| / scale / std digits: 200 x 1e-16 and a margin.
    assert moved["abs_rel"].value == pytest.approx(reference["abs_rel"].value, abs=1e-9)
    exact = metrics.depth_errors(scale * target + shift, target, limits=limits)
    assert exact["abs_rel"].value == pytest.approx(0, abs=1e-9)
    assert exact["delta1"].value == 1


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_aligned_depth_is_clipped_to_the_range_of_the_data_and_not_of_the_picture(seed):
    rng = np.random.default_rng(seed)
    target = np.append(rng.uniform(4, 6, 49), 6.0)
    prediction = np.append(target[:-1], 8.0)  # one pixel is too far, and costs what it is off
    free = metrics.align_depth(prediction, target, limits=(-np.inf, np.inf))
    assert free.max() > target.max()
    clipped = metrics.align_depth(prediction, target, limits=(1.0, 10.0))
    np.testing.assert_array_equal(clipped, np.clip(free, 1, 10))
    errors = metrics.depth_errors(prediction[None], target[None], limits=(1.0, 10.0))
    expected = np.mean(np.abs(clipped - target) / target)
    assert errors["abs_rel"].value == pytest.approx(expected, abs=EXACT)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(2, 40), st.floats(0, 3))
def test_depth_is_aligned_by_least_squares(seed, n, noise):
    """As numpy solves it for (scale, shift), which published protocols do."""
    rng = np.random.default_rng(seed)
    g = rng.uniform(1, 10, n)
    p = -2 * g + 5 + noise * rng.normal(size=n)
    design = np.stack([p, np.ones(n)], axis=1)
    solution, *_ = np.linalg.lstsq(design, g, rcond=None)
    aligned = metrics.align_depth(p, g, limits=(-np.inf, np.inf))
    np.testing.assert_allclose(aligned, design @ solution, atol=1e-9)


@pytest.mark.parity
def test_depth_is_aligned_as_scikit_learn_regresses():
    linear_model = pytest.importorskip("sklearn.linear_model")
    g = np.random.default_rng(0).uniform(1, 10, 50)
    p = np.sqrt(g)
    fitted = linear_model.LinearRegression().fit(p[:, None], g).predict(p[:, None])
    want = np.clip(fitted, 2, 9)
    np.testing.assert_allclose(metrics.align_depth(p, g, limits=(2.0, 9.0)), want, atol=1e-9)


def test_valid_pixels_are_those_that_are_given():
    target = np.array([[1.0, 2.0], [4.0, 400.0]])
    prediction = np.array([[1.0, 2.0], [4.0, 0.0]])
    valid = np.array([[True, True], [False, True]])
    errors = metrics.depth_errors(prediction, target, limits=(0.1, 10.0), valid=valid)
    # The far pixel counts, but predictions end at 10: g = 400 is 390 / 400 off.
    assert errors["abs_rel"].value > (390 / 400) / 3
    none = metrics.depth_errors(prediction, target, limits=(0.1, 10.0), valid=valid & False)
    assert none["abs_rel"].count.sum() == none["delta1"].count.sum() == 0


def test_pixels_out_of_the_range_do_not_count():
    target = np.array([[1.0, 2.0], [4.0, 20.0]])
    errors = metrics.depth_errors(np.array([[1.0, 2.0], [4.0, 0.0]]), target, limits=(0.0, 10.0))
    assert errors["abs_rel"].value == pytest.approx(0, abs=EXACT)


def test_pck_averages_over_joints_that_were_seen():
    target = np.zeros((3, 2))
    near, far = np.array([[0.5, 0], [3, 0], [0, 0]]), np.array([[0.0, 0], [np.nan, 0], [0, 0]])
    first = metrics.pck(near, target, visible=np.array([True, True, False]), box_size=10.0)
    second = metrics.pck(far, target, visible=np.array([True, False, False]), box_size=10.0)
    # Joint 0: 2 of 2. Joint 1: 0 of 1. Joint 2: never seen, does not count.
    assert (first + second).value == 0.5
    unseen = metrics.pck(near, target, visible=np.zeros(3, bool), box_size=10.0)
    assert np.isnan(unseen.value)
    loose = metrics.pck(near, target, visible=np.array([False, True, False]), box_size=10.0, at=0.4)
    assert loose.value == 1
    nan_is_a_miss = metrics.pck(far, target, visible=np.array([False, True, False]), box_size=10.0)
    assert nan_is_a_miss.value == 0


def test_recall_and_cosine():
    assert metrics.recall_at_1(np.array([0.3, 0.2, 0.1])).value == 1
    assert metrics.recall_at_1(np.array([0.3, 0.4, 0.1])).value == 0
    # a constant scorer is at chance, not at 100%
    assert metrics.recall_at_1(np.full(16, 0.5)).value == 1 / 16
    assert metrics.cosine(np.array([1.0, 0]), np.array([1.0, 1])).value == pytest.approx(
        2**-0.5, abs=EXACT
    )
    assert metrics.cosine(np.zeros(2), np.ones(2)).value == 0


@settings(max_examples=50, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_merge_of_shards_is_the_whole(seed, rows, shards, entries):
    rng = np.random.default_rng(seed)
    ratios = [
        Ratio.of(rng.random(entries), rng.integers(0, 3, entries).astype(float))
        for _ in range(rows)
    ]
    whole = metrics.merge(ratios)
    shuffled = metrics.merge([ratios[i] for i in rng.permutation(rows)])
    np.testing.assert_array_equal(whole.total, shuffled.total)
    parts = np.array_split(np.arange(rows), shards)  # uneven, some empty
    merged = metrics.merge(metrics.merge(ratios[i] for i in part) for part in parts if len(part))
    # One rounding per shard on top of one per sum.
    np.testing.assert_allclose(merged.total, whole.total, rtol=1e-14)
    np.testing.assert_array_equal(merged.count, whole.count)
    assert merged.value == pytest.approx(whole.value, rel=1e-13, nan_ok=True)


def test_ratio_addition_is_not_the_mean_of_means():
    few, many = Ratio.of(1.0, 1.0), Ratio.of(0.0, 9.0)
    assert (few + many).value == 0.1
    assert np.isnan(metrics.merge([]).value)
