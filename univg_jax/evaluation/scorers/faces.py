"""`identify`: the largest face in a picture as a vector, by an ONNX encoder of faces.

A JSON file (`Spec`) names the detector, which is YuNet, and the encoder, and says how an aligned
face becomes the encoder's input. A face is aligned as ArcFace's are (arXiv 1801.07698): the
similarity that brings eyes, nose and corners of the mouth nearest to where those of a mean face are
in a square of 112 pixels.
"""

import dataclasses
import os
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from data_pipelines.native import faces
from univg_jax import fields
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.scorers.onnx_network import OnnxNetwork, PictureInput
from univg_jax.fields import setting
from univg_jax.files import read_json
from univg_jax.pretrained import local_path

# Eyes, nose and corners of the mouth of the mean face, in a square of MEAN_SIDE pixels.
MEAN_SIDE = 112
MEAN_FACE = (
    *((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366)),
    *((41.5493, 92.3655), (70.7299, 92.2041)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(PictureInput):
    """The keys of a description; the input is that of ArcFace where nothing else is said."""

    mean: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "in the order of the channels")
    std: tuple[float, float, float] = setting((0.5, 0.5, 0.5), "in the same order", above=0)
    detector: str = setting(help="YuNet's ONNX file, beside this one", least=1)
    encoder: str = setting(help="the encoder's ONNX file, beside this one", least=1)
    output: str | None = setting(None, "the name of the output", none="the only one")
    size: int = setting(MEAN_SIDE, "pixels a side of an aligned face", least=16, most=1024)


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
        spec = fields.make(Spec, read_json(file), os.fspath(file))
        detector, encoder = file.parent / spec.detector, file.parent / spec.encoder
        self._detector = faces.Detector(os.fspath(detector))
        self._detector.find(np.zeros((64, 64, 3), np.uint8))
        # Where the files lie is no matter to the digest.
        self._spec = dataclasses.replace(spec, detector="", encoder="")
        self._network = OnnxNetwork(
            encoder,
            self._spec,
            outputs={"vector": spec.output},
            size=(spec.size, spec.size),
            beside=[detector],
        )
        self.digest = self._network.digest
        self._encoded(np.zeros((spec.size, spec.size, 3), np.uint8))

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, " d"] | None:
        """The vector of the face with the largest box; None where no face is found."""
        # Five points in one place are no face that could be aligned.
        found = [f for f in self._detector.find(image) if len(set(f.points)) > 1]
        if not found:
            return None
        largest = max(found, key=lambda face: face.box[2] * face.box[3])
        return self._encoded(aligned(image, largest.points, size=self._spec.size))

    def _encoded(self, face: UInt8[np.ndarray, "s s 3"]) -> Float[np.ndarray, " d"]:
        vector = self._network(self._spec.values(face))["vector"]
        if not vector.size or vector.size != vector.shape[-1]:
            got = list(vector.shape)
            raise UserError(f"{self._network.where} gives {got}: expected one vector of a face")
        return vector.reshape(-1).astype(np.float32)
