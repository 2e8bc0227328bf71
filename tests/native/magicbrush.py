"""MagicBrush: turns of edits of COCO's pictures, with transparent masks of other sizes."""

import pathlib

import cv2
import numpy as np

from tests.native.edits import after, before, png, struct, white_mask, write_parquet

RECORDS = {"train": 5, "validation": 2}


def transparent(number: int, scale: int = 1) -> bytes:
    """The picture, transparent where to edit, with soft edges."""
    picture = np.dstack([before(number), 255 - white_mask(number)])
    height, width = picture.shape[:2]
    return png(cv2.resize(picture, (width * scale, height * scale)))


def row(number: int, turn: int, **more) -> dict:
    source = before(number) if turn == 1 else after(number, turn - 1)
    return {
        "img_id": f"{100 + number}",
        "turn_index": turn,
        "source_img": struct(png(source)),
        "mask_img": struct(transparent(number, scale=turn)),
        "instruction": f"make {number} darker, {turn}",
        "target_img": struct(png(after(number, turn))),
        **more,
    }


def write(root: pathlib.Path) -> dict:
    """Two files of train, one of dev; rows without instruction, mask or target."""
    rows = [row(0, 1), row(0, 2), row(1, 1), row(2, 1, instruction=" "), row(2, 1)]
    write_parquet(root / "data" / "train-00000-of-00002.parquet", rows)
    broken = [row(3, 1, mask_img=struct(png(before(3)))), row(4, 1, target_img=struct(b"x"))]
    write_parquet(root / "data" / "train-00001-of-00002.parquet", [*broken, row(4, 1)])
    write_parquet(root / "data" / "dev-00000-of-00001.parquet", [row(5, 1), row(6, 1)])
    return {"source": str(root / "data")}
