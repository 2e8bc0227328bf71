"""Detectors from ONNX files, run by the real onnxruntime: where boxes and masks come to lie, what
stays of overlapping ones, and every way in which a description can be wrong.
"""

import dataclasses
import json
import math
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.onnx_model import onnx_model
from univg_jax import fields
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmarks import geneval
from univg_jax.evaluation.detection import by_score
from univg_jax.evaluation.scorers import scorer_digests
from univg_jax.evaluation.scorers.detector import open_detector, suppress
from univg_jax.evaluation.scorers.detector_spec import Spec, read_spec
from univg_jax.evaluation.scorers.framing import framed

pytest.importorskip("onnxruntime")

CLASSES = ("cat", "", "dog")
RULES = {
    "fixed": dict(resize="fixed", size=[40, 56]),
    "fixed-larger": dict(resize="fixed", size=[150, 260], antialias=False),
    "letterbox-wide": dict(resize="letterbox", size=[64, 64], pad=114.0),
    "letterbox-high": dict(resize="letterbox", size=[32, 90], pad=0.0),
    "letterbox-corner": dict(resize="letterbox", size=[64, 64], centered=False, antialias=False),
    "shortest-side": dict(resize="shortest_side", size=48),
    "shortest-side-padded": dict(resize="shortest_side", size=48, multiple=32, longest=70),
}
DETR = dict(output="detr", outputs=dict(logits="logits", boxes="pred_boxes"), scores="sigmoid")
YOLO = dict(output="yolo", outputs=dict(rows="output0"))
RCNN = dict(output="mask_rcnn", outputs=dict(boxes="b", labels="l", scores="s"))
FORMER = dict(output="mask2former", outputs=dict(logits="q", masks="m"))
FREE = ("float32", (1, 3, "h", "w"))


@pytest.fixture
def write(tmp_path):
    """Writes a model with constant outputs, its description and its classes."""

    def write_all(outputs, spec, *, kind=FREE, classes=CLASSES, more_inputs=None):
        inputs = {"images": kind} | (more_inputs or {})
        (tmp_path / "m.onnx").write_bytes(onnx_model(outputs, inputs=inputs))
        if spec is not None:
            spec = {"classes": "names.txt", "resize": "fixed", "size": [40, 50]} | spec
            (tmp_path / "m.json").write_text(json.dumps(spec))
        if classes is not None:
            (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in classes))
        return tmp_path / "m.onnx"

    return write_all


def logit(p):
    return math.log(p / (1 - p))


def rows_of(*boxes, score=0.9, label=0, count=3):
    """YOLO's rows: center and size, then a score for each class."""
    rows = np.zeros((len(boxes), 4 + count), np.float32)
    for row, (x0, y0, x1, y1) in zip(rows, boxes):
        row[:4] = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        row[4 + label] = score
    return rows


