"""MagicBrush's layout and rules: turns by themselves and in chains, and what is missing."""

import json
import math
import re

import numpy as np
import pytest

from tests.evaluation import evaluation_cases as data
from tests.evaluation.benchmarks.picture_scorers import SCORERS, plain
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmarks import magicbrush
from univg_jax.evaluation.benchmarks.magicbrush import BENCHMARK
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.official import Output
from univg_jax.evaluation.score_files import read_images, score_images
from univg_jax.images import write_png

# By session: the color before, and of each target in turn.
SESSIONS = {"30": ("red", "green"), "139": ("red", "green", "blue", "red")}


def write(root):
    """A folder in the official layout, of these sessions."""
    sessions, captions = {}, {}
    for name, colors in SESSIONS.items():
        inputs = [f"{name}-input.png", *(f"{name}-output{k}.png" for k in range(1, len(colors)))]
        for file, color in zip(inputs, colors, strict=True):
            write_png(root / "images" / name / file, plain(color))
        sessions[name] = [
            dict(
                input=inputs[k],
                mask=f"{name}-mask{k + 1}.png",
                output=inputs[k + 1],
                instruction=f"make it {colors[k + 1]}",
            )
            for k in range(len(colors) - 1)
        ]
        captions[name] = {inputs[k]: f"a {colors[k]} thing" for k in range(1, len(colors))}
    (root / "edit_sessions.json").write_text(json.dumps(sessions))
    (root / "local_captions.json").write_text(json.dumps(captions))
    return root


@pytest.fixture
def rows(tmp_path):
    return magicbrush.read(write(tmp_path / "test"), excerpt=True)


def fill(folder, **pictures):
    """Results by the end of their names; `_` stands for both sessions' first turn."""
    for end, color in pictures.items():
        for session in SESSIONS if end == "_1" else ["139"]:
            write_png(folder / session / f"{session}{end}.png", plain(color))
    return folder


ALL = dict(_1="green", _inde_2="blue", _inde_3="red", _iter_2="blue", _iter_3="red")


def found(rows, folder):
    return score_images(BENCHMARK, rows, folder, SCORERS).summary(BENCHMARK, rows)


def test_reads_turns_by_themselves_and_in_chains(rows):
    assert [(r.session, r.turn, r.chained) for r in rows] == [
        ("30", 1, False),
        *(("139", k, False) for k in (1, 2, 3)),
        *(("139", k, True) for k in (2, 3)),
    ]
    assert [name for row in rows for name in magicbrush.image_files(row)] == [
        "30/30_1.png",
        *("139/139_1.png", "139/139_inde_2.png", "139/139_inde_3.png"),
        *("139/139_iter_2.png", "139/139_iter_3.png"),
    ]
    assert rows[2].caption == "a blue thing"
    assert rows[2].target.endswith("139/139-output2.png")
    assert rows[2].last_caption == "a red thing"


def test_a_turn_starts_from_the_truth_or_from_the_result_before(rows):
    requests = BENCHMARK.requests(rows)
    sources = [request.inputs["image"] for request in requests]
    assert sources[2].endswith("images/139/139-output1.png")
    assert sources[4:] == [Output("139/139_1.png"), Output("139/139_iter_2.png")]
    assert [r.task for r in requests] == ["ie"] * 6
    assert requests[5].inputs["prompt"] == "make it red"


def test_right_results_are_perfect(rows, tmp_path):
    values = found(rows, fill(tmp_path, **ALL))
    for kind in ("official", "strict"):
        for setting in ("single", "multi"):
            assert values[f"{kind}/{setting}/clip_t"] == pytest.approx(1)
            assert values[f"{kind}/{setting}/clip_i"] == pytest.approx(1)
            assert values[f"{kind}/{setting}/dino"] == pytest.approx(1)
            assert values[f"{kind}/{setting}/l1"] == values[f"{kind}/{setting}/l2"] == 0
    kinds = ("single_missing", "multi_missing", "multi_replaced")
    assert [values[f"failures/{kind}"] for kind in kinds] == [0, 0, 0]


def test_single_is_over_turns_and_multi_over_sessions(rows, tmp_path):
    """One of four turns is wrong, and one of two chains at its end."""
    fill(tmp_path, **ALL | dict(_inde_2="green", _iter_3="green"))
    values = found(rows, tmp_path)
    assert values["official/single/clip_i"] == pytest.approx(3 / 4)
    assert values["official/multi/clip_t"] == pytest.approx(1 / 2)
    assert values["official/single/l1"] == pytest.approx(400 / 255 / 3 / 4)
    assert values["official/multi/l2"] == pytest.approx(2 * (200 / 255) ** 2 / 3 / 2)


def test_turns_before_the_last_of_a_chain_do_not_count(rows, tmp_path):
    values = found(rows, fill(tmp_path, **ALL | dict(_iter_2="green")))
    assert values["official/multi/clip_i"] == values["strict/multi/clip_i"] == pytest.approx(1)


