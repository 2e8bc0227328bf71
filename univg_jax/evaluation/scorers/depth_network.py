"""`depth`: how near each pixel of a picture is, by an ONNX network of depth or disparity.

A JSON file beside the network, MODEL.json for MODEL.onnx, has the keys of `Spec`.
"""

import dataclasses
import os

import cv2
import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from PIL import Image

from univg_jax import fields
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.scorers.onnx_network import OnnxNetwork, PictureInput
from univg_jax.fields import setting
from univg_jax.files import read_json
from univg_jax.pretrained import local_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(PictureInput):
    """The keys of a description; the input is normalized as ImageNet's where nothing is said."""

    mean: tuple[float, float, float] = setting((0.485, 0.456, 0.406), "in the order of channels")
    std: tuple[float, float, float] = setting((0.229, 0.224, 0.225), "in the same order", above=0)
    size: tuple[int, int] = setting(
        help="height and width in pixels to which a picture is resized, whatever its shape",
        least=1,
        most=2**14,
    )
    output: str | None = setting(None, "the name of the output", none="the only one")
    larger: str = setting(
        help="what a larger value means: nearer (disparity) or farther (depth)",
        names=("nearer", "farther"),
    )


class DepthNetwork:
    """The scorer of the protocol `depth`, of an ONNX file. May be called by threads.

    Raises UserError for a description or a model that cannot be used, and NotFoundError for a file
    that is missing.
    """

    def __init__(self, path: epath.PathLike) -> None:
        model = local_path(path)
        description = model.with_suffix(".json")
        for file, what in ((model, "an ONNX file"), (description, "a description of the network")):
            if not file.is_file():
                raise NotFoundError(f"{file} does not exist: expected {what}")
        self._spec = fields.make(Spec, read_json(description), os.fspath(description))
        outputs = {"depth": self._spec.output}
        self._network = OnnxNetwork(model, self._spec, outputs=outputs, size=self._spec.size)
        self.digest = self._network.digest
        self(np.zeros((*self._spec.size, 3), np.uint8))

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
        """Larger where it is nearer, in the network's own unit; bilinear at the picture's size."""
        (height, width), size = image.shape[:2], self._spec.size
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC)
        plane = self._network(self._spec.values(np.asarray(resized)))["depth"]
        if plane.ndim < 2 or plane.size != plane.shape[-2] * plane.shape[-1]:
            got = list(plane.shape)
            raise UserError(f"{self._network.where} gives {got}: expected one plane of depths")
        plane = plane.reshape(plane.shape[-2:]).astype(np.float32)
        nearness = plane if self._spec.larger == "nearer" else -plane
        return cv2.resize(nearness, (width, height), interpolation=cv2.INTER_LINEAR)
