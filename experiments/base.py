"""The complete configuration with every default, which stages and runs start from."""

import dataclasses
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from univg_jax import settings


def task(weight: float, *sources: str | Mapping[str, float], **dropout: float) -> ConfigDict:
    """A task's weight and the dataset families it reads, or one {family: weight}; dropout as in
    `settings.Task`.
    """
    is_weighted = len(sources) == 1 and isinstance(sources[0], Mapping)
    chosen = settings.Task(weight=weight, sources=sources[0] if is_weighted else sources, **dropout)
    return ConfigDict(dataclasses.asdict(chosen), allow_dotted_keys=True)


def get_config() -> ConfigDict:
    """`settings.Config` as a `ConfigDict`, which keeps the types of its values."""
    return ConfigDict(settings.Config().to_dict())


def multitask(scale: float = 1.0) -> dict[str, ConfigDict]:
    """Stage II's tasks in the paper's shares. It publishes one for the three auxiliary tasks; their
    equal split is our choice.

    Depth, pose and segmentation are sampled without guidance, so they need no dropout.
    """
    always = dict(drop_text=0.0, drop_image=0.0, drop_both=0.0)
    return dict(
        t2i=task(0.28 * scale, "scenes"),
        ie=task(0.47 * scale, "edits"),
        ip=task(0.20 * scale, "scenes"),
        lg=task(0.02 * scale, "scenes"),
        depth=task(0.01 * scale, "scenes", **always),
        pose=task(0.01 * scale, "puppets", **always),
        seg=task(0.01 * scale, "scenes", **always),
    )


def with_identity() -> dict[str, ConfigDict]:
    """Stage III's tasks: identity beside all of Stage II, one to one."""
    return dict(**multitask(0.5), id=task(0.5, "persons"))


def by_rows(
    stages: Sequence[Mapping[str, ConfigDict]], *, steps: Sequence[float]
) -> dict[str, dict[str, float]]:
    """task -> source -> weight for `conditioning.fit_on`: the rows of all stages together."""
    total: dict[str, dict[str, float]] = {}
    for mixture, count in zip(stages, steps, strict=True):
        for name, one in mixture.items():
            weights = total.setdefault(name, {})
            for source in one.sources:
                rows = count * one.weight / len(one.sources)
                weights[source] = weights.get(source, 0.0) + rows
    return total
