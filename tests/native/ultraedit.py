"""UltraEdit: free edits, whose mask has no type, and edits within a region."""

import json
import pathlib

from tests.native.drawing import write_file
from tests.native.edits import after, before, jpg, png, struct, white_mask, write_parquet

RECORDS = {"train": 5}


def row(number: int, **more) -> dict:
    return {
        "clip_sim_source": 0.5,
        "source_caption": f"picture {number}",
        "target_caption": f"dark picture {number}",
        "idx": number,
        "edit_prompt": f"make {number} darker",
        "source_image": struct(jpg(before(number))),
        "edited_image": struct(jpg(after(number))),
        **more,
    }


def write(root: pathlib.Path) -> dict:
    """Free edits and regions side by side."""
    free = [row(0), row(1), row(2)]
    nulls = ("mask_image", "edit_object")
    write_parquet(root / "FreeForm_0-00000-of-00001.parquet", free, nulls)
    region = [
        row(3, mask_image=struct(png(white_mask(3))), edit_object="disk"),
        row(4, mask_image=struct(png(white_mask(4))), edit_object="disk"),
        row(5, mask_image=struct(png(white_mask(5) * 0)), edit_object="nothing"),
    ]
    write_parquet(root / "RegionBase-00000-of-00001.parquet", region)
    return {"source": str(root)}


def lines(root: pathlib.Path) -> dict:
    """The form of the training script: names of pictures, and masks that may be missing."""
    rows = []
    for number, mask in enumerate(("masks/0.png", "NONE", None)):
        write_file(root / f"images/{number}_s.jpg", jpg(before(number)))
        write_file(root / f"images/{number}_t.jpg", jpg(after(number)))
        rows.append(
            dict(
                source_image=f"images/{number}_s.jpg",
                edited_image=f"images/{number}_t.jpg",
                mask_image=mask,
                edit_prompt=f"make {number} darker",
            )
        )
    write_file(root / "masks/0.png", png(white_mask(0)))
    write_file(root / "edits.jsonl", "\n".join(map(json.dumps, rows)))
    return {"source": str(root / "edits.jsonl")}
