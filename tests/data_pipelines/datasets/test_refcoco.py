"""RefCOCO and its relatives: pickles, JSON and segmentations, from native files to a batch."""

import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest

from data_pipelines.datasets.refcoco import DATASET
from data_pipelines.native import refer
from tests.data_pipelines.datasets import building
from tests.native import refcoco as fixture
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "."))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)


@pytest.fixture
def options(tmp_path):
    return fixture.write(tmp_path)


def test_objects_of_a_picture_once_with_all_that_is_said_of_them(options):
    native = building.open_native(DATASET, options)
    assert native.splits == ("train", "validation", "test")
    made, skipped = building.read(native, "train")
    assert sorted(made) == ["11", "12"]
    assert skipped == {"15": "the picture is also in refcocog val"}
    record = made["11"]
    assert record["masks"].shape == (2, 80, 120)
    said = list(zip(record["expressions"], record["expression_masks"].tolist(), strict=True))
    assert said == [
        ("left square", 0),
        ("the left one", 0),  # said twice
        ("biggest thing", 0),
        ("right square", 1),
        ("darker", 1),  # of RefCOCO+
    ]
    union = record["masks"][0]
    assert union[15, 15]
    assert union[45, 55]
    assert union[25, 35]
    assert not union[45, 15]
    assert union.sum() == 30 * 30 * 2 - 10 * 20
    np.testing.assert_array_equal(
        np.argwhere(made["12"]["masks"][0])[[0, -1]], [[30, 20], [59, 49]]
    )


def test_splits_and_their_sizes(options):
    native = building.open_native(DATASET, options)
    for split, count in fixture.RECORDS.items():
        made, _ = building.read(native, split)
        assert len(made) == count
    test, _ = building.read(native, "test")
    assert test["14"]["expressions"] == ["left box", "brighter square", "right box"]
    only_b = building.open_native(DATASET, dict(options, test=("testB",), subsets=("refcoco",)))
    assert building.read(only_b, "test")[0]["14"]["expressions"] == ["right box"]


def test_raw_expressions_and_kept_leaks(options):
    native = building.open_native(DATASET, dict(options, expressions="raw", keep_leaks=True))
    made, skipped = building.read(native, "train")
    assert not skipped
    assert made["15"]["expressions"] == ["Red Box."]
    assert made["11"]["expressions"][0] == "Left square!"


def test_a_batch_of_segmentations(options):
    native = building.open_native(DATASET, options)
    made, _ = building.read(native, "train")
    batch = building.batch(made.values(), "seg")
    assert batch.target.any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch /tmp/x'\ntR.",
        b"c__builtin__\neval\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"(ios\nsystem\n.",
        b"\x80\x02\x82\x01.",
        b"Pname\n.",
    ],
)
def test_a_pickle_that_would_run_anything_is_refused(options, tmp_path, content):
    path = tmp_path / "refcoco" / "refs(unc).p"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: it (wants|refers).* refused") as error:
        building.open_native(DATASET, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"r\xff\xff\xff\xff.",  # a slot beyond 64 GB of them
        b"(lp0\n.extra"[:5],
        b"L" + b"9" * 9999 + b"L\n.",
        b"I1\nI1\nR.",
        pickle.dumps(dict(a=1)),
        pickle.dumps([3]),
        pickle.dumps([dict(split="train", sentences=3, image_id=1, ann_id=1)]),
        pickle.dumps([dict(split="tr", sentences=[], image_id=1, ann_id=1)]),
    ],
)
def test_a_damaged_pickle_is_named(options, tmp_path, content):
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(content)
    with pytest.raises(UserError, match=r"refs\(unc\)\.p") as error:
        building.open_native(DATASET, options)
    assert "\n" not in str(error.value)


def test_pickles_of_python_2_are_read(tmp_path):
    """Its texts were bytes or Unicode, its numbers int or long."""
    content = (
        b"(lp1\n(dp2\nS'sent_ids'\np3\n(lp4\nI0\nasS'file_name'\np5\nS'COCO_1_0.jpg'\np6\n"
        b"sS'ann_id'\np7\nL1719310L\nsS'sentences'\np8\n(lp9\n(dp10\nS'tokens'\np11\n(lp12\nVhi\n"
        b"p13\nasS'raw'\np14\nS'caf\xc3\xa9'\np15\nsS'sent_id'\np16\nI0\nsS'sent'\np17\n"
        b"Vcaf\xe9 \\u00fc\np18\nsasS'split'\np19\nS'train'\np20\nsS'image_id'\np21\nI581857\nsa."
    )
    path = tmp_path / "refs(unc).p"
    path.write_bytes(content)
    (ref,) = refer.read_refs(path)
    assert ref == refer.Ref(581857, 1719310, "train", ("café ü",), ("café",))


