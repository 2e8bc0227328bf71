"""The host never holds more than a part of a model: 1.3 times its largest parameter, at most."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.marks import nightly
from tests.sd3_folder import write_image_encoder, write_sd3
from tests.sd3_run import write_run
from univg_jax import assembly, encoders
from univg_jax.batch import BatchShape
from univg_jax.checkpoint import Checkpointer
from univg_jax.settings import Config
from univg_jax.trained import open_trained
from univg_jax.trees import named_leaves

PEAK = pathlib.Path("/proc/self/clear_refs")  # of Linux

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pipeline")]

# Writes a small model first, after which all libraries are loaded, then a large one.
WRITE = """
import pathlib, sys
from etils import epath
from univg_jax import checksums
from univg_jax.export.format import open_format
from univg_jax.export.job import Job
from univg_jax.streaming import return_freed_blocks
from univg_jax.trained import open_trained

def memory(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

name, dtype, out, *runs = sys.argv[1:]
return_freed_blocks()
for i, run in enumerate(runs):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    folder = pathlib.Path(out, str(i))
    folder.mkdir(parents=True)
    open_format(name).write(Job(trained=open_trained(run), dtype=dtype), folder)
    checksums.checksums(epath.Path(folder), checksums.list_files(epath.Path(folder)))
print(memory("VmHWM") - before)
"""


# Exports a small model first, then a large one, by all that the command does.
EXPORT = """
import pathlib, sys
from univg_jax.export.job import Job
from univg_jax.export.run import export_model
from univg_jax.streaming import return_freed_blocks
from univg_jax.trained import open_trained

def memory(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

dtype, out, *runs = sys.argv[1:]
for i, run in enumerate(runs):
    return_freed_blocks()
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    export_model(Job(trained=open_trained(run), dtype=dtype), "safetensors", f"{out}/{i}")
print(memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large(root, tmp_path_factory):
    """A workdir of a model of 700 MB, and the bytes of its largest parameter."""
    workdir = tmp_path_factory.mktemp("large")
    config = json.loads((root / "stage1" / "config.json").read_text())
    config["model"]["overrides"].update(hidden_dim=768, num_heads=8, depth=9)
    config = Config.of(config)
    shutil.copytree(root / "stage1" / "encoders", workdir / "encoders")
    found = encoders.abstract(config.conditioning)
    spec = found.conditioner.encoded_spec(found.frozen, BatchShape.of(config.data).spec(1))
    model = assembly.make_model(config, found.conditioner)
    abstract = jax.eval_shape(lambda key: model.init_params(key, *spec), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jax.device_put(rng.standard_normal(x.shape, dtype=np.float32)), abstract
    )
    with Checkpointer(workdir) as checkpointer:
        state = {"ema": params, "params": {"none": jax.device_put(np.zeros(1, np.float32))}}
        checkpointer.save(1, state, {"next": 0}, config.to_dict())
    sizes = [x.nbytes for x in named_leaves(params).values()]
    assert sum(sizes) > 5 * max(sizes)
    return workdir, max(sizes), sum(sizes)


@pytest.fixture(scope="module")
def large_sd3(tmp_path_factory):
    """The same of a run with Stable Diffusion 3's encoders, and a small one."""
    tmp_path = tmp_path_factory.mktemp("large_sd3")
    folder = write_sd3(tmp_path / "pipeline")
    write_image_encoder(folder / "image_encoder")
    small = write_run(tmp_path / "small", folder=folder)
    sizes = {"hidden_dim": 512, "depth": 12, "num_heads": 8}
    sizes = {f"model.overrides.{name}": size for name, size in sizes.items()}
    large = write_run(tmp_path / "large", folder=folder, **sizes)
    sizes = [tensor.num_bytes for tensor in open_trained(large).tensors("ema").values()]
    assert sum(sizes) > 5 * max(sizes)
    return small, large, max(sizes)


needs_proc = pytest.mark.skipif(not PEAK.exists(), reason="reads Linux's /proc")


@needs_proc
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("safetensors", "f32"),
        *nightly(("orbax", "f32"), ("stablehlo", "f32"), ("safetensors", "int8")),
    ],
)
def test_an_export_needs_little_memory(large, root, tmp_path, name, dtype):
    workdir, largest, _ = large
    check_memory(name, dtype, tmp_path, root / "stage1", workdir, largest=largest)


@needs_proc
@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_pipeline_for_diffusers_needs_little_memory(large_sd3, tmp_path, dtype):
    small, large, largest = large_sd3
    check_memory("diffusers", dtype, tmp_path, small, large, largest=largest)


@needs_proc
@pytest.mark.nightly
def test_the_command_never_holds_two_models(large, root, tmp_path):
    """Rounding needs none beside the one that makes the pictures, without which f32 does."""
    workdir, _, whole = large
    used = {}
    for dtype in ("f32", "bf16", "int8"):
        command = [sys.executable, "-c", EXPORT, dtype, tmp_path / dtype, root / "stage1", workdir]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        used[dtype] = int(done.stdout.split()[-1]) / whole
    print({dtype: f"{times:.2f} times the model" for dtype, times in used.items()})
    assert max(used.values()) < used["f32"] + 0.5, used


def check_memory(name, dtype, out, *runs, largest):
    """Writes both runs, and holds what the second took beside the libraries."""
    command = [sys.executable, "-c", WRITE, name, dtype, out, *runs]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    used = int(done.stdout.split()[-1])
    print(f"{name}, {dtype}: {used / largest:.2f} times the largest parameter")
    assert used < 1.3 * largest, f"{used / largest:.2f} times the largest parameter"
