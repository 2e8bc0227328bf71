"""Image operations on records, in numpy: image, masks, depth, boxes and joints move together.

Boxes and joints are relative to width and height, so only a crop moves them, and a resize does not.
Parallel lists (boxes and phrases, masks and expressions) keep their length: what a crop pushes
outside becomes an empty box, an empty mask or an invisible joint.
"""

from typing import Any

import cv2
import numpy as np
from absl import logging
from jaxtyping import Float32, UInt8

Record = dict[str, Any]
Shape = tuple[int, int]  # height, width in pixels

_PLANES = ("image", "source", "edit_mask", "ignore_mask", "depth")


def resize_and_crop(
    record: Record, *, resolution: int | Shape, rng: np.random.Generator | None = None
) -> Record:
    """The image's largest window of the target's aspect ratio, resized to it.

    It lies at a random place (`rng`) or the center (None). `resolution` is the side of a square, or
    (height, width), in pixels. All planes, boxes and joints are moved along.
    """
    target = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    height, width = record["image"].shape[:2]
    if (height, width) == target:
        return record
    h, w = largest_window((height, width), target)
    if rng is None:
        top, left = (height - h) // 2, (width - w) // 2
    else:
        top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    window = crop(record, top=top, left=left, height=h, width=w)
    return resize(window, height=target[0], width=target[1])


def largest_window(image: Shape, target: Shape) -> Shape:
    """The largest (height, width) inside `image` with the aspect ratio of `target`, rounded."""
    (height, width), (h, w) = image, target
    if width * h >= height * w:
        return height, min(width, max(1, round(height * w / h)))
    return min(height, max(1, round(width * h / w))), width


