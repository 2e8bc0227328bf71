"""torchmetrics, against which tests marked `parity` compare."""

import importlib
import importlib.util
import sys
import types
import warnings

import pytest


def torchmetrics_of(module):
    """torch, and a module of torchmetrics; skips where one is not installed."""
    torch = pytest.importorskip("torch")
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("torchmetrics is not installed")
    # It imports torch-fidelity where that is installed, and that imports torchvision, which neither
    # needs for what we compare: a bare package has the same modules.
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is not None and "torchmetrics" not in sys.modules:
        package = types.ModuleType("torch_fidelity")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["torch_fidelity"] = package
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch, importlib.import_module(f"torchmetrics.{module}")
    finally:
        sys.modules.pop("torch_fidelity", None)