def image_of(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def only(detections):
    ((name, (detection,)),) = detections.items()
    return name, detection


# Where things are


def ramp(height, width):
    """A picture that says where a pixel is: red is its column, green its row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([columns, rows, np.full_like(rows, 200)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [(90, 120), (120, 70)], ids=["wide", "high"])
@pytest.mark.parametrize("rule", RULES)
def test_a_box_lies_where_the_picture_shows_what_the_input_does(write, rule, size):
    """What the network sees at a place of its input is at the box's place of the picture."""
    image = ramp(*size)
    spec_only = write({"output0": rows_of()[None]}, YOLO | RULES[rule] | dict(scale=1.0))
    values, _ = framed(image, read_spec(spec_only.with_suffix(".json")))
    red, green, blue = values.transpose(2, 0, 1)
    shown = np.argwhere(np.abs(blue - 200) < 0.5)  # not the padding
    (top, left), (bottom, right) = shown.min(axis=0), shown.max(axis=0)
    assert len(shown) == (bottom - top + 1) * (right - left + 1)
    places = [
        (y, x)
        for y in np.linspace(top + 4, bottom - 4, 4).astype(int)
        for x in np.linspace(left + 4, right - 4, 4).astype(int)
    ]
    rows = rows_of(*((x, y, x + 1, y + 1) for y, x in places))
    detect = open_detector(
        write({"output0": rows[None]}, YOLO | RULES[rule] | dict(scale=1.0, max_detections=99))
    )
    for (y, x), (x0, y0, x1, y1, *_) in zip(places, detect(image)["cat"], strict=True):
        # Resampling rounds to whole gray levels, and a border is half a pixel wide.
        assert (x0 + x1) / 2 - 0.5 == pytest.approx(red[y, x], abs=0.8)
        assert (y0 + y1) / 2 - 0.5 == pytest.approx(green[y, x], abs=0.8)


@pytest.mark.parametrize("rule", RULES)
def test_a_mask_covers_what_the_network_marked(write, rule):
    """The masks are the input itself: what is red in the picture is in the first one."""
    image = np.zeros((90, 120, 3), np.uint8)
    image[20:66, 30:85, 0] = 255
    image[70:88, 3:25, 2] = 255
    logits = np.full((1, 3, 4), -9, np.float32)
    logits[0, 0, 0] = logits[0, 2, 2] = 9
    logits[0, 1, 3] = 9  # no object
    rule = RULES[rule] | dict(mean=[0.5] * 3, std=[0.01] * 3)
    if "pad" not in rule and rule["resize"] != "fixed":
        rule["pad"] = 0
    path = write({"q": logits, "m": "images"}, FORMER | rule)
    found = open_detector(path)(image)
    assert set(found) == {"cat", "dog"}
    for name, (x0, y0, x1, y1) in (("cat", (30, 20, 85, 66)), ("dog", (3, 70, 25, 88))):
        ((*box, score, mask),) = found[name]
        near = 120 / 48  # pixels of the picture in one of the smallest input
        np.testing.assert_allclose(box, (x0, y0, x1, y1), atol=near)
        assert score > 0.8
        assert mask.shape == (90, 120)
        assert mask.dtype == bool
        assert mask[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3].all()
        assert mask.sum() <= (x1 - x0 + 6) * (y1 - y0 + 6)
        ys, xs = np.nonzero(mask)
        assert tuple(box) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def bilinear(plane, y, x, *, beyond):
    """The value of a plane between the centers of its cells, one point at a time."""
    value = 0.0
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            weight = (1 - abs(y - i)) * (1 - abs(x - j))
            inside = 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]
            if inside or beyond == "edge":
                a, b = (min(max(v, 0), n - 1) for v, n in zip((i, j), plane.shape))
                value += weight * plane[a, b]
    return value


@pytest.mark.parametrize("rule", ["fixed", "letterbox-corner", "shortest-side-padded"])
def test_masks_of_boxes_are_pasted_into_them(write, rule):
    image = image_of(30, 36)
    planes = np.random.default_rng(1).random((1, 1, 5, 6)).astype(np.float32)
    box = np.float32([[3.3, 4.2, 30.9, 60]])  # reaches below the picture
    outputs = {"b": box, "l": np.array([2]), "s": np.float32([0.8]), "m": planes}
    spec = RCNN | RULES[rule] | dict(mask_threshold=0.45)
    spec["outputs"] = spec["outputs"] | dict(masks="m")
    path = write(outputs, spec)
    name, (x0, y0, x1, y1, score, mask) = only(open_detector(path)(image))
    assert (name, float(score)) == ("dog", pytest.approx(0.8))
    _, frame = framed(image, read_spec(path.with_suffix(".json")))
    scale_y, scale_x = frame.scale
    a, b, c, d = box[0] / [scale_x, scale_y, scale_x, scale_y]  # these rules begin at the corner
    assert (x0, y0, x1, y1) == pytest.approx((a, b, min(c, 36), min(d, 30)))
    for y in range(30):
        for x in range(36):
            inside = b <= y + 0.5 < d and a <= x + 0.5 < c
            at = (y + 0.5 - b) / (d - b) * 5 - 0.5, (x + 0.5 - a) / (c - a) * 6 - 0.5
            value = bilinear(planes[0, 0], *at, beyond="zero") if inside else 0
            if abs(value - 0.45) > 1e-4:  # float32
                assert mask[y, x] == (value > 0.45)


