"""Layouts of COCO and Flickr30k: what is asked for, and what counts as found."""

import dataclasses
import json
import os
import pathlib

import numpy as np
import pytest

from data_pipelines import renderings
from tests.evaluation import evaluation_cases as data
from tests.native import boxes as coco
from tests.native import flickr30k_entities as flickr30k
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import layout_boxes
from univg_jax.evaluation.benchmarks.layout_boxes import Row, Settings, benchmark
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.score_files import score_images
from univg_jax.images import write_png

HALVES = Row(
    key="7",
    caption="a cat and a dog",
    boxes=((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)),
    phrases=("a cat", "a dog"),
    names=("cat", "dog"),
    classes=("cat", "cow", "dog"),
)
PICTURE = np.zeros((50, 100, 3), np.uint8)


def seen(**boxes):
    """A detector that sees these boxes, in pixels of PICTURE."""
    found = {name: np.array(rows, float).reshape(-1, 4) for name, rows in boxes.items()}
    return {"locate": lambda image, names: {n: found[n] for n in names if n in found}}


def score(row, images, scorers):
    return layout_boxes.score(row, images, scorers, settings=Settings(scorer="locate"))


def test_cocos_boxes_are_named_by_their_category(tmp_path):
    coco.write(tmp_path)
    rows = layout_boxes.read(tmp_path, Settings(split="train"))
    assert {row.key: row.names for row in rows} == {
        "0": ("dog", "dog", "person"),
        "1": ("dining table",),  # the dog is too small, and a crowd is no box
        "2": ("hot dog",),
    }
    assert rows[0].phrases[:2] == ("dogs", "dogs")
    assert rows[0].classes == ("dining table", "dog", "hot dog", "person")
    small = layout_boxes.read(tmp_path, Settings(split="train", min_area=0.0))
    assert small[1].names == ("dining table", "dog")


def test_flickrs_boxes_are_named_by_their_phrase(tmp_path):
    flickr30k.write(tmp_path)
    (row,) = layout_boxes.read(tmp_path, Settings(data="flickr30k", split="test"))
    assert (row.key, row.names, row.classes) == ("1007", ("A child",), ())
    rows = layout_boxes.read(tmp_path, Settings(data="flickr30k", split="train", min_area=0.0))
    by_key = {row.key: row for row in rows}
    # Of two phrases for one picture, those of the first caption alone.
    assert by_key["1001"].names == ("A man 's arm", "two dogs", "two dogs")
    assert "1005" not in by_key  # nothing has a box


def test_the_model_is_given_blocks_and_a_caption_that_names_them():
    first, second = layout_boxes.draw(HALVES), layout_boxes.draw(HALVES)
    left, right = (tuple(first.source[256, x]) for x in (128, 384))
    names = {color: name for name, color in renderings.PALETTE.items()}
    assert first.text == f"a cat ({names[left]} block) and a dog ({names[right]} block)"
    np.testing.assert_array_equal(first.source, second.source)
    assert any(layout_boxes.draw(HALVES, seed=k).text != first.text for k in range(1, 5))
    # What a picture is asked for does not hang on the others.
    others = [dataclasses.replace(HALVES, key="8"), HALVES]
    assert layout_boxes.requests(others)[1].inputs["prompt"] == first.text


