"""Any boxes with captions: names of categories and spans, to records and a batch."""

import json
import os
import pathlib
import shutil

import pytest

from data_pipelines.datasets.boxes import DATASET
from tests.native import boxes as fixture
from tests.native import drawing, reading
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "."))
TRAIN = "annotations/instances_train2017.json"


@pytest.fixture
def options(tmp_path):
    return fixture.write(tmp_path)


def rows_of(record, k: int) -> list[tuple]:
    """Caption, phrase and box of the record of picture k."""
    width, height = drawing.SIZES[k]
    boxes = (record["boxes"] * [width, height, width, height]).round(3).tolist()
    return list(zip(record["phrase_captions"].tolist(), record["phrases"], boxes, strict=True))


def change(path: pathlib.Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_categories_are_found_in_captions_or_added(options):
    assert reading.counts(DATASET, options) == fixture.RECORDS
    record = reading.read(DATASET, options)["0"]
    assert record["captions"] == [
        "Two dogs and a man, with person.",
        "A person pets a dog",
        "A hot dog stand, with dog and person",
    ]
    assert record["caption_kinds"] == ["original"] * 3
    dogs, person = [[10, 5, 50.5, 35], [60, 8, 96, 28]], [0, 0, 20, 64]
    assert rows_of(record, 0) == [
        *[(0, "dogs", dog) for dog in dogs],
        (0, "person", person),
        (1, "person", person),
        *[(1, "dog", dog) for dog in dogs],
        # The first "dog" is in "hot dog": one of category dog cannot be told from it.
        (2, "person", person),
    ]


def test_names_of_any_case_crowds_and_empty_captions(options):
    record = reading.read(DATASET, options)["1"]
    assert record["captions"] == ["Dinner is on the Dining Table, with dog."]
    assert rows_of(record, 1) == [
        (0, "Dining Table", [0, 50, 64, 96]),
        (0, "dog", [5, 5, 15, 15]),
    ]
    found = reading.read(DATASET, options)
    assert found["2"]["captions"] == ["Lunch & more, with hot dog"]
    assert reading.bad(found) == {"5": "no phrase of its captions has a box inside the picture"}


def test_categories_may_be_left_out_of_captions(options):
    record = reading.read(DATASET, options | {"append": False})["0"]
    assert record["captions"] == fixture.CAPTIONS[0]
    assert record["phrases"] == ["dogs", "dogs", "person", "dog", "dog"]


def test_spans_of_a_caption(tmp_path):
    options = fixture.write_spans(tmp_path)
    found = reading.read(DATASET, options)
    assert found["70"]["captions"] == ["a red disk and a blue bar"]
    disk, bar = [8, 16, 56, 48], [48, 5, 87.5, 8]
    assert rows_of(found["70"], 0) == [(0, "a red disk", disk), (0, "a blue bar", bar)]
    assert rows_of(found["71"], 0) == [(0, "the disk", disk), (0, "its", disk)]
    assert reading.bad(found) == {"72": "no phrase of its captions has a box inside the picture"}


def test_entries_have_the_ids_of_their_pictures(tmp_path):
    (native,) = DATASET.open(DATASET.make_options(fixture.write_spans(tmp_path))).values()
    entries = [e for part in native.parts("train") for e in native.entries(part)]
    assert [(e.key, e.ids) for e in entries][:2] == [("70", ("70", "9")), ("71", ("71", "9"))]


def test_files_may_be_named(options, tmp_path):
    usual = reading.read(DATASET, options)
    annotations = tmp_path / "annotations"
    (annotations / "captions_train2017.json").rename(tmp_path / "said.json")
    (annotations / "instances_train2017.json").rename(tmp_path / "things.json")
    (tmp_path / "train2017").rename(tmp_path / "p")
    named = dict(captions="said.json", annotations="things.json", pictures="p")
    found = reading.read(DATASET, {key: str(tmp_path / name) for key, name in named.items()})
    assert list(found) == list(usual)
    assert found["0"]["captions"] == usual["0"]["captions"]


def test_pictures_by_address_and_names_with_underlines(options, tmp_path):
    """As in LVIS."""

    def edit(content):
        for image in content["images"]:
            image["coco_url"] = f"a/train2017/{image.pop('file_name')}"
        content["categories"][3]["name"] = "dining_table"

    usual = reading.read(DATASET, options)
    change(tmp_path / TRAIN, edit)
    found = reading.read(DATASET, options)
    assert list(reading.good(found)) == list(reading.good(usual))
    assert found["1"]["phrases"] == ["Dining Table", "dog"]


def test_a_batch_of_layouts(options):
    found = {"4": reading.read(DATASET, options, "validation")["4"]}
    (prompt,) = reading.prompts_of(reading.batch_of(found, "lg"))
    assert "person (" in prompt


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("annotations"), r"has not the list 'annotations'"),
        (lambda c: c.pop("categories"), r"has not the list 'categories'"),
        (lambda c: c["annotations"][0].update(image_id=[]), r"2017\.json: 'image_id' is \[\]"),
        (lambda c: c.update(annotations=[]), "has no boxes of its images"),
        (lambda c: c.update(images=[]), "has no boxes of its images"),
    ],
)
def test_a_file_of_another_kind_is_named(options, tmp_path, edit, message):
    change(tmp_path / TRAIN, edit)
    with pytest.raises(UserError, match=message):
        reading.read(DATASET, options)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["annotations"][0].update(bbox=[1, "2", 3, 4]), "a bbox is"),
        (lambda c: c["annotations"][0].update(category_id=99), "no name for its category 99"),
        (lambda c: c["images"][0].update(width=97), "pixels and its annotations are for 97"),
        (lambda c: c["images"][0].update(file_name="x.jpg"), "there is no 'x.jpg' in"),
        (lambda c: c["annotations"][0].update(tokens_positive=3), "tokens_positive is 3"),
    ],
)
def test_what_is_wrong_with_one_picture_leaves_it_out(options, tmp_path, edit, message):
    change(tmp_path / TRAIN, edit)
    found = reading.read(DATASET, options)
    assert sorted(reading.good(found)) == ["1", "2"]
    assert message in reading.bad(found)["0"]


