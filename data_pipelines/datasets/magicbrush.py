"""MagicBrush: edits by hand of COCO's pictures, in several turns, as parquet."""

import os
import re
from collections.abc import Mapping

from data_pipelines.native import TEST, TRAIN, VALIDATION, CocoOptions, Dataset, Native, tables
from data_pipelines.native.edits import Columns, PairTable
from univg_jax.errors import UserError

WHAT = "MagicBrush's rows (img_id, source_img, mask_img, instruction, target_img)"


def open_dataset(options: CocoOptions) -> dict[str, Native]:
    """The one family. Raises UserError for the test split, which is not to be trained on."""
    files = {} if _is_sessions(options.source) else _by_split(options.source)
    if not files or TEST in files or TEST in options.split:
        raise UserError(
            f"{options.source} has MagicBrush's test split, whose terms forbid to train on it or "
            "to put it online: give the parquet files of train and dev"
        )
    columns = Columns(
        source=("source_img", "input_img"),  # older revisions have the second
        target=("target_img", "output_img"),
        instruction=("instruction",),
        mask=("mask_img",),
        ids=("img_id",),
    )
    return {"magicbrush": PairTable(what=WHAT, files=files, columns=columns, mask_is="transparent")}


def _is_sessions(source: str) -> bool:
    """Whether it is the test split as published: a zip, or what that holds."""
    is_zip = os.path.isfile(source) and source.lower().endswith(".zip")
    return is_zip or os.path.isfile(os.path.join(source, "edit_sessions.json"))


def _by_split(source: str) -> Mapping[str, tuple[str, ...]]:
    """The tables of each split, by their own names; of other names, by the folders they are in."""
    files: dict[str, list[str]] = {}
    for file in tables.open_table(source, what=WHAT).files:
        *folders, base = os.path.abspath(file).lower().split(os.sep)
        word = re.split(r"[-_.]", base)[0]
        if word == "test" or (word not in ("train", "dev") and "test" in folders[-2:]):
            split = TEST
        else:
            split = VALIDATION if word == "dev" else TRAIN
        files.setdefault(split, []).append(file)
    return {split: tuple(files[split]) for split in (TRAIN, VALIDATION, TEST) if split in files}


DATASET = Dataset(
    name="magicbrush",
    summary="MagicBrush: instructions and edits by hand of COCO's pictures, in several turns",
    tasks=("ie",),
    options=CocoOptions,
    open=open_dataset,
    size="8,807 edits of train, 528 of dev; 22 GB",
    license="CC BY 4.0; the test split must not be trained on or put online",
    where="Hugging Face: osunlp/MagicBrush",
    layout="data/train-*.parquet, data/dev-*.parquet",
    quirks=(
        "every turn is an edit: the source of turn k is the target of turn k-1",
        "the mask is a picture that is transparent where to edit, with soft edges (half is the "
        "limit), and may have another size than its source",
        "a source of another size (500x500) gets the target's",
        "older revisions (input_img, output_img, no mask): all of the picture may change",
        "img_id is the picture's id in COCO, by which exclusions find it",
    ),
    example="--source=MagicBrush/data --out=data",
)
