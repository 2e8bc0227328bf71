"""DPG-Bench's rules, one by one, and the traps of its official code."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.benchmarks.official import FILES, needs_files
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import dpg, dsg
from univg_jax.evaluation.benchmarks.dsg import Question
from univg_jax.evaluation.job import join

HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
)


def line(item: str, number: int, dependency: str, kind: str = "entity - whole") -> str:
    return f'{item},text of {item},k,{number},"{dependency}",a,b,{kind} (x),Question {number}?\n'


TABLE = (
    f"{HEAD}\n"
    + line("partiprompts97", 1, "0")
    + line("partiprompts97", 2, "0", "attribute - color")
    + line("0", 1, "0", "global")
    + line("0", 2, "1", "attribute - size")
)


def write(folder, text=TABLE):
    (folder / "dpg_bench.csv").write_text(text)
    return folder


def rows_of(tmp_path, text=TABLE):
    return {r.item_id: r for r in dpg.read(write(tmp_path, text), excerpt=True)}


def item(*parents: tuple[int, ...], kinds=None) -> dpg.Row:
    """An item with the parents of each question, all of which the official code knows."""
    kinds = kinds or ["entity - whole"] * len(parents)
    asked = [
        Question(number, named, "?", f"{kind} (x)")
        for number, (named, kind) in enumerate(zip(parents, kinds, strict=True), 1)
    ]
    return dpg.Row(0, "0", "", tuple(asked), tuple(q.number for q in asked))


def answers(*right: bool) -> dict[int, str]:
    return {number: "yes" if r else "no" for number, r in enumerate(right, 1)}


def score(row: dpg.Row, *cells, names=None):
    names = dpg.categories([row]) if names is None else names
    return dpg.score(row, cells or None, names=names)


def test_reads_items_in_the_order_of_their_ids(tmp_path):
    rows = dpg.read(write(tmp_path), excerpt=True)
    assert [(r.index, r.item_id) for r in rows] == [(0, "0"), (1, "partiprompts97")]
    assert rows[0].prompt == "text of 0"
    assert [q.parents for q in rows[0].questions] == [(), (1,)]
    assert dpg.image_files(rows[1]) == ("partiprompts97.png",)
    assert dpg.categories(rows) == (
        *("attribute - color", "attribute - size"),
        *("entity - whole", "global"),
    )


def test_prompts_are_those_of_the_folder_beside_the_table(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "0.txt").write_text("a long prompt\n")
    with pytest.raises(UserError, match="the prompt of DPG-Bench's item partiprompts97"):
        dpg.read(write(tmp_path), excerpt=True)
    (tmp_path / "prompts" / "partiprompts97.txt").write_text("another")
    assert [r.prompt for r in dpg.read(tmp_path, excerpt=True)] == ["a long prompt", "another"]
    rows = dpg.read_prompts(tmp_path / "prompts", excerpt=True)
    assert [(r.item_id, r.prompt) for r in rows] == [
        ("0", "a long prompt"),
        ("partiprompts97", "another"),
    ]
    with pytest.raises(UserError, match="2 texts instead of 1065"):
        dpg.read_prompts(tmp_path / "prompts")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TABLE, "has 2 items instead of 1065"),
        (TABLE[:-30], "is torn"),
        (TABLE + line("1", 1, "0, left"), "has a dependency that is no number in row 5"),
        (TABLE.replace(",k,2,", ",k,two,"), "has no question's number in row 2"),
    ],
)
def test_another_file_is_one_line(tmp_path, text, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        dpg.read(write(tmp_path, text))
    assert "expected dpg_bench.csv" in str(error.value)


def test_the_official_code_leaves_out_the_first_row(tmp_path):
    first = rows_of(tmp_path)["partiprompts97"]
    assert first.known == (2,)
    found = score(first, answers(False, True))
    assert found["official"].value == 1
    assert found["fixed"].value == 0.5


def test_an_item_whose_parent_was_left_out_is_dropped(tmp_path):
    text = TABLE.replace(',k,2,"0",a,b,attribute - color', ',k,2,"1",a,b,attribute - color')
    first = rows_of(tmp_path, text)["partiprompts97"]
    found = score(first, answers(True, True))
    assert found["official"].count.sum() == 0
    assert found["official_categories"].count.sum() == 0
    assert found["fixed"].value == found["strict"].value == 1


def test_a_parent_that_does_not_exist_is_only_met_after_those_that_hold():
    """The official code stops at the first parent that failed, and so may never miss the other."""
    row = item((), (1, 9))
    assert score(row, answers(False, True))["official"].value == 0
    assert score(row, answers(True, True))["official"].count.sum() == 0
    assert score(row, answers(True, True))["fixed"].value == 1


def test_an_item_that_comes_twice_has_its_last_questions(tmp_path):
    text = TABLE + line("partiprompts97", 3, "0")
    rows = rows_of(tmp_path, text)
    assert rows["partiprompts97"].known == (3,)
    assert [q.number for q in rows["partiprompts97"].questions] == [1, 2, 3]
    assert rows["0"].known == (1, 2)


def test_a_failure_runs_down_the_chain():
    """In DSG question 3 would keep its point, because the answer to question 2 is yes."""
    chain = item((), (1,), (2,))
    found = score(chain, answers(False, True, True))
    assert found["official"].value == found["fixed"].value == 0
    one_step = dsg.score(dsg.Row(0, "vrd_0", "", chain.questions), ["no", "yes", "yes"])
    assert one_step["official"].value == pytest.approx(1 / 3)


def test_a_child_before_its_parent_sees_the_parent_s_own_answer():
    row = item((2,), (3,), ())
    # Question 1 is asked before question 2 falls.
    assert score(row, answers(True, True, False))["official"].value == pytest.approx(1 / 3)


@pytest.mark.parametrize("answer", ["Yes", "yes ", "no", "", None])
def test_only_yes_itself_is_right(answer):
    assert score(item(()), {1: answer})["official"].value == 0


def test_an_item_is_the_mean_over_its_cells():
    row = item((), ())
    found = score(row, answers(True, True), answers(False, True), answers(False, False))
    assert found["official"].value == pytest.approx(0.5)
    assert found["official"].count.sum() == 1


def test_categories_are_answers_of_the_last_cell_or_of_all():
    row = item((), (1,), kinds=["entity - whole", "attribute - color"])
    names = ("attribute - color", "entity - part", "entity - whole")
    found = score(row, answers(True, True), answers(False, True), names=names)
    # The rule of parents does not apply.
    assert found["official_categories"].total.tolist() == [1, 0, 0]
    assert found["official_categories"].count.tolist() == [1, 0, 1]
    assert found["fixed_categories"].total.tolist() == [2, 0, 1]
    assert found["fixed_categories"].count.tolist() == [2, 0, 2]


def test_a_missing_grid_is_dropped_and_scores_0_if_strict():
    row = item((), ())
    rows = [row, dataclasses.replace(row, item_id="1")]
    scores = [score(row, answers(True, True)), score(row)]
    found = dpg.summary(rows, scores)
    assert found["official/overall"] == found["fixed/overall"] == 100
    assert found["strict/overall"] == 50
    assert found["dropped"] == 1


def test_unusable_answers_are_wrong():
    row = item((), ())
    scores = [score(row, {1: "yes", 2: None}, {1: "yes"})]
    found = dpg.summary([row], scores)
    assert found["official/overall"] == 50
    assert scores[0]["failures/entity"].count == 2


def test_the_summary_by_hand():
    rows = [
        item((), (), kinds=["entity - whole", "entity - part"]),
        item((), (), kinds=["entity - whole", "global"]),
    ]
    names = dpg.categories(rows)
    scores = [
        score(rows[0], answers(True, False), names=names),
        score(rows[1], answers(False, True), names=names),
    ]
    found = dpg.summary(rows, scores)
    assert found["official/overall"] == 50
    assert found["official/L2/entity - whole"] == 50
    assert found["official/L2/entity - part"] == 0
    assert found["official/L1/entity"] == pytest.approx(100 / 3)
    assert found["official/L1/global"] == found["official/L2/global"] == 100
    assert math.isclose(found["fixed/L1/entity"], found["official/L1/entity"])


def test_cells_are_cut_row_by_row_and_a_wrong_size_is_refused():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((4, 3, 3, 3), np.uint8)
    sheet = join(list(images))
    assert sheet.shape == (6, 6, 3)
    assert (sheet[0, 0, 0], sheet[0, 5, 0], sheet[5, 0, 0], sheet[5, 5, 0]) == (0, 1, 2, 3)
    np.testing.assert_array_equal(dpg.cells(sheet), images)
    np.testing.assert_array_equal(dpg.cells(sheet, resolution=3), images)
    with pytest.raises(UserError, match="6 x 6 pixels, expected 2 x 2 images of 4 x 4"):
        dpg.cells(sheet, resolution=4)
    with pytest.raises(UserError, match="6 x 5 pixels"):
        dpg.cells(sheet[:5])


@st.composite
def graphs(draw):
    """Items whose questions hang on earlier ones only."""
    count = draw(st.integers(1, 7))
    parents = [
        tuple(draw(st.lists(st.integers(1, n), max_size=3, unique=True))) if n else ()
        for n in range(count)
    ]
    right = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return parents, right


@given(graphs())
def test_in_order_a_question_holds_if_all_its_ancestors_do(graph):
    parents, right = graph
    row = item(*parents)

    def holds(number: int) -> bool:
        parents = row.questions[number - 1].parents
        return right[number - 1] and all(holds(parent) for parent in parents)

    expected = sum(holds(q.number) for q in row.questions) / len(right)
    found = score(row, answers(*right))
    assert found["official"].value == pytest.approx(expected, abs=1e-12)
    assert found["fixed"].value == found["official"].value
    said = ["yes" if r else "no" for r in right]
    one_step = dsg.score(dsg.Row(0, "vrd_0", "", row.questions), said)["official"].value
    assert found["official"].value <= one_step + 1e-12


@given(st.lists(graphs(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_summary_does_not_depend_on_the_order_of_rows(items, random):
    rows = [(item(*parents), right) for parents, right in items]
    pairs = [(row, score(row, answers(*right))) for row, right in rows]
    whole = dpg.summary(*map(list, zip(*pairs, strict=True)))
    random.shuffle(pairs)
    turned = dpg.summary(*map(list, zip(*pairs, strict=True)))
    assert whole == turned


@needs_files
def test_the_official_prompts(tmp_path):
    for row in (FILES / "dpg" / "dpg_prompts.jsonl").read_text().splitlines():
        row = json.loads(row)
        (tmp_path / f"{row['item_id']}.txt").write_text(row["text"])
    rows = dpg.read_prompts(tmp_path)
    assert len(rows) == 1065
    assert {"0", "partiprompts97"} <= {r.item_id for r in rows}
    assert all(r.prompt for r in rows)
