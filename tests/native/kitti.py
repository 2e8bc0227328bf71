"""KITTI depth in miniature: two dates of different sizes, sparse depth beyond 65 m."""

import pathlib

import numpy as np

from tests.native import shapes

RECORDS = {"train": 4, "validation": 1}
DRIVES = {  # split, size, frames with depth; the raw release has frames 0 to 11
    "2011_09_26_drive_0001_sync": ("train", (124, 38), (5, 6)),
    "2011_09_28_drive_0002_sync": ("train", (122, 37), (5,)),
    "2011_10_03_drive_0027_sync": ("val", (123, 40), (5,)),
}


def levels(width: int, height: int, seed: int) -> np.ndarray:
    """Every sixth pixel has depth, of a road that goes on to 80 m; the upper third has none."""
    rng = np.random.default_rng(seed)
    meters = np.linspace(80, 4, height)[:, None] * np.ones((1, width))
    known = rng.random((height, width)) < 1 / 6
    known[: height // 3] = False
    return (meters * 256 * known).round().astype(np.uint16)


def write(root: pathlib.Path) -> dict:
    for number, (drive, (split, size, frames)) in enumerate(DRIVES.items()):
        for camera in ("image_02", "image_03"):
            if camera == "image_03" and number:
                continue
            raw = root / "raw" / drive[:10] / drive / camera / "data"
            raw.mkdir(parents=True, exist_ok=True)
            for frame in range(12):
                picture = shapes.ground(*size, seed=100 * number + frame)
                is_jpeg = number == 1  # as some convert them, to save space
                content = shapes.jpeg(picture) if is_jpeg else shapes.png(picture)
                (raw / f"{frame:010d}{'.jpg' if is_jpeg else '.png'}").write_bytes(content)
            depth = root / split / drive / "proj_depth" / "groundtruth" / camera
            depth.mkdir(parents=True, exist_ok=True)
            for frame in frames[: 1 if camera == "image_03" else None]:
                (depth / f"{frame:010d}.png").write_bytes(shapes.png(levels(*size, seed=frame)))
    return {"source": str(root)}