def test_missing_files_are_named(options, tmp_path):
    with pytest.raises(NotFoundError, match=r"no boxes: expected annotations/instances_train2017"):
        reading.read(DATASET, {"source": str(tmp_path / "train2017")})
    with pytest.raises(NotFoundError, match=r"captions=.*x\.json does not exist"):
        reading.read(DATASET, options | {"captions": "x.json"})
    (tmp_path / "annotations" / "captions_val2017.json").unlink()
    with pytest.raises(NotFoundError, match=r"captions_val2017\.json does not exist: expected the"):
        reading.read(DATASET, options)
    fixture.write(tmp_path)
    shutil.rmtree(tmp_path / "train2017")
    (tmp_path / "val2017.zip").unlink()
    with pytest.raises(NotFoundError, match=r"the pictures of .* are not there"):
        reading.read(DATASET, options)
    fixture.write_spans(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "final_toy_train.json", tmp_path / "b" / "other.json")
    with pytest.raises(UserError, match=r"are of one split: give one, as annotations="):
        reading.read(DATASET, {"source": str(tmp_path / "b")})


@pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
def test_a_real_file(tmp_path):
    source = tmp_path / "coco"
    shutil.copytree(SAMPLES / "coco_tiny", source)
    found = reading.read(DATASET, {"source": str(source)})
    assert found["5"]["captions"] == ["hello, with b"]
    assert found["5"]["phrases"] == ["b"]
    assert (found["5"]["boxes"] * [10, 5, 10, 5]).round(4).tolist() == [[2, 2, 5, 3]]
