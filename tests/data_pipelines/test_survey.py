"""A survey's numbers are those of a count by hand, and its warnings what would harm a run."""

import collections
import dataclasses

import numpy as np
import pytest

from data_pipelines import survey as surveys
from data_pipelines.collate import Collator
from data_pipelines.sources import MemorySource
from data_pipelines.tokenizer import TokenizedText
from tests.data_pipelines import toy
from univg_jax.batch import BatchShape
from univg_jax.settings import Config

TALL, WIDE = (12, 8), (8, 12)
LIMIT = 6  # tokens of a prompt
KINDS = ("short", "long")


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr(surveys, "MIN_ROWS", 64)
    monkeypatch.setattr(surveys, "MAX_ROWS", 2000)


def tokenize(text: str, num_tokens: int) -> TokenizedText:
    """Words as tokens."""
    count = len(text.split())
    filled = np.arange(num_tokens) < count
    return TokenizedText(
        tokens=filled.astype(np.int32),
        text_mask=filled,
        identity_slot=np.zeros_like(filled),
        num_truncated=max(0, count - num_tokens),
    )


def make_record(k: int, **changes) -> dict:
    image = np.full((*(TALL, WIDE)[k % 2], 3), k, np.uint8)
    texts = ["pig " * (1 + k % 3), "pig " * (4 + k)]
    record = dict(image=image, captions=texts, caption_kinds=list(KINDS))
    record |= dict(masks=np.ones((1, *image.shape[:2]), np.uint8), expressions=["it"])
    return record | changes


def make_config(steps: int = 30, batch_size: int = 4, **sources: tuple[str, ...]) -> Config:
    """Tasks t2i and seg, 9 to 1, in two buckets."""
    names = dict(t2i=("many", "few"), seg=("few",)) | sources
    made = toy.make_config(batch_size, **{task: dict(t2i=0.9, seg=0.1)[task] for task in names})
    for task, found in names.items():
        made.tasks[task].sources = found
    made.data.buckets, made.data.num_tokens = (TALL, WIDE), LIMIT
    made.train = dict(steps=steps)
    return Config.of(made)


def survey(config: Config, num_examples: int = 2, **records: list[dict]) -> surveys.Survey:
    lists = dict(many=[make_record(k) for k in range(9)], few=[make_record(k) for k in range(3)])
    sources = {name: MemorySource(name, items) for name, items in (lists | records).items()}
    return surveys.survey(
        config,
        collator=Collator(tokenizer=tokenize, shape=BatchShape.of(config.data)),
        num_examples=num_examples,
        sources=sources,
    )


def parts_of(found: surveys.Survey) -> dict[tuple[str, str], surveys.Part]:
    return {(part.task, part.source.name): part for part in found.parts}


def test_shares_are_those_of_every_row_of_the_run():
    config = make_config(steps=37)
    found = survey(config)
    rows = [found.stream.row(position) for position in range(37 * 4)]
    counted = collections.Counter((row.task, row.origin[0].name) for row in rows)
    parts = parts_of(found)
    assert {key: int(part.rows.sum()) for key, part in parts.items()} == counted
    for key, part in parts.items():
        assert found.realized(part) == pytest.approx(counted[key] / len(rows))
        assert part.epochs == pytest.approx(counted[key] / len(part.source))
        # nine records to three; 9 to 1
        assert part.expected == pytest.approx(
            {("t2i", "many"): 0.675, ("t2i", "few"): 0.225, ("seg", "few"): 0.1}[key]
        )
    shapes = [row.example.target.shape[:2] for row in rows]
    assert found.stream.shapes == (TALL, WIDE)
    assert found.bucket_shares() == pytest.approx(
        [shapes.count(s) / len(rows) for s in (TALL, WIDE)]
    )


@pytest.mark.parametrize("batch_size", [1, 4, 96])
def test_prompts_are_counted_before_they_are_cut(batch_size):
    found = survey(make_config(batch_size=batch_size), num_examples=1)
    # All rows of a step are of one bucket, so one row is read of each of 64 steps.
    rows = [found.stream.row(step * batch_size) for step in range(64)]
    for (task, name), part in parts_of(found).items():
        mine = [row for row in rows if (row.task, row.origin[0].name) == (task, name)]
        lengths = [1 + len(row.example.text.split()) for row in mine]
        assert part.lengths == lengths
        assert part.num_cut == sum(n > LIMIT for n in lengths)
        kinds = ["long" if len(row.example.text.split()) > 3 else "short" for row in mine]
        assert part.kinds == (collections.Counter(kinds) if task == "t2i" else {})
        assert part.examples[0].sample_id == mine[0].sample_id
    cut = sum(p.expected * p.num_cut / len(p.lengths) for p in found.parts)
    assert found.cut == pytest.approx(cut)
    long = parts_of(found)["t2i", "many"]
    expected = f"{long.cut:.0%} of {len(long.lengths)} prompts are longer than data.num_tokens=6"
    assert any(text.startswith("t2i from many: ") and expected in text for text in found.warnings())


