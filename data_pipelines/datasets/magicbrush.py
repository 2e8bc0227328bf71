"""MagicBrush: edits by hand of COCO's pictures, in several turns, as parquet."""

from data_pipelines.edits import Columns, PairTable, tables_of
from data_pipelines.native import TEST, CocoOptions, Dataset, Native
from univg_jax.errors import UserError

WHAT = "MagicBrush's rows (img_id, source_img, mask_img, instruction, target_img)"


def open_dataset(options: CocoOptions) -> dict[str, Native]:
    """The one family. Raises UserError for the test split, which is not to be trained on."""
    files = tables_of(options.source, what=WHAT)
    if TEST in files or TEST in options.split:
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
        "older revisions (input_img, output_img, no mask): all of the picture may change",
        "img_id is the picture's id in COCO, by which exclusions find it",
    ),
    example="--source=MagicBrush/data --out=data",
)
