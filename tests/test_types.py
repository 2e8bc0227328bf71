"""The types of the public interface, as a type checker sees them outside of the repository."""

import importlib.resources
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# What a user may write. A comment `error: X` says that mypy must refuse the line with [X].
PROGRAM = """
import pathlib
from typing import Any, assert_type

import numpy as np
from PIL import Image

from univg_jax import Pipeline, Result

pipe = Pipeline.load(pathlib.Path("runs/stage3"), tasks=["t2i", "edit"])
assert_type(pipe, Pipeline)
pixels = np.zeros((8, 8, 3), np.uint8)
assert_type(pipe("a red fox", seed=3, guidance=5, size=(64, 48)), Result)
assert_type(pipe(["a red fox", "a cat"], seed=[1, 2]).images, list[Image.Image])
assert_type(pipe.edit(pixels, "make it snow", image_guidance=1.5), Result)
assert_type(pipe.inpaint("a.png", pathlib.Path("m.png"), callback=lambda n, total: None), Result)
assert_type(pipe.outpaint(["a.png", "b.png"], aspect="16:9"), Result)
assert_type(pipe.layout(prompt="a pig", boxes=[("a pig", (0, 0, 0.5, 0.5))]), Result)
assert_type(pipe.depth(pixels).answer, np.ndarray[tuple[Any, ...], np.dtype[Any]] | None)
assert_type(pipe.pose(pixels).image, Image.Image)
assert_type(pipe.segment([pixels, pixels], "the pig").seeds, list[int])
assert_type(pipe.identity("face.png", "a portrait of <p>").prompts, list[str])
assert_type(pipe.run("edit", image=pixels, prompt="make it snow", steps=4), Result)

pipe("a red fox", guidence=5)  # error: call-arg
pipe("a red fox", steps="many")  # error: arg-type
pipe.depth(pixels, size=(8, 8))  # error: call-arg
pipe.edit("make it snow")  # error: call-arg
pipe.layout(prompt="a pig", boxes=[("a pig", "here")])  # error: arg-type
Pipeline.load(3)  # error: arg-type
pipe("a red fox").image = Image.new("RGB", (8, 8))  # error: misc
"""


def mypy(*arguments: str, cwd: pathlib.Path) -> list[str]:
    """What mypy says, without the summary; it sees our packages as they are installed.

    Its cache may be of a run whose files were elsewhere, and then tells of those.
    """
    options = ["--no-error-summary", "--ignore-missing-imports", "--follow-imports=silent"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, f"--cache-dir={cwd / '.mypy_cache'}", *arguments],
        cwd=cwd,
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_public_interface_is_typed(tmp_path):
    """Its own files have no error, and a program that uses it has those that it should have."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    rooms = ["__init__", "pipeline", "result", "inputs", "errors"]
    found = mypy(str(program), *(f"univg_jax/{name}.py" for name in rooms), cwd=ROOT)
    ours = [line for line in found if f"/{program.name}:" not in line]
    assert not ours
    refused = {}
    for line in [line for line in found if ": error:" in line]:
        number, kind = line.split(":")[1], line.rpartition("[")[2].rstrip("]")
        refused[int(number)] = kind
    expected = {
        number: line.partition("# error: ")[2]
        for number, line in enumerate(PROGRAM.splitlines(), 1)
        if "# error: " in line
    }
    assert refused == expected


def test_the_package_says_that_it_is_typed():
    for package in ("univg_jax", "data_pipelines"):
        assert importlib.resources.files(package).joinpath("py.typed").is_file()
