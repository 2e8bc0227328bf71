"""Tiny datasets in their native layouts, with their traps, all drawn and invented here.

`tests/native/NAME.py` has `write(root)`, which returns the options of a build, and `RECORDS`, how
many records of each split must come out. They need no pytest.
"""

import importlib
import pathlib
import pkgutil


def write(name: str, root: pathlib.Path) -> dict:
    """Writes the native files of a dataset below `root`; gives the options of its build."""
    return importlib.import_module(f"tests.native.{name}").write(root)


def write_all(root: pathlib.Path) -> dict[str, dict]:
    """Writes those of every dataset, each in a folder of its name; gives their options by name."""
    modules = (
        importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)
    )
    names = [module.__name__.rpartition(".")[2] for module in modules if hasattr(module, "RECORDS")]
    return {name: write(name, root / name) for name in names}
