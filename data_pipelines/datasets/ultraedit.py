"""UltraEdit: generated edits, free or within a region, as parquet or JSON lines."""

from data_pipelines.native import Dataset, Native, Options
from data_pipelines.native.edits import Columns, PairTable, tables_of

WHAT = "UltraEdit's rows (source_image, edited_image, edit_prompt, mask_image)"


def open_dataset(options: Options) -> dict[str, Native]:
    """The one family."""
    columns = Columns(
        source=("source_image", "source"),
        target=("edited_image", "target_image", "target"),
        instruction=("edit_prompt", "instruction"),
        mask=("mask_image", "mask"),
        caption=("target_caption",),
        ids=("idx",),
    )
    files = tables_of(options.source, what=WHAT)
    return {"ultraedit": PairTable(what=WHAT, files=files, columns=columns, mask_is="white")}


DATASET = Dataset(
    name="ultraedit",
    summary="UltraEdit: 4M generated edits, and 100k within a region",
    tasks=("ie",),
    open=open_dataset,
    size="4M edits of 512x512, 1.5 TB; parts of 500k and 100k",
    license="CC BY 4.0",
    where="Hugging Face: BleachNick/UltraEdit, UltraEdit_500k, UltraEdit_Region_Based_100k",
    layout="FreeForm_*.parquet, RegionBase*.parquet, or a .jsonl that names its pictures",
    quirks=(
        "free edits have no mask (a column without a type, null or NONE): all may change",
        "masks are white where to edit, with gray edges: half is the limit",
        "no validation split: use hold_out",
    ),
    example="--source=UltraEdit/data --hold_out=0.001 --out=data",
)