@pytest.mark.parametrize("rule", ["fixed", "letterbox-high", "shortest-side-padded"])
@pytest.mark.parametrize("kind", ["detr", "detr-p", "mask_rcnn", "yolo"])
def test_masks_of_the_input_are_sampled_at_every_pixel(write, rule, kind):
    image = image_of(30, 36)
    planes = np.random.default_rng(1).normal(size=(1, 1, 7, 8)).astype(np.float32)
    (scores, labels) = (np.float32([[logit(0.8), -9, -9]]), np.array([0]))
    outputs, spec = {
        "detr": (
            dict(logits=scores[None], pred_boxes=np.full((1, 1, 4), 0.5, np.float32), m=planes),
            DETR | dict(outputs=DETR["outputs"] | dict(masks="m")),
        ),
        "detr-p": (
            dict(logits=scores[None], pred_boxes=np.full((1, 1, 4), 0.5, np.float32), m=planes),
            DETR
            | dict(outputs=DETR["outputs"] | dict(masks="m"))
            | dict(mask_values="probabilities", mask_threshold=0.3),
        ),
        "mask_rcnn": (
            dict(b=np.float32([[0, 0, 30, 30]]), l=labels, s=np.float32([0.8]), m=planes),
            RCNN | dict(outputs=RCNN["outputs"] | dict(masks="m"), mask_frame="image"),
        ),
        "yolo": (
            dict(
                output0=np.concatenate([rows_of((5, 6, 30, 28)), [[2]]], 1)[None].astype("f4"),
                output1=planes / 2,
            ),
            YOLO | dict(outputs=YOLO["outputs"] | dict(prototypes="output1")),
        ),
    }[kind]
    path = write(outputs, spec | RULES[rule])
    _, (x0, y0, x1, y1, _, mask) = only(open_detector(path)(image))
    _, frame = framed(image, read_spec(path.with_suffix(".json")))
    least = {"mask_rcnn": 0.5, "detr-p": 0.3}.get(kind, 0)
    for y in range(30):
        for x in range(36):
            at = [
                ((p + 0.5) * scale + start) / whole * cells - 0.5
                for p, scale, start, whole, cells in zip(
                    (y, x), frame.scale, frame.start, frame.input, (7, 8)
                )
            ]
            value = bilinear(planes[0, 0], *at, beyond="edge")
            inside = kind != "yolo" or (x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1)
            if abs(value - least) > 1e-4:  # float32
                assert mask[y, x] == (inside and value > least)


# What the input is


def test_channels_are_scaled_in_the_order_that_the_network_wants(write):
    image = np.zeros((20, 20, 3), np.uint8)
    image[:] = (10, 20, 30)
    spec = YOLO | dict(resize="letterbox", size=[40, 20], pad=100, color="bgr", layout="hwc")
    spec |= dict(scale=0.5, mean=[1, 2, 3], std=[2, 4, 8])
    path = write({"output0": rows_of()}, spec, kind=("float32", ("h", "w", 3)))
    values, _ = framed(image, read_spec(path.with_suffix(".json")))
    assert values.shape == (40, 20, 3)
    np.testing.assert_allclose(values[20, 10], [(15 - 1) / 2, (10 - 2) / 4, (5 - 3) / 8])
    np.testing.assert_allclose(values[0, 0], [(50 - 1) / 2, (50 - 2) / 4, (50 - 3) / 8])
    open_detector(path)