def test_the_officially_last_turn_is_the_last_that_there_is(rows, tmp_path):
    """139_iter_2.png stands in, and is compared with the last target, which is red."""
    fill(tmp_path, **{k: v for k, v in ALL.items() if k != "_iter_3"} | dict(_iter_2="red"))
    values = found(rows, tmp_path)
    assert values["official/multi/clip_i"] == values["official/multi/clip_t"] == pytest.approx(1)
    assert values["strict/multi/clip_i"] == pytest.approx(1 / 2)
    assert values["strict/multi/l1"] == pytest.approx(1 / 2)  # the worst that there is
    assert (values["failures/multi_missing"], values["failures/multi_replaced"]) == (1, 1)
    assert values["failures/single_missing"] == 0


def test_a_chain_without_any_turn_is_left_out(rows, tmp_path):
    """The first turn's own file never stands in for a longer chain."""
    values = found(rows, fill(tmp_path, _1="green", _inde_2="blue"))
    assert values["official/multi/clip_i"] == pytest.approx(1)  # of session 30
    assert values["strict/multi/clip_i"] == pytest.approx(1 / 2)
    assert (values["failures/multi_missing"], values["failures/multi_replaced"]) == (1, 0)
    assert values["failures/single_missing"] == 1
    assert values["official/single/clip_i"] == pytest.approx(1)
    assert values["strict/single/clip_i"] == pytest.approx(3 / 4)


def test_without_any_picture_there_is_no_number(rows):
    scores = [magicbrush.score(row, [None], SCORERS) for row in rows]
    values = magicbrush.summary(rows, scores)
    assert math.isnan(values["official/multi/l1"])
    assert values["strict/multi/l1"] == 1
    assert values["strict/single/dino"] == 0


def test_what_is_generated_goes_through_the_chain(rows, tmp_path):
    """An answer that halves its source: the third turn of a chain has an eighth of the first."""
    answer = lambda batch, task: batch.source // 2  # noqa: E731
    requests = BENCHMARK.requests(rows)
    assert generate(requests, tmp_path, answer=answer, collator=data.COLLATOR, batch_size=4) == 6
    level = {r.files[0]: read_images(BENCHMARK, r, tmp_path).images[0].max() for r in requests}
    assert level == {
        "30/30_1.png": 100,
        "139/139_1.png": 100,
        "139/139_inde_2.png": 100,
        "139/139_inde_3.png": 100,
        "139/139_iter_2.png": 50,
        "139/139_iter_3.png": 25,
    }
    assert found(rows, tmp_path)["failures/multi_missing"] == 0


def test_rows_in_any_order_have_one_summary(rows, tmp_path):
    fill(tmp_path, **ALL | dict(_iter_3="green", _inde_2="red"))
    scores = score_images(BENCHMARK, rows, tmp_path, SCORERS).rows
    whole = magicbrush.summary(rows, scores)
    order = np.random.default_rng(0).permutation(len(rows))
    assert magicbrush.summary([rows[i] for i in order], [scores[i] for i in order]) == whole


def change(root, name, edit):
    content = json.loads((root / name).read_text())
    edit(content)
    (root / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("edit_sessions.json", lambda v: None, "has 2 sessions instead of 535"),
        ("edit_sessions.json", lambda v: v.update({"../x": []}), "'../x': its name is that of no"),
        ("edit_sessions.json", lambda v: v.update({"5": []}), "'5': it has no turns"),
        (
            "edit_sessions.json",
            lambda v: v["30"][0].pop("instruction"),
            "there is no 'instruction'",
        ),
        (
            "edit_sessions.json",
            lambda v: v["30"][0].update(input="../a.png"),
            "its input '../a.png' is the name of no picture",
        ),
        (
            "local_captions.json",
            lambda v: v["139"].pop("139-output2.png"),
            "'139': local_captions.json has no caption of 139-output2.png",
        ),
        ("local_captions.json", lambda v: v.pop("30"), "has no caption of 30-output1.png"),
    ],
)
def test_another_file_is_one_line(tmp_path, name, edit, reason):
    change(write(tmp_path), name, edit)
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        magicbrush.read(tmp_path)
    assert "\n" not in str(error.value)
    assert "MagicBrush's test split" in str(error.value)


def test_a_file_or_a_target_that_is_missing_is_named(rows, tmp_path):
    with pytest.raises(NotFoundError, match=r"edit_sessions\.json does not exist"):
        magicbrush.read(tmp_path)
    (tmp_path / "test" / "images" / "30" / "30-output1.png").unlink()
    with pytest.raises(NotFoundError, match=r"30-output1\.png does not exist: expected a target"):
        found(rows, fill(tmp_path, **ALL))
