"""`univg export`: what it prints, what it refuses, and that its folder serves other commands."""

import json
import signal
import subprocess
import sys

import pytest

from univg_jax import Pipeline, checkpoint
from univg_jax.cli.main import main
from univg_jax.evaluation.results import Results

pytestmark = pytest.mark.xdist_group("pipeline")


def export(root, out, *more):
    """The command's exit code, for the run of stage 1."""
    return main(["export", f"--checkpoint={root / 'stage1'}", f"--out={out}", *map(str, more)])


def evaluation_of(weights, out):
    """The folder of an evaluation of the weights with a digest."""
    metric = {"label": "R@1", "better": "higher", "percent": False}
    entry = {
        "title": "text-to-image",
        "metric": "r1",
        "metrics": {"r1": metric},
        "examples": 4,
        "systems": {"model": {"r1": {"value": 0.25, "stderr": 0.1}}},
        "trivial": {},
        "beats": {},
        "samples": [],
    }
    results = Results(
        benchmark="emoji_scenes",
        settings={"weights": weights, "step": 2},
        provenance={"date": "2026-01-01", "revision": "abc"},
        tasks={"t2i": entry},
    )
    results.write(results.folder(out))
    return out


def test_an_export_serves_the_other_commands(root, tmp_path, capsys):
    weights = checkpoint.digests(root / "stage1")[1]
    evaluation = evaluation_of(weights, tmp_path / "evaluation")
    out = tmp_path / "exports" / "stage1"
    flags = ("--format=safetensors", "--dtype=bf16", "--step=1", f"--evaluation={evaluation}")
    assert export(root, out, *flags) == 0
    printed = capsys.readouterr().out
    assert "t2i: the picture differs by 0 of 255 from the checkpoint's; bf16 itself" in printed
    assert f"wrote {out} (safetensors, bf16, step 1, ema)" in printed
    assert "| **t2i/r1** | 0.25 |" in (out / "README.md").read_text()

    sample = ["sample", f"--checkpoint={out}", "--task=t2i", "--prompt=a pig"]
    assert main([*sample, f"--out={tmp_path / 'pig.png'}"]) == 0
    assert (tmp_path / "pig.png").exists()
    with (out / "README.md").open("a") as card:  # its reader adds the license
        card.write("License: CC BY 4.0\n")
    assert main(["checkpoint", "verify", str(out)]) == 0
    assert "sound" in capsys.readouterr().out
    assert Pipeline.load(out).step == 1
    (out / "config.json").write_text("{}")
    assert main(["checkpoint", "verify", str(out)]) == 1
    assert "config.json is not what was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format=onnx"], "unknown format 'onnx'; did you mean 'orbax'?"),
        (["--format=orbax", "--dtype=int8"], "unknown dtype of format orbax: 'int8'"),
        (["--format=orbax", "--step=9"], "no step 9 in"),
        (["--format=diffusers"], "is 'minilm', where diffusers has 'sd3': export a run with enc"),
        (["--format=orbax", "--checkpoint=nowhere"], "no checkpoint in"),
        (["--format=orbax", "--pretrained=nowhere"], "pretrained=nowhere is not a folder"),
        (["--format=orbax", "--evaluation=nowhere"], "nowhere has no evaluation"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    root, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.setattr(Pipeline, "load", None)
    assert export(root, tmp_path / "out", *flags) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["checkpoints/99", "checkpoints/export"])
def test_no_export_is_taken_for_a_checkpoint(root, monkeypatch, capsys, place):
    """As `99` it would be the newest one, which no command could load."""
    monkeypatch.setattr(Pipeline, "load", None)
    assert export(root, root / "stage1" / place, "--format=orbax") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{place} is in the checkpoints of the run {root / 'stage1'}" in line
    assert export(root, "s3://bucket/x", "--format=orbax") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--out=s3://bucket/x: expected a local path or gs://" in line


def test_numbers_of_another_model_are_refused(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "load", None)
    evaluation = evaluation_of("another", tmp_path / "evaluation")
    assert export(root, tmp_path / "out", "--format=orbax", f"--evaluation={evaluation}") == 1
    assert "has no evaluation of this checkpoint: it has emoji_scenes-" in capsys.readouterr().err


KILLED_AT_THE_END = """
import os, signal, sys
from univg_jax.cli.main import main
from univg_jax.export import run

run.write_card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def test_an_export_that_is_killed_leaves_nothing_that_looks_whole(root, tmp_path):
    """Also when all that is missing is the card; the next try is not disturbed."""
    flags = [f"--checkpoint={root / 'stage1'}", f"--out={tmp_path / 'out'}", "--format=orbax"]
    command = [sys.executable, "-c", KILLED_AT_THE_END, "export", *flags]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert [child.name[:5] for child in tmp_path.iterdir()] == [".out."]
    assert main(["export", *flags]) == 0
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["format"] == "orbax"
