"""GenEval 2's rules, one by one. Its files have a license that keeps them out of the tests."""

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import geneval2
from univg_jax.evaluation.benchmarks.geneval2 import Answer, Question, Row

LINES = [
    {
        "prompt": "four tin owls above a lake",
        "atom_count": 4,
        "vqa_list": [
            ["How many owls are there?", "four"],
            ["Are the owls made of tin?", "No"],
            ["Are there any owls?", "Yes"],
        ],
        "skills": ["count", "attribute", "object"],
    },
    {
        "prompt": "a lake",
        "atom_count": 3,
        "vqa_list": [["Is there a lake?", "Yes"]],
        "skills": ["object"],
    },
]


def whole(spelling: str) -> str:
    """Every spelling is one token."""
    return spelling


def write(folder, lines=LINES):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "geneval2_data.jsonl").write_text(text)
    return folder


def test_images_lie_where_the_official_index_says(tmp_path):
    rows = geneval2.read(write(tmp_path), excerpt=True)
    assert geneval2.found(rows, tmp_path) == [["00000.png"], ["00001.png"]]
    index = {"a lake": "mine/lake.jpg", "of nobody": "0.png"}
    (tmp_path / "images.json").write_text(json.dumps(index))
    assert geneval2.found(rows, tmp_path) == [["00000.png"], ["mine/lake.jpg"]]
    for content in ("[]", '{"a lake": 1}', "{"):
        (tmp_path / "images.json").write_text(content)
        with pytest.raises(UserError, match=r"images\.json .*expected images\.json, the file of"):
            geneval2.found(rows, tmp_path)


def row(*skills: str, atoms: int = 3) -> Row:
    return Row(0, "", atoms, tuple(Question("Is it?", "Yes", skill) for skill in skills))


def said(*probabilities: float) -> list[Answer]:
    return [Answer("Yes" if p > 0.5 else "No", {"Yes": p}) for p in probabilities]


def test_reads_prompts_with_their_questions(tmp_path):
    rows = geneval2.read(write(tmp_path), excerpt=True)
    assert [(r.index, r.prompt, r.atom_count) for r in rows] == [
        (0, "four tin owls above a lake", 4),
        (1, "a lake", 3),
    ]
    assert rows[0].questions[0] == Question("How many owls are there?", "four", "count")
    assert rows[0].questions[0].prompt == "How many owls are there? Answer in one word."
    assert geneval2.count_by_skill(rows) == {"count": 1, "attribute": 1, "object": 2}
    assert geneval2.image_files(rows[1]) == ("00001.png",)
    assert geneval2.index_file(rows) == {r.prompt: f"0000{r.index}.png" for r in rows}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "has 2 prompts instead of 800"),
        ({"skills": ["count"]}, "has no questions with skills in line 1"),
        ({"vqa_list": [], "skills": []}, "has no questions in line 1"),
        ({"vqa_list": [["How many?"]], "skills": ["count"]}, "has no questions with skills"),
    ],
)
def test_another_file_is_one_line(tmp_path, change, reason):
    write(tmp_path, [LINES[0] | change, LINES[1]])
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        geneval2.read(tmp_path)
    assert "expected geneval2_data.jsonl" in str(error.value)


def test_spellings_of_a_number_and_of_yes():
    four = Question("How many owls are there?", "four", "count")
    assert four.spellings == ("four", "Four", " four", " Four", "4", " 4")
    many = Question("How many owls are there?", "eleven", "count")
    assert many.spellings[4:] == ("other", " other")
    # The answer of other questions is not read.
    assert Question("Are they red?", "No", "attribute").spellings == ("Yes", "yes", " Yes", " yes")


def test_a_score_is_the_sum_over_spellings_and_is_not_cut():
    four = Question("How many?", "four", "count")
    p = {"four": 0.5, "Four": 0.25, " 4": 0.125, "five": 0.125}
    assert geneval2.soft_score(four, p, whole) == 0.875
    # Where all spellings begin with one token, it counts six times.
    assert geneval2.soft_score(four, {"f": 0.5}, lambda spelling: "f") == 3
    assert geneval2.soft_score(four, {}, whole) == 0


def test_qwen_has_the_space_before_a_digit_alone():
    assert [geneval2.qwen_first_token(s) for s in ("four", " four", "4", " 4", "10", " other")] == [
        *("four", " four", "4", " ", "1", " other")
    ]
    four = Question("How many?", "four", "count")
    found = geneval2.soft_score(four, {" ": 0.5, "4": 0.25}, geneval2.qwen_first_token)
    assert found == 0.75


@pytest.mark.parametrize(
    ("token", "expected"), [("Yes", 1), ("YES", 1), (" yes", 1), ("yes.", 0), ("No", 0)]
)
def test_tifa_is_the_likeliest_token_in_lower_case(token, expected):
    assert geneval2.hard_score(Question("Is it?", "Yes", "object"), token) == expected


def test_means_over_a_prompt():
    scores = geneval2.score(row("a", "b"), said(0.9, 0.4), whole, ("a", "b"))
    assert scores["am"].value == pytest.approx(0.65)
    assert scores["gm"].value == pytest.approx(0.6)
    assert scores["tifa"].value == 0.5
    assert scores["skills"].total.tolist() == [0.9, 0.4]


def test_one_zero_makes_the_geometric_mean_zero():
    scores = geneval2.score(row("a", "b"), said(0.9, 0.0), whole, ("a", "b"))
    assert scores["gm"].value == 0


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=8))
def test_the_geometric_mean_is_at_most_the_arithmetic_one(numbers):
    product = math.prod(numbers) ** (1 / len(numbers))
    assert geneval2.geometric_mean(numbers) == pytest.approx(product)
    assert product <= sum(numbers) / len(numbers) + 1e-12


def test_a_missing_image_or_answer_counts_0():
    rows = [row("a", "a"), row("a")]
    scores = [
        geneval2.score(rows[0], None, whole, ("a",)),
        geneval2.score(rows[1], [None], whole, ("a",)),
    ]
    found = geneval2.summary(rows, scores)
    assert found["am"] == found["gm"] == found["tifa"] == found["skill/a"] == 0


def test_wrong_answers_are_counted_by_skill():
    scores = geneval2.score(row("a", "b", "b"), [*said(0.9, 0.4), None], whole, ("a", "b"))
    assert scores["failures/a"].total == 0
    assert (scores["failures/b"].total, scores["failures/b"].count) == (1, 1)


def test_answers_are_one_for_each_question():
    with pytest.raises(UserError, match="has 2 questions, not 1 answers"):
        geneval2.score(row("a", "b"), said(1.0), whole, ("a", "b"))


def test_a_skill_is_the_mean_over_questions_and_atoms_are_means_of_gm():
    rows = [row("a", "a", "b", atoms=3), row("a", atoms=10)]
    names = geneval2.skills(rows)
    assert names == ("a", "b")
    scores = [
        geneval2.score(rows[0], said(0.25, 0.5, 0.125), whole, names),
        geneval2.score(rows[1], said(0.75), whole, names),
    ]
    found = geneval2.summary(rows, scores)
    assert found["skill/a"] == pytest.approx(50)
    assert found["skill/b"] == pytest.approx(12.5)
    assert found["gm/atoms_3"] == pytest.approx(25)
    assert found["gm/atoms_10"] == pytest.approx(75)
    assert found["gm"] == pytest.approx(50)
    assert found["am"] == pytest.approx(100 * (0.875 / 3 + 0.75) / 2)
    assert list(found).index("gm/atoms_3") < list(found).index("gm/atoms_10")
