"""UniVG in JAX: train, evaluate and serve one generalist image model."""

from typing import Any

from univg_jax.version import __version__

__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    # Experiments import this package, and must load without JAX.
    if name == "Pipeline":
        from univg_jax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