@pytest.mark.parametrize(
    ("dtype", "shape", "spec"),
    [
        ("float32", (1, 3, 40, 50), {}),
        ("float16", ("n", 3, 40, "w"), {}),
        ("float32", (40, 50, 3), dict(layout="hwc")),
        ("float32", ("n", "h", "w", "c"), dict(layout="nhwc")),
        ("float32", (3, "h", "w"), dict(layout="chw")),
        ("uint8", (1, 3, 40, 50), dict(scale=1)),
    ],
    ids=["static", "half", "hwc", "nhwc", "chw", "bytes"],
)
def test_inputs_of_other_types_and_layouts(write, dtype, shape, spec):
    path = write({"output0": rows_of((5, 5, 25, 20))}, YOLO | spec, kind=(dtype, shape))
    _, detection = only(open_detector(path)(image_of(80, 100)))
    assert detection[:4] == (10, 10, 50, 40)


# What the outputs mean


def test_detr_with_sigmoid_has_every_class_of_a_query(write):
    logits = np.float32([[[logit(0.7), logit(0.99), logit(0.4)], [-9, -9, logit(0.6)]]])
    boxes = np.float32([[[0.5, 0.5, 0.2, 0.4], [0.3, 0.2, 0.2, 0.2]]])
    found = open_detector(write({"logits": logits, "pred_boxes": boxes}, DETR))(image_of(50, 100))
    assert set(found) == {"cat", "dog"}  # class 1 has no name
    assert found["cat"][0][:4] == pytest.approx((40, 15, 60, 35))
    assert [float(box[4]) for box in found["dog"]] == pytest.approx([0.6, 0.4])
    assert found["dog"][0][:4] == pytest.approx((20, 5, 40, 15))


def test_detr_with_softmax_has_the_best_class_unless_it_is_no_object(write):
    p = np.array([[[0.5, 0.1, 0.3, 0.1], [0.02, 0.01, 0.02, 0.95]]])
    boxes = np.full((1, 2, 4), 0.5, np.float32)
    outputs = {"logits": np.log(p).astype(np.float32), "pred_boxes": boxes}
    spec = DETR | dict(scores="softmax", min_score=0.04)
    name, detection = only(open_detector(write(outputs, spec))(image_of(50, 100)))
    assert (name, float(detection[4])) == ("cat", pytest.approx(0.5))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", ["cxcywh_classes", "cxcywh_object_classes", "xyxy_score_class"])
def test_rows_of_every_yolo(write, rows, transposed):
    content = {
        "cxcywh_classes": [[10, 10, 8, 4, 0.1, 0.2, 0.7], [30, 20, 4, 4, 0.6, 0, 0.1]],
        "cxcywh_object_classes": [[10, 10, 8, 4, 0.875, 0.1, 0, 0.8], [30, 20, 4, 4, 1, 0.6, 0, 0]],
        # filled up, as exports with NMS are
        "xyxy_score_class": [[6, 8, 14, 12, 0.7, 2], [28, 18, 32, 22, 0.6, 0], [0, 0, 9, 9, 0, -1]],
    }[rows]
    array = np.float32(content)
    outputs = {"output0": (array.T if transposed else array)[None]}
    spec = YOLO | dict(rows=rows, transposed=transposed)
    found = open_detector(write(outputs, spec))(image_of(40, 50))
    assert found == {
        "dog": [(6, 8, 14, 12, pytest.approx(0.7), None)],
        "cat": [(28, 18, 32, 22, pytest.approx(0.6), None)],
    }


def test_normalized_boxes_are_of_the_input_with_its_padding(write):
    spec = YOLO | dict(resize="letterbox", size=[40, 40], normalized=True)
    path = write({"output0": rows_of((0.25, 0.5, 0.75, 0.75))[None]}, spec)
    _, detection = only(open_detector(path)(image_of(40, 80)))
    assert detection[:4] == (20, 20, 60, 40)


def test_boxes_end_at_the_picture(write):
    boxes = [(-5, -5, 20, 20), (60, 10, 70, 20), (10, 10, 10, 20)]
    path = write({"output0": rows_of(*boxes)[None]}, YOLO)
    _, detection = only(open_detector(path)(image_of(40, 50)))
    assert detection[:4] == (0, 0, 20, 20)  # the others show nothing of it


