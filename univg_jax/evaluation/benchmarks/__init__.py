"""The benchmarks, one module each, which `evaluation.benchmark.open_benchmark` imports.

To add one, write its module here, with a `BENCHMARK` (`evaluation.official`), or with `Settings`
and `benchmark(settings)`.
"""

import pkgutil

BENCHMARKS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
