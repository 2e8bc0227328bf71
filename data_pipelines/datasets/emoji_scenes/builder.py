"""Writes the dataset's families as TFDS ArrayRecord folders (`data_pipelines.build`)."""

import dataclasses
import functools

import tensorflow_datasets as tfds
from etils import epath

from data_pipelines import records
from data_pipelines.build import Family, RecordBuilder, build_families
from data_pipelines.datasets.emoji_scenes import FAMILIES, VERSION, Options, examples
from data_pipelines.datasets.emoji_scenes.sprites import WHITELIST


class EmojiScenes(RecordBuilder):
    """Scenes, edits, puppets and persons composed from Twemoji and DiceBear artwork."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=family) for family in FAMILIES]  # noqa: RUF012 (TFDS's own form)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=records.family_features(FAMILIES[self.builder_config.name]),
            license="artwork: Twemoji, CC BY 4.0; Personas by Draftbit, CC BY 4.0",
        )


def build(
    out: epath.PathLike, options: Options, *, progress: bool = True, processes: int | None = None
) -> None:
    """See `emoji_scenes.build`."""
    arguments = examples.Build(
        resolution=options.resolution,
        num_scenes=options.num_scenes,
        seed=options.seed,
        nouns=options.nouns or len(WHITELIST),
    )
    families = [
        Family(
            name=name,
            counts={split: arguments.count(name, split) for split in examples.SPLITS},
            make=functools.partial(examples.make_records, arguments, name),
        )
        for name in FAMILIES
    ]
    build_families(
        out,
        families,
        builder=EmojiScenes,
        arguments={**dataclasses.asdict(arguments), "version": VERSION},
        progress=progress,
        processes=processes,
    )
