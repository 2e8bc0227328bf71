"""`identify`: the largest face in a picture as a vector, by an ONNX encoder of faces.

A JSON file (`Spec`) names the detector, which is YuNet, and the encoder, and says how an aligned
face becomes the encoder's input. A face is aligned as ArcFace's are (arXiv 1801.07698): the
similarity that brings eyes, nose and corners of the mouth nearest to where those of a mean face are
in a square of 112 pixels.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from data_pipelines.native import faces, onnx_files
from univg_jax import fields
from univg_jax.errors import NotFoundError, UserError
from univg_jax.fields import setting
from univg_jax.files import read_json
from univg_jax.pretrained import local_path

# Eyes, nose and corners of the mouth of the mean face, in a square of MEAN_SIDE pixels.
MEAN_SIDE = 112
MEAN_FACE = (
    *((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366)),
    *((41.5493, 92.3655), (70.7299, 92.2041)),
)
LAYOUTS = ("nchw", "nhwc")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The keys of a description."""

    detector: str = setting(help="YuNet's ONNX file, beside this one", least=1)
    encoder: str = setting(help="the encoder's ONNX file, beside this one", least=1)
    size: int = setting(MEAN_SIDE, "pixels a side of an aligned face", least=16, most=1024)
    layout: str = setting("nchw", "order of the input's axes", names=LAYOUTS)
    color: str = setting("rgb", "order of the channels", names=("rgb", "bgr"))
    scale: float = setting(1 / 127.5, "the input is scale x - shift, x in 0..255", above=0)
    shift: float = setting(1.0, "see scale")


def aligned(
    image: UInt8[np.ndarray, "h w 3"], points: Sequence[tuple[float, float]], *, size: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The face of five points (`faces.Face`), turned, scaled and moved to be the mean face.

    Bilinear; black outside of the picture.
    """
    # A point x + iy goes to a (x + iy) + b, where a turns and scales; by least squares.
    here, there = (np.array(p, float) @ [1, 1j] for p in (points, MEAN_FACE))
    there = there * size / MEAN_SIDE
    centered = here - here.mean()
    square = np.vdot(centered, centered).real
    if square == 0:
        raise UserError("a face has five points in one place")
    a = np.vdot(centered, there - there.mean()) / square
    b = there.mean() - a * here.mean()
    matrix = np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)


class FaceEncoder:
    """The scorer of the protocol `identify`, of a description's file. May be called by threads.

    Raises UserError for a description or a model that cannot be used, and NotFoundError for a file
    that is missing.
    """

    def __init__(self, path: str):
        file = local_path(path)
        if not file.is_file():
            raise NotFoundError(f"{file} does not exist: expected a description of an encoder")
        spec = self._spec = fields.make(Spec, read_json(file), os.fspath(file))
        detector, self._path = (os.fspath(file.parent / n) for n in (spec.detector, spec.encoder))
        self._detector = faces.Detector(detector)
        self._detector.find(np.zeros((64, 64, 3), np.uint8))
        self._session = onnx_files.open_session(self._path, what="an encoder of faces", threads=0)
        self._input, self._idle = self._inputs()
        self._encoded(np.zeros((spec.size, spec.size, 3), np.uint8))
        digest = hashlib.sha256()
        for model in (detector, self._path):
            with open(model, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
        # Where the files lie is no matter.
        settings = dataclasses.asdict(dataclasses.replace(spec, detector="", encoder=""))
        digest.update(json.dumps(settings, sort_keys=True).encode())
        self.digest = digest.hexdigest()[:16]

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " d"] | None:
        """The vector of the face with the largest box; None where no face is found."""
        found = self._detector.find(image)
        if not found:
            return None
        largest = max(found, key=lambda face: face.box[2] * face.box[3])
        return self._encoded(aligned(image, largest.points, size=self._spec.size))

    def _inputs(self) -> tuple[str, dict[str, np.ndarray]]:
        """The name of the face's input, and zeros for inputs that mean nothing."""
        with open(self._path, "rb") as file:
            idle = onnx_files.idle_inputs(file.read())
        given = {one.name: one.shape for one in self._session.get_inputs()}
        face, *others = given
        if more := [name for name in others if name not in idle]:
            raise UserError(f"{self._path} has the input {more[0]!r}: expected the face alone")
        return face, {name: np.zeros(given[name], np.float32) for name in others}

    def _encoded(self, face: UInt8[np.ndarray, "s s 3"]) -> Float[np.ndarray, " d"]:
        spec = self._spec
        pixels = face if spec.color == "rgb" else face[..., ::-1]
        values = pixels.astype(np.float32)[None] * np.float32(spec.scale) - np.float32(spec.shift)
        if spec.layout == "nchw":
            values = values.transpose(0, 3, 1, 2)
        try:
            outputs = self._session.run(None, {self._input: values, **self._idle})
        except Exception as error:  # onnxruntime's own kinds
            raise UserError(f"{self._path} does not run: {onnx_files.reason(error)}") from None
        vector = np.asarray(outputs[0]).reshape(-1).astype(np.float32)
        if len(outputs) > 1 or not len(vector) or not np.isfinite(vector).all():
            shapes = [list(np.shape(output)) for output in outputs]
            raise UserError(f"{self._path} gives {shapes}: expected one vector of finite numbers")
        return vector
