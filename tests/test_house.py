"""The house's own rules: imports go one way, configs load without JAX, commands are outermost."""

import ast
import functools
import graphlib
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODES = ("w", "wb", "a", "ab", "x", "xb", "w+", "r+")
OURS = ("univg_jax", "data_pipelines", "experiments")

# Small rooms that any other may import. They know nothing of models, data or training.
FOUNDATION = {
    *(
        "buckets",
        "errors",
        "fields",
        "files",
        "images",
        "jpeg",
        "object_store",
        "pages",
        "progress",
        "settings",
        "sizes",
        "together",
        "trees",
    ),
    "version",
}

# Each room, and which others it imports besides the foundation. A room is a module or package of
# the first level; names without a dot are of univg_jax, but for data_pipelines and experiments.
# Every entry is in use: a test fails for one that is not.
ALLOWED: dict[str, set[str]] = {
    # The foundation: these import each other at most.
    "buckets": set(),
    "errors": set(),
    "fields": set(),
    "files": set(),
    "images": set(),
    "jpeg": set(),
    "object_store": set(),
    "pages": set(),
    "progress": set(),
    "settings": set(),
    "sizes": set(),
    "together": set(),
    "trees": set(),
    "version": set(),
    # Ideas of their own.
    "batch": set(),
    "checksums": set(),
    "configs": set(),
    "flow": set(),
    "lock": set(),
    "pretrained": set(),
    "quantization": {"streaming"},
    "stored": {"streaming"},
    "streaming": set(),
    "tpu": set(),
    "retention": {"workdir", "writers"},
    "workdir": {"checksums", "stored"},
    "writers": set(),
    "runtime": {"tpu"},
    "sharding": {"batch"},
    "heartbeat": set(),
    "roll_call": set(),
    "distributed": {"heartbeat", "roll_call", "sharding"},
    "checkpoint": {"checksums", "lock", "retention", "sharding", "stored", "streaming", "workdir"},
    # Networks: ours, weights of others, and what encodes a batch.
    "models": {"batch", "sharding"},
    "interop": {"models", "pretrained", "sharding", "streaming"},
    "trained": {
        *("checkpoint", "checksums", "interop", "quantization", "sharding", "stored"),
        *("streaming", "workdir"),
    },
    "conditioning": {"batch", "models", "sharding"},
    "encoders": {
        *("checksums", "conditioning", "interop", "models", "pretrained", "sharding", "streaming"),
        "workdir",
    },
    "sampling": {"batch", "conditioning", "flow", "models", "sharding"},
    # Training never sees a dataset. Only training.initialize knows the weights of others.
    "training": {
        *("batch", "checkpoint", "conditioning", "flow", "heartbeat", "interop", "models"),
        *("sharding", "tpu", "trained", "workdir", "writers"),
    },
    # Data never sees a model.
    "data_pipelines": {"batch", "pretrained"},
    "experiments": set(),
    # From a config to a run, and from a run to a trained model.
    "assembly": {
        *("batch", "checkpoint", "conditioning", "data_pipelines", "encoders", "lock", "models"),
        *("sampling", "sharding", "tpu", "training", "workdir"),
    },
    "inputs": {"batch", "data_pipelines"},
    "result": set(),
    "pipeline": {
        *("assembly", "batch", "data_pipelines", "encoders", "inputs", "pretrained"),
        *("result", "sampling", "sharding", "tpu", "trained"),
    },
    "__init__": {"pipeline", "result"},
    # What is done with them.
    "precompute": {
        *("assembly", "conditioning", "data_pipelines", "encoders", "sharding", "training"),
    },
    "previews": {"assembly", "pipeline", "training"},
    "evaluation": {
        *("assembly", "batch", "checkpoint", "conditioning", "data_pipelines", "flow", "inputs"),
        *("interop", "lock", "models", "pipeline", "pretrained", "progress", "retention"),
        *("sharding", "version", "workdir", "writers"),
    },
    "export": {
        *("assembly", "batch", "checksums", "data_pipelines", "encoders", "flow", "inputs"),
        *("interop", "models", "pipeline", "pretrained", "quantization", "sampling", "sharding"),
        *("streaming", "trained", "workdir"),
    },
    "serving": {
        *("batch", "data_pipelines", "inputs", "pipeline", "result", "sampling", "version"),
    },
    "planning": {
        *("assembly", "batch", "conditioning", "data_pipelines", "encoders", "models"),
        *("sampling", "sharding", "tpu", "training"),
    },
    "__main__": {"cli"},
}
# Commands may import everything. Nothing but the program's entry may import them.
COMMANDS = "cli"


