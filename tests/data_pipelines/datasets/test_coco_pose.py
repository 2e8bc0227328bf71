"""COCO keypoints: people, crowds and what has no label, from native files to a batch."""

import json
import os
import pathlib

import numpy as np
import pytest

from data_pipelines.datasets.coco_pose import DATASET, JOINTS
from tests.data_pipelines.datasets import building
from tests.native import coco_pose as fixture
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "."))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)


@pytest.fixture
def native(tmp_path):
    return building.open_native(DATASET, fixture.write(tmp_path))


def annotations(root: pathlib.Path, split: str = "train"):
    return root / "annotations" / f"person_keypoints_{split}2017.json"


def change(path: pathlib.Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_all_people_of_a_picture_with_their_joints(native):
    made, skipped = building.read(native, "train")
    assert sorted(made) == ["1", "2", "3", "6"]
    assert len(made) == fixture.RECORDS["train"]
    assert list(skipped) == ["5"]
    assert "no person with a labeled joint" in skipped["5"]
    joints = made["1"]["joints"]
    assert joints.shape == (2, 17, 3)
    x, y, w, h = fixture.BOX[1]
    # The nose is at pixel (x + w / 2, y + .08 h), and its middle half a pixel further.
    expected = [(x + round(0.5 * w) + 0.5) / 160, (y + round(0.08 * h) + 0.5) / 96, 2]
    np.testing.assert_allclose(joints[0, 0], expected, rtol=1e-6)
    assert joints[0, 9, 2] == 1
    assert (joints[0, [3, 16]] == 0).all()
    assert not made["1"]["ignore_mask"].any()


def test_crowds_and_people_without_joints_are_ignored(native):
    made, _ = building.read(native, "train")
    crowd = made["2"]["ignore_mask"]
    assert crowd.shape == (128, 96)
    assert crowd[20:110, 50:90].all()
    assert crowd.sum() == 90 * 40
    assert made["2"]["joints"].shape == (1, 17, 3)
    lying = made["3"]["ignore_mask"]
    assert lying[41:99, 71:99].all()
    assert not lying[:, :69].any()
    both = made["6"]["ignore_mask"]
    assert both[5:45, 48:68].all()  # compressed RLE
    assert both[110:150, 40:72].all()
    assert not both[45:109].any()


def test_entries_have_the_id_of_their_picture(native):
    entries = [e for part in native.parts("train") for e in native.entries(part)]
    assert [(e.key, e.ids) for e in entries][:2] == [("1", ("1",)), ("2", ("2",))]


def test_pictures_may_be_in_a_zip_and_have_the_names_of_2017(native, tmp_path):
    made, skipped = building.read(native, "validation")
    assert list(made) == ["7"]
    assert not skipped
    # The annotations of 2014 name the same pictures otherwise.
    path = annotations(tmp_path, "val")
    change(path, lambda c: c["images"][0].update(file_name="COCO_val2014_000000000007.jpg"))
    path.rename(path.with_name("person_keypoints_val2014.json"))
    native = building.open_native(DATASET, dict(source=str(tmp_path), year="2014"))
    assert native.splits == ("validation",)
    options = dict(source=str(tmp_path), year="2014", pictures=str(tmp_path / "val2017.zip"))
    native = building.open_native(DATASET, options)
    assert list(building.read(native, "validation")[0]) == ["7"]


def test_a_batch_of_poses(native):
    made, _ = building.read(native, "train")
    batch = building.batch(made.values(), "pose")
    assert batch.target.any(axis=(1, 2, 3)).all()


def test_joints_in_another_order_are_put_in_cocos(tmp_path):
    options = fixture.write(tmp_path)
    plain, _ = building.read(building.open_native(DATASET, options), "train")

    def reverse(content):
        content["categories"][0]["keypoints"] = list(JOINTS[::-1])
        for ann in content["annotations"]:
            points = np.reshape(ann["keypoints"], (17, 3))[::-1]
            ann["keypoints"] = points.ravel().tolist()

    change(annotations(tmp_path), reverse)
    turned, _ = building.read(building.open_native(DATASET, options), "train")
    np.testing.assert_array_equal(plain["1"]["joints"], turned["1"]["joints"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("annotations"), r"2017\.json has not the list 'annotations'"),
        (lambda c: c["categories"][0].update(keypoints=[]), r"name the keypoints \[\[\]\]"),
        (lambda c: c["images"].append(3), r"item 6 of the list 'images' is 3: no object"),
        (lambda c: c["annotations"][0].update(image_id="x"), r"2017\.json: 'image_id' is 'x'"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, edit, message):
    native = building.open_native(DATASET, fixture.write(tmp_path))
    change(annotations(tmp_path), edit)
    with pytest.raises(UserError, match=message):
        native.parts("train")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["annotations"][2].update(keypoints=[1] * 50), "expected 51 numbers"),
        (
            lambda c: c["annotations"][2]["keypoints"].__setitem__(2, 7),
            "visibility of a joint is 7",
        ),
        (lambda c: c["annotations"][2]["keypoints"].__setitem__(0, 500), "outside its picture"),
        (lambda c: c["annotations"][3]["segmentation"]["counts"].append(9), "an RLE covers"),
        (lambda c: c["images"][1].update(width=97), "RLE is of size"),
        (lambda c: c["images"][1].update(file_name="no.jpg"), "there is no 'no.jpg' in"),
        (lambda c: c["images"][1].pop("height"), "'height'"),
    ],
)
def test_what_is_wrong_with_one_picture_leaves_it_out(tmp_path, edit, message):
    native = building.open_native(DATASET, fixture.write(tmp_path))
    change(annotations(tmp_path), edit)
    made, skipped = building.read(native, "train")
    assert len(made) == 3
    assert message in skipped["2"]


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"expected .*annotations/person_keypoints_train2017"):
        building.open_native(DATASET, dict(source=str(tmp_path)))
    native = building.open_native(DATASET, fixture.write(tmp_path))
    path = annotations(tmp_path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"person_keypoints_train2017\.json is not JSON"):
        native.parts("train")
    fixture.write(tmp_path)
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    (tmp_path / "val2017.zip").unlink()
    with pytest.raises(NotFoundError, match=r"no pictures for .*: expected one of .*train2017"):
        native.parts("train")


