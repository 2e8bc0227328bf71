"""Pictures alone, for in- and outpainting: any folder, zip or tar of them."""

import dataclasses
import os
from collections.abc import Sequence

from data_pipelines.native import TRAIN, Dataset, Native, Options, layouts
from data_pipelines.native.pictures import Pictures, look_into
from univg_jax.errors import NotFoundError

WHAT = "pictures, in a folder, a zip or a tar"


@dataclasses.dataclass(frozen=True)
class Images(Pictures):
    """Pictures whose splits are told by the names of folders and archives."""

    def _of_split(self, names: Sequence[str], split: str) -> set[str]:
        return set(layouts.by_split(names)[split])


def open_dataset(options: Options) -> dict[str, Native]:
    """The one family. Raises NotFoundError where there is nothing."""
    source = options.source
    if not os.path.exists(source):
        raise NotFoundError(f"{source or 'source'} does not exist: expected {WHAT}")
    if not os.path.isdir(source):
        return {"images": Images(WHAT, {TRAIN: (source,)})}
    packed, loose = look_into(source)
    if not packed and not loose:
        raise NotFoundError(f"{source} has no pictures: expected {WHAT}")
    splits = layouts.by_split(packed + loose)
    return {"images": Images(WHAT, dict.fromkeys(splits, (source,)))}


DATASET = Dataset(
    name="images",
    summary="pictures without captions: any folder, zip or tar, for in- and outpainting",
    tasks=("ip",),
    open=open_dataset,
    size="any",
    license="that of the pictures",
    where="your own",
    layout="folders of pictures, zips, tars, tars in tars; train/, val/ and test/ are splits",
    quirks=(
        "what is no picture although its name says so (text, empty files) is left out by name",
        "AppleDouble (._x.jpg), __MACOSX and hidden folders are not pictures",
        "an archive that is unpacked beside itself is read once",
    ),
    example="--source=photos --out=data",
)
