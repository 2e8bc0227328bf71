"""The embedded dataset: scenes composed from artwork that comes by pip, with exact labels.

It has records for every task, and needs no native files. Importing this package imports neither
JAX nor TFDS nor the artwork, so that the processes which make records start quickly, and so that
its options are known where the artwork is not installed.
"""

import dataclasses
import functools

from etils import epath

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of a build, on which every record depends."""

    resolution: int = setting(64, "pixels a side", least=16)
    num_scenes: int = setting(
        10_000,
        "training scenes; half as many edits, a fifth as many puppets, a twentieth as many persons "
        "of 4 pictures",
        least=1,
    )
    seed: int = setting(0, "of everything that is random", least=0)
    nouns: int = setting(0, "use the first so many nouns of the whitelist; 0: all", least=0)

    def count(self, family: str, split: str) -> int:
        """How many records a family's split has: for evaluation at most 256."""
        if split != "train":
            return min(256, max(16, self.num_scenes // 8 // 4 * 4))
        if family == "persons":
            return max(4, self.num_scenes // 20) * PICTURES
        return max(16, self.num_scenes // {"scenes": 1, "edits": 2, "puppets": 5}[family])


def build(
    out: epath.PathLike, options: Options = Options(), *, processes: int | None = None
) -> None:
    """Builds the families that are not complete yet, each into a folder of its name below `out`.

    The records do not depend on `processes` (None: one a core).

    Raises UserError for options out of range, and if `out` holds a build by other options.
    """
    from data_pipelines.build import Family, build_families  # imports TFDS

    with needs_extra("quickstart", "to build emoji_scenes"):
        from data_pipelines.datasets.emoji_scenes import examples  # imports the artwork

    options = examples.check(options)
    families = [
        Family(
            name=name,
            fields=fields,
            counts={split: options.count(name, split) for split in SPLITS},
            make=functools.partial(examples.make_records, options, name),
        )
        for name, fields in FAMILIES.items()
    ]
    build_families(
        out,
        families,
        dataset="emoji_scenes",
        version=VERSION,
        description="Scenes, edits, puppets and persons from Twemoji and DiceBear artwork.",
        license="artwork: Twemoji, CC BY 4.0; Personas by Draftbit, CC BY 4.0",
        arguments=dataclasses.asdict(options),
        processes=processes,
    )
