"""Grounded SBU: from lines of megabytes to records and a batch."""

import dataclasses
import tracemalloc

import numpy as np
import pytest

from data_pipelines.datasets.grounded_sbu import DATASET
from tests.native import drawing, reading
from tests.native import grounded_sbu as fixture
from univg_jax.errors import NotFoundError, UserError


@pytest.fixture
def options(tmp_path):
    return fixture.write(tmp_path)


def boxes_of(found, key: str) -> list:
    width, height = drawing.SIZES[list(fixture.ROWS).index(key)]
    return (found[key]["boxes"] * [width, height, width, height]).round(3).tolist()


def test_captions_with_boxes_of_their_phrases(options):
    assert reading.counts(DATASET, options) == fixture.RECORDS
    found = reading.read(DATASET, options)
    record = found["0001"]
    assert record["captions"] == ["My dog & a cat on the dog bed"]
    assert record["caption_kinds"] == ["original"]
    assert record["image"] == drawing.picture(0)
    # Spans count in the native caption, before its entity is read.
    assert record["phrases"] == ["My dog", "a cat"]
    assert boxes_of(found, "0001") == [[10, 5, 50.5, 35], [60, 8, 96, 64]]
    assert record["phrase_captions"].tolist() == [0, 0]


def test_a_box_may_have_several_spans(options):
    found = reading.read(DATASET, options)
    assert found["0002"]["phrases"] == ["a man", "he", "his hat"]
    assert boxes_of(found, "0002") == [[0, 0, 64, 96], [0, 0, 64, 96], [4, 6, 14, 26]]
    assert found["0004"]["phrases"] == ["two boats", "two boats"]


def test_boxes_are_clipped_or_left_out(options):
    found = reading.read(DATASET, options)
    assert boxes_of(found, "0003") == [[0, 0, 19.5, 80]]
    bad = reading.bad(found)
    assert bad["0006"] == "no phrase of its captions has a box inside the picture"
    (other,) = bad.keys() - {"0006"}
    assert other.startswith("train-0000.tsv:")
    assert bad[other] == "its line is no key, tab and JSON"


@pytest.mark.parametrize("part_bytes", [997, 5000, 30_000])
def test_parts_of_any_size_have_each_line_once(options, part_bytes):
    (native,) = DATASET.open(DATASET.make_options(options)).values()
    native = dataclasses.replace(native, part_bytes=part_bytes)
    parts = native.parts("train")
    keys = [entry.key for part in parts for entry in native.entries(part)]
    assert [key for key in keys if ":" not in key] == list(fixture.ROWS)
    assert len(keys) == len(fixture.ROWS) + 1


def test_one_line_is_in_memory_at_a_time(tmp_path):
    with open(tmp_path / "train-00.tsv", "wb") as file:
        for k in range(20):
            file.write(b"%d\t{" % k + b" " * 2**20 + b"}\n")
    (native,) = DATASET.open(DATASET.make_options({"source": str(tmp_path)})).values()
    tracemalloc.start()
    count = sum(1 for part in native.parts("train") for _ in native.entries(part))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20
    assert peak < 8 * 2**20


def test_a_batch_of_layouts(options):
    found = reading.read(DATASET, options)
    batch = reading.batch_of({"0004": found["0004"]}, "lg")
    (prompt,) = reading.prompts_of(batch)
    assert "two boats (" in prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(caption=3), "'caption' is 3, a int: expected str"),
        (dict(caption=""), "it has no caption"),
        (dict(image="a?b"), "its picture is not in base64"),
        (dict(image="aaaa"), "the picture is not a readable image"),
        (dict(annos={}), "'annos' is {}, a dict: expected list"),
        (dict(annos=[1]), "one of its annos is 1: expected an object"),
        (dict(annos=[{"bbox": [1, 2, 3]}]), "a bbox is [1, 2, 3]: expected x, y, width, height"),
        (dict(annos=[{"bbox": [1, 2, 3, 4]}]), "tokens_positive is None: expected"),
        (dict(annos=[{"bbox": [1, 2, 3, 4], "tokens_positive": ["a"]}]), "expected [start, end]"),
        (dict(annos=[{"bbox": [1, 2, 3, 4], "tokens_positive": [[5, 99]]}]), "no phrase of"),
    ],
)
def test_what_is_wrong_with_one_line_leaves_it_out(tmp_path, changes, message):
    good, bad = fixture.line("0005", 4), fixture.line("0004", 3, **changes)
    (tmp_path / "train-00.tsv").write_text(f"{good}\n{bad}\n{bad[:-9].replace('0004', '9')}\n")
    found = reading.read(DATASET, {"source": str(tmp_path / "train-00.tsv")})
    assert list(reading.good(found)) == ["0005"]
    assert message in reading.bad(found)["0004"]
    assert "its line is not JSON" in reading.bad(found)["9"]


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"has no \.tsv: expected lines of a key, a tab"):
        reading.read(DATASET, {"source": str(tmp_path)})
    (tmp_path / "train.tsv").write_text("caption\turl\na dog\tx.jpg\n")
    with pytest.raises(UserError, match=r"train\.tsv begins with .*expected lines of a key"):
        reading.read(DATASET, {"source": str(tmp_path)})


def test_boxes_are_fractions_in_float32(options):
    boxes = reading.read(DATASET, options)["0001"]["boxes"]
    np.testing.assert_allclose(boxes[0], [10 / 96, 5 / 64, 50.5 / 96, 35 / 64], rtol=1e-6)
    assert boxes.dtype == np.float32
