"""The report: self-contained, honest about what failed, and the same numbers in JSON."""

import contextlib
import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.test_run import run
from univg_jax import checkpoint
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.report import Evaluation, TaskResult, write_report, write_sheet
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
            | {f"latent_square/{t}": len(t) for t in tasks}
            | {"records/quarantined": s}
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


def shown(folder):
    return Evaluation.of(folder / "evaluation", last_stage=folder / "stage2")


@contextlib.contextmanager
def changed(folder):
    """The tasks of the results, to be changed as if they had been found so."""
    evaluation = shown(folder)
    tasks = json.loads(json.dumps(evaluation.results.tasks))
    yield tasks
    dataclasses.replace(evaluation.results, tasks=tasks).write(evaluation.folder)


def write(folder):
    write_report(
        folder,
        folder / "report.html",
        folder / "report.json",
        stages=[folder / "stage1", folder / "stage2"],
        evaluation=shown(folder),
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


def test_each_stage_says_what_the_codec_and_the_records_were_like(finished):
    page, report = write(finished)
    stage = report["stages"]["stage2"]
    assert stage["latent_square"] == {"t2i": 3, "ie": 2, "seg": 3}
    assert stage["records"] == {"quarantined": 8}
    for task, value in stage["latent_square"].items():
        assert f"<dt>{task}</dt><dd>{value:.2f}</dd>" in page
    assert page.count("<dt>records quarantined</dt><dd>8</dd>") == 2


def test_json_has_what_was_promised(finished):
    _, report = write(finished)
    assert report["stages"]["stage2"]["mixture"] == pytest.approx(
        {"t2i": 1 / 3, "ie": 1 / 3, "seg": 1 / 3}
    )
    assert {"steps", "seconds", "first_loss", "last_loss"} <= set(report["stages"]["stage1"])
    for task in report["tasks"].values():
        assert {"metric", "value", "untrained", "trivial", "ceiling", "beats_both"} <= set(task)
        answers = {name: values[task["metric"]] for name, values in task["trivial_answers"].items()}
        best = max if task["better"] == "higher" else min
        assert task["trivial"] == best(answers.values()) == answers[task["trivial_name"]]
        for name, values in task["secondary"].items():
            best = max if values["better"] == "higher" else min
            each = [found[name] for found in task["trivial_answers"].values()]
            assert values["trivial"] == (best(each) if None not in each else None)


def test_the_page_says_which_run_it_is(finished):
    evaluation = shown(finished)
    made = {"checkpoint": "a/b", "date": "2026-01-02", "version": "9.8.7", "revision": "abc123"}
    made["machine"] = "host, 8 x TPU"
    dataclasses.replace(evaluation.results, provenance=made).write(evaluation.folder)
    page, report = write(finished)
    assert all(value in page for value in made.values())
    assert report["provenance"] == made
    assert report["settings"]["checkpoint_step"] == 3


def test_table_heads_have_a_scope(finished):
    page, _ = write(finished)
    heads = re.findall(r"<th[ >][^>]*>?", page)
    assert len(heads) > 10
    assert all(re.search(r'scope="(col|row)"', head) for head in heads)


def test_the_report_shows_the_evaluation_of_the_last_stage(finished):
    """Of several, the newest of a checkpoint that the last stage has."""
    evaluation = shown(finished)
    step = finished / "stage2" / "checkpoints" / "8"
    step.mkdir(parents=True)
    (step / "_CHECKPOINT_METADATA").write_text("{}")
    (step / "checksums.json").write_text("{}")
    (weights,) = checkpoint.digests(finished / "stage2").values()

    def add(date, **settings):
        results = dataclasses.replace(
            evaluation.results,
            settings=evaluation.results.settings | settings,
            provenance={"date": date},
        )
        results.write(results.folder(finished / "evaluation"))
        return results.folder(finished / "evaluation").name

    with pytest.raises(
        UserError, match=f"no evaluation of a checkpoint .*{evaluation.folder.name}"
    ):
        shown(finished)
    old = add("2026-01-01", weights=weights)
    assert shown(finished).folder.name == old
    new = add("2026-01-02", weights=weights, seed=1)
    former = add("2026-01-03", weights="of the model that was here before")
    found = shown(finished)
    assert found.folder.name == new
    assert set(found.others) == {old, former, evaluation.folder.name}
    named = Evaluation.of(finished / "evaluation" / old, last_stage=finished / "stage2")
    assert named.folder.name == old
    (finished / "evaluation" / new / "results.json").write_text("{")
    assert shown(finished).folder.name == old


def test_a_failed_task_is_named_with_its_numbers(finished):
    with changed(finished) as tasks:
        tasks["seg"]["systems"]["model"]["miou"]["value"] = 0.01
        tasks["seg"]["beats"]["trivial"] = False
    page, report = write(finished)
    # the stand-in model loses in depth, too: noise costs more than the mean
    assert "1 of 3 tasks beat" in page
    assert "1.0\u00a0% does not beat" in page
    assert not report["tasks"]["seg"]["beats_both"]


def test_an_opponent_that_was_not_measured_is_not_beaten(finished):
    with changed(finished) as tasks:
        del tasks["ie"]["systems"]["untrained"], tasks["ie"]["beats"]["untrained"]
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
            "trivial": {"m": {"value": 0.5, "answer": "guess"}},
        },
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
    for path in (finished / "stage1" / "summary.json", shown(finished).folder / "results.json"):
        content = path.read_text()
        path.write_text(content[:-9])
        with pytest.raises(UserError, match=f"{path} is not JSON"):
            write(finished)
        path.write_text(content)


def test_a_torn_picture_is_named(finished):
    picture = shown(finished).folder / "ie" / "001.png"
    picture.write_bytes(picture.read_bytes()[:-30])
    for make in (write, lambda folder: write_sheet(shown(folder), folder / "samples.png")):
        with pytest.raises(UserError, match=r"ie/001\.png is not a readable image"):
            make(finished)


def test_a_task_without_trivial_answers_is_reported_too(finished):
    with changed(finished) as tasks:
        del tasks["ie"]["systems"]["trivial"], tasks["ie"]["beats"]["trivial"]
        tasks["ie"]["trivial"] = {}
    page, report = write(finished)
    assert "was not compared with any trivial answer" in page
    assert report["tasks"]["ie"]["trivial"] is None


def test_contact_sheet_shows_the_pictures_themselves(finished):
    evaluation = shown(finished)
    write_sheet(evaluation, finished / "samples.png")
    with Image.open(finished / "samples.png") as sheet:
        before = np.asarray(sheet.convert("RGB"))
    assert before.shape[1] == 1200
    output = evaluation.folder / evaluation.results.tasks["ie"]["samples"][0]["output"]
    with Image.open(output) as picture:
        size = picture.size
    Image.new("RGB", size, (255, 0, 255)).save(output)
    write_sheet(evaluation, finished / "samples.png")
    with Image.open(finished / "samples.png") as sheet:
        after = np.asarray(sheet.convert("RGB"))
    changed = (before != after).any(-1)
    assert (after[changed] == (255, 0, 255)).all(-1).mean() > 0.9  # but for the resized edge
    assert changed.sum() > size[0] * size[1]
