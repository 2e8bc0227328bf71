"""DALLE3-1M: pictures by DALL-E 3 with captions of a model, as WebDataset tars.

A sample is a picture (.jpg, .jpeg or .png) and a .json. Its `short_caption` and `long_caption` are
texts, `short_caption2` and `long_caption2` lists that only some rows have, `original_prompt` may
be missing: the types change from row to row, which typed loaders refuse.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import TRAIN, Dataset, Entry, Native, Options, archives, captioned
from data_pipelines.native.tables import listed
from univg_jax.errors import NotFoundError, UserError

KINDS = {
    "short_caption": "short",
    "short_caption2": "short",
    "long_caption": "long",
    "long_caption2": "long",
    "original_prompt": "prompt",
}


@dataclasses.dataclass(frozen=True)
class Dalle3:
    """The tars below a folder, or one tar; a part is a tar."""

    source: str
    fields: tuple[str, ...] = captioned.FIELDS
    splits: tuple[str, ...] = (TRAIN,)

    def parts(self, split: str) -> Sequence[str]:
        """The paths of the tars."""
        if os.path.isfile(self.source):
            return [self.source]
        found = [path for _, path in archives.walk(self.source, archives.TAR_SUFFIXES)]
        if not found:
            raise NotFoundError(
                f"{self.source} has no tar: expected data/data-000000.tar and the following of "
                "DALLE3-1M"
            )
        return found

    def entries(self, part: str) -> Iterator[Entry]:
        """The samples of a tar."""
        name = os.path.basename(part).split(".")[0]
        is_foreign = True
        for key, sample in captioned.samples(part):
            is_foreign = is_foreign and "json" not in sample
            yield Entry(key=f"{name}/{key}", raw=sample, ids=(key,))
        if is_foreign:
            raise UserError(
                f"{part} has no sample with a .json: expected a tar of DALLE3-1M, with "
                "NAME.jpg (or .png) and NAME.json"
            )

    def make(self, raw: Mapping[str, bytes | UserError]) -> dict[str, Any]:
        """The picture with all its captions."""
        suffix = captioned.picture_suffix(raw)
        if suffix is None:
            raise UserError(f"it has no picture, but {listed(raw)}")
        if "json" not in raw:
            raise UserError(f"it has no .json with captions, but {listed(raw)}")
        row = captioned.row_of(raw)
        return captioned.record(
            raw[suffix], [(kind, row.get(name)) for name, kind in KINDS.items()]
        )


def open_dataset(options: Options) -> dict[str, Native]:
    """The one family."""
    return {"dalle3": Dalle3(options.source)}


DATASET = Dataset(
    name="dalle3",
    summary="DALLE3-1M: generated pictures with short and long captions",
    tasks=("t2i", "ip"),
    open=open_dataset,
    size="1M pictures, 69 tars of 5-10 GB",
    license="MIT",
    where="Hugging Face: ProGamerGov/synthetic-dataset-1m-dalle3-high-quality-captions",
    layout="data/data-000000.tar ...: WebDataset, NAME.jpg|.jpeg|.png and NAME.json",
    quirks=(
        "all of short_caption, short_caption2, long_caption, long_caption2 (lists in some rows) "
        "and original_prompt are kept, as the kinds short, long and prompt",
        "JPEG and PNG mixed within a tar; the types of fields change from row to row",
        "no validation split: use hold_out",
    ),
    example="--source=dalle3/data --out=data",
)