def test_the_best_come_first_and_no_more_than_asked_for(write):
    rows = np.concatenate(
        [rows_of((i, i, i + 9, i + 9), score=s, label=i % 2 * 2) for i, s in enumerate((0.3, 0.9))]
        + [rows_of((20, 20, 30, 30), score=s) for s in (0.5, 0.2, 0.05)]
    )
    path = write({"output0": rows[None]}, YOLO | dict(max_detections=3, min_score=0.25))
    found = open_detector(path)(image_of(40, 50))
    assert [(n, round(float(b[4]), 2)) for n, b in by_score(found, above=0.0)] == [
        ("dog", 0.9),
        ("cat", 0.5),
        ("cat", 0.3),
    ]
    assert isinstance(found["cat"][0][4], np.float32)  # in which the official code compares


def test_equal_scores_stay_in_order_and_every_call_gives_the_same(write):
    boxes = [(x, 5, x + 9, 15) for x in (30, 0, 20, 10)]
    for nms in (None, 0.5):
        detect = open_detector(write({"output0": rows_of(*boxes)}, YOLO | dict(nms=nms)))
        found = detect(image_of(40, 50))
        assert [box[0] for box in found["cat"]] == [30, 0, 20, 10]
        assert detect(image_of(40, 50)) == found


@pytest.mark.parametrize(("across", "left"), [(False, 2), (True, 1)])
def test_nms_is_of_one_class_or_of_all(write, across, left):
    rows = np.concatenate(
        [
            rows_of((10, 10, 30, 30), score=0.9),
            rows_of((11, 10, 31, 30), score=0.8),
            rows_of((10, 10, 30, 30), score=0.7, label=2),
        ]
    )
    path = write({"output0": rows}, YOLO | dict(nms=0.5, nms_across_classes=across))
    found = open_detector(path)(image_of(40, 50))
    assert sum(map(len, found.values())) == left
    assert float(found["cat"][0][4]) == pytest.approx(0.9)


def naive_nms(boxes, scores, labels, iou):
    def overlap(a, b):
        w = min(a[2], b[2]) - max(a[0], b[0])
        h = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(w, 0) * max(h, 0)
        union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - shared
        return shared / union if union else 0

    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if all(labels[i] != labels[j] or overlap(boxes[i], boxes[j]) <= iou for j in kept):
            kept.append(i)
    return kept


@given(
    st.lists(
        st.tuples(*[st.integers(0, 6)] * 4, st.integers(0, 4), st.integers(0, 1)), max_size=12
    ),
    st.sampled_from([0.0, 0.3, 0.45, 0.7, 1.0]),
)
@settings(deadline=None, max_examples=200)
def test_nms_is_the_naive_one(items, iou):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h, *_ in items], float).reshape(-1, 4)
    scores = np.array([item[4] / 4 for item in items])
    labels = np.array([item[5] for item in items], int)
    assert suppress(boxes, scores, labels, iou=iou).tolist() == naive_nms(
        boxes.tolist(), scores, labels, iou
    )


def test_nothing_found_is_nothing(write):
    assert open_detector(write({"output0": rows_of()[None]}, YOLO))(image_of(9, 9)) == {}
    former = {"q": np.zeros((1, 2, 4), np.float32), "m": np.full((1, 2, 3, 3), -1, np.float32)}
    assert open_detector(write(former, FORMER))(image_of(9, 9)) == {}


def test_the_digest_names_model_description_and_classes(write):
    outputs = {"output0": rows_of((5, 5, 9, 9))}
    first = open_detector(write(outputs, YOLO))
    assert re.fullmatch("[0-9a-f]{16}", first.digest)
    assert scorer_digests({"detect": first}) == {"detect": first.digest}
    assert open_detector(write(outputs, YOLO)).digest == first.digest
    assert open_detector(write(outputs, YOLO | dict(min_score=0.05))).digest == first.digest
    others = [
        open_detector(write(outputs, YOLO | dict(min_score=0.1))).digest,
        open_detector(write(outputs, YOLO, classes=("cat", "", "cow"))).digest,
        open_detector(write({"output0": rows_of((5, 5, 9, 8))}, YOLO)).digest,
    ]
    path = write(outputs, YOLO)
    (path.parent / "m.onnx_data").write_bytes(b"weights")
    others.append(open_detector(path).digest)
    assert len({first.digest, *others}) == 5


