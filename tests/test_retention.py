"""Which checkpoints stay beside the newest ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_checkpoint import make_state
from univg_jax import checkpoint
from univg_jax.errors import UserError
from univg_jax.retention import Retention, evaluations
from univg_jax.settings import Train
from univg_jax.workdir import list_steps

STEPS = range(1, 9)


def write(workdir, rows):
    """Rows of steps: a number, None, or the text of an error."""
    file = evaluations(workdir, "geneval")
    file.parent.mkdir(exist_ok=True)
    lines = []
    for step, x in rows.items():
        found = {"error": x} if isinstance(x, str) else {"numbers": {"overall": x}}
        lines.append({"step": step, **found})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def settings(number="overall", **changes):
    """Those of a run that saves every step, and keeps its best."""
    return Train(**dict(save_every=1, keep=2, best=number and f"geneval/{number}") | changes)


def kept(workdir, number="overall", there=STEPS, **changes):
    return sorted(Retention(workdir, settings(number, **changes)).kept(there))


def test_without_a_best_number_the_newest_stay(tmp_path):
    write(tmp_path, {1: 0.9})
    assert kept(tmp_path, None) == [7, 8]
    assert kept(tmp_path, keep=None) == list(STEPS)


def test_every_so_many_th_step_stays(tmp_path):
    assert kept(tmp_path, None, keep_every=3) == [3, 6, 7, 8]


def test_a_step_of_an_interrupted_run_stays_until_the_next_one_and_pushes_none_out(tmp_path):
    regular = dict(number=None, save_every=3, keep=2, steps=20)
    assert kept(tmp_path, there=[3, 6, 7], **regular) == [3, 6, 7]
    assert kept(tmp_path, there=[3, 6, 7, 8], **regular) == [3, 6, 8]
    assert kept(tmp_path, there=[3, 6, 8, 9], **regular) == [6, 9]
    assert kept(tmp_path, there=[15, 18, 20], **regular) == [18, 20]  # the last one is planned


def test_the_best_one_stays(tmp_path):
    write(tmp_path, {step: 1 / step for step in STEPS})
    assert kept(tmp_path) == [1, 7, 8]
    assert kept(tmp_path, keep_best=3) == [1, 2, 3, 7, 8]
    assert kept(tmp_path, "overall:min") == [7, 8]
    assert kept(tmp_path, "overall:min", keep_best=4) == [5, 6, 7, 8]
    write(tmp_path, dict.fromkeys(STEPS, 0.5))
    assert kept(tmp_path) == [1, 7, 8]  # the first of several


def test_what_waits_stays_as_far_as_it_is_taken_next(tmp_path):
    assert kept(tmp_path) == [1, 2, 7, 8]
    write(tmp_path, {1: 0.3, 2: 0.4})
    assert kept(tmp_path) == [2, 3, 4, 7, 8]


def test_failures_and_what_is_no_number_are_neither_best_nor_waited_for(tmp_path):
    rows = {1: "no server", 2: None, 3: float("nan"), 4: float("inf"), 5: 0.1, 6: 0.2}
    write(tmp_path, rows)
    assert kept(tmp_path) == [6, 7, 8]
    # What a killed follower left of a row is none, and what was removed is not the best.
    write(tmp_path, {0: 0.9, **{step: step for step in range(1, 7)}})
    with evaluations(tmp_path, "geneval").open("a") as file:
        file.write('{"step": 1, "numb')
    assert kept(tmp_path) == [6, 7, 8]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"step": 1, "numbers": None}, "its numbers are None"),
        ({"step": 1, "numbers": [0.5]}, "its numbers are [0.5]"),
        ({"step": 1, "numbers": {"overall": "0.5"}}, "its 'overall' is '0.5'"),
        ({"step": 1, "numbers": {}, "settings": None}, "its settings are None"),
        ({"step": 1, "error": None}, "it has neither numbers nor an error"),
    ],
)
def test_a_row_that_cannot_be_is_named_and_its_step_waits(tmp_path, caplog, row, reason):
    write(tmp_path, {2: 0.3, 3: 0.2, 4: 0.1, 5: 0.2, 6: 0.1})
    file = evaluations(tmp_path, "geneval")
    file.write_text(json.dumps(row) + "\n" + file.read_text())
    assert kept(tmp_path) == [1, 2, 7, 8]
    assert f"{file}: line 1 is left out: {reason} (" in caplog.text


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(), x))
NUMBERS = st.dictionaries(st.sampled_from(["overall", "counting"]), VALUES)
ROWS = st.fixed_dictionaries(
    {}, optional={"step": st.integers(1, 8) | VALUES, "numbers": NUMBERS | VALUES, "error": VALUES}
)


@given(rows=st.lists(ROWS | VALUES, max_size=6))
def test_whatever_the_rows_are_the_newest_stay_and_nothing_fails(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    file = evaluations(folder, "geneval")
    file.parent.mkdir()
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert {7, 8} <= set(kept(folder)) <= set(STEPS)


def test_a_number_that_no_row_has_is_named_once(tmp_path, caplog):
    write(tmp_path, {1: 0.3})
    retention = Retention(tmp_path, settings("overal"))
    for _ in range(2):
        assert 8 in retention.kept(STEPS)
    assert caplog.text.count("has no number 'overal'; did you mean 'overall'?") == 1


def test_a_run_removes_the_rest_when_it_saves(tmp_path):
    state = make_state()
    with checkpoint.Checkpointer(tmp_path, settings(keep=1)) as checkpointer:

        def steps_after(step):
            checkpointer.save(step, state, {}, {})
            checkpointer.wait()
            return list_steps(tmp_path)

        assert [steps_after(step) for step in (1, 2, 3)] == [(1,), (1, 2), (1, 3)]
        write(tmp_path, {1: 0.5, 3: 0.7})
        assert steps_after(4) == (3, 4)
        write(tmp_path, {1: 0.5, 3: 0.7, 4: 0.6})
        assert [steps_after(step) for step in (5, 6, 7)] == [(3, 5), (3, 5, 6), (3, 5, 7)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("geneval/overall", ("geneval", "overall", False)),
        ("emoji_scenes/depth/abs_rel:min", ("emoji_scenes", "depth/abs_rel", True)),
        ("coco30k/fid:max", ("coco30k", "fid", False)),
        (None, None),
    ],
)
def test_how_the_number_is_named(text, found):
    assert Train(best=text).best_number == found


@pytest.mark.parametrize("text", ["", "geneval", "geneval/", "/overall"])
def test_what_names_no_number(text):
    with pytest.raises(UserError, match=r"train\.best=.*: expected BENCHMARK/NUMBER"):
        Train(best=text).check("train")
