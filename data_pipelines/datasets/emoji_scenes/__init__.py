"""The embedded dataset: scenes composed from artwork that comes by pip, with exact labels.

It has records for every task, and needs no native files. Importing this package imports neither
JAX nor TFDS nor the artwork, so that the processes which make records start quickly, and so that
its options are known where the artwork is not installed.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import Dataset, Entry, Native
from univg_jax.errors import needs_extra
from univg_jax.fields import setting

VERSION = "1.0.0"  # of the records: any change of what a (seed, split, index) gives moves it
SPLITS = ("train", "validation", "test")

# The fields of each family's records.
FAMILIES: dict[str, tuple[str, ...]] = {
    "scenes": ("image", "caption", "boxes", "phrases", "masks", "expressions", "depth"),
    "edits": ("source", "image", "instruction", "caption", "edit_mask"),
    "puppets": ("image", "caption", "joints", "boxes"),
    "persons": ("image", "caption", "face", "person"),
}
PICTURES = 4  # of each person
PART = 64  # records that a process draws at a time; whole persons


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of a build, on which every record depends."""

    resolution: int = setting(64, "pixels a side", least=16, unit="pixels")
    num_scenes: int = setting(
        10_000,
        "training scenes; half as many edits, a fifth as many puppets, a twentieth as many persons "
        "of 4 pictures",
        least=1,
        unit="scenes",
    )
    seed: int = setting(0, "of everything that is random", least=0, unit="seed")
    nouns: int = setting(
        0, "use the first so many nouns of the whitelist; 0: all", least=0, unit="nouns"
    )

    def count(self, family: str, split: str) -> int:
        """How many records a family's split has: for evaluation at most 256."""
        if split != "train":
            return min(256, max(16, self.num_scenes // 8 // 4 * 4))
        if family == "persons":
            return max(4, self.num_scenes // 20) * PICTURES
        return max(16, self.num_scenes // {"scenes": 1, "edits": 2, "puppets": 5}[family])


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A family, whose records are drawn from their numbers."""

    options: Options
    family: str
    splits: tuple[str, ...] = SPLITS

    @property
    def fields(self) -> tuple[str, ...]:
        """Those of FAMILIES."""
        return FAMILIES[self.family]

    def parts(self, split: str) -> Sequence[tuple[str, int, int]]:
        """Ranges of numbers."""
        count = self.options.count(self.family, split)
        return [(split, k, min(count, k + PART)) for k in range(0, count, PART)]

    def entries(self, part: tuple[str, int, int]) -> Iterator[Entry]:
        """The numbers of a range."""
        split, start, stop = part
        for index in range(start, stop):
            yield Entry(key=f"{split}/{index}", raw=(split, index))

    def make(self, raw: tuple[str, int]) -> Mapping[str, Any]:
        """Draws a record."""
        from data_pipelines.datasets.emoji_scenes import examples  # imports the artwork

        return examples.example(self.options, self.family, *raw)


def open_families(options: Options) -> dict[str, Native]:
    """The families by name. Raises UserError for options out of range."""
    with needs_extra("quickstart", "to build emoji_scenes"):
        from data_pipelines.datasets.emoji_scenes import examples

    options = examples.check(options)
    return {family: Drawn(options, family) for family in FAMILIES}


DATASET = Dataset(
    name="emoji_scenes",
    summary="composed scenes with exact labels for every task; needs no files",
    tasks=("t2i", "ie", "ip", "lg", "depth", "pose", "seg", "id"),
    options=Options,
    families=tuple(FAMILIES),
    open=open_families,
    version=VERSION,
    size="10,000 scenes by default",
    license="artwork: Twemoji, CC BY 4.0; Personas by Draftbit, CC BY 4.0",
    where="drawn here, from artwork that comes by pip (extra quickstart)",
    example="--resolution=64",
)
