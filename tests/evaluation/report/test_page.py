"""The page of any evaluations: all numbers beside others', pictures, and what repeats them."""

import dataclasses
import json
import re

import numpy as np
import pytest

from tests.evaluation.test_run import run
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import results
from univg_jax.evaluation.report import album, find, write_page
from univg_jax.evaluation.scorecard import Scorecard
from univg_jax.images import write_png

HOSTILE = '<script>alert("1")</script>'
NUMBERS = {
    "missing": 0.0,
    "overall": 0.5,
    **{"strict/overall": 0.25, "strict/colors": None, "lone/number": 7.0},
    **{"failures/color": 3.0, "failures/missing": 30.0, "failures/position": 0.0},
}


def write_card(out, *, numbers=None, side=8, date="2026-01-01", provenance=None, **settings):
    """Writes a result with its pictures below `out`; returns its folder."""
    prompts = ["a cow", HOSTILE, "two cups"]
    cases = [
        {"index": k, "task": "t2i", "prompt": prompt, "files": [f"{k}.png"], "quality": 0.5 * k}
        for k, prompt in enumerate(prompts)
    ]
    card = Scorecard(
        benchmark="toy",
        settings={
            **{"step": 3, "steps": 10, "guidance": {"t2i": {"text": 2.5}}, "weights": "ab" * 8},
            **settings,
        },
        provenance={
            "checkpoint": "runs/a",
            "revision": "abc123",
            "date": date,
            **(provenance or {}),
        },
        rows=3,
        primary="overall",
        numbers=NUMBERS | (numbers or {}),
        published=[
            {"system": "Other", "metric": "overall", "value": 0.74, "source": f"table 1 {HOSTILE}"}
        ],
        cases={"first": cases, "best": cases[2:], "worst": cases[:1]},
    )
    folder = card.folder(out)
    images = out / f"images-{folder.name}"
    dataclasses.replace(card, images=f"../{images.name}").write(folder)
    for k in range(len(prompts)):
        rng = np.random.default_rng(k)
        write_png(images / f"{k}.png", rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    return folder


def page_of(tmp_path, *evaluations):
    write_page(tmp_path / "page.html", evaluations or [tmp_path])
    return (tmp_path / "page.html").read_text()


def text_of(html):
    """What is read: the texts of elements, separated by bars."""
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return "|".join(filter(None, (t.strip() for t in re.split(r"<[^>]*>", html))))


def test_the_page_is_self_contained_and_escaped(tmp_path):
    write_card(tmp_path)
    page = page_of(tmp_path)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert not re.findall(r"(?:@import|<script|<link)", page)
    assert page.count("&lt;script&gt;") >= 3  # the prompt, its picture, the source
    assert "prefers-color-scheme: dark" in page
    assert all(re.search(r'scope="(col|row)"', head) for head in re.findall(r"<th[ >][^>]*", page))


def test_numbers_stand_beside_those_of_others_with_their_source(tmp_path):
    write_card(tmp_path)
    text = text_of(page_of(tmp_path))
    assert "toy: overall 0.5000" in text
    assert "this|Other|overall|0.5000|0.7400|missing|0|lone/number|7" in text  # the primary first
    assert "strict|this|overall|0.2500|colors|-" in text  # a table of all that begin alike
    assert "Other: table 1 &lt;script" in text


def test_failures_are_told_by_kind_the_most_frequent_first(tmp_path):
    write_card(tmp_path)
    text = text_of(page_of(tmp_path))
    assert "Failures by kind|count|missing|30|color|3|position|0" in text
    assert "failures/" not in text


def test_what_repeats_the_result_stands_at_the_end(tmp_path):
    folder = write_card(tmp_path, scorers={"detect": "cd" * 8}, version=4)
    page = page_of(tmp_path)
    end = text_of(page[page.index("To repeat it") :])
    for name, value in {
        **{"checkpoint": "runs/a", "code revision": "abc123", "step": "3", "steps": "10"},
        **{"guidance.t2i.text": "2.5", "weights": "ab" * 8, "scorers.detect": "cd" * 8},
        **{"version": "4", "folder": folder.name},
    }.items():
        assert f"|{name}|{value}|" in f"{end}|"


def test_several_settings_are_side_by_side_in_one_row_for_each_prompt(tmp_path):
    folders = [
        write_card(tmp_path, steps=steps, numbers={"overall": 0.1 * steps}) for steps in (2, 1)
    ]
    page = page_of(tmp_path, *folders)
    text = text_of(page)
    assert "toy: overall 0.1000 to 0.2000" in text
    assert "steps 2|steps 1|Other|overall|0.2000|0.1000|0.7400" in text  # in the order given
    assert "steps 2|steps 1|t2i 0|a cow|" in text  # captions of two pictures, and their prompt
    assert "The best and the worst of steps 2|Best|t2i 2|two cups|1" in text
    assert "|steps|2|1|" in text[text.index("To repeat it") :]
    assert "|step|3|" in text[text.index("To repeat it") :]  # alike: once
    assert text_of(page_of(tmp_path)).index("steps 1|steps 2|Other") > 0  # of a folder: in order


def test_checkpoints_are_named_where_settings_are_alike(tmp_path):
    for name in "ab":
        write_card(tmp_path, weights=name * 16, provenance={"checkpoint": f"runs/{name}"})
    assert "runs/a|runs/b|Other" in text_of(page_of(tmp_path))


def test_a_sweep_is_plotted_with_a_line_for_each_value_of_the_second_setting(tmp_path):
    for guidance in (1.0, 3.0, 5.0):
        for steps in (10, 25):
            write_card(
                tmp_path,
                steps=steps,
                guidance={task: {"text": guidance} for task in ("t2i", "ie")},
                numbers={"overall": guidance / steps},
            )
    page = page_of(tmp_path)
    text = text_of(page)
    assert page.count('<svg role="img" aria-label="overall over guidance"') == 1
    assert "steps 10|steps 25|guidance|steps 10|steps 25|1|0.1000|0.0400|3|0.3000|0.1200" in text
    assert "steps 10, guidance 1|steps 10, guidance 3" in text  # once, though of two tasks


def test_settings_that_change_with_the_first_make_no_lines(tmp_path):
    for step in (100, 200):
        write_card(tmp_path, step=step, weights=f"{step:016x}", seed=step // 100)
    text = text_of(page_of(tmp_path))
    assert "overall over step" in text
    assert "step|overall|100|0.5000|200|0.5000" in text


def test_a_followed_run_is_plotted_over_its_steps(tmp_path):
    folder = tmp_path / "run" / "evaluations"
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "numbers": {"other": 1, "overall": step / 1000, "missing": None}}
        for step in (100, 200)
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "toy.jsonl").write_text(f'{text}{{"step": 3')
    alone = text_of(page_of(tmp_path, tmp_path / "run"))
    assert "other over step" in alone  # the first number, where none is said to be that
    write_card(tmp_path / "out", step=100)
    write_card(tmp_path / "out", step=200)
    beside = page_of(tmp_path, tmp_path / "run", tmp_path / "out")
    assert "overall over step" in text_of(beside)
    assert "step|overall|100|0.1000|200|0.2000" in text_of(beside)
    assert beside.count("<svg") == 1
    for steps in (20, 30, 40):
        write_card(tmp_path / "out", steps=steps)
    assert page_of(tmp_path, tmp_path / "run", tmp_path / "out").count("<svg") == 2


