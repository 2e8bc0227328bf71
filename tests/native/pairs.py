"""Edits of one's own: a csv that names its pictures in a zip."""

import pathlib

from tests.native.drawing import write_file, write_zip
from tests.native.edits import after, before, jpg, png, white_mask

RECORDS = {"train": 3}


def write(root: pathlib.Path) -> dict:
    """Masks black where to edit; a row without its picture, and one of two sizes."""
    files: dict[str, bytes] = {}
    lines = ["before,after,what,mask"]
    for k in range(5):
        files[f"p/{k}a.jpg"] = jpg(before(k))
        files[f"p/{k}b.jpg"] = jpg(after(k if k != 4 else 0))
        files[f"p/{k}m.png"] = png(255 - white_mask(k))
        mask = f"p/{k}m.png" if k else ""
        lines.append(f'p/{k}a.jpg,p/{k}b.jpg,"make {k}, darker",{mask}')
    del files["p/3b.jpg"]
    write_zip(root / "pictures.zip", files)
    write_file(root / "pairs.csv", "\r\n".join(lines))
    return {
        "source": str(root / "pairs.csv"),
        "folder": str(root / "pictures.zip"),
        "instruction": "what",
        "mask_is": "black",
    }
