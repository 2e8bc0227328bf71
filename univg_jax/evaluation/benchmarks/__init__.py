"""The benchmarks, one module each, which `evaluation.benchmark.open_benchmark` imports.

To add one, write its module with a `BENCHMARK` (`evaluation.benchmark`) and name it here.
"""

BENCHMARKS = ("emoji_scenes",)  # each the name of a module of this folder
