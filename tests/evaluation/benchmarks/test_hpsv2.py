"""HPSv2's rules: means over chunks, and over all images."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import hpsv2
from univg_jax.evaluation.benchmarks.hpsv2 import Row

VERSIONS = ("v2.0", "v2.1")


def write(folder, count=2, **lists):
    for style in hpsv2.STYLES:
        content = lists.get(style, [f"{style} {k}" for k in range(count)])
        if content is not None:
            (folder / f"{style}.json").write_text(json.dumps(content))
    return folder


def scored(numbers, style="photo"):
    """Rows of a style with these cosines (None: no image), and their scores."""
    rows = [Row(style, k, "") for k in range(len(numbers))]
    return rows, [hpsv2.score(None if n is None else {"v2.1": n}, ["v2.1"]) for n in numbers]


def test_reads_the_lists_of_all_styles(tmp_path):
    rows = hpsv2.read(write(tmp_path), excerpt=True)
    assert [(r.style, r.index) for r in rows] == [(s, k) for s in hpsv2.STYLES for k in (0, 1)]
    assert hpsv2.image_files(rows[3]) == ("concept-art/00001.jpg",)
    assert rows[3].prompt == "concept-art 1"
    assert len(hpsv2.read(write(tmp_path, 800))) == 3200


@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        ({}, "anime.json has 2 prompts instead of 800"),
        ({"photo": None}, "photo.json does not exist"),
        ({"photo": {"a": "b"}}, "photo.json is not a list of texts"),
        ({"photo": [1]}, "photo.json is not a list of texts"),
    ],
)
def test_another_file_is_one_line(tmp_path, lists, reason):
    write(tmp_path, **lists)
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        hpsv2.read(tmp_path, excerpt=bool(lists))
    assert "zhwang/HPDv2" in str(error.value)


def test_a_style_is_the_mean_of_means_of_80():
    """The last chunk is short and weighs as much as the others."""
    rows, scores = scored([0.25] * 80 + [0.5] * 20)
    found = hpsv2.summary(rows, scores)
    assert found["v2.1/photo"] == 37.5
    assert found["v2.1/photo/deviation"] == 12.5  # of the population
    assert found["v2.1/average"] == 30


def test_the_average_is_over_images_and_not_over_styles():
    rows, scores = scored([0.25] * 3)
    more = scored([0.5], "anime")
    found = hpsv2.summary(rows + more[0], scores + more[1])
    assert found["v2.1/average"] == 31.25


def test_missing_images_are_left_out_and_shift_the_chunks():
    rows, scores = scored([None] + [0.25] * 80 + [0.5] * 79)
    found = hpsv2.summary(rows, scores)
    assert found["v2.1/photo"] == 37.5
    assert found["failures/missing"] == 1
    assert found["v2.1/strict/average"] == pytest.approx((80 * 25 + 79 * 50) / 160)


def test_versions_are_apart():
    rows = [Row("photo", 0, "")]
    found = hpsv2.summary(rows, [hpsv2.score({"v2.0": 0.25, "v2.1": 0.5}, VERSIONS)])
    assert (found["v2.0/average"], found["v2.1/average"]) == (25, 50)
    assert hpsv2.score(None, VERSIONS).keys() == {*VERSIONS, "failures/missing"}


@given(
    st.lists(st.none() | st.floats(-1, 1), min_size=1, max_size=300),
    st.randoms(use_true_random=False),
)
def test_the_summary_by_its_definition_in_any_order(cosines, random):
    rows, scores = scored(cosines)
    pairs = list(zip(rows, scores, strict=True))
    random.shuffle(pairs)
    found = hpsv2.summary(*map(list, zip(*pairs, strict=True)))
    numbers = [100 * c for c in cosines if c is not None]
    means = [np.mean(numbers[i : i + 80]) for i in range(0, len(numbers), 80)]
    expected = np.mean(means) if means else np.nan
    assert found["v2.1/photo"] == pytest.approx(expected, nan_ok=True, abs=1e-9)
