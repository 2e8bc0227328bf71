"""How a picture lies in the input of a detector, and the way back for boxes and masks.

Pixel (x, y) of the input shows the point ((x - left) / scale_x, (y - top) / scale_y) of the
picture, where a pixel's center lies at half a pixel. Boxes go that way; masks are sampled the other
way, once, at the center of every pixel of the picture.
"""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from univg_jax.evaluation.scorers.detector_spec import Spec


@dataclasses.dataclass(frozen=True)
class Frame:
    """How a picture lies in the input; pairs are of rows and of columns."""

    picture: tuple[int, int]
    input: tuple[int, int]
    scale: tuple[float, float]  # pixels of the input for one of the picture
    start: tuple[int, int]

    def boxes(self, boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
        """Boxes x0 y0 x1 y1 in pixels of the picture, from those in pixels of the input."""
        (scale_y, scale_x), (top, left) = self.scale, self.start
        return (boxes - [left, top, left, top]) / [scale_x, scale_y, scale_x, scale_y]

    def of_input(self, plane: Float[np.ndarray, "mh mw"]) -> Float[np.ndarray, "h w"]:
        """The values at the picture's pixels of a plane that is the whole input at any size."""
        rows, columns = (
            _hats(((np.arange(n) + 0.5) * scale + start) / whole * cells - 0.5, cells, inside=True)
            for n, scale, start, whole, cells in zip(
                self.picture, self.scale, self.start, self.input, plane.shape
            )
        )
        return rows @ plane @ columns.T

    def of_box(
        self, plane: Float[np.ndarray, "mh mw"], box: Float[np.ndarray, "4"]
    ) -> Float[np.ndarray, "h w"]:
        """The same of a plane that is a box of the picture at any size; 0 outside."""
        inside = pixels_of(box, self.picture)
        values = np.zeros(self.picture, np.float32)
        rows, columns = (
            _hats(
                (np.arange(part.start, part.stop) + 0.5 - low) / (high - low) * cells - 0.5,
                cells,
                inside=False,
            )
            for part, low, high, cells in zip(inside, box[[1, 0]], box[[3, 2]], plane.shape)
        )
        values[inside] = rows @ plane @ columns.T
        return values


def _hats(at: Float[np.ndarray, " n"], cells: int, *, inside: bool) -> Float[np.ndarray, "n cells"]:
    """Weights of linear interpolation; beyond the cells the last one's (`inside`), or zero's."""
    at = np.clip(at, 0, cells - 1) if inside else at
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells))).astype(np.float32)


def pixels_of(box: Float[np.ndarray, "4"], picture: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of the pixels whose centers are in a box."""
    x0, y0, x1, y1 = np.ceil(box - 0.5)
    starts = [min(max(int(v), 0), n) for v, n in zip((y0, x0), picture)]
    stops = [min(max(int(v), s), n) for v, s, n in zip((y1, x1), starts, picture)]
    return tuple(map(slice, starts, stops))


def _placed(spec: Spec, height: int, width: int) -> tuple[tuple[int, int], Frame]:
    """The size to which a picture is resized, and where it then is."""
    if spec.resize == "fixed":
        new = whole = spec.size
    elif spec.resize == "letterbox":
        whole = spec.size
        ratio = min(whole[0] / height, whole[1] / width)
        new = tuple(min(max(1, round(n * ratio)), m) for n, m in zip((height, width), whole))
    else:
        ratio = spec.size / min(height, width)
        if spec.longest is not None:
            ratio = min(ratio, spec.longest / max(height, width))
        new = tuple(max(1, round(n * ratio)) for n in (height, width))
        whole = tuple(-(-n // spec.multiple) * spec.multiple for n in new)
    is_centered = spec.resize == "letterbox" and spec.centered
    start = tuple((m - n) // 2 if is_centered else 0 for m, n in zip(whole, new))
    return new, Frame((height, width), whole, (new[0] / height, new[1] / width), start)


def framed(
    image: UInt8[np.ndarray, "h w 3"], spec: Spec
) -> tuple[Float32[np.ndarray, "ih iw 3"], Frame]:
    """The values of a detector's input that shows a picture, and how it lies there."""
    (height, width), frame = _placed(spec, *image.shape[:2])
    if spec.antialias:
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(small)
    else:
        pixels = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    canvas = np.zeros((*frame.input, 3), np.float32)
    if spec.pad is not None:
        canvas[:] = spec.values(np.full(3, spec.pad))
    (top, left) = frame.start
    canvas[top : top + height, left : left + width] = spec.values(pixels)
    return canvas, frame
