"""Tiny datasets in their native layouts, with their traps, all drawn and invented here.

`tests/native/NAME.py` has `write(root)`, which returns the options of a build, and `RECORDS`, how
many records of each split must come out. They need no pytest.
"""

import importlib
import pathlib


def write(name: str, root: pathlib.Path) -> dict:
    """Writes the native files of a dataset below `root`; gives the options of its build."""
    return importlib.import_module(f"tests.native.{name}").write(root)
