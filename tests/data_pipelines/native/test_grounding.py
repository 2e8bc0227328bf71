"""Regions of captions: boxes clipped, and phrases that the task of layout finds where they were."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines import examples
from data_pipelines.native import grounding
from univg_jax.errors import UserError


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 5, 20, 50), (0.1, 0.1, 0.2, 1)),
        ((-1, -0.5, 100.9, 51), (0, 0, 1, 1)),
        ((-1.1, 0, 5, 5), None),
        ((0, 0, 5, 51.5), None),
        ((20, 0, 10, 5), None),
        ((5, 5, 5, 9), None),
        ((float("nan"), 0, 5, 5), None),
    ],
)
def test_boxes_are_clipped_by_at_most_a_pixel(box, expected):
    assert grounding.fractions(box, 50, 100) == expected


def test_spans_side_by_side_are_one():
    caption = "the red dog, its tail"
    assert grounding.spans_of([[8, 11], [4, 7], [13, 16]], caption) == [(4, 11), (13, 16)]
    assert grounding.spans_of([0, 3], caption) == [(0, 3)]
    for other in (None, [1], [[1, 2, 3]], [[1, "2"]], [[True, 2]], {}):
        with pytest.raises(UserError, match="expected"):
            grounding.spans_of(other, caption)


def test_a_caption_that_is_left_out_moves_the_numbers():
    regions = [grounding.Region(1, 0, 5, (0, 0, 5, 5)), grounding.Region(2, 0, 3, (0, 0, 9, 5))]
    captions = [("a", ""), ("b", "a dog runs"), ("c", "the dog")]
    record = grounding.record(b"", captions, regions, (10, 10))
    assert record["captions"] == ["a dog runs", "the dog"]
    assert record["caption_kinds"] == ["b", "c"]
    assert record["phrases"] == ["a dog", "the"]
    assert record["phrase_captions"].tolist() == [0, 1]


words = st.lists(st.sampled_from(["a", "dog", "the dog", "&amp;", "<b>", " ", "hot"]), max_size=12)
spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=6)


@hypothesis.given(words, spans)
def test_each_phrase_is_found_where_a_span_with_its_box_was(words, spans):
    caption = " ".join(words)
    regions = [
        grounding.Region(0, start, end, (0, 0, 1 + k, 9)) for k, (start, end) in enumerate(spans)
    ]
    try:
        record = grounding.record(b"", [("x", caption)], regions, (10, 10))
    except UserError:
        return
    (text,) = record["captions"]
    ends = examples.places(text, record["phrases"])
    for phrase, end, box in zip(record["phrases"], ends, record["boxes"], strict=True):
        start, stop = spans[int(np.round(box[2] * 10)) - 1]
        assert phrase == grounding.text_of(caption[start:stop])
        assert end == len(grounding.text_of(caption[:stop]))
