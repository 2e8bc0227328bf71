"""LongText-Bench's rules: what is a word, and what matches."""

import collections
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.benchmarks.official import FILES, needs_files
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import longtext
from univg_jax.evaluation.benchmarks.longtext import Row

LINES = [
    {
        **{"category": "sign", "length": "short", "prompt": "a sign", "prompt_id": 3},
        **{"text": ["FRESH brews, every", "Day"], "text_length": 4},
    },
    {
        **{"category": "label", "length": "long", "prompt": "a label", "prompt_id": 199},
        **{"text": ["one"], "text_length": 1},
    },
]


def write(folder, lines=LINES, name="text_prompts.jsonl"):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / name).write_text(text)
    return folder


def row(*lines: str, language="en", category="sign") -> Row:
    return Row(0, 3, "", lines, category, "short", language)


def value(row: Row, *texts: str) -> float:
    return longtext.score(row, texts)["text"].value


def test_reads_prompts_with_the_text_that_they_ask_for(tmp_path):
    rows = longtext.read(write(tmp_path), excerpt=True)
    assert rows[0] == Row(0, 3, "a sign", ("FRESH brews, every", "Day"), "sign", "short", "en")
    assert longtext.image_files(rows[1]) == ("199.png",)
    assert longtext.image_files(rows[1], images=2) == ("199_0.png", "199_1.png")
    write(tmp_path, name="text_prompts_zh.jsonl")
    assert longtext.read(tmp_path, "zh", excerpt=True)[0].language == "zh"


@pytest.mark.parametrize(
    ("change", "reason"),
    [({}, "has 2 prompts instead of 160"), ({"text": "FRESH"}, "has no list of texts in line 1")],
)
def test_another_file_is_one_line(tmp_path, change, reason):
    write(tmp_path, [LINES[0] | change, LINES[1]])
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        longtext.read(tmp_path)
    assert "expected text_prompts.jsonl" in str(error.value)


def test_an_unknown_language_is_one_line(tmp_path):
    with pytest.raises(UserError, match="unknown language of LongText-Bench 'fr'"):
        longtext.read(tmp_path, "fr")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("FRESH  Brews,\nevery-day!", ["fresh", "brews", "everyday"]),
        ("Café Noël, 3.5 km", ["café", "noël", "35", "km"]),
        ("España ß", ["espaa"]),
        ("每日 Fresh", ["每日", "fresh"]),
        ("", []),
    ],
)
def test_english_words(text, words):
    assert longtext.words(text, "en") == words


def test_chinese_is_compared_by_characters_that_keep_their_case():
    assert longtext.words("每日。新鲜 Ab 1", "zh") == ["每", "日", "新", "鲜", "A", "b", "1"]
    asked = row("每日 Ab", language="zh")
    assert value(asked, "每日ab") == 0.75
    assert value(row("Ab"), "ab") == 1


def test_words_match_as_often_as_they_are_there():
    assert value(row("a a b"), "a b b c") == pytest.approx(2 / 3)
    assert value(row("a b", "c"), "C, b; a!") == 1  # in any order, over all lines


def test_only_the_phrase_with_its_dot_is_dropped():
    """Without its dot, which the question asks for, the phrase is words like others."""
    assert value(row("no text"), "No text recognized.") == 0
    assert value(row("no text"), "No text recognized") == 1
    assert value(row("addcriterion"), "addCriterion") == 1


def test_the_score_is_of_sums_over_all_images():
    rows = [row("a b c d"), row("e", category="label")]
    scores = [longtext.score(rows[0], ["a b", "a"]), longtext.score(rows[1], ["e", None])]
    found = longtext.summary(rows, scores)
    assert found["overall"] == pytest.approx((2 + 1 + 1) / (4 + 4 + 1))
    assert found["strict/overall"] == pytest.approx((2 + 1 + 1) / (4 + 4 + 1 + 1))
    assert found["category/sign"] == 0.375
    assert found["category/label"] == 1


@given(st.lists(st.sampled_from("abcd")), st.lists(st.sampled_from("abcd")))
def test_matches_by_taking_words_away_one_by_one(asked, read):
    left, matched = list(read), 0
    for word in asked:
        if word in left:
            left.remove(word)
            matched += 1
    scores = longtext.score(row(" ".join(asked)), [" ".join(read)])
    assert scores["text"].total.tolist() == [matched]
    assert scores["text"].count.tolist() == [len(asked)]


@needs_files
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_official_files(language):
    rows = longtext.read(FILES / "longtext", language)
    assert len({r.prompt_id for r in rows}) == 160
    assert max(r.prompt_id for r in rows) == 199
    assert set(collections.Counter((r.category, r.length) for r in rows).values()) == {10}
    assert all(value(r, " ".join(r.lines)) == 1 for r in rows)
