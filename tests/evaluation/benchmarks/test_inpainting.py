"""In- and outpainting: raw and composited pictures apart, holes, and FID of any shards."""

import math
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.evaluation import evaluation_cases as data
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import fid, metrics
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import inpainting
from univg_jax.evaluation.benchmarks.inpainting import Settings, benchmark
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.score_files import score_images
from univg_jax.images import write_png

SETTINGS = Settings(side=48)
SCORERS = {
    "inception": lambda images: np.array([image[::16, ::16, 0].ravel() / 255 for image in images]),
    "lpips": lambda a, b: float(np.abs(a.astype(float) - b).mean() / 255),
}


@pytest.fixture
def folder(tmp_path):
    """Six pictures of noise, wider than high."""
    rng = np.random.default_rng(0)
    for k in range(6):
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        write_png(tmp_path / "in" / f"{k}.png", pixels)
    return tmp_path / "in"


def write(folder, rows, make):
    for row in rows:
        write_png(folder / inpainting.image_files(row)[0], make(row.truth(), row.hole()))
    return folder


def found(rows, folder):
    bench = benchmark(rows[0].settings)
    return score_images(bench, rows, folder, SCORERS).summary(bench, rows)


def test_the_truth_is_the_middle_square(folder):
    row = inpainting.read(folder, SETTINGS)[2]
    with Image.open(folder / "2.png") as picture:
        np.testing.assert_array_equal(row.truth(), np.asarray(picture)[:, 8:56])
    assert inpainting.read(folder, Settings(side=24))[2].truth().shape == (24, 24, 3)


def test_holes(folder):
    center = inpainting.read(folder, SETTINGS)[0].hole()
    outside = inpainting.read(folder, Settings(side=48, hole="outside"))[0].hole()
    assert (center + outside == 1).all()
    assert center[12:36, 12:36].all()
    assert center.sum() == 24 * 24
    boxes = [r.hole() for r in inpainting.read(folder, Settings(side=48, hole="box"))]
    assert len({box.tobytes() for box in boxes}) > 3
    assert all(12 * 12 <= box.sum() <= 24 * 24 for box in boxes)
    again = inpainting.read(folder, Settings(side=48, hole="box"))[3].hole()
    np.testing.assert_array_equal(boxes[3], again)
    others = [r.hole() for r in inpainting.read(folder, Settings(side=48, hole="box", seed=1))]
    assert any((a != b).any() for a, b in zip(boxes, others, strict=True))


def test_masks_of_a_folder_lie_on_the_pictures(folder, tmp_path):
    mask = np.zeros((48, 64), np.uint8)
    mask[:, 8:20] = 255  # the first twelve columns of the middle square
    for k in range(6):
        write_png(tmp_path / "masks" / f"{k}.png", mask)
    rows = inpainting.read(folder, Settings(side=48, hole=str(tmp_path / "masks")))
    assert rows[0].hole()[:, :12].all()
    assert rows[0].hole().sum() == 48 * 12
    write_png(tmp_path / "masks" / "1.png", np.roll(mask, -8, axis=1) * 0)
    with pytest.raises(UserError, match=r"masks/1\.png has no white pixel in the middle"):
        rows[1].hole()
    (tmp_path / "masks" / "2.png").unlink()
    with pytest.raises(NotFoundError, match="masks has no mask called '2'"):
        inpainting.read(folder, rows[0].settings)
    with pytest.raises(NotFoundError, match=r"2\.png does not exist: expected the mask of"):
        rows[2].hole()


def test_a_perfect_answer(folder, tmp_path):
    rows = inpainting.read(folder, SETTINGS)
    values = found(rows, write(tmp_path / "out", rows, lambda truth, hole: truth))
    for kind in inpainting.KINDS:
        assert values[f"{kind}/fid"] == pytest.approx(0, abs=1e-6)
        assert values[f"{kind}/lpips"] == 0
        assert values[f"{kind}/ssim"] == pytest.approx(1)
        assert values[f"{kind}/psnr"] == math.inf
        assert values[f"{kind}/identical"] == len(rows)
    assert values["failures/missing"] == 0


def test_raw_and_composited_are_apart(folder, tmp_path):
    """Inside the hole the answer is right; outside of it, it is gray."""

    def make(truth, hole):
        return np.where(hole[..., None] > 0, truth, np.uint8(128))

    rows = inpainting.read(folder, SETTINGS)
    values = found(rows, write(tmp_path / "out", rows, make))
    assert values["composited/lpips"] == 0
    assert values["composited/fid"] == pytest.approx(0, abs=1e-6)
    assert values["raw/lpips"] > 0.1
    assert values["raw/psnr"] < 20
    assert values["raw/fid"] > 0.1
    by_hand = [metrics.psnr(make(r.truth(), r.hole()), r.truth()).value for r in rows]
    assert values["raw/psnr"] == pytest.approx(np.mean(by_hand))


