"""The benchmarks, one module each; a module is imported when its benchmark is opened.

To add one, write its module with a `BENCHMARK` (`evaluation.benchmark`) and name it here.
"""

import importlib

from univg_jax.errors import check_name
from univg_jax.evaluation.benchmark import Benchmark

BENCHMARKS = ("emoji_scenes",)  # each the name of a module of this folder


def open_benchmark(name: str) -> Benchmark:
    """The benchmark called `name`. Raises UserError if there is none, with the nearest name."""
    check_name(name, BENCHMARKS, what="benchmark")
    return importlib.import_module(f"{__name__}.{name}").BENCHMARK
