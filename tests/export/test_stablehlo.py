"""Exported programs: what is in the folder, and that they run where our package is not."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax import export

from tests.clean_python import make_python
from univg_jax import Pipeline
from univg_jax.errors import NotFoundError
from univg_jax.export.formats import stablehlo
from univg_jax.export.formats.stablehlo import LOADER, MANIFEST, PLATFORMS
from univg_jax.export.job import Job
from univg_jax.export.run import export_model
from univg_jax.inputs import make_request
from univg_jax.interop.tensors import TensorFolder
from univg_jax.trained import WEIGHTS, open_trained

# Minutes of tracing and compiling; test_programs.py has each program.
pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("pipeline")]

ROOT = pathlib.Path(__file__).parents[2]
NEEDS = ("jax", "flatbuffers", "numpy", "safetensors")  # of the loader
TASKS = ("t2i", "ie", "ip", "id")  # every sort of input, and every sampler but that of one pass
TOLERANCE = 1  # levels of 255: float32 sums of programs that are compiled by themselves


@pytest.fixture(scope="module")
def job(root):
    """The parameters that were trained: their average is nearly what they began with."""
    return Job(trained=open_trained(root / "stage3"), ema=False)


@pytest.fixture(scope="module")
def folder(job, tmp_path_factory):
    """An export. `export_model` has compared a picture of each task."""
    out = tmp_path_factory.mktemp("exports") / "stablehlo"
    export_model(job, "stablehlo", out)
    return out


@pytest.fixture(scope="module")
def pipeline(root):
    return Pipeline.load(root / "stage3", ema=False)


@pytest.fixture(scope="module")
def pictures():
    """What a user gives, of the model's own size."""
    rng = np.random.default_rng(0)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 255
    image, face = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return {
        "t2i": dict(prompt="a pig on grass"),
        "ie": dict(prompt="remove the pig", image=image),
        "ip": dict(prompt="a pig", image=image, mask=mask),
        "id": dict(prompt="a portrait of <p> smiling", face=face),
    }


@pytest.fixture(scope="module", params=["linked", "pip"], ids=str)
def clean_python(request, tmp_path_factory):
    """The Python of an environment with NEEDS alone: links to our files of them, or installed."""
    folder = tmp_path_factory.mktemp("venv")
    return make_python(folder, NEEDS, installed=request.param == "pip")


def test_the_pictures_are_the_pipelines_where_our_package_is_not(
    job, folder, pipeline, pictures, clean_python, monkeypatch
):
    for package in ("univg_jax", "data_pipelines", "flax", "tokenizers"):
        missing = subprocess.run(
            [clean_python, "-I", "-c", f"import {package}"], capture_output=True, text=True
        )
        assert "ModuleNotFoundError" in missing.stderr
    requests = [make_request(t, data=job.config.data, **pictures[t]) for t in TASKS]
    inputs = [
        stablehlo.inputs_of(job, folder, request) | {"seeds": np.array([3])} for request in requests
    ]
    monkeypatch.setattr(sys, "executable", clean_python)
    found = stablehlo.run_loader(folder, TASKS, inputs)
    for task, images in zip(TASKS, found, strict=True):
        expected = np.asarray(pipeline.run(task, **pictures[task], seed=3).image)
        assert np.abs(images[0].astype(int) - expected).max() <= TOLERANCE, task