def test_more_boxes_than_colors_are_the_largest(tmp_path):
    coco.write(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    things = [
        dict(image_id=4, category_id=1, bbox=[0, 0, 20 + k, 20], iscrowd=0, id=k) for k in range(12)
    ]
    file.write_text(json.dumps(content | dict(annotations=things)))
    (row,) = layout_boxes.read(tmp_path, Settings(min_area=0.0))
    assert len(row.boxes) == layout_boxes.MOST == 8
    widths = sorted(x1 for _, _, x1, _ in row.boxes)
    assert widths[0] == pytest.approx(widths[-1] * 24 / 31)


def test_success_and_iou_of_boxes():
    found = score(HALVES, [PICTURE], seen(cat=[[0, 0, 50, 50]], dog=[[50, 0, 75, 50]]))
    assert found["official/layout_miou"].value == pytest.approx(0.75)
    assert found["official/layout_success"].value == 1  # one half is enough
    found = score(HALVES, [PICTURE], seen(cat=[[0, 0, 24, 50]]))
    assert found["official/layout_success"].value == 0
    assert found["official/layout_miou"].value == pytest.approx(0.24)


def test_the_best_detection_of_the_same_name_counts():
    boxes = [[0, 0, 5, 5], [0, 0, 50, 50]]
    assert score(HALVES, [PICTURE], seen(cat=boxes))["official/layout_miou"].value == 0.5
    swapped = seen(dog=[[0, 0, 50, 50]], cat=[[50, 0, 100, 50]])
    assert score(HALVES, [PICTURE], swapped)["official/layout_miou"].value == 0


def test_means_over_boxes_and_over_classes():
    cats = Row("8", "cats", ((0.0, 0.0, 1.0, 1.0),), ("cats",), ("cat",), HALVES.classes)
    scores = [
        score(HALVES, [PICTURE], seen(cat=[[0, 0, 50, 50]])),
        score(cats, [PICTURE], seen(cat=[[0, 0, 100, 50]])),
    ]
    values = layout_boxes.summary([HALVES, cats], scores)
    assert values["official/layout_success"] == pytest.approx(2 / 3)
    assert values["official/layout_success_by_class"] == pytest.approx((1 + 0) / 2)
    assert values["official/layout_success/cat"] == 1
    assert values["official/layout_success/dog"] == 0
    assert "official/layout_success/cow" not in values
    assert layout_boxes.summary([cats, HALVES], scores[::-1]) == values


def test_a_missing_picture_counts_nowhere_or_finds_nothing():
    scores = [
        score(HALVES, [PICTURE], seen(cat=[[0, 0, 50, 50]], dog=[[50, 0, 100, 50]])),
        score(HALVES, [None], seen()),
    ]
    assert {n: r.total.shape for n, r in scores[0].items()} == {
        n: r.total.shape for n, r in scores[1].items()
    }
    values = layout_boxes.summary([HALVES] * 2, scores)
    assert values["official/layout_miou"] == 1
    assert values["strict/layout_miou"] == values["strict/layout_success_by_class"] == 0.5
    assert values["failures/missing"] == 1


def test_a_detector_of_classes_is_asked_for_its_classes():
    detections = {"cat": [(0, 0, 50, 50, 0.9, None), (0, 0, 9, 9, 0.4, None)], "cow": []}
    locate = layout_boxes.of_classes(lambda image: detections, above=0.5)
    found = locate(PICTURE, ["cat", "dog"])
    assert found["cat"].tolist() == [[0, 0, 50, 50]]
    assert found["dog"].shape == (0, 4)


def test_a_detector_of_classes_is_enough_for_coco(tmp_path):
    bench = open_benchmark("layout_boxes:above=0.6,detector=yolo")
    assert bench.needs == {"detect": ()}

    def detect(image):
        cat, dog = (0, 0, 50, 50, 0.9, None), (90, 0, 100, 50, 0.9, None)
        return {"cat": [cat], "dog": [dog, (50, 0, 100, 50, 0.5, None)]}

    write_png(tmp_path / "7.png", PICTURE)
    rows = [HALVES, dataclasses.replace(HALVES, key="8")]
    scored = score_images(bench, rows, tmp_path, {"detect": detect})
    found = scored.summary(bench, rows)
    assert found["official/layout_success"] == 0.5
    assert found["official/layout_miou"] == bench.quality(scored.rows[0]) == pytest.approx(0.6)
    kinds = {name: x for name, x in found.items() if name.startswith("failures/")}
    assert kinds == {
        "failures/missing": 1,
        "failures/box_not_found": 0,
        "failures/box_elsewhere": 1,
        "failures/unreadable": 0,
    }
    detect.classes = ("cat", "dogs")
    with pytest.raises(UserError, match="unknown class of the detector 'dog'"):
        score_images(bench, rows, tmp_path, {"detect": detect})


def test_what_is_generated_is_scored(tmp_path):
    """An answer that paints the blocks, and a detector that knows their colors."""
    coco.write(tmp_path / "coco")
    bench = open_benchmark("layout_boxes:split=train,scorer=locate")
    rows = bench.read(tmp_path / "coco")
    requests = bench.requests(rows)
    folder = tmp_path / "out"
    answer = lambda batch, task: batch.source  # noqa: E731
    generate(requests, folder, answer=answer, collator=data.COLLATOR, batch_size=2)

    def locate(image, names):
        boxes = []
        for color in renderings.PALETTE.values():
            ys, xs = np.nonzero((np.abs(image.astype(int) - color) < 40).all(axis=-1))
            if len(ys):
                boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        return {name: np.array(boxes, float).reshape(-1, 4) for name in names}

    found = score_images(bench, rows, folder, {"locate": locate}).summary(bench, rows)
    assert found["official/layout_success"] == 1
    assert found["official/layout_miou"] > 0.8
    assert found["failures/missing"] == 0


def test_what_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"unknown layout_boxes\.data 'lvis'"):
        open_benchmark("layout_boxes:data=lvis")
    with pytest.raises(UserError, match="have phrases and no classes: give scorer=locate"):
        open_benchmark("layout_boxes:data=flickr30k")
    coco.write(tmp_path)
    with pytest.raises(UserError, match="has no split test of coco, but train, validation"):
        layout_boxes.read(tmp_path, Settings(split="test"))
    with pytest.raises(UserError, match=r"no picture with a box of at least 1\.5"):
        layout_boxes.read(tmp_path, Settings(min_area=1.5))
    stored = json.loads(json.dumps(benchmark(Settings(detector="yolo")).settings))
    assert (stored["detector"], stored["above"], stored["min_area"]) == ("yolo", 0.5, 0.02)


@pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
def test_real_annotations():
    folder = pathlib.Path(os.environ["UNIVG_SAMPLES"]) / "coco_tiny"
    (row,) = layout_boxes.read(folder, Settings(split="train"))
    assert (row.names, row.classes) == (("b",), ("a", "b", "c"))
    assert row.boxes[0] == pytest.approx((0.2, 0.4, 0.5, 0.6))
