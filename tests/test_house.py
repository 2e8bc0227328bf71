"""The house's own rules: imports go one way, configs load without JAX, nothing pulls in TensorFlow."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Each room and the rooms that it may import (docs/decisions.md). A room is a module or package of
# the first level.
ALLOWED = {
    "univg_jax.batch": set(),
    "univg_jax.errors": set(),
    "univg_jax.flow": {"univg_jax.errors"},
    "univg_jax.models": {"univg_jax.batch", "univg_jax.errors", "univg_jax.sharding"},
    "univg_jax.pretrained": {"univg_jax.errors"},
    "univg_jax.interop": {"univg_jax.models", "univg_jax.sharding"},
    "univg_jax.conditioning": {"univg_jax.models", "univg_jax.batch"},
    "univg_jax.encoders": {
        "univg_jax.conditioning", "univg_jax.models", "univg_jax.interop", "univg_jax.pretrained", "univg_jax.errors",
        "univg_jax.sharding",
    },
    "univg_jax.sampling": {
        "univg_jax.flow", "univg_jax.conditioning", "univg_jax.models", "univg_jax.batch", "univg_jax.errors",
        "univg_jax.sharding",
    },
    "univg_jax.sharding": {"univg_jax.batch"},
    "univg_jax.training.optim": {"univg_jax.sharding", "univg_jax.batch", "univg_jax.errors"},
    "univg_jax.checkpoint": {"univg_jax.sharding"},
    "univg_jax.writers": set(),
    "univg_jax.compilation": set(),
    "univg_jax.training.preemption": set(),
    "univg_jax.training.profiling": set(),
    "univg_jax.train": {
        "univg_jax.flow", "univg_jax.conditioning", "univg_jax.training.optim", "univg_jax.sharding", "univg_jax.batch",
        "univg_jax.checkpoint", "univg_jax.models", "univg_jax.writers", "univg_jax.interop", "univg_jax.training.profiling",
        "univg_jax.training.preemption", "univg_jax.tpu",
    },
    "univg_jax.evaluation": {
        "univg_jax.sampling", "univg_jax.conditioning", "univg_jax.batch", "univg_jax.interop", "univg_jax.models",
        "univg_jax.sharding", "univg_jax.writers", "univg_jax.errors", "data_pipelines",
    },
    "univg_jax.planning.hlo": set(),
    "univg_jax.tpu": set(),
    "univg_jax.planning.plan": {
        "univg_jax.train", "univg_jax.sampling", "univg_jax.conditioning", "univg_jax.sharding", "univg_jax.batch",
        "univg_jax.planning.hlo", "univg_jax.tpu", "univg_jax.errors",
    },
    "univg_jax.cli": {"*"},
    "univg_jax.__main__": {"univg_jax.cli"},
    "univg_jax": set(),
    "data_pipelines": {"univg_jax.batch", "univg_jax.pretrained", "univg_jax.errors"},
    "experiments": set(),
}  # fmt: skip


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "univg_jax" else parts[0]


def files():
    for package in ("univg_jax", "data_pipelines", "experiments"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield module.removesuffix(".__init__"), path


def imports(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from univg_jax import flow` names the module only in its list.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("module", "path"), list(files()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_imports_go_one_way(module, path):
    here = room(module)
    assert here in ALLOWED, f"{module}: a new room needs a line in the table of allowed imports"
    for name in imports(path):
        there = room(name)
        if name.split(".")[0] in ("univg_jax", "data_pipelines", "experiments") and there != here:
            assert "*" in ALLOWED[here] or there in ALLOWED[here], f"{module} imports {name}"


@pytest.mark.parametrize(
    ("module", "path"), list(files()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_only_models_import_flax_and_nothing_imports_torch_or_tensorflow(module, path):
    for name in imports(path):
        first = name.split(".")[0]
        assert first not in ("torch", "tensorflow", "diffusers", "transformers"), (
            f"{module} imports {name}"
        )
        assert first != "flax" or room(module) == "univg_jax.models", f"{module} imports {name}"
        if first == "ml_collections":
            rooms = ("experiments", "cli", "train", "optim", "plan")
            assert room(module).split(".")[-1] in rooms, f"{module} imports {name}"


@pytest.mark.parametrize(
    "path", sorted((*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py"))), ids=lambda p: p.stem
)
def test_what_scripts_import_of_ours_exists(path):
    """No test runs them, and some need torch."""
    for name in imports(path):
        if name.split(".")[0] in ("univg_jax", "data_pipelines", "experiments"):
            module, _, last = name.rpartition(".")
            assert hasattr(importlib.import_module(module), last) or importlib.util.find_spec(
                name
            ), name


@pytest.mark.xdist_group("house")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has no groups")
def test_groups_reach_the_scheduler(request):
    """Or every worker would make the slow fixtures."""
    assert request.node.nodeid.endswith("@house")


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_experiments_load_without_jax():
    code = "import sys, pkgutil, importlib, experiments as e\n"
    code += "modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(e.__path__, 'experiments.')]\n"
    code += "[m.get_config() for m in modules if hasattr(m, 'get_config')]\n"
    code += "print('jax' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_no_tensorflow_is_loaded_or_installed_by_the_lock():
    code = "import sys, univg_jax.train, univg_jax.evaluation.report, data_pipelines.mixture\n"
    # tensorboardX loads torch where it is installed; the lock has none
    code += "print('tensorflow' in sys.modules)"
    assert run_python(code).strip() == "False"
    locked = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert not locked & {"tensorflow", "tensorflow-cpu", "tf-nightly", "keras", "torch"}
