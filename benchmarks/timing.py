"""Fair timing on a machine that is never quiet: the same memory pages for all, and rounds in which
runs alternate.

Other load then hits all of them, so ratios hold where seconds do not.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Starts the program again with glibc's huge pages, which it reads at its start only; both XLA
    and PyTorch use it.

    A `GLIBC_TUNABLES` that is set, to anything, stays. JAX is told that this is about CPUs.
    """
    if "GLIBC_TUNABLES" not in os.environ:
        environment = {"JAX_PLATFORMS": "cpu", **os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def best_seconds(runs: Mapping[str, Callable[[], None]], *, rounds: int) -> dict[str, float]:
    """The fastest of `rounds` calls of each run, after one call that compiles and warms up."""
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
