"""OpenStreetView-5M: street views, for in- and outpainting.

The zips hold numbered folders of `ID.jpg` whose numbers follow no rule: they are found by walking.
Places are codes and numbers (country NA is Namibia), which are no captions, so that train.csv and
test.csv are not read.
"""

import os

from data_pipelines.native import TEST, TRAIN, Dataset, Native, Options
from data_pipelines.native.pictures import Pictures
from univg_jax.errors import NotFoundError

WHAT = "images/train/00.zip (or unpacked) of OSV-5M, with pictures ID.jpg"


def open_dataset(options: Options) -> dict[str, Native]:
    """The one family. Raises NotFoundError where neither split is."""
    sources: dict[str, tuple[str, ...]] = {}
    for split in (TRAIN, TEST):
        for folder in (os.path.join(options.source, "images", split), f"{options.source}/{split}"):
            if os.path.isdir(folder):
                sources.setdefault(split, (folder,))
    if not sources:
        raise NotFoundError(f"{options.source} has no images/train or images/test: expected {WHAT}")
    return {"osv5m": Pictures(WHAT, sources)}


DATASET = Dataset(
    name="osv5m",
    summary="OSV-5M: street views of the whole world, for in- and outpainting",
    tasks=("ip",),
    open=open_dataset,
    size="4.9M pictures of train, 210,000 of test",
    license="CC BY-SA 4.0",
    where="Hugging Face: osv5m/osv5m",
    layout="images/train/00.zip ..., images/test/00.zip ...; or these unpacked",
    quirks=(
        "pictures are found by walking, as the folders in the zips follow no rule",
        "the key ends in the picture's id, by which it can be excluded",
        "no captions: train.csv and test.csv are not needed; no validation split: use hold_out",
    ),
    example="--source=osv5m --out=data",
)
