"""The complete configuration with every default, which stages and runs start from."""

import dataclasses

from ml_collections import ConfigDict

from univg_jax import settings


def task(weight: float, *sources: str, **dropout: float) -> ConfigDict:
    """A task's weight and the dataset families it reads; dropout as in `settings.Task`."""
    return ConfigDict(dataclasses.asdict(settings.Task(weight=weight, sources=sources, **dropout)))


def get_config() -> ConfigDict:
    """`settings.Config` as a `ConfigDict`, which keeps the types of its values."""
    return ConfigDict(settings.Config().to_dict())
