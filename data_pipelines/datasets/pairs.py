"""Any edits: a table with a picture before, one after, an instruction, and perhaps a mask."""

import dataclasses
from typing import get_args

from data_pipelines.native import Dataset, Native
from data_pipelines.native import Options as BaseOptions
from data_pipelines.native.edits import Columns, MaskIs, PairTable, tables_of
from univg_jax.fields import setting

WHAT = "rows of edits (source, target, instruction)"
SOURCES = (
    *("source", "source_image", "source_img", "input_image", "original_image", "input_img"),
    *("before", "input", "image_before"),
)
TARGETS = (
    *("target", "target_image", "target_img", "edited_image", "output_image", "output_img"),
    *("after", "output", "image_after"),
)
INSTRUCTIONS = ("instruction", "edit_prompt", "edit", "prompt", "edit_instruction", "text")
MASKS = ("mask", "mask_image", "mask_img", "edit_mask")
CAPTIONS = ("caption", "target_caption", "output_caption", "edited_prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """Which columns are what, and where pictures lie."""

    before: str = setting("", "column of the picture before; none: by its usual names")
    after: str = setting("", "column of the picture after; none: by its usual names")
    instruction: str = setting("", "column of the instruction; none: by its usual names")
    mask: str = setting("", "column of the mask; none: by its usual names, if there is one")
    mask_is: str = setting(
        "white", "what a mask is where the picture changes", names=get_args(MaskIs)
    )
    folder: str = setting(
        "", "folder, zip or tar of the pictures that a table names; none: beside it", is_path=True
    )


def open_dataset(options: Options) -> dict[str, Native]:
    """The one family."""
    columns = Columns(
        source=(options.before,) if options.before else SOURCES,
        target=(options.after,) if options.after else TARGETS,
        instruction=(options.instruction,) if options.instruction else INSTRUCTIONS,
        mask=(options.mask,) if options.mask else MASKS,
        caption=CAPTIONS,
        ids=("id", "key", "idx", "img_id"),
    )
    native = PairTable(
        what=WHAT,
        files=tables_of(options.source, what=WHAT),
        columns=columns,
        mask_is=options.mask_is,
        folder=options.folder,
    )
    return {"pairs": native}


DATASET = Dataset(
    name="pairs",
    summary="any edits: a table of pictures before and after, with instructions",
    tasks=("ie",),
    options=Options,
    open=open_dataset,
    size="any",
    license="that of the collection",
    where="your own",
    layout="a csv, tsv, jsonl, json or parquet with pictures, or with their names (folder=)",
    quirks=(
        "columns are found by their usual names, or given by before=, after=, instruction=, mask=",
        "masks are white, black, transparent, opaque or colored (of a palette: any index but 0) "
        "where the picture changes (mask_is=)",
        "a source of another scale gets the target's size; pairs of different shapes are left out "
        "by name",
    ),
    example="--source=pairs.csv --folder=pictures --hold_out=0.02 --out=data",
)
