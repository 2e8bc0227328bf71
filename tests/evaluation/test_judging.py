"""Prompts that are read and never run, and outcomes that are counted."""

import hashlib

import pytest

from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import judging
from univg_jax.evaluation.inputs import InputFile

PYTHON = InputFile("prompts.py", "the prompts of a test")
JSON = InputFile("prompts.json", "the prompts of a test")
SOURCE = r'''
import package_that_is_not_there
open("was_run", "w")
_rule = """RULES:
from \d to 10"""
first = second = "one " "text"
number = 3
made = "a" + "b"
def f():
    hidden = "inside"
'''


def test_texts_of_a_python_file_are_read_and_it_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.py").write_text(SOURCE)
    prompts = judging.read_python_prompts(PYTHON, tmp_path)
    assert prompts.texts == {
        "_rule": "RULES:\nfrom \\d to 10",
        "first": "one text",
        "second": "one text",
    }
    assert prompts.sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert not (tmp_path / "was_run").exists()
    with pytest.raises(UserError, match=r"prompts.py has no prompt 'frist'; did you mean 'first'"):
        prompts["frist"]


@pytest.mark.parametrize("text", ["x = (", "a\0b", "(" * 10_000])
def test_what_is_no_python_is_one_line(tmp_path, text):
    (tmp_path / "prompts.py").write_text(text)
    with pytest.raises(UserError, match=r"is not Python .* expected prompts.py, the prompts of"):
        judging.read_python_prompts(PYTHON, tmp_path)


def test_prompts_that_are_not_there_are_one_line(tmp_path):
    with pytest.raises(NotFoundError, match=r"expected prompts.py, the prompts of a test"):
        judging.read_python_prompts(PYTHON, tmp_path)


@pytest.mark.parametrize("text", ["[1]", '{"add": 3}', '{"add": '])
def test_prompts_in_json_are_an_object_of_texts(tmp_path, text):
    (tmp_path / "prompts.json").write_text(text)
    with pytest.raises(UserError, match=r"expected prompts.json, the prompts of a test"):
        judging.read_json_prompts(JSON, tmp_path)


@pytest.mark.parametrize(("dropped", "warns"), [(0, False), (2, False), (3, True)])
def test_more_than_one_percent_without_a_score_is_a_warning(dropped, warns, caplog):
    outcomes = ["refused"] * dropped + ["judged"] * (200 - dropped)
    scores = [judging.outcome_columns(outcome) for outcome in outcomes]
    counts = judging.outcome_counts(scores, what="a test")
    assert list(counts) == ["judged", *(f"failures/{name}" for name in judging.FAILURES)]
    assert counts["judged"] == 200 - dropped
    assert counts["failures/refused"] == dropped
    assert sum(counts.values()) == 200
    assert bool(caplog.records) == warns
    if warns:
        assert "3 of 200 judgments have no score (refused 3)" in caplog.text


@pytest.mark.parametrize("name", ["", "/a.png", "../a.png", "a/../../b.png"])
def test_a_name_stays_in_its_folder(name):
    assert not judging.is_inside(name)
    assert judging.is_inside("a/b.png")
