"""Images in a benchmark's official layout are scored, whoever made them."""

import contextlib
import json
import types

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.evaluation import evaluation_cases as data
from tests.evaluation.benchmarks.official import FILES, needs_files
from tests.evaluation.benchmarks.test_geneval import write
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import inpainting
from univg_jax.evaluation.benchmarks.geneval import BENCHMARK, read
from univg_jax.evaluation.job import generate, write_side_files
from univg_jax.evaluation.official import Request
from univg_jax.evaluation.score_files import (
    check_scorers,
    check_settings,
    read_images,
    score_images,
    warn_of_networks,
)
from univg_jax.images import write_png

COLORS = {"cow": (200, 0, 0), "cup": (0, 0, 200)}


def detect(image):
    """A box around all pixels of an object's color."""
    found = {}
    for name, color in COLORS.items():
        ys, xs = np.nonzero((image == color).all(axis=-1))
        if len(ys):
            found[name] = [(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, 0.99, None)]
    return found


def name_colors(image, objects, name):
    return ["red" if name == "cow" else "blue" for _ in objects]


SCORERS = dict(detect=detect, color=name_colors)


def picture(*names) -> np.ndarray:
    image = np.full((40, 40, 3), 255, np.uint8)
    for k, name in enumerate(names):
        image[10:20, 5 + 20 * k : 15 + 20 * k] = COLORS[name]
    return image


