"""RefCOCO as a benchmark: every sentence is a sample, and sets are not mixed."""

import json
import os
import pathlib
import pickle
import re

import numpy as np
import pytest

from data_pipelines import renderings
from tests.evaluation import evaluation_cases as data
from tests.native import refcoco as release
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import segmentation
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import refcoco_seg
from univg_jax.evaluation.benchmarks.refcoco_seg import BENCHMARK, Settings
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.score_files import score_images
from univg_jax.images import write_png


@pytest.fixture
def root(tmp_path):
    release.write(tmp_path)
    return tmp_path


def read(root, **settings):
    return refcoco_seg.read(root, Settings(**settings), excerpt=True)


def masks(shape, *boxes) -> np.ndarray:
    """A mask of boxes x0 y0 x1 y1."""
    mask = np.zeros(shape, bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def picture(mask) -> np.ndarray:
    return renderings.render_mask(mask.astype(np.uint8))


def test_every_sentence_is_a_sample(root):
    rows = read(root, splits=("train",))
    assert [(r.ref, r.number, r.sentence) for r in rows] == [
        (0, 0, "left square"),
        (0, 1, "the left one"),
        (1, 0, "right square"),
        (2, 0, "the left one"),  # a second ref of one object, and a sentence twice
        (2, 1, "biggest thing"),
        (3, 0, "middle box"),
    ]
    # What two polygons share is there once.
    overlapping = masks((80, 120), (10, 10, 40, 40), (30, 20, 60, 50))
    np.testing.assert_array_equal(rows[0].mask, overlapping)
    np.testing.assert_array_equal(rows[5].mask, masks((110, 70), (20, 30, 50, 60)))
    names = [name for row in rows for name in refcoco_seg.image_files(row)]
    assert names[1] == "refcoco_unc/train/00000_1.png"
    assert len(set(names)) == 6


@pytest.mark.parametrize(
    ("spec", "sets", "primary"),
    [
        ("refcoco_seg", {"refcoco_unc/val", "refcoco_unc/testA", "refcoco_unc/testB"}, "val"),
        ("refcoco_seg:splits=['testB']", {"refcoco_unc/testB"}, "testB"),
        ("refcoco_seg:subset=refcoco+", {"refcoco+_unc/testA"}, "val"),
        (
            "refcoco_seg:subset=refcocog,partition=google",
            {"refcocog_google_refexp/val"},
            "val",
        ),
    ],
)
def test_one_subset_without_train(root, spec, sets, primary):
    bench = open_benchmark(spec)
    rows = bench.read(root, excerpt=True)
    assert {row.name.rsplit("/", 1)[0] for row in rows} == sets
    assert bench.primary == f"{primary}/official/oiou"
    assert bench.settings["partition"] == ("google" if "google" in spec else "unc")


def test_pictures_are_those_of_train2014(root):
    (row,) = read(root, splits=("testB",))
    assert row.picture == str(root / "train2014" / "COCO_train2014_000000000014.jpg")
    (row,) = read(root, splits=("testB",), pictures="coco")
    (request,) = BENCHMARK.requests([row])
    assert request.inputs == {"prompt": "right box", "image": "coco/" + release._name(14)}
    assert (request.task, request.whole) == ("seg", True)


def test_sets_are_apart_and_a_ratio_of_sums_is_no_mean(root, tmp_path):
    rows = read(root)
    shape, folder = (60, 140), tmp_path / "out"
    answers = {
        "the box": masks((96, 96), (20, 20, 60, 60)),
        "left box": masks(shape, (10, 10, 50, 30)),  # half of it
        "right box": masks(shape, (90, 10, 140, 50)),  # and a quarter more
    }
    for row in rows:
        write_png(folder / refcoco_seg.image_files(row)[0], picture(answers[row.sentence]))
    found = score_images(BENCHMARK, rows, folder, {}).summary(BENCHMARK, rows)
    assert found["val/official/oiou"] == found["val/official/miou"] == 1
    assert found["testA/official/oiou"] == 0.5
    assert found["testA/official/precision@0.5"] == 1  # at least
    assert found["testA/official/precision@0.6"] == 0
    assert found["testB/official/miou"] == 0.8
    assert found["testB/official/precision@0.8"] == 1
    both = [r for r in rows if r.split != "val"]
    scores = [segmentation.score(picture(answers[r.sentence]), r.mask) for r in both]
    merged = segmentation.summary(["both"] * 2, scores)
    assert merged["both/official/oiou"] == (800 + 1600) / (1600 + 2000)
    assert merged["both/official/miou"] == pytest.approx((0.5 + 0.8) / 2)


def test_a_picture_of_any_size_is_of_the_whole_photograph(root):
    (row,) = read(root, splits=("testA",))
    small = picture(masks((30, 70), (5, 5, 25, 25)))
    assert segmentation.score(small, row.mask)["official/miou"].value > 0.9
    square = picture(masks((70, 70), (5, 12, 25, 58)))
    assert segmentation.score(square, row.mask)["official/miou"].value > 0.9


@pytest.mark.parametrize(("level", "inside"), [(127, 0), (128, 1)])
def test_the_threshold_is_half_of_white(level, inside):
    gray = np.full((20, 20, 3), level, np.uint8)
    assert segmentation.decode(gray, shape=(20, 20)).mean() == inside


def test_a_missing_picture_is_left_out_or_an_empty_mask(root, tmp_path):
    rows = read(root, splits=("testA", "testB"))
    write_png(tmp_path / refcoco_seg.image_files(rows[0])[0], picture(rows[0].mask))
    found = score_images(BENCHMARK, rows, tmp_path, {}).summary(BENCHMARK, rows)
    assert found["failures/missing"] == 1
    assert np.isnan(found["testB/official/miou"])
    assert found["testB/strict/miou"] == found["testB/strict/oiou"] == 0


def test_what_is_generated_lies_on_the_whole_photograph(root, tmp_path):
    """An answer that marks the left half of what it is given."""

    def answer(batch, task):
        images = np.zeros_like(batch.source)
        images[:, :, : images.shape[2] // 2] = 255
        return images

    rows = read(root, splits=("testA", "testB"))
    folder = tmp_path / "out"
    requests = BENCHMARK.requests(rows)
    generate(requests, folder, answer=answer, collator=data.COLLATOR, batch_size=2)
    found = score_images(BENCHMARK, rows, folder, {}).summary(BENCHMARK, rows)
    # All of 40 x 40 pixels within 70 x 60, and none of those to the right.
    assert found["testA/official/oiou"] == pytest.approx(1600 / 4200, abs=0.01)
    assert found["testB/official/oiou"] == 0


def test_another_release_is_one_line(root):
    with pytest.raises(UserError, match=r"has 1 sentences of refcoco unc val instead of 10834"):
        refcoco_seg.read(root)
    with pytest.raises(NotFoundError, match=r"has no refcoco\+ of google: expected refcoco\+/refs"):
        read(root, subset="refcoco+", partition="google")
    with pytest.raises(UserError, match="'refcok'"):
        open_benchmark("refcoco_seg:subset=refcok")
    with pytest.raises(NotFoundError, match=r"refcoco has no sentences of testC"):
        read(root, splits=("val", "testC"))
    with pytest.raises(
        NotFoundError, match=r"nothing has no refcoco of unc: expected refcoco/refs"
    ):
        read(root / "nothing")


def test_refs_of_other_instances_are_refused(root):
    file = root / "refcoco" / "instances.json"
    content = json.loads(file.read_text())
    content["images"] = [i for i in content["images"] if i["id"] != 13]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"has not picture 13 with annotation 131, of refcoco \(u"):
        read(root)
    content["images"].append(dict(release._image(13), file_name="../13.jpg"))
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape("'../13.jpg' is the name of no picture")):
        read(root)


@pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
def test_real_refs(tmp_path):
    """The TFDS dump has real refs, with their annotations; they are put back as released."""
    folder = pathlib.Path(os.environ["UNIVG_SAMPLES"]) / "refcoco"
    dump = json.loads((folder / "tfds_refcoco.json").read_text())
    images = [dict(v["info"]) for v in dump["coco_anns"].values()]
    anns = {r["ann_id"]: {k: v for k, v in r["ann"].items() if k != "ann"} for r in dump["ref"]}
    refs = [r for r in dump["ref"] if (r["dataset"], r["dataset_partition"]) == ("refcoco", "unc")]
    (tmp_path / "refcoco").mkdir()
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    instances = dict(images=images, annotations=list(anns.values()), categories=[])
    (tmp_path / "refcoco" / "instances.json").write_text(json.dumps(instances))
    splits = {r["split"] for r in refs}
    rows = read(tmp_path, splits=tuple(splits), pictures=str(folder / "coco_train2014"))
    assert len(rows) == sum(len(r["sentences"]) for r in refs)
    assert all(row.mask.any() and os.path.isfile(row.picture) for row in rows)
