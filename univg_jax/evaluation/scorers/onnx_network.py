"""A network of pictures that somebody exported to ONNX, and what its file does not say.

A JSON file describes it. It has the keys of `PictureInput`, and more that are of the kind of
network: a detector, or an encoder of faces.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32, Num

from data_pipelines.native import onnx_files
from univg_jax.errors import UserError, quote, suggestion
from univg_jax.evaluation.scorers.network import digest_of
from univg_jax.fields import setting
from univg_jax.pretrained import local_path

# Where the channels, rows and columns of a picture are.
LAYOUTS = {"nchw": (1, 2, 3), "nhwc": (3, 1, 2), "chw": (0, 1, 2), "hwc": (2, 0, 1)}
_INPUT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureInput:
    """How pixels become a network's only input."""

    input: str | None = setting(None, "the input's name", none="the first one")
    layout: str = setting("nchw", "order of the input's axes", names=tuple(LAYOUTS))
    color: str = setting("rgb", "order of the channels", names=("rgb", "bgr"))
    scale: float = setting(1 / 255, "the input is (scale x - mean) / std, x in 0..255", above=0)
    mean: tuple[float, float, float] = setting((0.0, 0.0, 0.0), "in the order of the channels")
    std: tuple[float, float, float] = setting((1.0, 1.0, 1.0), "in the same order", above=0)

    def values(self, pixels: Num[np.ndarray, "*any 3"]) -> Float32[np.ndarray, "*any 3"]:
        """Normalized values of RGB pixels in 0..255, in the order of the input's channels."""
        ordered = pixels if self.color == "rgb" else pixels[..., ::-1]
        scaled = ordered.astype(np.float32) * np.float32(self.scale)
        return (scaled - np.float32(self.mean)) / np.float32(self.std)

    def arranged(self, values: Float32[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "..."]:
        """`values` of one picture with the input's axes."""
        axes = values if "hwc" in self.layout else values.transpose(2, 0, 1)
        return np.ascontiguousarray(axes[None] if self.layout.startswith("n") else axes)


class OnnxNetwork:
    """`network(picture)` -> the outputs by their parts. May be called by threads.

    `where` is its file, for errors. `digest` is of the model with the files that large weights have
    of their own, of its description, and of what lies beside it.
    """

    def __init__(
        self,
        path: epath.PathLike,
        spec: PictureInput,
        *,
        outputs: Mapping[str, str | None],
        size: tuple[int, int] | None,
        beside: Sequence[pathlib.Path] = (),
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        """Opens a file; `outputs` are names in it by part, and `size` is None where it varies.

        An output without a name is the only one. `beside` are more files that the answers depend
        on, and `providers` onnxruntime's. Raises UserError where the file and its description
        `spec` do not fit together.
        """
        model = local_path(path)
        self.where = os.fspath(model)
        what = "an ONNX file that onnxruntime runs"
        self._session = onnx_files.open_session(
            self.where, what=what, threads=0, providers=providers
        )
        self._spec, self._outputs = spec, {}
        self._input, self._dtype = _checked_input(self._session, spec, size, self.where)
        self._idle = _idle_inputs(self._session, self._input, self.where)
        names = [item.name for item in self._session.get_outputs()]
        for part, name in outputs.items():
            if name is None and len(names) > 1:
                raise UserError(f"{self.where} has the outputs {', '.join(names)}: expected one")
            self._outputs[part] = name = name or names[0]
            if name not in names:
                near = suggestion(name, names)
                raise UserError(f"{self.where} has no output {quote(name)} ({part}){near}")
        files = sorted(file for file in model.parent.iterdir() if file.name.startswith(model.name))
        settings = json.dumps(dataclasses.asdict(spec), sort_keys=True)
        self.digest = digest_of([*files, *beside], settings)

    def __call__(self, values: Float32[np.ndarray, "h w 3"]) -> dict[str, np.ndarray]:
        """What it makes of `PictureInput.values`. Raises UserError where that is not finite."""
        picture = self._spec.arranged(values).astype(self._dtype)
        try:
            arrays = self._session.run(
                list(self._outputs.values()), {self._input: picture, **self._idle}
            )
        except Exception as error:  # onnxruntime's own kinds
            raise UserError(f"{self.where} does not run: {onnx_files.reason(error)}") from None
        parts = dict(zip(self._outputs, map(np.asarray, arrays)))
        for part, array in parts.items():
            if not np.isfinite(array).all():
                raise UserError(f"{self.where}: {part} are not finite")
        return parts


def _idle_inputs(session: Any, name: str, where: str) -> dict[str, np.ndarray]:
    """Zeros for the inputs beside `name`, which no node takes. Raises UserError for others."""
    others = [one for one in session.get_inputs() if one.name != name]
    if not others:
        return {}
    with open(where, "rb") as file:
        idle = onnx_files.idle_inputs(file.read())
    for one in others:
        is_plain = one.type == "tensor(float)" and all(isinstance(n, int) for n in one.shape)
        if one.name not in idle or not is_plain:
            raise UserError(
                f"{where} has the input {one.name!r} beside {name!r}: "
                "expected a model that is given the picture alone"
            )
    return {one.name: np.zeros(one.shape, np.float32) for one in others}


def _checked_input(
    session: Any, spec: PictureInput, size: tuple[int, int] | None, where: str
) -> tuple[str, Any]:
    """The input's name and dtype."""
    inputs = {item.name: item for item in session.get_inputs()}
    name = spec.input or next(iter(inputs))
    if name not in inputs:
        raise UserError(f"{where} has no input {quote(name)}{suggestion(name, inputs)}")
    given = inputs[name]
    if given.type not in _INPUT_TYPES:
        raise UserError(f"{where}: its input is a {given.type}: expected {', '.join(_INPUT_TYPES)}")
    is_plain = (spec.scale, spec.mean, spec.std) == (1, (0, 0, 0), (1, 1, 1))
    if given.type == "tensor(uint8)" and not is_plain:
        raise UserError(f"{where} takes bytes: its description has to say scale 1, no mean, no std")
    if len(given.shape) != len(spec.layout):
        raise UserError(f"{where} takes {given.shape}, which is not layout {spec.layout!r}")
    channels, *sides = (given.shape[axis] for axis in LAYOUTS[spec.layout])
    if isinstance(channels, int) and channels != 3:
        raise UserError(f"{where} takes {given.shape}, without 3 channels in {spec.layout!r}")
    for side, wanted in zip(sides, size or (None, None)):
        if isinstance(side, int) and side != wanted:
            takes, gives = (" x ".join(map(str, pair)) for pair in (sides, size or ("any size",)))
            raise UserError(
                f"{where} takes pictures of {takes} alone, but its description gives {gives}"
            )
    return name, _INPUT_TYPES[given.type]