def test_geneval_is_scored_by_any_detector(write):
    """A cat that is red in the picture, and a dog beside it that is blue."""
    image = np.zeros((60, 120, 3), np.uint8)
    image[20:40, 10:40, 0] = 255
    image[20:40, 80:110, 2] = 255
    logits = np.full((1, 3, 4), -9, np.float32)
    logits[0, 0, 0] = logits[0, 2, 2] = logits[0, 1, 3] = 9
    spec = FORMER | dict(size=[60, 120], mean=[0.5] * 3, std=[0.01] * 3)
    detect = open_detector(write({"q": logits, "m": "images"}, spec))

    def color(image, objects, name):
        return ["red" if image[objects[0][5]].mean(axis=0)[0] > 127 else "blue"]

    def scores(*include):
        row = geneval.Row(0, "colors", "", include, (), "{}")
        scorers = {"detect": detect, "color": color}
        geneval.BENCHMARK.check_scoring([row], scorers)
        return geneval.BENCHMARK.score(row, [image, None], scorers)["correct"].value

    cat, dog = geneval.Clause("cat", 1, "red"), geneval.Clause("dog", 1, "blue", "right of", 0)
    assert scores(cat, dog) == 1
    assert scores(dataclasses.replace(cat, color="blue")) == 0
    assert scores(cat, dataclasses.replace(dog, relation="left of")) == 0
    assert scores(dataclasses.replace(cat, count=2)) == 0
    with pytest.raises(UserError, match="unknown class of the detector 'cats'; did you mean 'cat'"):
        scores(geneval.Clause("cats", 1))


# What goes wrong

