"""Faces in pictures: where they are, and the square around one.

A face is found by YuNet (a detector of 75,000 parameters by OpenCV's model zoo, MIT), if its ONNX
file is given, or given as a box or as landmarks.
"""

import dataclasses
import functools
import io
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines import transforms
from data_pipelines.native import onnx_files
from univg_jax.errors import UserError

JPEG_QUALITY = 95
_STRIDES = (8, 16, 32)
_OUTPUTS = tuple(
    f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in _STRIDES
)
MIN_SCORE, _MAX_OVERLAP = 0.6, 0.3
# Of the square around five landmarks (eyes, nose, corners of the mouth), in their extent.
_AROUND_POINTS = 2.4

Box = tuple[float, float, float, float]  # x, y, width, height in pixels
Points = tuple[tuple[float, float], ...]  # x, y in pixels


@dataclasses.dataclass(frozen=True, order=True)
class Face:
    """A detected face, of a score in [0, 1].

    `points` are both eyes, the nose and both corners of the mouth, the left one in the picture of
    an upright face first.
    """

    score: float
    box: Box
    points: Points


@dataclasses.dataclass(frozen=True)
class Detector:
    """YuNet from an ONNX file. Picklable: another process loads the file again."""

    path: str

    def find(self, pixels: UInt8[np.ndarray, "h w 3"]) -> list[Face]:
        """The faces of an RGB picture, the best first. Raises UserError for a file of another kind.

        The picture is resized to fit the network's square input, which it fills from the top left.
        """
        session = _session(self.path)
        side = session.get_inputs()[0].shape[-1]
        height, width = pixels.shape[:2]
        scale = side / max(height, width)
        shown = (max(1, round(height * scale)), max(1, round(width * scale)))
        canvas = np.zeros((side, side, 3), np.float32)
        resized = transforms.resize_image(pixels, height=shown[0], width=shown[1])
        canvas[: shown[0], : shown[1]] = resized[..., ::-1]  # BGR, 0 to 255
        feed = {session.get_inputs()[0].name: canvas.transpose(2, 0, 1)[None]}
        try:
            outputs = dict(zip(_OUTPUTS, session.run(list(_OUTPUTS), feed), strict=True))
        except Exception as error:  # onnxruntime's own kinds
            raise UserError(f"{self.path} does not run: {onnx_files.reason(error)}") from None
        faces = [face for stride in _STRIDES for face in _decode(outputs, stride, side)]
        return [
            Face(
                face.score,
                tuple(v / scale for v in face.box),
                tuple((x / scale, y / scale) for x, y in face.points),
            )
            for face in _without_overlap(faces)
        ]

    def largest(self, pixels: UInt8[np.ndarray, "h w 3"]) -> Box:
        """The box of the largest face. Raises UserError if there is none."""
        faces = self.find(pixels)
        if not faces:
            raise UserError("no face was found in the picture")
        return max(faces, key=lambda face: face.box[2] * face.box[3]).box


def _decode(outputs: dict[str, np.ndarray], stride: int, side: int) -> list[Face]:
    """The faces of one stride: a cell is the place of one, and tells center and size from there."""
    cells = side // stride
    score = np.clip(outputs[f"cls_{stride}"], 0, 1) * np.clip(outputs[f"obj_{stride}"], 0, 1)
    score = np.sqrt(score.reshape(-1))
    faces = []
    for cell in np.flatnonzero(score >= MIN_SCORE):
        row, column = divmod(int(cell), cells)
        dx, dy, log_w, log_h = outputs[f"bbox_{stride}"].reshape(-1, 4)[cell].tolist()
        w, h = (math.exp(min(v, 10)) * stride for v in (log_w, log_h))
        x, y = (column + dx) * stride - w / 2, (row + dy) * stride - h / 2
        points = outputs[f"kps_{stride}"].reshape(-1, 5, 2)[cell].tolist()
        places = tuple(((column + px) * stride, (row + py) * stride) for px, py in points)
        faces.append(Face(float(score[cell]), (x, y, w, h), places))
    return faces


def _without_overlap(faces: Sequence[Face]) -> list[Face]:
    kept: list[Face] = []
    for face in sorted(faces, reverse=True):
        if all(_overlap(face.box, other.box) <= _MAX_OVERLAP for other in kept):
            kept.append(face)
    return kept


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


@functools.lru_cache(maxsize=2)
def _session(path: str):
    session = onnx_files.open_session(path, what="YuNet's ONNX file")
    names = {output.name for output in session.get_outputs()}
    shapes = [given.shape for given in session.get_inputs()]
    is_square = len(shapes) == 1 and len(shapes[0]) == 4 and shapes[0][2] == shapes[0][3]
    if not set(_OUTPUTS) <= names or not is_square or not isinstance(shapes[0][3], int):
        listed = ", ".join(sorted(names))
        raise UserError(f"{path} is not YuNet's ONNX file: its outputs are {listed}")
    return session


def box_of(values: Sequence[float]) -> Box:
    """The box of a face from its own x, y, width, height, or from five landmarks x, y.

    Raises UserError for other numbers.
    """
    if not all(math.isfinite(v) and abs(v) < 1e6 for v in values):
        raise UserError(f"a face is at {list(values)}: expected pixels")
    if len(values) == 4 and values[2] > 0 and values[3] > 0:
        return tuple(map(float, values))
    if len(values) == 10:
        points = np.reshape(values, (5, 2)).astype(float)
        low, high = points.min(axis=0), points.max(axis=0)
        side = max(*(high - low), 1.0) * _AROUND_POINTS
        x, y = (low + high - side) / 2
        return (float(x), float(y), float(side), float(side))
    raise UserError(f"a face is at {list(values)}: expected x, y, width, height or 5 points")


def crop(
    pixels: UInt8[np.ndarray, "h w 3"], box: Box | None, *, margin: float
) -> UInt8[np.ndarray, "side side 3"]:
    """The square around a box, with `margin` of its side on each side; the centered one without.

    It is moved, and if need be made smaller, to lie within the picture. Raises UserError for a box
    outside the picture.
    """
    height, width = pixels.shape[:2]
    if box is None:
        return transforms.center_square(pixels)
    x, y, w, h = box
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        shown = " ".join(f"{v:g}" for v in box)
        raise UserError(f"the face's box {shown} is outside its picture of {width} x {height}")
    side = min(max(1, round(max(w, h) * (1 + 2 * margin))), height, width)
    left = min(max(round(x + (w - side) / 2), 0), width - side)
    top = min(max(round(y + (h - side) / 2), 0), height - side)
    return pixels[top : top + side, left : left + side]


def jpeg_bytes(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A crop's file: nearly as it was, at a fifth of a PNG's size."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