def room(module: str) -> str:
    """The room of a module's full name."""
    package, _, inside = module.partition(".")
    return (inside.split(".")[0] or "__init__") if package == "univg_jax" else package


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def imports(path: pathlib.Path) -> frozenset[str]:
    """Everything that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from univg_jax import flow` names the module only in its list.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def files(*folders: str) -> list[pathlib.Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_rooms() -> dict[str, set[str]]:
    """What each room imports of the others."""
    graph: dict[str, set[str]] = {}
    for path in files(*OURS):
        here = room(module_name(path))
        there = {room(name) for name in imports(path) if name.split(".")[0] in OURS}
        graph[here] = graph.get(here, set()) | (there - {here})
    return graph


def test_rooms_import_what_the_table_allows():
    for here, there in imported_rooms().items():
        if here == COMMANDS:
            continue
        assert here in ALLOWED, f"{here} is a new room: give it a line in the table"
        extra = there - ALLOWED[here] - FOUNDATION
        assert not extra, f"{here} imports {', '.join(sorted(extra))}"


def test_the_table_has_no_entry_that_is_not_in_use():
    found = imported_rooms()
    for here, there in ALLOWED.items():
        assert here in found, f"there is no room {here}"
        assert there <= found[here], f"{here} does not import {', '.join(there - found[here])}"


def test_the_foundation_imports_only_itself_and_no_rooms_form_a_circle():
    found = imported_rooms()
    for name in FOUNDATION:
        assert found[name] <= FOUNDATION, f"{name} imports {', '.join(found[name] - FOUNDATION)}"
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError


def test_only_the_entry_and_their_own_tests_import_the_commands():
    """Whatever a command does can be done with the library."""
    inside = (ROOT / "univg_jax" / "cli", ROOT / "tests" / "cli")
    for path in files(*OURS, "benchmarks", "tools", "tests"):
        if not path.is_relative_to(inside[0]) and not path.is_relative_to(inside[1]):
            named = [name for name in imports(path) if f"{name}.".startswith("univg_jax.cli.")]
            assert not named or path.name == "__main__.py", f"{path} imports {', '.join(named)}"


def test_of_training_only_initialize_knows_other_projects_weights():
    for path in files("univg_jax/training"):
        if path.name != "initialize.py":
            assert not {name for name in imports(path) if room(name) == "interop"}, path


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("flax", {"models"}),
        ("ml_collections", {"experiments", "configs"}),
        ("torch", {"export"}),  # of a pipeline that is copied, and to compare it where it can run
        ("tensorflow", set()),
        ("diffusers", {"export"}),
        ("transformers", {"export"}),
    ],
)
def test_other_packages_stay_in_their_rooms(package, rooms):
    for path in files(*OURS):
        if any(name.split(".")[0] == package for name in imports(path)):
            assert room(module_name(path)) in rooms, f"{path} imports {package}"


def test_processes_wait_for_each_other_in_one_place():
    """`together` knows that it waits, so that a run that hangs names who does not."""
    collectives = {"process_allgather", "broadcast_one_to_all", "sync_global_devices"}
    for path in files(*OURS):
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        }
        # The first of all opens the channels.
        assert not used & collectives or path.name in ("together.py", "distributed.py"), path


def test_files_are_written_whole():
    """By `files.write_whole`. Only metrics are appended to."""
    for path in files(*OURS):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                mode = {a.value for a in node.args if isinstance(a, ast.Constant)} & set(MODES)
                writes = name in ("write_text", "write_bytes") or (name == "open" and mode)
                assert not writes or path.name in ("files.py", "writers.py"), path


def test_nothing_runs_what_a_file_says():
    """Configs are code (`configs.py`). The readers of pickles find no name and call nothing."""
    forbidden = {"eval", "exec", "__import__", "exec_module", "run_path"}
    readers = {"configs.py": {"exec_module"}, "stablehlo.py": {"exec_module"}}  # of our own loader
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
    for path in files(*OURS):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                assert name not in forbidden - readers.get(path.name, set()), f"{path}: {name}"
                if name == "load" and getattr(getattr(node.func, "value", None), "id", "") == "np":
                    given = {word.arg: word.value for word in node.keywords}
                    assert not getattr(given.get("allow_pickle"), "value", False), path
        found = {name.split(".")[0] for name in imports(path)} & modules
        # Beam's workers hand calls of ours to each other.
        readers_of_pickles = ("pickles.py", "refer.py", "beam.py")
        assert not found or path.name in readers_of_pickles, f"{path} imports {found}"


def test_only_writers_imports_metric_writers():
    """It puts a stand-in before clu's own TensorBoard writer, which would import TensorFlow."""
    for path in files(*OURS):
        if path.name != "writers.py":
            found = [name for name in imports(path) if name.startswith("clu.metric_writers")]
            assert not found, f"{path} imports {', '.join(found)}"


@pytest.mark.parametrize("path", files("benchmarks", "tools"), ids=lambda path: path.stem)
def test_what_scripts_import_of_ours_exists(path):
    """No test runs them, and some need torch."""
    for name in imports(path):
        if name.split(".")[0] in OURS:
            module, _, last = name.rpartition(".")
            assert hasattr(importlib.import_module(module), last) or importlib.util.find_spec(
                name
            ), name


@pytest.mark.xdist_group("house")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has no groups")
def test_groups_reach_the_scheduler(request):
    """Or every worker would make the slow fixtures."""
    assert request.node.nodeid.endswith("@house")


def test_no_test_is_named_by_an_address(request):
    """Its name would differ between workers, which then refuse to share the tests."""
    assert [item.nodeid for item in request.session.items if " at 0x" in item.nodeid] == []


def loads(package: str, code: str) -> bool:
    """Whether `code`, in a new process, loads a package."""
    code += f"\nimport sys; print({package!r} in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return done.stdout.strip() == "True"


CALL_EVERY_CONFIG = """
import importlib, pkgutil, experiments
for found in pkgutil.iter_modules(experiments.__path__, "experiments."):
    module = importlib.import_module(found.name)
    if hasattr(module, "get_config"):
        module.get_config()
"""


@pytest.mark.parametrize(
    "code",
    ["import univg_jax", "import univg_jax.settings", CALL_EVERY_CONFIG],
    ids=["package", "settings", "experiments"],
)
def test_configs_load_without_jax(code):
    assert not loads("jax", code)


def test_no_tensorflow_is_loaded_or_installed_by_the_lock():
    # tensorboardX loads torch where it is installed; the lock has none
    assert not loads(
        "tensorflow",
        "import univg_jax.previews, univg_jax.evaluation.run, univg_jax.evaluation.report",
    )
    locked = {line.split("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines()}
    assert not locked & {"tensorflow", "tensorflow-cpu", "tf-nightly", "keras", "torch"}
