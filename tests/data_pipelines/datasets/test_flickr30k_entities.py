"""Flickr30k Entities: from brackets and boxes to records and a batch."""

import os
import pathlib
import shutil

import numpy as np
import pytest

from data_pipelines.datasets.flickr30k_entities import DATASET, parse_sentence
from tests.native import drawing, reading
from tests.native import flickr30k_entities as fixture
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "."))


@pytest.fixture
def options(tmp_path):
    return fixture.write(tmp_path)


def rows_of(record) -> list[tuple]:
    """Caption, phrase and box of a record of 96 x 64 pixels."""
    boxes = (record["boxes"] * [96, 64, 96, 64]).round(3).tolist()
    return list(zip(record["phrase_captions"].tolist(), record["phrases"], boxes, strict=True))


def test_a_picture_with_its_captions_and_a_box_for_each_object_of_a_phrase(options):
    assert reading.counts(DATASET, options) == fixture.RECORDS
    record = reading.read(DATASET, options)["1001"]
    assert record["captions"] == [
        "A man 's arm holds two dogs in mud.",
        "It shows a dog in rain .",
        "Texas A&M fan # 8 runs with a ball .",
        "Nothing is marked in this sentence .",
    ]
    assert record["caption_kinds"] == ["original"] * 4
    assert rows_of(record) == [
        (0, "A man 's arm", [10, 4, 50, 40]),
        (0, "two dogs", [50, 8, 96, 64]),
        (0, "two dogs", [60, 19, 80, 30]),
        (1, "a dog", [60, 19, 80, 30]),
        (2, "Texas A&M fan # 8", [10, 4, 50, 40]),
    ]


def test_boxes_and_phrases_that_mislead_are_left_out(options):
    found = reading.read(DATASET, options)
    assert found["1002"]["phrases"] == ["A girl"] * 5
    np.testing.assert_array_equal(found["1002"]["boxes"], [[0, 0, 1, 1]] * 5)
    # "a cat" would be the first of its sentence, that is another one.
    assert found["1003"]["phrase_captions"].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(found["1003"]["boxes"][0], [0, 0, 1 / 80, 1 / 80])
    assert reading.bad(found) == {"1005": "no phrase of its captions has a box inside the picture"}


def test_annotations_may_be_unpacked_and_pictures_packed(options, tmp_path):
    packed = reading.read(DATASET, options)
    (tmp_path / "annotations.zip").unlink()
    for name, text in fixture.annotations().items():
        drawing.write_file(tmp_path / "annotations" / name, text)
    pictures = tmp_path / "flickr30k-images"
    files = {f"flickr30k-images/{p.name}": p.read_bytes() for p in pictures.iterdir()}
    drawing.write_tar(tmp_path / "flickr30k-images.tar", files)
    shutil.rmtree(pictures)
    again = reading.read(DATASET, options)
    assert list(packed) == list(again)
    assert again["1001"]["image"] == packed["1001"]["image"]
    np.testing.assert_array_equal(again["1001"]["boxes"], packed["1001"]["boxes"])


def test_without_lists_all_pictures_are_train(options, tmp_path):
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.txt").unlink()
    assert reading.counts(DATASET, options) == {"train": 6}


def test_a_batch_of_layouts(options):
    found = {"1001": reading.read(DATASET, options)["1001"]}
    batch = reading.batch_of(found, "lg")
    (prompt,) = reading.prompts_of(batch)
    assert "block" in prompt


@pytest.mark.parametrize(
    ("line", "text", "phrases"),
    [
        (
            "[/EN#255545/bodyparts/people a man 's arm] up",
            "a man 's arm up",
            [(255545, "a man 's arm")],
        ),
        ("a [/EN#0/notvisual b  c ] d", "a b  c d", [(0, "b  c")]),
        ("no phrases", "no phrases", []),
    ],
)
def test_phrases_of_a_sentence(line, text, phrases):
    found, spans = parse_sentence(line)
    assert found == text
    assert [(chain, found[start:end]) for chain, start, end in spans] == phrases


