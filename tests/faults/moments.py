"""`univg`, which says when a moment of its work begins: `python -m tests.faults.moments NAME ...`.

What begins goes on as it would: whoever reads the line may strike then.
"""

import functools
import importlib
import os
import runpy
import sys

MOMENTS = {  # the function whose first call the moment is
    "compile": "univg_jax.training.loop:Programs.compile",
    "restore": "univg_jax.checkpoint:read_state",
    "step": "univg_jax.training.loop:PendingMetrics.put",
    "validate": "univg_jax.training.loop:validation_losses",
    "sample": "univg_jax.pipeline:Pipeline.generate_batch",
    "save": "univg_jax.checkpoint:Checkpointer.save",
    "image": "univg_jax.evaluation.job:_write",
    "export": "univg_jax.files:write_folder",
}


def line_of(name: str) -> str:
    """What is printed when the moment comes."""
    return f"MOMENT: {name}"


def announce(name: str) -> None:
    """Replaces the moment's function by one that says that it is called, the first time."""
    module, _, path = MOMENTS[name].partition(":")
    *owners, last = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function, calls = getattr(owner, last), []

    @functools.wraps(function)
    def announced(*args: object, **options: object) -> object:
        if not calls:
            calls.append(1)
            print(line_of(name), flush=True)
        return function(*args, **options)

    setattr(owner, last, announced)


if __name__ == "__main__":
    name = sys.argv.pop(1)
    if name == "compile":  # or it would be over at once
        os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
    else:
        from tests.faults import cached
        from univg_jax import distributed

        distributed.start = cached.start
    announce(name)
    runpy.run_module("univg_jax", run_name="__main__")
