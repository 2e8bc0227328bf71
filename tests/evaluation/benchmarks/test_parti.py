"""PartiPrompts: the reader, and the means of a cosine."""

import re

import pytest

from tests.evaluation.benchmarks.official import FILES, needs_files
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import parti

TABLE = (
    "Prompt\tCategory\tChallenge\tNote\r\n"
    'a sign that says "Deep\tArts\tWriting & Symbols\t\r\n'
    "a cat\tAnimals\tBasic\tone\r\n"
)


def write(folder, text=TABLE):
    (folder / "PartiPrompts.tsv").write_bytes(text.encode())
    return folder


def test_a_quote_is_a_letter_like_others(tmp_path):
    rows = parti.read(write(tmp_path), excerpt=True)
    assert [(r.prompt, r.category, r.challenge) for r in rows] == [
        ('a sign that says "Deep', "Arts", "Writing & Symbols"),
        ("a cat", "Animals", "Basic"),
    ]
    assert parti.image_files(rows[1]) == ("00001.png",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TABLE, "has 2 prompts instead of 1632"),
        (TABLE + "a d", "is torn at row 3"),
        (TABLE.replace("\t", ","), "has no column 'Prompt'"),
    ],
)
def test_another_file_is_one_line(tmp_path, text, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        parti.read(write(tmp_path, text))
    assert "expected PartiPrompts.tsv" in str(error.value)


def test_means_by_category_and_challenge(tmp_path):
    rows = parti.read(write(tmp_path, TABLE + "a dog\tAnimals\tStyle\t\n"), excerpt=True)
    found = parti.summary(rows, [parti.score(c) for c in (0.25, 0.5, None)])
    assert found == {
        "overall": 0.375,
        "category/Arts": 0.25,
        "category/Animals": 0.5,
        "challenge/Writing & Symbols": 0.25,
        "challenge/Basic": 0.5,
        "challenge/Style": pytest.approx(float("nan"), nan_ok=True),
        "failures/missing": 1,
    }


@needs_files
def test_the_official_file():
    rows = parti.read(FILES / "parti")
    assert len(rows) == len({r.prompt for r in rows}) == 1632
    assert len({r.category for r in rows}) == 12
    assert len({r.challenge for r in rows}) == 11
    assert sum(r.category == "Animals" for r in rows) == 314
