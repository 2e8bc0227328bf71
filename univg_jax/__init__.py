"""UniVG in JAX: train, evaluate and serve one generalist image model."""

from typing import TYPE_CHECKING, Any

from univg_jax.version import __version__

if TYPE_CHECKING:
    from univg_jax.pipeline import Pipeline
    from univg_jax.result import Result

__all__ = ["Pipeline", "Result", "__version__"]


def __getattr__(name: str) -> Any:
    # Experiments import this package, and must load without JAX.
    if name == "Pipeline":
        from univg_jax.pipeline import Pipeline

        return Pipeline
    if name == "Result":
        from univg_jax.result import Result

        return Result
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
