"""Several captions of a picture: which one a sample has, and what of the labels goes with it."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.held_out import HeldOut
from data_pipelines.reader import MissingFieldError, Reader
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import TASKS, UnsuitableRecord
from tests.data_pipelines import toy
from univg_jax.errors import UserError
from univg_jax.settings import Config

IMAGE = np.zeros((toy.SIZE, toy.SIZE, 3), np.uint8)
CAPTIONS, KINDS = ["a pig", "a fat pig on grass", "pig"], ["short", "long", "alt"]
RECORD = dict(image=IMAGE, captions=CAPTIONS, caption_kinds=KINDS)


def text(record=RECORD, task="t2i", seed=0, **weights) -> str:
    rng = np.random.default_rng(seed)
    weights = {kind: float(weight) for kind, weight in weights.items()}
    return TASKS[task].example(record, rng, toy.SIZE, caption_weights=weights).text


def test_captions_are_drawn_by_the_weights_of_their_kinds():
    counts = collections.Counter(text(seed=seed, long=2, alt=0) for seed in range(600))
    assert set(counts) == set(CAPTIONS[:2])
    # A kind that is not named weighs 1: a third; five standard deviations of 600 draws are 0.1.
    assert counts["a pig"] / 600 == pytest.approx(1 / 3, abs=0.1)
    equal = collections.Counter(text(seed=seed) for seed in range(600))
    assert min(equal.values()) > 140


def test_without_kinds_all_weigh_the_same():
    record = dict(image=IMAGE, captions=CAPTIONS, caption_kinds=[])
    assert {text(record, seed=seed, short=0) for seed in range(50)} == set(CAPTIONS)
    del record["caption_kinds"]
    assert {text(record, seed=seed) for seed in range(50)} == set(CAPTIONS)


def test_an_empty_caption_is_never_drawn():
    record = RECORD | dict(captions=["", "  ", " pig "])
    assert {text(record, seed=seed) for seed in range(20)} == {"pig"}


@pytest.mark.parametrize(
    ("record", "weights", "message"),
    [
        (RECORD, dict(short=0, long=0, alt=0), r"of 3, 3 have text; their kinds are alt, long, sh"),
        (RECORD | dict(captions=["", "", ""]), {}, "of 3, 0 have text"),
        (RECORD | dict(captions=[], caption_kinds=[]), {}, "of 0, 0 have text"),
    ],
)
def test_a_record_without_a_caption_to_draw_is_unsuitable(record, weights, message):
    with pytest.raises(UnsuitableRecord, match=message):
        text(record, **weights)
    assert text(record, "ip", **weights) == ""  # which paints background without a text


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_the_draw_moves_no_other_random_choice(seed):
    wide = dict(image=np.arange(8 * 20 * 3, dtype=np.uint8).reshape(8, 20, 3), caption="a pig")
    several = {k: v for k, v in wide.items() if k != "caption"} | dict(captions=["a pig", "pig"])
    for task in ("t2i", "ip"):
        one, two = (
            TASKS[task].example(record, np.random.default_rng(seed), 8)
            for record in (wide, several)
        )
        np.testing.assert_array_equal(one.target, two.target)
        if task == "ip":
            np.testing.assert_array_equal(one.mask, two.mask)
            assert bool(one.text) == bool(two.text)


def test_id_draws_among_the_captions_with_the_person():
    face = np.zeros((4, 4, 3), np.uint8)
    record = RECORD | dict(captions=["a man", "<p> smiles", "a photo of <p>"], face=face)
    assert {text(record, "id", seed) for seed in range(30)} == {"<p> smiles", "a photo of <p>"}
    with pytest.raises(UnsuitableRecord, match="none of its captions"):
        text(RECORD | dict(face=face), "id")


LAYOUT = RECORD | dict(
    boxes=np.float32([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 0.5, 1]]),
    phrases=["a pig", "grass", "a fat pig"],
    phrase_captions=np.array([0, 1, 1]),
)


def test_lg_shows_the_boxes_of_the_drawn_caption_alone():
    texts = collections.defaultdict(set)
    for seed in range(40):
        example = TASKS["lg"].example(LAYOUT, np.random.default_rng(seed), toy.SIZE)
        kept = example.text.count("block")
        texts[kept].add(example.text.startswith("a fat pig ("))
        colors = {tuple(c) for c in example.source.reshape(-1, 3)} - {(128, 128, 128)}
        assert len(colors) == kept
    # The caption "pig" has no phrase.
    assert texts == {1: {False}, 2: {True}}


def test_lg_finds_its_captions_by_their_phrases_without_an_index():
    record = {k: v for k, v in LAYOUT.items() if k != "phrase_captions"}
    assert {text(record, "lg", s)[:5] for s in range(40)} == {"a pig", "a fat"}
    empty = LAYOUT | dict(phrase_captions=np.zeros(0, np.int64))
    assert text(empty, "lg", 3) == text(record, "lg", 3)


def test_a_box_that_is_dropped_takes_its_index_along():
    boxes = LAYOUT["boxes"].copy()
    boxes[0] = 0
    record = LAYOUT | dict(boxes=boxes)
    assert {text(record, "lg", s)[:5] for s in range(10)} == {"a fat"}


# --- through the readers ---


def make_reader(task="t2i", items=(RECORD,), fields=(), **weights) -> Reader:
    config = toy.make_config()
    config.data.caption_weights = weights
    collator = toy.make_collator(config)
    return Reader(task, MemorySource("toy", list(items)), collator=collator, fields=fields)


def test_a_source_with_captions_serves_whoever_needs_a_caption():
    reader = make_reader(long=0, alt=0)
    assert toy.text_of(reader.row(0, np.random.default_rng(0)).prompt.tokens) == "<t2i> a pig"
    assert reader.record(0)["caption"] == "a pig"
    assert set(reader.record(0)) == {"image", "caption"}
    items = [RECORD | dict(depth=np.ones((toy.SIZE, toy.SIZE), np.float32))]
    assert make_reader("depth", items, ("caption",), short=0, long=0).record(0)["caption"] == "pig"
    with pytest.raises(MissingFieldError, match="no field 'caption'"):
        make_reader(items=[dict(image=IMAGE)])


def test_the_stream_and_held_out_records_have_the_weights_of_the_config():
    config = toy.make_config(t2i=1.0)
    config.data.caption_weights = dict(short=0, alt=0)
    sources = dict(scenes=MemorySource("scenes", [RECORD] * 5))
    stream = toy.stream(config, sources=sources)
    assert {stream.row(p).example.text for p in range(20)} == {CAPTIONS[1]}
    held_out = HeldOut(
        Config.of(config), "t2i", split="test", collator=toy.make_collator(config), sources=sources
    )
    assert [held_out.row(i).example.text for i in range(5)] == [CAPTIONS[1]] * 5


def test_a_held_out_record_has_the_caption_of_its_row_on_any_host():
    config = toy.make_config(t2i=1.0)
    sources = dict(scenes=MemorySource("scenes", [RECORD] * 12))
    held_out, again = (
        HeldOut(
            Config.of(config),
            "t2i",
            split="test",
            seed=3,
            collator=toy.make_collator(config),
            sources=sources,
        )
        for _ in range(2)
    )
    texts = [held_out.row(i).example.text for i in range(12)]
    assert [held_out[i]["caption"] for i in range(12)] == texts
    assert [again.row(i).example.text for i in reversed(range(12))] == texts[::-1]
    assert set(texts) == set(CAPTIONS)


def test_the_weights_are_a_setting():
    assert dict(Config().data.caption_weights) == {}
    config = Config.of({"data": {"caption_weights": {"long": 2}}})
    assert config.data.caption_weights["long"] == 2.0
    with pytest.raises(UserError, match=r"data\.caption_weights\.long=-1"):
        Config.of({"data": {"caption_weights": {"long": -1}}})
