"""Known leaks by name: which pictures of COCO evaluation splits have."""

import json
import os
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.build import build
from data_pipelines.datasets import coco_pose as coco_pose_dataset
from data_pipelines.native import exclusions
from tests.native import coco_pose, refcoco
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "."))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)


def test_pictures_of_refcocos_validation_and_test_splits(tmp_path):
    refcoco.write(tmp_path)
    # 15 is of Google's RefCOCOg.
    assert exclusions.ids(f"refcoco:{tmp_path}") == {"13", "14", "15"}
    assert exclusions.ids("") == exclusions.ids(" ") == frozenset()


def test_several_and_paths_with_commas(tmp_path):
    folder = tmp_path / "a,b c"
    refcoco.write(folder)
    coco_pose.write(tmp_path)
    file = tmp_path / "annotations" / "person_keypoints_val2017.json"
    found = exclusions.ids(f"refcoco:{folder},coco_val:{file}")
    assert found == {"7", "13", "14", "15"}


def test_magicbrush_as_parquet_and_as_folders(tmp_path):
    (tmp_path / "data").mkdir()
    table = pa.table({"img_id": ["139", "285"], "turn_index": pa.array([1, 1], pa.int32())})
    pq.write_table(table, tmp_path / "data" / "dev-00000-of-00001.parquet")
    train = pa.table({"img_id": ["9"]})
    pq.write_table(train, tmp_path / "data" / "train-00000-of-00001.parquet")
    assert exclusions.ids(f"magicbrush:{tmp_path}") == {"139", "285"}
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "edit_sessions.json").write_text(json.dumps({"000000000632": []}))
    assert exclusions.ids(f"magicbrush:{tmp_path}") == {"139", "285", "632"}


def test_karpathys_splits(tmp_path):
    path = tmp_path / "dataset_coco.json"
    images = [dict(cocoid=k, split=s) for k, s in enumerate(("train", "restval", "val", "test"))]
    path.write_text(json.dumps(dict(images=images)))
    assert exclusions.ids(f"karpathy:{path}") == {"2", "3"}


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(UserError, match=r"unknown exclusion 'refcoc'; did you mean 'refcoco'\?"):
        exclusions.ids(f"refcoc:{tmp_path}")
    with pytest.raises(UserError, match=r"exclude='/data/refs': expected NAME:PATH"):
        exclusions.ids("/data/refs")
    with pytest.raises(UserError, match="has no path: expected refcoco:PATH"):
        exclusions.ids("refcoco:")
    with pytest.raises(NotFoundError, match="nowhere does not exist"):
        exclusions.ids(f"coco_val:{tmp_path}/nowhere")
    with pytest.raises(NotFoundError, match=r"has no refs: expected .*refcoco/refs\(unc\)\.p"):
        exclusions.ids(f"refcoco:{tmp_path}")
    with pytest.raises(NotFoundError, match=r"has no dev-\*\.parquet"):
        exclusions.ids(f"magicbrush:{tmp_path}")
    path = tmp_path / "x.json"
    path.write_text(json.dumps(dict(images=[])))
    with pytest.raises(UserError, match="names no picture of an evaluation split"):
        exclusions.ids(f"coco_val:{path}")
    path.write_text(json.dumps(dict(images=[dict(id="a")])))
    with pytest.raises(UserError, match=r"x\.json: 'id' is 'a'"):
        exclusions.ids(f"coco_val:{path}")


def test_a_build_leaves_them_out(tmp_path):
    options = coco_pose.write(tmp_path)
    (tmp_path / "ids.txt").write_text("3\n")
    dataset = coco_pose_dataset.DATASET
    val = tmp_path / "annotations" / "person_keypoints_val2017.json"
    content = json.loads(val.read_text())
    content["images"].append(dict(content["images"][0], id=1))
    val.write_text(json.dumps(content))
    given = dict(options, exclude=f"coco_val:{val}", exclude_ids=str(tmp_path / "ids.txt"))
    made = dataset.make_options(dict(given, split=("train",)))
    assert dataset.excluded(made) == {"1", "3", "7"}
    build(dataset, tmp_path / "out", made)
    info = json.loads(next((tmp_path / "out").rglob("dataset_info.json")).read_text())
    assert [split["shardLengths"] for split in info["splits"]] == [["2"]]


@needs_samples
def test_real_files():
    karpathy = SAMPLES / "coco_tiny" / "tfds" / "dataset_coco.json"
    images = json.loads(karpathy.read_text())["images"]
    held_out = [i["filename"] for i in images if i["split"] in ("val", "test")]
    if held_out:
        expected = {name.removesuffix(".jpg").split("_")[-1].lstrip("0") for name in held_out}
        assert exclusions.ids(f"karpathy:{karpathy}") == expected
    val = SAMPLES / "coco_tiny" / "annotations" / "captions_val.json"
    expected = {str(i["id"]) for i in json.loads(val.read_text())["images"]}
    assert exclusions.ids(f"coco_val:{val}") == expected
