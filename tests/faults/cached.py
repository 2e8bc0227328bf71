"""`univg`, with programs of several processes on CPUs from the compilation cache.

The library leaves it off there, because JAX lets only process 0 write, which would then be ahead of
the others. Here all write what they compile: a run that is killed often compiles once.
"""

import runpy
import types

import jax
from jax._src import compiler
from jax.experimental.compilation_cache import compilation_cache

from univg_jax import distributed

join = distributed.start


def start(**flags: object) -> None:
    join(**flags)
    if distributed.is_one_of_several():
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()  # it remembers that it was off
        client = compiler.distributed.global_state.client
        writer = types.SimpleNamespace(process_id=0, client=client)
        compiler.distributed = types.SimpleNamespace(global_state=writer)


if __name__ == "__main__":
    distributed.start = start
    runpy.run_module("univg_jax", run_name="__main__")
