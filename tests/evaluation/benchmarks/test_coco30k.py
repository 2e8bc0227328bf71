"""COCO-30k: MLPerf's choice of captions, and its table."""

import json
import re

import pytest

from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import coco30k
from univg_jax.evaluation.benchmarks.coco30k import Row

# What pandas 3.1 gives for `DataFrame({"a": range(12)}).sample(frac=1, random_state=2023)`.
SHUFFLED = (5, 8, 2, 0, 10, 3, 4, 1, 11, 6, 9, 7)
CAPTIONS = [
    {"image_id": 7, "id": 10, "caption": ' a "b"\nc '},
    {"image_id": 7, "id": 11, "caption": "d"},
    {"image_id": 9, "id": 5, "caption": "e\tf"},
]


def write(folder, content=None, name="captions_val2014.json"):
    content = {"annotations": CAPTIONS} if content is None else content
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_the_shuffle_is_that_of_pandas():
    """Of twelve captions of as many pictures, the first ones of the shuffle are chosen."""
    captions = [{"image_id": k, "id": k, "caption": ""} for k in range(12)]
    for count in range(1, 13):
        chosen = coco30k.select(captions, samples=count)
        assert [r.caption_id for r in chosen] == sorted(SHUFFLED[:count])
        assert [r.index for r in chosen] == list(range(count))


def test_the_first_caption_of_a_picture_in_the_shuffle_is_kept():
    captions = [{"image_id": k // 4, "id": 100 - k, "caption": ""} for k in range(12)]
    first = {}
    for k in SHUFFLED:
        first.setdefault(k // 4, 100 - k)
    chosen = coco30k.select(captions, samples=3)
    assert {r.image_id: r.caption_id for r in chosen} == first
    assert [r.caption_id for r in chosen] == sorted(first.values())


def test_captions_lose_their_ends_of_lines(tmp_path):
    rows = coco30k.read(write(tmp_path), samples=2)
    assert [r.image_id for r in rows] == [9, 7]
    assert rows[0].prompt == "e\tf"
    assert rows[1].prompt in ('a "b"c', "d")
    assert coco30k.image_files(rows[0]) == ("9.png",)
    assert coco30k.real_file(rows[0]) == "val2014/COCO_val2014_000000000009.jpg"


def test_the_table_is_read_as_it_is_written(tmp_path):
    rows = (Row(0, 9, 5, "e\tf"), Row(1, 7, 10, 'a "b"c'), Row(2, 8, 12, "plain"))
    text = coco30k.table(rows)
    assert text == (
        'image_id\tid\tcaption\n9\t5\t"e\tf"\n7\t10\t"a ""b""c"\n8\t12\tplain\n'
    )  # as pandas' to_csv
    path = write(tmp_path, text, "val2014_30k.tsv") / "val2014_30k.tsv"
    assert coco30k.read(path, samples=3) == rows


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        ({"annotations": CAPTIONS}, "captions_val2014.json", "has 2 captions instead of 30000"),
        ({"images": []}, "captions_val2014.json", "has no annotations"),
        ({"annotations": [{"id": 1}]}, "captions_val2014.json", "an annotation without caption"),
        ('{"annotations": [', "captions_val2014.json", "is torn"),
        ("image_id\tid\tcaption\n1\t2\n", "a.tsv", "is torn or another table"),
        ("id\tcaption\n1\t2\n", "a.tsv", "is torn or another table"),
        ("image_id\tid\tcaption\n1\t2\ta\n", "a.tsv", "has 1 captions instead of 30000"),
    ],
)
def test_another_file_is_one_line(tmp_path, content, name, reason):
    write(tmp_path, content, name)
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        coco30k.read(tmp_path / name)
    assert "expected" in str(error.value)


def test_the_clip_score_is_a_mean_of_raw_cosines():
    rows = [Row(k, k, k, "") for k in range(3)]
    found = coco30k.summary(
        rows, [coco30k.score(c, is_missing=c is None) for c in (0.25, -0.125, None)]
    )
    assert found == {"clip": 0.0625, "failures/missing": 1}
