"""DSG's rules, one by one, and the counts of its official file."""

import collections
import csv
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.benchmarks.official import FILES, needs_files
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import dsg
from univg_jax.evaluation.benchmarks.dsg import Question, Row

HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
)
TABLE = f"""{HEAD}
whoops_5,"A cube, purple",cube,1,0,entity,whole,entity - whole (cube),Is there a cube?
whoops_5,"A cube, purple","cube, purple",2,1,attribute,color,"attribute - color (cube, red)",Red?
vrd_3,a cat on a mat,cat,1,0,entity,whole,entity - whole (cat),Is there a cat?
vrd_3,a cat on a mat,mat,2,0,entity,whole,entity - whole (mat),Is there a mat?
vrd_3,a cat on a mat,on,3,"1, 2",relation,spatial,"relation - spatial (cat, mat, on)",Is it on it?
"""


def write(folder, text=TABLE):
    (folder / "dsg-1k-anns.csv").write_text(text)
    return folder


def row(*parents: tuple[int, ...], first: int = 1, odd: bool = False, item="vrd_0") -> Row:
    """An item with the parents of each of its questions, which are numbered from `first`."""
    asked = [
        Question(number, named, "?", "entity - whole (x)", names_no_number=odd and number == first)
        for number, named in enumerate(parents, first)
    ]
    return Row(0, item, "", tuple(asked))


def value(row: Row, answers, name="official") -> float:
    return dsg.score(row, answers)[name].value