@pytest.mark.parametrize("line", ["[/EN#x/people a man]", "[/EN#1/people a man", "[/EN#1 a man]"])
def test_brackets_that_cannot_be_read(line):
    with pytest.raises(UserError, match="expected"):
        parse_sentence(line)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Annotations/1004.xml", "<annotation><size>", "are not XML"),
        ("Annotations/1004.xml", "<html><size/></html>", "are 'html': expected annotation"),
        ("Annotations/1004.xml", '<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "are not XML"),
        ("Annotations/1004.xml", fixture.xml("1004", (56, 128), []), "pixels and its annotations"),
        ("Annotations/1004.xml", fixture.xml("1", (128, 56), [("x", (1, 1, 2, 2))]), "a number"),
        ("Annotations/1004.xml", fixture.xml("1", (128, 56), [("1", (1, "", 2, 2))]), "'ymin'"),
        ("Sentences/1004.txt", "[/EN#", "cannot be read"),
        ("Sentences/1004.txt", "\n", "it has no caption"),
        ("Sentences/1004.txt", b"\xff\xfe", "not in UTF-8"),
        ("Sentences/1004.txt", None, "there is no 'Sentences/1004.txt'"),
    ],
)
def test_what_is_wrong_with_one_picture_leaves_it_out(options, tmp_path, name, content, message):
    files = fixture.annotations() | {name: content}
    files = {key: value for key, value in files.items() if value is not None}
    drawing.write_zip(tmp_path / "annotations.zip", files)
    found = reading.read(DATASET, options)
    assert len(reading.good(found)) == fixture.RECORDS["train"] - 1
    assert message in reading.bad(found)["1004"]


def test_missing_files_are_named(options, tmp_path):
    with pytest.raises(NotFoundError, match=r"expected Annotations/ID\.xml and Sentences"):
        reading.read(DATASET, {"source": str(tmp_path / "flickr30k-images")})
    (tmp_path / "train.txt").write_text("not an id\n../x\n")
    with pytest.raises(UserError, match=r"train\.txt has '\.\./x': expected an id"):
        reading.read(DATASET, options)
    (tmp_path / "flickr30k-images").rename(tmp_path / "elsewhere")
    fixture.write(tmp_path / "other")
    with pytest.raises(NotFoundError, match=r"no pictures for .*expected one of .*flickr30k-im"):
        reading.read(DATASET, options, "validation")
    whole = (tmp_path / "annotations.zip").read_bytes()
    (tmp_path / "annotations.zip").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"annotations\.zip is not a whole zip"):
        reading.read(DATASET, options)


@pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
def test_real_sentences(tmp_path):
    """With boxes of ours: the release's may not be kept here."""
    shutil.copytree(SAMPLES / "flickr30k_entities" / "Sentences", tmp_path / "Sentences")
    chains = {"4945942737": "253069", "6338542128": "253069"}
    for name in (path.stem for path in (tmp_path / "Sentences").iterdir()):
        text = (tmp_path / "Sentences" / f"{name}.txt").read_text()
        chain = "221796" if "221796" in text else chains[name]
        xml = fixture.xml(name, drawing.SIZES[0], [((chain,), (2, 3, 60, 50))])
        drawing.write_file(tmp_path / "Annotations" / f"{name}.xml", xml)
        drawing.write_file(tmp_path / "images" / f"{name}.jpg", drawing.picture(0))
    found = reading.read(DATASET, {"source": str(tmp_path)})
    assert not reading.bad(found)
    girl, football = sorted(found.values(), key=lambda record: len(record["captions"][0]))
    assert girl["captions"][0] == (
        "A girl with brown hair sits on the edge of a cement area overlooking water ."
    )
    assert girl["phrases"] == ["A girl", "A woman", "A girl", "A small girl", "A dark-haired girl"]
    assert girl["phrase_captions"].tolist() == [0, 1, 2, 3, 4]
    assert football["captions"][4].startswith("# 8 for Iowa State stiff arms a Texas AM player")
    assert "a Texas A&M football player" in football["phrases"]
