"""Sweeps: one model at several settings of its sampling."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from univg_jax.errors import UserError, check_name
from univg_jax.fields import parse_literal
from univg_jax.pipeline import Pipeline, with_sampling
from univg_jax.settings import Config, Options, Sampler

SCALES = {"guidance": "text", "image_guidance": "image"}  # keys of `sampling.guidance`
KEYS = (*SCALES, *(field.name for field in dataclasses.fields(Sampler)))


@dataclasses.dataclass(frozen=True)
class Choice:
    """Values of some KEYS."""

    values: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.values.items())

    def check(self, config: Config) -> None:
        """Raises UserError for a value that cannot be."""
        with_sampling(config, self._options(config))

    def applied_to(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline at these settings; guidance is that of every task that has any."""
        return pipeline.with_sampling(self._options(pipeline.config)) if self.values else pipeline

    def _options(self, config: Config) -> Options:
        options: dict[str, Any] = {k: v for k, v in self.values.items() if k not in SCALES}
        scales = {SCALES[k]: v for k, v in self.values.items() if k in SCALES}
        if scales:
            stored = config.to_dict()["sampling"]["guidance"]
            options["guidance"] = {task: {**given, **scales} for task, given in stored.items()}
        return options


def combinations(flags: Sequence[str]) -> list[Choice]:
    """All choices that `KEY=A,B,C` of each flag allow; one of nothing without any.

    Raises UserError for a key that is none of KEYS, with the nearest one, or without values.
    """
    found: dict[str, list[Any]] = {}
    for text in flags:
        name, _, values = text.partition("=")
        check_name(name, KEYS, what="key of --sweep:")
        if not values:
            raise UserError(f"--sweep={text}: expected {name}=A,B,C")
        found[name] = [parse_literal(value) for value in values.split(",")]
    return [Choice(dict(zip(found, values))) for values in itertools.product(*found.values())]
