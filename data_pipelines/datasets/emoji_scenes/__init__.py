"""The embedded data set: scenes composed from real artwork that arrives by pip, with exact labels
for every task.

`build` writes it; `family_dir` says where a family lies, for `tfds.builder_from_directory`.
Importing this package imports neither JAX nor TFDS, so that the processes which draw start quickly.
"""

import os
from typing import Any

from etils import epath

VERSION = "1.0.0"  # of the records: any change of what a (seed, split, index) draws moves it


def family_dir(data_dir: str | os.PathLike, family: str) -> epath.Path:
    """The TFDS directory of a built family: one of scenes, edits, puppets, persons."""
    return epath.Path(data_dir) / family


def __getattr__(name: str) -> Any:
    if name in ("build", "EmojiScenes", "FAMILIES"):
        from data_pipelines.datasets.emoji_scenes import builder

        return getattr(builder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
