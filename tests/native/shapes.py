"""Drawn pictures and shapes for the fixtures of labels: what is drawn is what is labeled."""

import io

import cv2
import numpy as np
from PIL import Image

# Where a standing person's 17 joints are, in a box of 1 x 1.
STANDING = np.array(
    [
        *[[0.50, 0.08], [0.54, 0.06], [0.46, 0.06], [0.58, 0.08], [0.42, 0.08]],
        *[[0.66, 0.22], [0.34, 0.22], [0.76, 0.38], [0.24, 0.38], [0.82, 0.52], [0.18, 0.52]],
        *[[0.60, 0.54], [0.40, 0.54], [0.62, 0.74], [0.38, 0.74], [0.64, 0.94], [0.36, 0.94]],
    ]
)
_LIMBS = ((5, 7), (7, 9), (6, 8), (8, 10), (11, 13), (13, 15), (12, 14), (14, 16))


def ground(width: int, height: int, seed: int) -> np.ndarray:
    """A smooth background, another one for each seed."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(60, 230, (2, 2, 3)).astype(np.uint8)
    return cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR)


def draw_person(picture: np.ndarray, box: tuple[int, int, int, int], color=(40, 40, 160)) -> None:
    """A person that fills the box x, y, width, height."""
    x, y, w, h = box
    at = (STANDING * (w, h) + (x, y)).round().astype(int)
    thick = max(2, w // 6)
    trunk = at[[5, 6, 12, 11]]
    cv2.fillPoly(picture, [trunk], color)
    for a, b in _LIMBS:
        cv2.line(picture, at[a].tolist(), at[b].tolist(), color, thick)
    cv2.circle(picture, at[0].tolist(), max(2, h // 12), (190, 150, 120), -1)


def keypoints(box: tuple[int, int, int, int], hidden=(), unlabeled=()) -> list[int]:
    """The 51 numbers of COCO for `draw_person`: pixel indices, and 0, 0, 0 for no label."""
    x, y, w, h = box
    values = []
    for k, (px, py) in enumerate(STANDING * (w, h) + (x, y)):
        seen = 0 if k in unlabeled else 1 if k in hidden else 2
        values += [round(px), round(py), seen] if seen else [0, 0, 0]
    return values


def jpeg(pixels: np.ndarray, quality: int = 92) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def runs(mask: np.ndarray) -> list[int]:
    """A mask as COCO's uncompressed RLE: by columns, beginning with a run of zeros."""
    flat = np.concatenate([[0], mask.T.ravel(), [2]])
    ends = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], ends])).tolist()
