"""DATASETS: the datasets that can be built.

Each is a module or package here with `Options`, `FAMILIES` and `build`, none of which import what
only a build needs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from data_pipelines.datasets import emoji_scenes
from univg_jax import fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset that can be built.

    `options` is a frozen dataclass of `fields.setting`s with defaults: the arguments of a build.
    `build(out, options)` writes the families that are not complete
    yet below `out`, a local folder or a bucket. It raises UserError for options out of range, and
    if `out` holds a build by other options.
    """

    name: str
    summary: str
    options: type
    families: tuple[str, ...]
    build: Callable[..., None]

    def make_options(self, values: Mapping[str, Any], *, where: str = "data.build") -> Any:
        """`values` as `options`, with the defaults of those left out.

        `where` they were given is part of messages. Raises UserError for an unknown name, with the
        nearest one, and for a value of another type or out of range.
        """
        return fields.make(self.options, values, where)


_DATASETS = (
    Dataset(
        name="emoji_scenes",
        summary="composed scenes with exact labels for every task; needs no files",
        options=emoji_scenes.Options,
        families=tuple(emoji_scenes.FAMILIES),
        build=emoji_scenes.build,
    ),
)
DATASETS = {dataset.name: dataset for dataset in _DATASETS}
