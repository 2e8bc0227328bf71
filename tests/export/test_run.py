"""What an export refuses, and that nothing is left where it fails."""

import dataclasses
import shutil
import signal

import jax
import numpy as np
import pytest

from univg_jax import Pipeline, files
from univg_jax.errors import AlreadyExistsError, Ended, UserError
from univg_jax.export import compare, format, run
from univg_jax.export.card import Measured
from univg_jax.export.formats import FORMATS, safetensors
from univg_jax.export.job import Job
from univg_jax.export.run import export_model
from univg_jax.trained import open_trained

pytestmark = pytest.mark.xdist_group("pipeline")


@pytest.fixture
def job(root):
    return Job(trained=open_trained(root / "stage1"))


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        ({}, "safetensor", "unknown format 'safetensor'; did you mean 'safetensors'?"),
        ({"dtype": "fp32"}, "orbax", "unknown dtype of format orbax: 'fp32'; did you mean 'f32'?"),
        ({"pretrained": "nowhere"}, "orbax", "pretrained=nowhere is not a folder"),
    ],
)
def test_what_cannot_be_is_one_line_before_the_model_is_loaded(
    job, tmp_path, monkeypatch, change, name, message
):
    monkeypatch.setattr(Pipeline, "load", None)
    with pytest.raises(UserError) as error:
        export_model(dataclasses.replace(job, **change), name, tmp_path / "out")
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_left_alone(job, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", None)
    (tmp_path / "file").touch()
    with pytest.raises(AlreadyExistsError, match="exists: choose another folder"):
        export_model(job, "orbax", tmp_path)


def test_a_full_disk_is_told_beforehand(job, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", None)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs \d+\.\d+ MiB, and .* has 0.00 MiB left"):
        export_model(job, "safetensors", tmp_path / "out")


def test_a_preemption_leaves_nothing(job, tmp_path, monkeypatch):
    def write(job, folder):
        safetensors.FORMAT.write(job, folder)
        raise Ended(signal.SIGTERM)

    form = dataclasses.replace(safetensors.FORMAT, write=write)
    monkeypatch.setattr(run, "open_format", lambda name: form)
    with pytest.raises(Ended) as end:
        export_model(job, "safetensors", tmp_path / "out")
    assert end.value.exit_code == 143
    assert not list(tmp_path.iterdir())


def test_a_model_that_answers_otherwise_is_not_exported(job, tmp_path, monkeypatch):
    """Whatever went wrong: here another model is read back than was written."""

    def reload(job, folder):
        pipeline = Pipeline.load(folder)
        params = jax.tree.map(lambda x: x + 0.1, pipeline.params)
        return lambda cases: compare.answer(dataclasses.replace(pipeline, params=params), cases)

    broken = dataclasses.replace(safetensors.FORMAT, reload=reload)
    monkeypatch.setattr(run, "open_format", lambda name: broken)
    with pytest.raises(UserError, match=r"picture of task t2i differs by \d+ of 255"):
        export_model(job, "safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_card_tells_what_the_model_is(job, tmp_path):
    measured = Measured(
        benchmark="geneval",
        examples=553,
        numbers={"overall": 0.5123456, "counting": 0.25},
        primaries=["overall"],
        date="2026-01-01",
        revision="abc",
    )
    export_model(job, "safetensors", tmp_path / "out", evaluation=[measured])
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "# emoji_smoke_stage1",
        '| `t2i` | text-to-image | nothing but the prompt | what to paint, such as "a pig on',
        "CC BY 4.0",  # of the data
        "MIT (all-MiniLM-L6-v2)",
        "geneval, 553 examples, 2026-01-01, revision abc:",
        "| **overall** | 0.5123 |",
        "| counting | 0.25 |",
        "| t2i | 0 | 0.0000 |",
        'Pipeline.load("path/of/this/folder")',
    ):
        assert part in card
    assert "\n\n\n" not in card
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("path/of/this/folder", str(tmp_path / "out"))
    exec(code.replace("picture.png", str(tmp_path / "picture.png")), {})
    assert (tmp_path / "picture.png").exists()


def test_every_format_says_what_the_command_asks():
    assert {"orbax", "safetensors"} <= set(FORMATS)
    for name in FORMATS:
        form = format.open_format(name)
        assert form.title
        assert form.opened_by
        assert set(form.dtypes) <= {"f32", "bf16", "int8"}
        assert form.tolerance_reason


def test_differences_are_in_levels():
    a = np.zeros((2, 2, 3), np.uint8)
    found = compare.Difference.of(a, a + np.array([0, 0, 255], np.uint8))
    assert (found.most, found.mean) == (255, 85.0)
    with pytest.raises(UserError, match="picture of task t2i differs by 255 of 255"):
        compare.check({"t2i": found}, tolerance=1)