def test_missing_and_foreign_files_are_named(options, tmp_path):
    with pytest.raises(NotFoundError, match=r"has no refs: expected .*refcoco/refs\(unc\)\.p"):
        building.open_native(DATASET, dict(source=str(tmp_path / "train2014")))
    with pytest.raises(UserError, match=r"partition='umd': refcoco has unc and google"):
        building.open_native(DATASET, dict(options, subsets=("refcoco",), partition="umd"))
    with pytest.raises(NotFoundError, match=r"expected .*refcoco/refs\(google\)\.p"):
        building.open_native(DATASET, dict(options, subsets=("refcoco",), partition="google"))
    native = building.open_native(DATASET, options)
    path = tmp_path / "refcoco" / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"].pop(0)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"instances\.json has not picture 11 with annotation 111"):
        native.parts("train")
    path.unlink()
    with pytest.raises(NotFoundError, match=r"refcoco/instances\.json does not exist"):
        native.parts("train")
    fixture.write(tmp_path)
    shutil.rmtree(tmp_path / "train2014")
    with pytest.raises(NotFoundError, match="no pictures"):
        native.parts("train")


def test_an_object_that_cannot_be_leaves_its_picture_out(options, tmp_path):
    native = building.open_native(DATASET, dict(options, subsets=("refcoco",)))
    path = tmp_path / "refcoco" / "instances.json"
    for segmentation, message in [
        ([[1, 2, 3]], "expected pairs"),
        ([["a", 2, 3, 4, 5, 6]], "expected numbers"),
        ([[1e30, 0, 5, 5, 0, 5]], "far outside"),
        (None, "expected polygons or RLE"),
        ([], "no object of the picture has a pixel"),
        ({"counts": [70 * 110 + 1], "size": [110, 70]}, "an RLE covers 7701 pixels of 7700"),
        ({"counts": "zzz", "size": [110, 70]}, "an RLE covers -1 pixels"),
        ({"counts": 3, "size": [110, 70]}, "expected a list or a text"),
        ({"counts": [1], "size": [11, 70]}, "expected [110, 70]"),
    ]:
        content = fixture.instances()
        content["annotations"][2]["segmentation"] = segmentation
        path.write_text(json.dumps(content))
        made, skipped = building.read(native, "train")
        assert list(made) == ["11"]
        assert message in skipped["12"]


@needs_samples
def test_real_refs_of_all_partitions(tmp_path):
    """The TFDS dump has real refs, with their annotations; they are put back as released."""
    folder = SAMPLES / "refcoco"
    dump = json.loads((folder / "tfds_refcoco.json").read_text())
    images = [dict(v["info"]) for v in dump["coco_anns"].values()]
    anns = {r["ann_id"]: {k: v for k, v in r["ann"].items() if k != "ann"} for r in dump["ref"]}
    source = dict(images=images, annotations=list(anns.values()), categories=[])
    by_file: dict[tuple, list] = {}
    for ref in dump["ref"]:
        by_file.setdefault((ref["dataset"], ref["dataset_partition"]), []).append(ref)
    assert len(by_file) == 5 - 1 + 1
    for (subset, partition), refs in by_file.items():
        (tmp_path / subset).mkdir(exist_ok=True)
        (tmp_path / subset / f"refs({partition}).p").write_bytes(pickle.dumps(refs, protocol=0))
        (tmp_path / subset / "instances.json").write_text(json.dumps(source))
    pictures = str(folder / "coco_train2014")
    for (subset, partition), refs in by_file.items():
        options = dict(source=str(tmp_path), subsets=(subset,), partition=partition)
        options |= dict(pictures=pictures, keep_leaks=True)
        native = building.open_native(DATASET, options)
        made = {}
        for split in native.splits:
            records, skipped = building.read(native, split)
            assert all("pixels and its annotations" in why for why in skipped.values()), skipped
            made |= records
        for ref in refs:
            if record := made.get(str(ref["image_id"])):
                said = {s["sent"] for s in ref["sentences"]}
                assert said & set(record["expressions"])
                assert record["masks"].any(axis=(1, 2)).all()


@needs_samples
def test_googles_real_release():
    options = dict(source=str(SAMPLES / "refcoco"))
    native = building.open_native(DATASET, options)
    assert native.splits == ("train",)
    made, skipped = building.read(native, "train")
    assert len(made) + len(skipped) == 3
    for record in made.values():
        assert record["expressions"]
        assert record["masks"].any(axis=(1, 2)).all()