GOOD = {"output0": rows_of((5, 5, 9, 9))[None]}
DETR_OUT = {
    "logits": np.zeros((1, 2, 3), np.float32),
    "pred_boxes": np.full((1, 2, 4), 0.5, np.float32),
}
BAD = {
    "unknown-key": (GOOD, YOLO | dict(min_scor=0.1), "min_scor'; did you mean 'min_score'"),
    "unknown-output": (GOOD, YOLO | dict(output="yollo"), "'yollo'; did you mean 'yolo'"),
    "no-output": (GOOD, dict(outputs=dict(rows="output0")), "has no output"),
    "unknown-part": (GOOD, YOLO | dict(outputs=dict(row="output0")), "did you mean 'rows'"),
    "missing-part": (DETR_OUT, DETR | dict(outputs=dict(logits="logits")), "has no boxes"),
    "other-name": (
        GOOD,
        YOLO | dict(outputs=dict(rows="output")),
        "has no output 'output' (rows); did you mean 'output0'",
    ),
    "other-input": (GOOD, YOLO | dict(input="image"), "no input 'image'; did you mean 'images'"),
    "size-of-rule": (GOOD, YOLO | dict(size=640), "wants height and width"),
    "sizes-of-rule": (GOOD, YOLO | dict(resize="shortest_side"), "wants one number"),
    "longest-below": (
        GOOD,
        YOLO | dict(resize="shortest_side", size=640, longest=600),
        "longest=600 is less than size=640",
    ),
    "key-of-another-rule": (GOOD, YOLO | dict(multiple=32), "multiple belongs to resize short"),
    "key-of-another-output": (GOOD, YOLO | dict(scores="sigmoid"), "scores belongs to output detr"),
    "no-scores": (DETR_OUT, {k: v for k, v in DETR.items() if k != "scores"}, "has no scores"),
    "nms-of-nothing": (GOOD, YOLO | dict(nms_across_classes=True), "is set without nms"),
    "range": (GOOD, YOLO | dict(min_score=1.5), "expected a finite number >= 0 and < 1"),
    "std": (GOOD, YOLO | dict(std=[1, 1, 0]), "std=0: expected a finite number > 0"),
    "mean": (GOOD, YOLO | dict(mean=[1, 1]), "expected a list of 3, each a finite number"),
    "columns": (
        {"output0": np.zeros((1, 5, 8), np.float32)},
        YOLO,
        "rows [1, 5, 8]: expected 7 columns, by its description and the 3 lines of names.txt",
    ),
    "turned": ({"output0": np.zeros((1, 7, 9), np.float32)}, YOLO, "should it be transposed"),
    "softmax": (DETR_OUT, DETR | dict(scores="softmax"), "expected 4 columns"),
    "rows-differ": (
        DETR_OUT | {"pred_boxes": np.zeros((1, 3, 4), np.float32)},
        DETR,
        "3 boxes: expected 2",
    ),
    "label": (
        {"output0": np.float32([[1, 1, 5, 5, 0.9, 80]])},
        YOLO | dict(rows="xyxy_score_class"),
        "a label 80",
    ),
    "nan": ({"output0": np.full((1, 1, 7), np.nan, np.float32)}, YOLO, "rows are not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_description_that_does_not_fit_is_one_line(write, name):
    outputs, spec, message = BAD[name]
    with pytest.raises(UserError, match=re.escape(message)) as error:
        open_detector(write(outputs, spec))
    assert "\n" not in str(error.value)
    assert "m.json" in str(error.value) or "m.onnx" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "spec", "message"),
    [
        (("float32", (1, 3, 64, 64)), {}, "takes pictures of 64 x 64 alone"),
        (
            ("float32", (1, 3, 64, 64)),
            dict(resize="shortest_side", size=64),
            "takes pictures of 64 x 64 alone",
        ),
        (("float32", (3, 40, 50)), {}, "is not layout 'nchw'"),
        (("float32", (1, 40, 50, 3)), {}, "without 3 channels in 'nchw'"),
        (("int64", (1, 3, 40, 50)), {}, "its input is a tensor(int64)"),
        (("uint8", (1, 3, 40, 50)), {}, "takes bytes"),
    ],
    ids=["size", "shortest-side", "axes", "channels", "type", "bytes"],
)
def test_an_input_that_does_not_fit_is_one_line(write, kind, spec, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_detector(write(GOOD, YOLO | spec, kind=kind))


def test_a_second_input_is_one_line(write):
    more = {"pixel_mask": ("int64", (1, 64, 64))}
    with pytest.raises(UserError, match="has the input 'pixel_mask' beside 'images'"):
        open_detector(write(GOOD, YOLO, more_inputs=more))


def test_what_is_missing_or_torn_is_one_line(write, tmp_path):
    with pytest.raises(NotFoundError, match="expected an ONNX file"):
        open_detector(tmp_path / "no.onnx")
    with pytest.raises(NotFoundError, match=r"m\.json does not exist: expected the description of"):
        open_detector(write(GOOD, None))
    (tmp_path / "names.txt").unlink()
    with pytest.raises(NotFoundError, match="expected the classes that"):
        open_detector(write(GOOD, YOLO, classes=None))
    for classes, message in ((["cat", "dog", "cat"], "the class 'cat' twice"), ([""], "is empty")):
        with pytest.raises(UserError, match=message):
            open_detector(write(GOOD, YOLO, classes=classes))
    path = write(GOOD, YOLO)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="is not an ONNX file that onnxruntime runs") as error:
        open_detector(path)
    assert "\n" not in str(error.value)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(UserError, match=r"m\.json"):
        open_detector(path)


# The page about detectors

PAGE = (pathlib.Path(__file__).parents[3] / "docs" / "detectors.md").read_text()
EXAMPLES = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=map(str, range(len(EXAMPLES))))
def test_the_descriptions_of_the_page_are_ones(tmp_path, example):
    (tmp_path / "m.json").write_text(example)
    assert read_spec(tmp_path / "m.json").output in PAGE


def test_the_page_has_every_key_with_its_meaning():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE))
    assert list(rows) == [field.name for field in dataclasses.fields(Spec)]
    for field in dataclasses.fields(Spec):
        assert rows[field.name].startswith(fields.rule_of(field).help)
