"""Emu Edit's test set: swapped splits, two references, and what is left out."""

import dataclasses
import json
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.evaluation import evaluation_cases as data
from tests.evaluation.benchmarks.picture_scorers import SCORERS, plain
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import emu_edit
from univg_jax.evaluation.benchmarks.emu_edit import Settings, benchmark
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.score_files import score_images
from univg_jax.images import png_bytes, write_png

# idx, task, captions before and after, the source's color and that of Emu Edit's result
EDITS = [
    (7, "color", "a red thing", "a green thing", "red", "green"),
    (3, "color", "a red thing", "a blue thing", "red", "red"),
    (9, "add", "a blue thing", "a blue thing", "blue", "blue"),
]
GENERATIONS = Settings(release="generations")


def write(folder, name="test", *, release="set", edits=EDITS, **change):
    rows = []
    for idx, task, before, after, source, emu in edits:
        row = dict(
            idx=idx,
            hash="0",
            task=task,
            instruction=f"from {source}",
            input_caption=before,
            output_caption=after,
            image=dict(bytes=png_bytes(plain(source)), path=None),
        )
        if release == "generations":
            row |= dict(edited_image=dict(bytes=png_bytes(plain(emu)), path=None), split=name)
        rows.append({k: v for k, v in (row | change).items() if v is not ...})
    (folder / "data").mkdir(parents=True, exist_ok=True)
    file = folder / "data" / f"{name}-00000-of-00001-0a1b.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    return folder


def scored(folder, results, settings):
    """The summary of results by idx, of a release in `folder`."""
    rows = emu_edit.read(folder, settings, excerpt=True)
    for idx, color in results.items():
        write_png(folder / "out" / f"{idx}.png", plain(color))
    bench = benchmark(settings)
    return score_images(bench, rows, folder / "out", SCORERS).summary(bench, rows)


def test_reads_rows_and_asks_for_edits(tmp_path):
    rows = emu_edit.read(write(tmp_path), excerpt=True)
    assert [(r.idx, r.task, r.caption) for r in rows] == [
        (7, "color", "a green thing"),
        (3, "color", "a blue thing"),
        (9, "add", "a blue thing"),
    ]
    request = benchmark().requests(rows)[1]
    assert request.files == ("3.png",)
    assert request.inputs["prompt"] == "from red"
    np.testing.assert_array_equal(request.inputs["image"](), plain("red"))
    assert request.whole


def test_the_generations_have_the_names_of_the_splits_swapped(tmp_path):
    write(tmp_path, "validation", release="generations")
    write(tmp_path, "test", release="generations", edits=EDITS[:1])
    assert len(emu_edit.read(tmp_path, GENERATIONS, excerpt=True)) == 3
    other = dataclasses.replace(GENERATIONS, split="validation")
    assert len(emu_edit.read(tmp_path, other, excerpt=True)) == 1
    with pytest.raises(
        UserError, match=r"3 rows of test \(validation-\*\.parquet\) instead of 3589"
    ):
        emu_edit.read(tmp_path, GENERATIONS)
    with pytest.raises(
        UserError, match=r"1 rows of validation \(test-\*\.parquet\) instead of 2022"
    ):
        emu_edit.read(tmp_path, other)


@pytest.mark.parametrize(("reference", "alike"), [("source", 1 / 3), ("emu_output", 2 / 3)])
def test_results_are_compared_with_the_source_or_with_emus(tmp_path, reference, alike):
    """7 is edited as Emu Edit does, 9 is not changed, and 3 is another color than both."""
    write(tmp_path, "validation", release="generations")
    settings = Settings(release="generations", reference=reference)
    found = scored(tmp_path, {7: "green", 3: "blue", 9: "blue"}, settings)
    assert found["official/clip_i"] == pytest.approx(alike)
    assert found["official/clip_t"] == pytest.approx(1)
    assert found["official/l1"] == pytest.approx((1 - alike) * 400 / 255 / 3)
    assert found["official/clip_t/add"] == pytest.approx(1)
    assert found["official/clip_i/add"] == pytest.approx(1)


def test_a_missing_result_counts_nowhere_or_as_the_worst(tmp_path):
    found = scored(write(tmp_path), {7: "red", 9: "blue"}, Settings())
    assert found["official/clip_i"] == pytest.approx(1)
    assert found["strict/clip_i"] == pytest.approx(2 / 3)
    assert (found["official/l1"], found["strict/l1"]) == (0, pytest.approx(1 / 3))
    assert (found["failures/missing"], found["failures/black"]) == (1, 0)
    assert math.isclose(found["official/clip_t/add"], 1)


@pytest.mark.parametrize(
    ("drop", "official"), [((), 1 / 3), (("black_results",), 1 / 2), (("equal_captions",), 0)]
)
def test_what_is_left_out_is_a_setting(tmp_path, drop, official):
    """7 is black, 3 is wrong, and the captions of 9 ask for nothing."""
    found = scored(write(tmp_path), {7: (0, 0, 0), 3: "green", 9: "blue"}, Settings(drop=drop))
    assert found["official/clip_t"] == pytest.approx(official)
    assert found["failures/black"] == 1
    assert found["strict/clip_t"] == pytest.approx(1 / 3 if "equal_captions" not in drop else 0)


def test_what_is_generated_is_scored(tmp_path):
    rows = emu_edit.read(write(tmp_path), excerpt=True)
    requests = benchmark().requests(rows)
    answer = lambda batch, task: batch.source  # noqa: E731
    generate(requests, tmp_path / "out", answer=answer, collator=data.COLLATOR, batch_size=2)
    found = scored(tmp_path, {}, Settings())
    assert found["official/l1"] == found["official/l2"] == found["failures/missing"] == 0


def test_settings_are_stored_and_checked():
    bench = open_benchmark("emu_edit:clip=ViT-L/14,split=validation,drop=['black_results']")
    assert json.loads(json.dumps(bench.settings)) == {
        "clip": "ViT-L/14",
        "clip_score": "cosine",
        "dino": "dino_vits16",
        "split": "validation",
        "release": "set",
        "reference": "source",
        "drop": ["black_results"],
    }
    for wrong in ("split=train", "reference=target", "drop=['some']"):
        with pytest.raises(UserError, match=r"'(train|target|some)'"):
            open_benchmark(f"emu_edit:{wrong}")
    with pytest.raises(UserError, match="reference=emu_output needs release=generations"):
        open_benchmark("emu_edit:reference=emu_output")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(output_caption=""), "row 0: it has no output_caption"),
        (dict(idx=5), "row 1: the idx 5 is there twice"),
        (dict(task=...), "has no column 'task'"),
    ],
)
def test_another_file_is_one_line(tmp_path, change, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        emu_edit.read(write(tmp_path, **change), excerpt=True)


def test_files_and_pictures_that_are_missing_are_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"has no test-\*\.parquet: expected the parquet"):
        emu_edit.read(tmp_path)
    with pytest.raises(UserError, match="has no column 'edited_image'"):
        emu_edit.read(write(tmp_path, "validation"), GENERATIONS)
    rows = emu_edit.read(write(tmp_path, image=dict(bytes=b"no", path=None)), excerpt=True)
    with pytest.raises(UserError, match=r"row 0: image is not a readable image"):
        emu_edit.score(rows[0], [plain("red")], SCORERS)