def test_reads_prompts_with_their_questions(tmp_path):
    rows = dsg.read(write(tmp_path), excerpt=True)
    assert [(r.index, r.item_id, r.prompt) for r in rows] == [
        (0, "whoops_5", "A cube, purple"),
        (1, "vrd_3", "a cat on a mat"),
    ]
    assert [q.parents for q in rows[1].questions] == [(), (), (1, 2)]
    assert rows[0].questions[1].text == "Red?"
    assert rows[0].questions[1].proposition == "attribute - color (cube, red)"
    assert dsg.image_files(rows[0]) == ("whoops_5.png",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TABLE, "has 2 prompts instead of 1060"),
        (TABLE[:-60], "is torn at row 5"),
        (HEAD.replace("tuple", "triple") + "\n", "has no column 'tuple'"),
        (TABLE.replace("cat,1,0", "cat,one,0"), "has no question's number in row 3"),
        (TABLE.replace("mat,2,0", "mat,1,0"), "has a question of vrd_3 twice"),
        (TABLE + 'vrd_4,"a', "is torn at line"),
        ("", "has no column 'item_id'"),
    ],
)
def test_another_file_is_one_line(tmp_path, text, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        dsg.read(write(tmp_path, text))
    assert "expected dsg-1k-anns.csv" in str(error.value)


def test_images_may_have_the_name_that_the_official_code_loads(tmp_path):
    rows = [Row(k, item, "", ()) for k, item in enumerate(("vrd_1", "vrd_12", "tifa160_3", "x"))]
    names = ["vrd_1_muse.jpg", "vrd_12.png", "x.png", "notes.txt"]
    for name in names:
        (tmp_path / name).touch()
    assert dsg.found(rows, tmp_path) == [[names[0]], [names[1]], [], [names[2]]]
    (tmp_path / "vrd_1_imagen.jpg").touch()
    with pytest.raises(UserError, match=r"two images of vrd_1, vrd_1_imagen\.jpg and vrd_1_muse"):
        dsg.found(rows, tmp_path)


@pytest.mark.parametrize("answer", ["Yes", "yes ", "yes.", "no", "", None])
def test_only_yes_itself_is_right(answer):
    assert value(row((), ()), ["yes", answer]) == 0.5


def test_a_question_without_its_parent_is_wrong():
    assert value(row((), (1,)), ["no", "yes"]) == 0
    assert value(row((), (1,)), ["no", "yes"], "without_parents") == 0.5
    assert value(row((), (), (1, 2)), ["yes", "no", "yes"]) == pytest.approx(1 / 3)


def test_the_rule_goes_one_step():
    """Question 2 falls with question 1; question 3 looks at the answer to question 2 itself."""
    assert value(row((), (1,), (2,)), ["no", "yes", "yes"]) == pytest.approx(1 / 3)


def test_a_parent_may_come_later_and_may_be_the_question_itself():
    assert value(row((2,), ()), ["yes", "no"]) == 0
    assert value(row((1,), ()), ["yes", "yes"]) == 1


def test_a_parent_that_is_no_number_frees_the_item_of_all_parents(tmp_path):
    text = TABLE.replace('"1, 2"', '"1, outside"')
    odd = dsg.read(write(tmp_path, text), excerpt=True)[1]
    assert odd.questions[2].parents == (1,)
    assert value(odd, ["no", "yes", "yes"]) == pytest.approx(2 / 3)
    assert value(odd, ["no", "yes", "yes"], "fixed") == pytest.approx(1 / 3)


def test_an_item_with_a_parent_that_does_not_exist_scores_nothing():
    """tifa160_134 is one: the official summary counts it as 0 whatever its image shows."""
    cut = row((1,), (1,), first=2)
    assert value(cut, ["yes", "yes"]) == 0
    assert value(cut, ["yes", "no"], "fixed") == 0.5


def test_an_image_that_is_not_there_scores_nothing():
    scores = dsg.score(row((), ()), None)
    assert scores["official"].value == scores["fixed"].value == 0
    assert scores["failures/entity"].count == 0


def test_wrong_answers_are_counted_by_the_group_of_their_question():
    """What cannot be used is no answer; parents play no part."""
    kinds = ("entity - whole", "attribute - color", "attribute - size", "global", "mood")
    asked = [Question(k, (1,), "?", f"{kind} (x)") for k, kind in enumerate(kinds, 1)]
    scores = dsg.score(Row(0, "vrd_0", "", tuple(asked)), ["no", "yes", "no", None, "no"])
    wrong = {name: float(r.total[0]) for name, r in scores.items() if name.startswith("failures/")}
    assert wrong == {
        **{"failures/entity": 1, "failures/attribute": 1, "failures/relation": 0},
        **{"failures/global": 0, "failures/other": 1},
    }


def test_answers_are_one_for_each_question():
    with pytest.raises(UserError, match="has 2 questions, not 1"):
        dsg.score(row((), ()), ["yes"])


def test_the_mean_is_over_prompts_and_by_category():
    rows = [row((), item="vrd_0"), row((), (), (), item="vrd_1"), row((), item="drawtext_7")]
    scores = [
        dsg.score(rows[0], ["yes"]),
        dsg.score(rows[1], ["no", "no", "yes"]),
        dsg.score(rows[2], ["no"]),
    ]
    found = dsg.summary(rows, scores)
    assert found["official/overall"] == pytest.approx(100 * (1 + 1 / 3) / 3)
    assert found["official/relation"] == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert found["official/text"] == 0
    assert found["fixed/overall"] == found["official/overall"]


@st.composite
def items(draw):
    count = draw(st.integers(1, 7))
    parents = [
        tuple(draw(st.lists(st.integers(1, count), max_size=3, unique=True))) for _ in range(count)
    ]
    return parents, draw(st.lists(st.booleans(), min_size=count, max_size=count))


@given(items())
def test_the_score_by_its_definition(item):
    parents, right = item
    asked = row(*parents)
    expected = 0
    for question in asked.questions:
        good = right[question.number - 1]
        for parent in question.parents:
            good = good and right[parent - 1]
        expected += good
    answers = ["yes" if r else "no" for r in right]
    assert value(asked, answers) == pytest.approx(expected / len(right), abs=1e-12)
    assert value(asked, answers, "fixed") == value(asked, answers)


@needs_files
def test_the_official_file():
    rows = dsg.read(FILES / "dsg")
    assert len(rows) == 1060
    assert sum(len(r.questions) for r in rows) == 8182
    assert collections.Counter(r.category for r in rows) == {
        **{"tifa": 160, "paragraph": 200, "relation": 100, "count": 100},
        **{"real_user": 200, "pose": 100, "defying": 100, "text": 100},
    }
    odd = [r.item_id for r in rows if any(q.names_no_number for q in r.questions)]
    assert len(odd) == 8
    cut = [
        r.item_id for r in rows if dsg.score(r, ["yes"] * len(r.questions))["official"].value < 1
    ]
    assert cut == ["tifa160_134"]
    with open(FILES / "dsg" / "dsg-1k-anns.csv", newline="") as file:
        texts = [line["question_natural_language"] for line in csv.DictReader(file)]
    assert [q.text for r in rows for q in r.questions] == texts