def test_both_kinds_of_results_are_shown_and_only_its_own_kind_is_found(tmp_path):
    run(tmp_path)
    (embedded,) = (file.parent for file in tmp_path.glob("*/results.json"))
    public = write_card(tmp_path)
    text = text_of(page_of(tmp_path))
    assert "2 benchmarks" in text
    assert "untrained|strongest trivial|real" in text
    assert "untrained, strongest trivial, real: the same evaluation" in text
    assert text.count("input|target|output") == 4 * 3  # a third of twelve of each of three tasks
    folder, _, others = results.find(tmp_path)
    assert (folder, others) == (embedded, [])
    with pytest.raises(UserError, match="is of a public benchmark: `univg report` without"):
        results.find(public)


def test_pictures_that_are_gone_or_torn_are_named_in_their_place(tmp_path):
    folder = write_card(tmp_path)
    images = tmp_path / f"images-{folder.name}"
    (images / "0.png").unlink()
    (images / "1.png").write_bytes(b"no picture")
    text = text_of(page_of(tmp_path))
    assert "missing|t2i 0" in text
    assert "not readable|t2i 1" in text


def test_pictures_are_small_and_bounded(tmp_path, monkeypatch):
    folder = write_card(tmp_path, side=1000)
    picture = tmp_path / f"images-{folder.name}" / "0.png"
    shown = album.Album(10**6).add(picture)
    assert shown.uri.startswith("data:image/jpeg")
    assert len(shown.uri) < 10**5 < picture.stat().st_size
    monkeypatch.setattr("univg_jax.evaluation.report.page.MOST_BYTES", 1)
    text = text_of(page_of(tmp_path))
    assert "4 more pictures would make the page too large" in text


def test_what_is_left_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "MOST", 2)
    folders = [write_card(tmp_path, seed=k, date=f"2026-01-0{k}") for k in (4, 3, 2, 1)]
    (folders[2] / "results.json").write_text("{")
    assert set(write_page(tmp_path / "page.html", [tmp_path])) == {f.name for f in folders[2:]}
    page = (tmp_path / "page.html").read_text()
    assert all(folder.name in page[: page.index("Numbers")] for folder in folders[2:])
    assert "seed 3|seed 4" in text_of(page)
    with pytest.raises(UserError, match="is not JSON"):
        page_of(tmp_path, folders[2])


def test_a_folder_without_results_is_named(tmp_path):
    with pytest.raises(NotFoundError, match=f"{tmp_path} has no evaluation: `univg evaluate`"):
        page_of(tmp_path, tmp_path)
    assert not (tmp_path / "page.html").exists()
