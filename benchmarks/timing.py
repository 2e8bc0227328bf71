"""Fair timing on a busy machine: the same memory pages for all, and runs that alternate.

Other load then slows all of them, so ratios hold where seconds do not.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
    """Starts the program again with huge pages, unless `GLIBC_TUNABLES` is set to anything.

    glibc, whose memory both XLA and PyTorch use, reads the variable at the start of a process only.
    JAX then uses the CPU, which is what these benchmarks compare on.
    """
    if "GLIBC_TUNABLES" not in os.environ:
        environment = {"JAX_PLATFORMS": "cpu", **os.environ, "GLIBC_TUNABLES": HUGE_PAGES}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def best_seconds(runs: Mapping[str, Callable[[], None]], *, rounds: int) -> dict[str, float]:
    """The fastest of `rounds` calls of each run, after one call that compiles and warms up.

    Each call that counts comes after one of the same run that does not, as in a loop of steps: what
    another program leaves in the caches and in the allocator costs the next call up to a fifth.
    """
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