def test_a_result_that_is_the_truth_does_not_hide_the_others(folder, tmp_path):
    rows = inpainting.read(folder, SETTINGS)
    write(tmp_path / "out", rows[:1], lambda truth, hole: truth)
    write(tmp_path / "out", rows[1:], lambda truth, hole: np.uint8(255) - truth)
    values, rest = found(rows, tmp_path / "out"), found(rows[1:], tmp_path / "out")
    for kind in inpainting.KINDS:
        assert values[f"{kind}/psnr"] == rest[f"{kind}/psnr"] < 40
        assert (values[f"{kind}/identical"], rest[f"{kind}/identical"]) == (1, 0)
        assert values[f"strict/{kind}/psnr"] == values[f"{kind}/psnr"]


def test_a_missing_picture_is_left_out_or_the_worst(folder, tmp_path):
    rows = inpainting.read(folder, SETTINGS)
    values = found(rows, write(tmp_path / "out", rows[:3], lambda truth, hole: truth))
    assert values["failures/missing"] == 3
    assert values["raw/ssim"] == pytest.approx(1)
    assert values["strict/raw/ssim"] == values["strict/raw/lpips"] == pytest.approx(1 / 2)
    assert values["strict/composited/psnr"] == 0  # of those that are not the truth itself
    assert values["raw/fid"] > 0  # of three results and six truths
    alone = found(rows[:1], tmp_path / "out")
    assert math.isnan(alone["raw/fid"])
    nothing = [inpainting.score(row, [None], SCORERS) for row in rows]
    assert math.isnan(inpainting.summary(rows, nothing)["raw/psnr"])


def test_fid_is_that_of_all_features(folder, tmp_path):
    rows = inpainting.read(folder, SETTINGS)
    out = write(tmp_path / "out", rows, lambda truth, hole: truth // 2)
    truths = [row.truth() for row in rows]
    sums = [
        fid.FeatureSums.of(SCORERS["inception"](images), convention="pytorch-fid").gaussian()
        for images in (truths, [truth // 2 for truth in truths])
    ]
    expected = fid.frechet_distance(*sums)
    assert found(rows, out)["raw/fid"] == pytest.approx(expected)


def test_a_result_of_another_size_is_resized(folder):
    row = inpainting.read(folder, SETTINGS)[0]
    large = np.repeat(np.repeat(row.truth(), 2, axis=0), 2, axis=1)
    small = np.asarray(Image.fromarray(large).resize((48, 48), Image.Resampling.BICUBIC))
    found = inpainting.score(row, [large], SCORERS)["raw/psnr"].value
    assert found == metrics.psnr(small, row.truth()).value


def test_what_the_model_painted_outside_the_hole_is_kept_for_raw(folder, tmp_path):
    rows = inpainting.read(folder, SETTINGS)
    bench = benchmark(SETTINGS)
    answer = lambda batch, task: np.full_like(batch.target, 128)  # noqa: E731
    requests = bench.requests(rows)
    generate(requests, tmp_path / "out", answer=answer, collator=data.COLLATOR, batch_size=4)
    values = found(rows, tmp_path / "out")
    assert values["failures/missing"] == 0
    assert values["composited/psnr"] > values["raw/psnr"] + 3
    with Image.open(tmp_path / "out" / "0.png") as picture:
        assert (np.asarray(picture) == 128).all()


def test_another_folder_is_one_line(folder, tmp_path):
    with pytest.raises(NotFoundError, match="nothing does not exist: expected a folder"):
        inpainting.read(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no pictures: expected \.jpg"):
        inpainting.read(tmp_path / "empty")
    with pytest.raises(NotFoundError, match="hole=middle: expected center, outside, box, or a fol"):
        inpainting.read(folder, Settings(hole="middle"))
    (folder / "0.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="has two pictures called '0'"):
        inpainting.read(folder)
    (folder / "0.png").unlink()
    with pytest.raises(UserError, match=r"0\.jpg is not a readable image"):
        inpainting.read(folder)[0].truth()


def test_settings_are_checked():
    bench = open_benchmark("inpainting:side=64,prompt=a pig, small,hole=box")
    assert (bench.settings["side"], bench.settings["prompt"]) == (64, "a pig, small")
    with pytest.raises(UserError, match=r"unknown inpainting\.convention 'mine'"):
        open_benchmark("inpainting:convention=mine")
    with pytest.raises(UserError, match=r"inpainting\.side=8: expected a whole number >= 16"):
        open_benchmark("inpainting:side=8")
    with pytest.raises(UserError, match=r"unknown key of inpainting: 'holes'.*'hole'"):
        open_benchmark("inpainting:holes=box")
    with pytest.raises(UserError, match="geneval has no settings, but is given 'a=1'"):
        open_benchmark("geneval:a=1")


@pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
def test_real_pictures(tmp_path):
    folder = pathlib.Path(os.environ["UNIVG_SAMPLES"]) / "refcoco" / "coco_train2014"
    rows = inpainting.read(folder, SETTINGS)
    assert {row.truth().shape for row in rows} == {(48, 48, 3)}
    values = found(rows, write(tmp_path / "out", rows, lambda truth, hole: truth))
    assert values["raw/fid"] == pytest.approx(0, abs=1e-6)
