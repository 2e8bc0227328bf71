"""COCO's pose rules: OKS against pycocotools, AP by hand and over shards, PCK."""

import copy
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import renderings
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import metrics
from univg_jax.evaluation.benchmarks import coco_pose

pytest.importorskip("pycocotools")
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "."))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
AREA = 120.0 * 80


def annotations(seed=0, pictures=4, people=2):
    """Pictures with people whose joints are labeled for the most part, one of them a crowd."""
    rng = np.random.default_rng(seed)
    people_of = [(i, k) for i in range(pictures) for k in range(people)]
    return {
        "images": [{"id": i, "height": 300, "width": 400} for i in range(pictures)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [_person(rng, number, i) for number, (i, _) in enumerate(people_of, 1)],
    }


def _person(rng, number, image_id):
    visible = rng.integers(0, 3, 17)
    visible[0] = 2
    corner = rng.integers(20, 150, 2)
    joints = np.concatenate([corner + rng.integers(0, 120, (17, 2)), visible[:, None]], axis=1)
    joints[visible == 0] = 0
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": int(number == 3),
        "num_keypoints": int((visible > 0).sum()),
        "keypoints": joints.ravel().tolist(),
        "bbox": [*corner.tolist(), 120, 120],
        "area": AREA if number % 2 else AREA / 4,
    }


def joints_of(person):
    return np.array(person["keypoints"], float).reshape(17, 3)


def predictions(truth, seed=0, noise=6.0):
    """A result of each person, its joints off by some pixels."""
    rng = np.random.default_rng(seed)
    results = []
    for person in truth["annotations"]:
        joints = joints_of(person)
        joints[:, :2] += rng.normal(0, noise, (17, 2))
        joints[:, 2] = rng.uniform(0.1, 1, 17)
        results += coco_pose.keypoint_results(person["image_id"], joints[None])
    return results


# --- OKS ---


@pytest.mark.parametrize("seed", range(3))
def test_oks_is_pycocotools(seed):
    truth = annotations(seed)
    results = predictions(truth, seed, noise=12)
    target = COCO()
    target.dataset = copy.deepcopy(truth)
    target.createIndex()
    evaluation = COCOeval(target, target.loadRes(copy.deepcopy(results)), "keypoints")
    evaluation.evaluate()
    for image in truth["images"]:
        people = evaluation._gts[image["id"], 1]
        found = [r for r in results if r["image_id"] == image["id"]]
        found.sort(key=lambda r: -r["score"])
        theirs = evaluation.computeOks(image["id"], 1)
        ours = [
            [coco_pose.oks(joints_of(r), joints_of(p), area=p["area"]) for p in people]
            for r in found
        ]
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_oks_by_hand():
    target = np.zeros((17, 3))
    target[[0, 5]] = (10, 20, 2), (30, 40, 1)
    off = target.copy()
    off[:, 2] = 1
    assert coco_pose.oks(off, target, area=AREA) == 1
    # One of two joints is 2 sigma sqrt(area) away, where exp(-1/2) is left of it.
    off[5, 0] += 2 * 0.079 * np.sqrt(AREA)
    want = (1 + np.exp(-0.5)) / 2
    assert coco_pose.oks(off, target, area=AREA) == pytest.approx(want, abs=1e-9)
    off[0, 2] = 0  # not found
    assert coco_pose.oks(off, target, area=AREA) == pytest.approx(want - 0.5, abs=1e-9)
    assert np.isnan(coco_pose.oks(off, np.zeros((17, 3)), area=AREA))


# --- average precision ---


def test_average_precision_of_known_answers():
    truth = annotations(people=1)
    perfect = predictions(truth, noise=0)
    scores = coco_pose.average_precision(truth, perfect)
    assert scores == pytest.approx(dict.fromkeys(coco_pose.STATISTICS, 1.0), abs=1e-12)
    assert coco_pose.average_precision(truth, [])["AP"] == 0
    # OKS .77 of the only person reaches 6 of the 10 thresholds, .5 to .75.
    one = annotations(pictures=1, people=1)
    person = one["annotations"][0]
    person["keypoints"] = [100, 100, 2] + [0] * 48
    shift = 2 * coco_pose.SIGMAS[0] * np.sqrt(-2 * np.log(0.77) * person["area"])
    joints = joints_of(person)
    joints[:, 2], joints[0, 0] = 1, 100 + shift
    scores = coco_pose.average_precision(one, coco_pose.keypoint_results(0, joints[None]))
    assert scores["AP"] == pytest.approx(0.6, abs=1e-12)
    assert (scores["AP50"], scores["AP75"]) == pytest.approx((1, 1), abs=1e-12)
    assert np.isnan(scores["APM"]), "the only person is large"


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_shards_in_any_order_have_one_average_precision(seed):
    truth = annotations(seed)
    results = predictions(truth, seed, noise=12)
    for result in results:
        result["score"] = round(result["score"], 1)  # so that some are equal
    shuffled = [results[i] for i in np.random.default_rng(seed).permutation(len(results))]
    whole = coco_pose.average_precision(truth, results)
    np.testing.assert_equal(coco_pose.average_precision(truth, shuffled), whole)
    assert all("id" not in result for result in results), "arguments stay as they were"