def test_what_is_rare_is_searched_until_it_has_examples():
    config = toy.make_config(4, t2i=0.99, seg=0.01)
    config.tasks.t2i.sources = config.tasks.seg.sources = ("few",)
    found = survey(Config.of(config), num_examples=3)
    rare = parts_of(found)["seg", "few"]
    assert [row.task for row in rare.examples] == ["seg"] * 3
    later = [row.sample_id for row in rare.examples if row.sample_id >= 64]
    assert later
    assert found.num_read == 64 + len(later)


def test_unusable_records_are_listed_once_a_task_with_their_place():
    records = [make_record(k) for k in range(8)]
    records[2]["image"] = records[2]["image"].astype(np.float32)
    records[4]["expressions"] = [""]
    found = survey(make_config(steps=2000, t2i=("mixed",), seg=("mixed",)), 16, mixed=records)
    skips = {(s.task, s.place.dataset, s.place.index, s.place.key): s for s in found.skips}
    damaged = {key for key, skip in skips.items() if skip.is_damaged}
    assert damaged == {("t2i", "mixed", 2, 2), ("seg", "mixed", 2, 2)}
    assert set(skips) - damaged == {("seg", "mixed", 4, 4)}
    assert "uint8" in skips["t2i", "mixed", 2, 2].reason
    assert skips["seg", "mixed", 4, 4].reason == "no expression refers to a visible mask"
    seg = parts_of(found)["seg", "mixed"]
    assert (seg.num_damaged, seg.num_unsuitable, seg.num_tried) == (1, 1, 8)
    assert seg.served == {0, 1, 3, 5, 6, 7}
    assert "seg from mixed: 1 of 8 records tried cannot be used" in found.warnings()


def test_a_source_without_usable_records_ends_no_survey():
    broken = [make_record(k, image=np.zeros(3, np.uint8)) for k in range(8)]
    found = survey(make_config(t2i=("many", "broken"), seg=("few",)), broken=broken)
    parts = parts_of(found)
    assert not parts["t2i", "broken"].examples
    assert len(parts["t2i", "many"].examples) == len(parts["seg", "few"].examples) == 2
    (line,) = [text for text in found.warnings() if "t2i from broken" in text]
    assert line.startswith("the run would end at t2i from broken: 8 records in succession")


def test_too_large_a_share_of_damage_is_told():
    damaged = [make_record(k, **(dict(image=0) if k % 2 else {})) for k in range(60)]
    found = survey(make_config(t2i=("many",), seg=("many",)), 1, many=damaged)
    assert "more than data.max_bad_fraction=0.01" in found.warnings()[0]


def test_a_run_that_is_too_short_and_a_bucket_that_is_too_small_are_told():
    found = survey(make_config(steps=1, batch_size=6))
    warnings = "\n".join(found.warnings())
    assert "bucket 8x12 has 5 records, fewer than a batch of 6" in warnings
    assert "12x8" not in warnings  # of 5 records of `many` and 2 of `few`
    missing = [part.name for part in found.parts if not part.rows.any()]
    assert missing
    assert all(f"{name} has no row in the run" in warnings for name in missing)


def test_a_weight_of_a_kind_that_no_caption_has_is_told():
    config = make_config()
    weights = {KINDS[0]: 0.0, KINDS[1]: 2.0, KINDS[0] + "s": 1.0}
    data = dataclasses.replace(config.data, caption_weights=weights)
    (warning,) = [
        line
        for line in survey(dataclasses.replace(config, data=data)).warnings()
        if "caption_weights" in line
    ]
    assert f"kind {KINDS[0] + 's'!r}; did you mean {KINDS[0]!r}?" in warning


def test_a_sound_mixture_has_no_warning():
    records = [make_record(k, captions=["a pig", "pigs"]) for k in range(40)]
    found = survey(make_config(t2i=("many",), seg=("many",)), many=records)
    assert found.warnings() == []


def test_the_summary_has_a_line_of_each_part_and_bucket():
    found = survey(make_config())
    lines = found.lines()
    assert lines[0] == f"base: 30 steps of 4 rows, {found.num_read} rows read"
    rows = [line.split() for line in lines[2:5]]
    assert [row[:3] for row in rows] == [
        ["t2i", "many", "9"],
        ["t2i", "few", "3"],
        ["seg", "few", "3"],
    ]
    assert [row[5] for row in rows] == ["67.50%", "22.50%", "10.00%"]
    assert lines[5:8] == ["buckets of the stream:", *found.stream.describe_buckets()]
    assert lines[9:] == [f"warning: {text}" for text in found.warnings()]