def test_a_trivial_answer_scores_what_a_folder_of_it_does(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_png(tmp_path / "given" / f"{name}.png", rng.integers(0, 256, (40, 40, 3), np.uint8))
    settings = inpainting.Settings(side=32)
    benchmark = inpainting.benchmark(settings)
    rows = inpainting.read(tmp_path / "given", settings)
    for folder in ("theirs", "trivial"):
        (tmp_path / folder).mkdir()
    for row in rows:
        write_png(tmp_path / "theirs" / f"{row.name}.png", np.zeros((32, 32, 3), np.uint8))
        filled = cv2.inpaint(row.truth(), row.hole(), 1, cv2.INPAINT_TELEA)
        write_png(tmp_path / "trivial" / f"{row.name}.png", filled)
    scorers = {"inception": lambda images: [image.mean(axis=(0, 1)) for image in images]}
    numbers, of_trivial = (
        score_images(benchmark, rows, tmp_path / folder, scorers).summary(benchmark, rows)
        for folder in ("theirs", "trivial")
    )
    for name in ("raw/psnr", "composited/ssim", "composited/fid"):
        assert numbers[f"trivial_telea/{name}"] == of_trivial[name] != numbers[name]
    assert not {name for name in numbers if name.startswith("trivial_") and "strict" in name}


def test_what_is_transparent_has_its_own_colors(tmp_path):
    """As Pillow's `convert("RGB")` in the official code."""
    pixels = np.full((4, 4, 4), (200, 10, 10, 0), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    request = Request(index=0, task="t2i", inputs={}, files=("0.png",))
    (image,) = read_images(BENCHMARK, request, tmp_path).images
    np.testing.assert_array_equal(image, pixels[..., :3])


@pytest.fixture
def rows(tmp_path):
    return read(write(tmp_path), excerpt=True)


def test_a_folder_that_somebody_made_is_scored_by_the_benchmarks_rules(tmp_path, rows):
    folder = tmp_path / "images"
    for request in BENCHMARK.requests(rows):
        for name in request.files[:2]:
            write_png(folder / name, picture("cup", "cow"))
    found = score_images(BENCHMARK, rows, folder, SCORERS).summary(BENCHMARK, rows)
    # One cow; not two cups; the cup is left of the cow; the cow is red.
    right = dict(single_object=1.0, counting=0.0, position=1.0, colors=1.0)
    assert {tag: found[tag] for tag in right} == right
    assert found["overall"] == 0.75
    assert found["failures/missing"] == 8
    assert found["strict/overall"] == 0.375


def test_what_is_generated_is_in_the_layout_that_is_scored(tmp_path, rows):
    folder = tmp_path / "images"
    generate(
        BENCHMARK.requests(rows),
        folder,
        answer=lambda batch, task: np.stack([picture("cow", "cup")] * batch.size),
        collator=data.COLLATOR,
        batch_size=8,
    )
    write_side_files(BENCHMARK, rows, folder)
    assert json.loads((folder / "00001" / "metadata.jsonl").read_text())["prompt"] == "two cups"
    found = score_images(BENCHMARK, rows, folder, SCORERS).summary(BENCHMARK, rows)
    assert (found["failures/missing"], found["position"], found["colors"]) == (0, 0, 1)


def test_who_does_without_a_scorer_gets_the_other_numbers(tmp_path, rows):
    folder = tmp_path / "images"
    for request in BENCHMARK.requests(rows):
        write_png(folder / request.files[0], picture("cup", "cow"))
    whole = score_images(BENCHMARK, rows, folder, SCORERS).summary(BENCHMARK, rows)
    check_scorers(BENCHMARK, ["detect"], without=["color"])
    scored = score_images(BENCHMARK, rows, folder, dict(detect=detect))
    found = scored.summary(BENCHMARK, rows, without=["color"])
    assert {"overall", "strict/overall", "colors"} <= set(whole) - set(found)
    assert found == {name: whole[name] for name in found}


def test_processes_share_the_rows(tmp_path, rows, monkeypatch):
    folder = tmp_path / "images"
    for request in BENCHMARK.requests(rows):
        write_png(folder / request.files[0], picture("cow"))
    whole = score_images(BENCHMARK, rows, folder, SCORERS).rows
    parts = []
    monkeypatch.setattr("jax.process_count", lambda: 3)
    module = "univg_jax.evaluation.score_files"
    monkeypatch.setattr(f"{module}.missing", lambda requests, folder: [])
    monkeypatch.setattr(f"{module}.local_mesh", contextlib.nullcontext)
    monkeypatch.setattr(f"{module}.each_together", lambda items: items)
    monkeypatch.setattr(f"{module}._Sums.gathered", lambda sums: {})
    nothing = {name: [ratio] * 4 for name, ratio in whole[0].items()}
    monkeypatch.setattr(f"{module}.score.gather", lambda found, **_: parts.append(found) or nothing)
    for index in range(3):
        monkeypatch.setattr("jax.process_index", lambda index=index: index)
        score_images(BENCHMARK, rows, folder, SCORERS)
    assert [sorted(part) for part in parts] == [[0, 3], [1], [2]]
    together = {k: v for part in parts for k, v in part.items()}
    for k, expected in enumerate(whole):
        for name, ratio in expected.items():
            np.testing.assert_array_equal(together[k][name].total, ratio.total)


def test_what_is_missing_is_one_line(tmp_path, rows):
    with pytest.raises(UserError, match="has no image of geneval: expected 00000/samples/0000"):
        score_images(BENCHMARK, rows, tmp_path / "nothing", SCORERS)
    with pytest.raises(
        UserError,
        match=r"needs the scorer 'color': --scorer=color=DIR, CLIP.*--without=color leaves",
    ):
        check_scorers(BENCHMARK, ["detect"])
    with pytest.raises(UserError, match="geneval has no number without the scorer 'detect'"):
        check_scorers(BENCHMARK, ["color"], without=["detect"])
    with pytest.raises(UserError, match=r"unknown scorer of geneval: 'colour'.*'color'"):
        check_scorers(BENCHMARK, ["detect"], without=["colour"])


@needs_files
def test_all_prompts_of_the_official_file_ask_for_images_of_their_own(tmp_path):
    requests = BENCHMARK.requests(read(FILES / "geneval"))
    names = [name for request in requests for name in request.files]
    assert (len(requests), len(set(names))) == (553, 2212)
    ids = {request.sample_id(k) for request in requests for k in range(4)}
    assert len(ids) == 2212
    assert max(ids) < 2**32


def test_another_network_than_the_benchmark_names_is_told(tmp_path, caplog):
    bench = open_benchmark("parti:clip=ViT-L/14")
    for backbone in ("ViT-L/14", "ViT-B/32"):
        warn_of_networks(bench, {"clip": types.SimpleNamespace(backbone=backbone)})
    (record,) = caplog.records
    assert record.getMessage() == (
        "parti has clip=ViT-L/14, but the scorer 'clip' is ViT-B/32: these numbers do not compare"
    )


@pytest.mark.parametrize(("scorer", "key"), [("inception", "convention"), ("lpips", "lpips")])
def test_a_scorer_of_another_setting_is_refused(tmp_path, scorer, key):
    """Its numbers would be stored under the benchmark's setting."""
    named = inpainting.BENCHMARK.settings[key]
    opened = types.SimpleNamespace(opened_with={key: named})
    check_settings(inpainting.BENCHMARK, {scorer: opened})
    opened.opened_with = {key: "other"}
    message = f"inpainting has {key}={named}, but the scorer '{scorer}' has {key}=other"
    with pytest.raises(UserError, match=message):
        check_settings(inpainting.BENCHMARK, {scorer: opened})
    with pytest.raises(UserError, match=message):
        score_images(inpainting.BENCHMARK, [], tmp_path, {scorer: opened})