@needs_samples
def test_real_annotations():
    """Parts without pictures: the release's may not be kept here."""
    source = SAMPLES / "coco_keypoints"
    native = building.open_native(DATASET, dict(source=str(source)))
    assert native.splits == ("validation",)
    with pytest.raises(NotFoundError, match="no pictures"):
        native.parts("validation")
    tiny = building.open_native(DATASET, dict(source=str(SAMPLES / "coco_tiny")))
    with pytest.raises(UserError, match=r"person_keypoints_train\.json.*name the keypoints"):
        tiny.parts("train")


@needs_samples
def test_real_annotations_with_pictures_of_their_sizes(tmp_path):
    source = SAMPLES / "coco_keypoints" / "annotations"
    content = json.loads((source / "person_keypoints_val2017.json").read_text())
    (tmp_path / "val2017").mkdir()
    for image in content["images"]:
        blank = np.full((image["height"], image["width"], 3), 90, np.uint8)
        (tmp_path / "val2017" / image["file_name"]).write_bytes(fixture.shapes.jpeg(blank))
    options = dict(source=str(SAMPLES / "coco_keypoints"), pictures=str(tmp_path / "val2017"))
    made, skipped = building.read(building.open_native(DATASET, options), "validation")
    assert made
    assert len(made) + len(skipped) <= len(content["images"])
    for key, record in made.items():
        anns = [a for a in content["annotations"] if a["image_id"] == int(key)]
        labeled = [a for a in anns if a["num_keypoints"] and not a["iscrowd"]]
        assert len(record["joints"]) == len(labeled)
        assert (record["joints"][..., 2] > 0).sum() == sum(a["num_keypoints"] for a in labeled)
        assert record["ignore_mask"].any() == (len(labeled) < len(anns))
    batch = building.batch(made.values(), "pose")
    assert batch.target.any(axis=(1, 2, 3)).all()