def test_a_missing_package_is_told_before_the_model_is_loaded(job, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.setattr(Pipeline, "load", None)
    with pytest.raises(NotFoundError, match=r"flatbuffers: pip install 'univg_jax\[stablehlo\]'"):
        export_model(job, "stablehlo", tmp_path / "out")


@pytest.fixture(scope="module")
def model(folder):
    return stablehlo.import_loader(folder).Model(folder)


def test_rows_steps_and_what_guidance_leads_away_from_may_differ_from_call_to_call(
    job, folder, pipeline, model
):
    prompts, options = ["a pig on grass", "two cats on sand"], dict(data=job.config.data)
    rows = [
        stablehlo.inputs_of(job, folder, make_request("t2i", prompt=p, **options)) for p in prompts
    ]
    prompt = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    negative = stablehlo.inputs_of(job, folder, make_request("t2i", prompt="a dog", **options))
    null = {f"null_{name}": value for name, value in negative.items()}
    options = dict(seeds=[5, 6], times=np.linspace(1, 0, 4), guidance_weights=[9.0, -8.0])
    found = model.sample("t2i", **prompt, **null, **options)
    expected = pipeline(prompts, negative_prompt="a dog", seed=5, steps=3, guidance=9.0).images
    for a, b in zip(found, map(np.asarray, expected), strict=True):
        assert np.abs(a.astype(int) - b).max() <= TOLERANCE
    assert np.abs(found[0].astype(int) - found[1]).max() > 10 * TOLERANCE
    usual = model.sample("t2i", **prompt, seeds=[5, 6])
    assert np.abs(usual.astype(int) - found).max() > TOLERANCE, "the options are of no account"


def test_inputs_that_cannot_be_are_named(model):
    row = dict(tokens=np.zeros((1, 36)), text_mask=np.ones((1, 36), bool), seeds=[0])
    tokens = np.zeros((1, 36), np.int32)
    for wrong, message in [
        (row, r"32x32/sample_text: tokens is float64 \(1, 36\), not int32 \[1, 36\]"),
        (dict(row, tokens=tokens, sed=[1]), "missing or unknown inputs: sed"),
        (dict(tokens=tokens, seeds=[0]), "missing or unknown inputs: text_mask"),
        (dict(row, tokens=tokens[None]), r"tokens is int32 \(1, 1, 36\), not int32 \[1, 36\]"),
    ]:
        with pytest.raises(TypeError, match=message):
            model.sample("t2i", **wrong)


def test_the_manifest_lists_the_arguments_of_the_programs_in_order(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    stored = {name: list(shape) for name, shape in TensorFolder(folder, WEIGHTS).shapes.items()}
    assert stored.keys() == manifest["weights"].keys()
    files = {f"{name}.{platform}" for name in manifest["programs"] for platform in PLATFORMS}
    written = (f for f in (folder / "programs").rglob("*") if f.is_file())
    assert {str(file.relative_to(folder / "programs")) for file in written} == files
    for file in files:
        content = (folder / "programs" / file).read_bytes()
        assert str(ROOT).encode() not in content, "a path of the machine that wrote it"
        program = manifest["programs"][file.rpartition(".")[0]]
        made = export.deserialize(bytearray(content))
        expected = [stored[name] for name in program["weights"]]
        expected += [given["shape"] for given in program["inputs"].values()]
        assert [[*map(plain, x.shape)] for x in made.in_avals] == expected
        outputs = [given["shape"] for given in program["outputs"].values()]
        assert [[*map(plain, x.shape)] for x in made.out_avals] == outputs
        assert made.module_kept_var_idx == tuple(range(len(expected)))
        assert made.platforms == (file.rpartition(".")[2],)
        assert made.nr_devices == 1


def plain(size):
    """A size of a shape as the manifest has it."""
    return size if isinstance(size, int) else str(size)


def test_each_platform_has_its_own_attention(folder):
    kernels = {
        platform: set(re.findall(r"custom_call @(\w+)", made.mlir_module()))
        for platform in PLATFORMS
        for made in [read(folder, f"32x32/step.{platform}")]
    }
    assert "tpu_custom_call" in kernels["tpu"]
    assert "tpu_custom_call" not in kernels["cpu"] | kernels["cuda"]


def read(folder, name):
    return export.deserialize(bytearray((folder / "programs" / name).read_bytes()))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["step", "sample_text_image"])
def test_programs_for_tpus_compile_for_one(folder, name, monkeypatch):
    from jax.experimental.topologies import get_topology_desc
    from jax.sharding import SingleDeviceSharding

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    made, sizes = read(folder, f"32x32/{name}.tpu"), {"b": 2, "s + 1": 5}
    arguments = [
        jax.ShapeDtypeStruct(
            [sizes.get(str(size), size) for size in x.shape],
            x.dtype,
            sharding=SingleDeviceSharding(device),
        )
        for x in made.in_avals
    ]
    compiled = jax.jit(made.call).lower(*jax.tree.unflatten(made.in_tree, arguments)[0]).compile()
    assert "tpu_custom_call" in compiled.as_text()


def test_the_card_says_how_to_get_a_picture(folder, tmp_path):
    """Its code runs beside the folder's files."""
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code += "\nprint(images.shape, images.dtype)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(1, 32, 32, 3) uint8", done.stderr
    assert "in this folder, copied" in card  # the text encoder
    assert (folder / LOADER).read_text() == (ROOT / "univg_jax/export/load.py").read_text()
