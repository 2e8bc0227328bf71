"""DATASETS: the datasets that can be built, by name. Each module and package here has one."""

import importlib
import pkgutil

from data_pipelines.native import Dataset

DATASETS: dict[str, Dataset] = {
    found.name: found
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
    for found in [importlib.import_module(f"{__name__}.{module.name}").DATASET]
}