def test_only_the_images_that_were_generated_are_evaluated():
    truth = annotations()
    first = [r for r in predictions(truth, noise=0) if r["image_id"] == 0]
    assert coco_pose.average_precision(truth, first)["AP"] < 1
    assert coco_pose.average_precision(truth, first, image_ids=[0])["AP"] == 1
    with pytest.raises(UserError, match=r"1 of the images with results, such as 0, are not among"):
        coco_pose.average_precision(truth, first, image_ids=[1, 2])


@needs_samples
def test_average_precision_of_real_annotations_is_pycocotools(tmp_path):
    file = SAMPLES / "coco_keypoints" / "annotations" / "person_keypoints_val2017.json"
    truth = coco_pose.read_annotations(file)
    results = predictions(truth, noise=10)
    got = coco_pose.average_precision(truth, results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    target = COCO(str(file))
    evaluation = COCOeval(target, target.loadRes(str(tmp_path / "results.json")), "keypoints")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    want = [np.nan if v < 0 else v for v in evaluation.stats]
    np.testing.assert_allclose(list(got.values()), want, atol=1e-12)
    assert 0 < got["AP"] < 1
    others = SAMPLES / "coco_results" / "person_keypoints_val2014_fakekeypoints100_results.json"
    with pytest.raises(UserError, match="are not among the 2 that are evaluated"):
        coco_pose.average_precision(truth, json.loads(others.read_text()))


def test_files_of_another_kind_are_told(tmp_path):
    with pytest.raises(NotFoundError, match=r"no.json does not exist: expected COCO's keypoints"):
        coco_pose.read_annotations(tmp_path / "no.json")
    (tmp_path / "captions.json").write_text('{"images": [], "sentences": []}')
    with pytest.raises(UserError, match=r"captions.json has not the list 'annotations'"):
        coco_pose.read_annotations(tmp_path / "captions.json")


# --- one skeleton of a picture ---


def test_the_largest_labeled_person_is_compared():
    truth = annotations(pictures=1, people=4)
    people = truth["annotations"]
    # 1 and 3 are large, and 3 is a crowd.
    assert coco_pose.largest_person(people)["id"] == 1
    people[0]["keypoints"] = [0] * 51
    assert coco_pose.largest_person(people)["id"] == 2  # the first of equals
    assert coco_pose.largest_person([people[0], people[2]]) is None


def test_a_rendered_skeleton_is_read_back():
    """From an annotation through the picture that a model is trained on, and back."""
    height, width = 192, 256
    xy = np.array(
        [
            *((128, 30), (134, 26), (122, 26), (140, 28), (116, 28)),
            *((150, 62), (106, 62), (166, 96), (90, 96), (170, 130), (86, 130)),
            *((142, 118), (114, 118), (146, 150), (110, 150), (148, 180), (108, 180)),
        ]
    )
    person = {
        "id": 1,
        "iscrowd": 0,
        "keypoints": np.concatenate([xy, np.full((17, 1), 2)], axis=1).ravel().tolist(),
        "bbox": [80, 20, 96, 166],
        "area": 6000.0,
    }
    fractions = joints_of(person).astype(np.float32)
    fractions[:, :2] = (fractions[:, :2] + 0.5) / (width, height)
    picture = renderings.render_pose(fractions[None], height=height, width=width)
    found = coco_pose.in_pixels(renderings.decode_pose(picture), height=height, width=width)
    scores = coco_pose.compare(found, person)
    assert scores["pck@0.1"].value == scores["pck@0.2"].value == 1
    assert scores["oks"].value > 0.8
    exact = coco_pose.in_pixels(fractions, height=height, width=width)
    np.testing.assert_allclose(exact[:, :2], xy, atol=1e-4)  # fractions are float32
    assert coco_pose.compare(exact, person)["oks"].value == pytest.approx(1, abs=1e-6)


def test_joints_that_were_not_found_score_nothing():
    person = annotations(pictures=1, people=1)["annotations"][0]
    person["keypoints"][:3] = [0, 0, 2]  # at the corner, where missing joints are put
    nothing = coco_pose.in_pixels(np.full((17, 3), (0.5, 0.5, 0)), height=300, width=400)
    assert not nothing.any()
    scores = coco_pose.compare(nothing, person)
    assert scores["oks"].value == scores["pck@0.2"].value == 0
    assert coco_pose.keypoint_results(0, nothing[None]) == []


def test_pck_averages_over_joints_that_are_labeled_somewhere():
    truth = annotations(pictures=3, people=1)
    rows = []
    for person in truth["annotations"]:
        joints = joints_of(person)
        joints[:, 2] = 1
        joints[0, 0] += 0.15 * 120  # every nose: within .2 of the box and not within .1
        rows.append(coco_pose.compare(joints, person))
    labeled = np.array([joints_of(p)[:, 2] > 0 for p in truth["annotations"]]).any(axis=0).sum()
    merged = {name: metrics.merge(row[name] for row in rows).value for name in rows[0]}
    assert merged["pck@0.1"] == pytest.approx((labeled - 1) / labeled, abs=1e-12)
    assert merged["pck@0.2"] == 1
