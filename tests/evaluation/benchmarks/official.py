"""The official input files, for tests that count them. They are not part of the project."""

import os
import pathlib

import pytest

FILES = pathlib.Path(os.environ.get("UNIVG_BENCHMARKS", "."))
needs_files = pytest.mark.skipif(
    not os.environ.get("UNIVG_BENCHMARKS"), reason="official files are not part of the project"
)