def center_square(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
    """The image's largest square at its center."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def tell_crop(what: str, picture: UInt8[np.ndarray, "h w 3"], *, at_random: bool = False) -> None:
    """Logs the first picture that is not square, where only a square of it is used."""
    height, width = picture.shape[:2]
    if min(height, width) < 0.9 * max(height, width):  # less is not worth a line
        side, place = min(height, width), "at a random place" if at_random else "at its center"
        logging.log_first_n(
            logging.WARNING,
            "%s has %dx%d pixels: the square of %dx%d %s is used; "
            "further pictures that are not square are not reported",
            *(1, what, width, height, side, side, place),
        )


def crop(record: Record, *, top: int, left: int, height: int, width: int) -> Record:
    """The window of `height` x `width` pixels at (`top`, `left`); boxes are clipped to it.

    Raises ValueError for a window that is empty or leaves the image.
    """
    full_height, full_width = record["image"].shape[:2]
    if not (0 <= top < top + height <= full_height and 0 <= left < left + width <= full_width):
        raise ValueError(
            f"crop of {height}x{width} at ({top}, {left}) "
            f"leaves the image of {full_height}x{full_width}"
        )
    scale = np.array([full_width / width, full_height / height], np.float32)
    shift = np.array([left / width, top / height], np.float32)
    rows, columns = slice(top, top + height), slice(left, left + width)
    planes = [name for name in _PLANES if name in record]
    out = record | {name: record[name][rows, columns] for name in planes}
    if "masks" in record:
        out["masks"] = record["masks"][:, rows, columns]
    if "boxes" in record:
        corners = record["boxes"] * np.tile(scale, 2) - np.tile(shift, 2)
        out["boxes"] = np.clip(corners, 0, 1).astype(np.float32)
    if "joints" in record:
        xy, visible = record["joints"][..., :2] * scale - shift, record["joints"][..., 2:]
        visible = visible * ((xy >= 0) & (xy <= 1)).all(axis=-1, keepdims=True)
        out["joints"] = np.concatenate([np.clip(xy, 0, 1), visible], -1).astype(np.float32)
    return out


def resize(record: Record, *, height: int, width: int) -> Record:
    """All planes at another size: images antialiased, masks by majority, depth by nearest pixel.

    Of `ignore_mask`, every pixel that it touches is ignored.
    """
    out = dict(record)
    for name in ("image", "source"):
        if name in record:
            out[name] = resize_image(record[name], height=height, width=width)
    if "edit_mask" in record:
        out["edit_mask"] = _resize_mask(record["edit_mask"], height, width)
    if "ignore_mask" in record:  # what is ignored stays so, even a part of a pixel
        coverage = _coverage(record["ignore_mask"], height, width)
        out["ignore_mask"] = (coverage > 0).astype(np.uint8)
    if "masks" in record:
        masks = [_resize_mask(mask, height, width) for mask in record["masks"]]
        out["masks"] = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
    # A mean of depths on both sides of an edge would be a depth where there is nothing.
    if "depth" in record:
        nearest = cv2.INTER_NEAREST_EXACT
        out["depth"] = cv2.resize(record["depth"], (width, height), interpolation=nearest)
    return out


def resize_image(
    image: UInt8[np.ndarray, "h w 3"], *, height: int, width: int
) -> UInt8[np.ndarray, "h2 w2 3"]:
    """`image` at another size: means over pixel areas where it shrinks, cubic where it grows."""
    if image.shape[:2] == (height, width):
        return image
    return _resize(image, height, width, growing=cv2.INTER_CUBIC)


def _resize_mask(
    mask: UInt8[np.ndarray, "h w"], height: int, width: int
) -> UInt8[np.ndarray, "h2 w2"]:
    return (_coverage(mask, height, width) >= 0.5).astype(np.uint8)


def _coverage(
    mask: UInt8[np.ndarray, "h w"], height: int, width: int
) -> Float32[np.ndarray, "h2 w2"]:
    """How much of each pixel a mask covers, at another size."""
    return _resize(mask.astype(np.float32), height, width, growing=cv2.INTER_LINEAR)


def _resize(pixels: np.ndarray, height: int, width: int, *, growing: int) -> np.ndarray:
    """Means over pixel areas where it shrinks, OpenCV's interpolation `growing` where it grows."""
    shrinks = height <= pixels.shape[0] and width <= pixels.shape[1]
    kind = cv2.INTER_AREA if shrinks else growing
    return cv2.resize(pixels, (width, height), interpolation=kind)


def sample_hole(
    rng: np.random.Generator, *, height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 1"]:
    """A random mask for in- and outpainting, 1 = to fill in.

    Rectangles or brush strokes inside the image, or everything around a window that is kept. It
    covers at least one pixel and never the whole image.
    """
    hole = np.zeros((height, width), np.uint8)
    kind = rng.choice(["rectangles", "strokes", "outside"], p=[0.4, 0.3, 0.3])
    if kind == "rectangles":
        for _ in range(rng.integers(1, 4)):
            (top, bottom), (left, right) = _span(rng, height, 0.2, 0.6), _span(rng, width, 0.2, 0.6)
            hole[top:bottom, left:right] = 1
    elif kind == "strokes":
        for _ in range(rng.integers(1, 4)):
            points = rng.uniform(0, [width, height], size=(rng.integers(2, 6), 2)).astype(np.int32)
            thickness = max(1, round(rng.uniform(0.08, 0.2) * min(height, width)))
            cv2.polylines(hole, [points], isClosed=False, color=1, thickness=thickness)
    else:
        hole[:] = 1
        (top, bottom), (left, right) = _span(rng, height, 0.4, 0.8), _span(rng, width, 0.4, 0.8)
        # Half of the time the window spans the whole height or width: the image then grows along
        # one axis only.
        if rng.random() < 0.5:
            top, bottom, left, right = [(0, height, left, right), (top, bottom, 0, width)][
                rng.integers(2)
            ]
        hole[top:bottom, left:right] = 0
    if hole.all():  # Strokes can cover a tiny image.
        hole[: max(1, height // 4)] = 0
    return hole[..., None]


def _span(rng: np.random.Generator, size: int, least: float, most: float) -> tuple[int, int]:
    """A random interval (start, end) in `size` pixels, `least` to `most` of it long."""
    length = min(size - 1, max(1, round(rng.uniform(least, most) * size))) if size > 1 else 1
    start = int(rng.integers(size - length + 1))
    return start, start + length
