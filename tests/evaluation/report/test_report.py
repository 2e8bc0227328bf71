"""The report: self-contained, honest about what failed, and the same numbers in JSON."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.test_run import run
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.report import TaskResult, write_report, write_sheet
from univg_jax.evaluation.report.wording import explain


@pytest.fixture
def finished(tmp_path):
    run(tmp_path / "evaluation")
    for name, tasks in (("stage1", ("t2i",)), ("stage2", ("t2i", "ie", "seg"))):
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {
                "step": s,
                "loss": 2 / s,
                "steps_per_second": 2.0,
                "images_per_second": 32.0,
                "time": s / 2,
            }
            | {f"loss/{t}": 2 / s for t in tasks}
            for s in range(1, 9)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        share = 1 / len(tasks)
        summary = {
            "stage": name,
            "steps": 8,
            "seconds": 4.0,
            "first_loss": 2.0,
            "last_loss": 0.25,
            "shares": dict.fromkeys(tasks, share),
            "weights": dict.fromkeys(tasks, share),
            "parameters": 5_800_000,
            "config": {"data": {"batch_size": 16}, "note": "<script>alert(1)</script>"},
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def write(folder):
    write_report(
        folder,
        folder / "report.html",
        folder / "report.json",
        stages=[folder / "stage1", folder / "stage2"],
        evaluation=folder / "evaluation",
    )
    return (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())


def test_page_is_self_contained_and_escaped(finished):
    page, _ = write(finished)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert not re.findall(r"(?:@import|<script|<link)", page)
    assert "&lt;script&gt;" in page
    assert page.count("data:image/png") == 3 * 6 * 3  # tasks x samples x (input, target, output)
    assert page.count('<svg role="img"') == 2
    ids = re.findall(r' id="([^"]+)"', page)
    svg_defs = [i for i in ids if i.startswith("p")]  # clip paths of both plots
    assert len(svg_defs) == len(set(svg_defs))


def test_json_has_what_was_promised(finished):
    _, report = write(finished)
    assert report["stages"]["stage2"]["mixture"] == pytest.approx(
        {"t2i": 1 / 3, "ie": 1 / 3, "seg": 1 / 3}
    )
    assert {"steps", "seconds", "first_loss", "last_loss"} <= set(report["stages"]["stage1"])
    for task in report["tasks"].values():
        assert {"metric", "value", "untrained", "trivial", "ceiling", "beats_both"} <= set(task)


def test_a_failed_task_is_named_with_its_numbers(finished):
    path = finished / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    results["tasks"]["seg"]["systems"]["model"]["miou"]["value"] = 0.01
    results["tasks"]["seg"]["beats"]["trivial"] = False
    path.write_text(json.dumps(results))
    page, report = write(finished)
    # the stand-in model loses in depth, too: noise costs more than the mean
    assert "1 of 3 tasks beat" in page
    assert "1.0\u00a0% does not beat" in page
    assert not report["tasks"]["seg"]["beats_both"]


def test_an_opponent_that_was_not_measured_is_not_beaten(finished):
    path = finished / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    del results["tasks"]["ie"]["systems"]["untrained"], results["tasks"]["ie"]["beats"]["untrained"]
    path.write_text(json.dumps(results))
    page, report = write(finished)
    assert not report["tasks"]["ie"]["beats_both"]
    assert report["tasks"]["ie"]["untrained"] is None
    assert "was not compared with the untrained model" in page


def test_the_codec_is_blamed_only_when_it_fails_too():
    task = {
        "metric": "m",
        "metrics": {"m": {"label": "M", "better": "higher", "percent": False}},
        "systems": {
            "model": {"m": {"value": 0.1, "stderr": 0.001}},
            "trivial": {"m": {"value": 0.5}},
        },
        "trivial": {"chosen": "guess"},
        "beats": {"untrained": True, "trivial": False},
        "examples": 8,
    }
    for codec, blamed in ((0.4, True), (0.9, False)):
        task["systems"]["codec"] = {"m": {"value": codec}}
        assert (
            "codec is the limit"
            in " ".join(explain(TaskResult(task), images_seen=100.0, share_seen=0.5))
        ) is blamed


def test_unfinished_stage_is_named(finished):
    (finished / "stage2" / "summary.json").unlink()
    with pytest.raises(NotFoundError, match=r"stage2/summary\.json is missing"):
        write(finished)


def test_a_broken_file_is_named(finished):
    for name in ("stage1/metrics.jsonl", "evaluation/results.json"):
        path = finished / name
        content = path.read_text()
        path.write_text(content[:-9])
        with pytest.raises(UserError, match=f"{name} is not JSON"):
            write(finished)
        path.write_text(content)


def test_a_task_without_trivial_answers_is_reported_too(finished):
    path = finished / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    task = results["tasks"]["ie"]
    del task["systems"]["trivial"], task["beats"]["trivial"]
    task["trivial"] = {"chosen": None, "all": {}}
    path.write_text(json.dumps(results))
    page, report = write(finished)
    assert "was not compared with any trivial answer" in page
    assert report["tasks"]["ie"]["trivial"] is None


def test_contact_sheet_shows_the_pictures_themselves(finished):
    evaluation = finished / "evaluation"
    results = json.loads((evaluation / "results.json").read_text())
    write_sheet(evaluation, finished / "samples.png")
    with Image.open(finished / "samples.png") as sheet:
        before = np.asarray(sheet.convert("RGB"))
    assert before.shape[1] == 1200
    sample = results["tasks"]["ie"]["samples"][0]
    with Image.open(evaluation / sample["output"]) as picture:
        size = picture.size
    Image.new("RGB", size, (255, 0, 255)).save(evaluation / sample["output"])
    write_sheet(evaluation, finished / "samples.png")
    with Image.open(finished / "samples.png") as sheet:
        after = np.asarray(sheet.convert("RGB"))
    changed = (before != after).any(-1)
    assert (after[changed] == (255, 0, 255)).all(-1).mean() > 0.9  # but for the resized edge
    assert changed.sum() > size[0] * size[1]
