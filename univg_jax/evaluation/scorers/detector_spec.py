"""The description of a detector: the keys of the JSON file that stands beside its ONNX file."""

import dataclasses
import os
from collections.abc import Mapping

from etils import epath

from univg_jax import fields
from univg_jax.errors import UserError, quote, suggestion
from univg_jax.evaluation.scorers.onnx_network import PictureInput
from univg_jax.fields import setting
from univg_jax.files import read_json

# The outputs of each kind of model by their parts, and those that it may have beside.
PARTS = {
    "detr": ("logits", "boxes"),
    "yolo": ("rows",),
    "mask_rcnn": ("boxes", "labels", "scores"),
    "mask2former": ("logits", "masks"),
}
MORE_PARTS = {"detr": ("masks",), "yolo": ("prototypes",), "mask_rcnn": ("masks",)}
# What a row of YOLO has beside the scores of all classes.
ROWS = {"cxcywh_classes": 4, "cxcywh_object_classes": 5, "xyxy_score_class": 6}
# Keys that mean something with certain values of another key only.
_BELONGS = {
    "longest": ("resize", ("shortest_side",)),
    "multiple": ("resize", ("shortest_side",)),
    "centered": ("resize", ("letterbox",)),
    "pad": ("resize", ("letterbox", "shortest_side")),
    "scores": ("output", ("detr",)),
    "rows": ("output", ("yolo",)),
    "transposed": ("output", ("yolo",)),
    "normalized": ("output", ("yolo", "mask_rcnn")),
    "mask_frame": ("output", ("mask_rcnn",)),
    "mask_values": ("output", ("detr", "yolo", "mask_rcnn")),
    "mask_threshold": ("output", ("detr", "yolo", "mask_rcnn")),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec(PictureInput):
    """The keys of a description."""

    output: str = setting(help="what the outputs mean", names=tuple(PARTS))
    outputs: Mapping[str, str] = setting(
        help="the outputs' names in the file, by part: "
        + "; ".join(
            f"{kind}: {', '.join(parts)}"
            + "".join(f" [{part}]" for part in MORE_PARTS.get(kind, ()))
            for kind, parts in PARTS.items()
        ),
        least=1,
    )
    classes: str = setting(
        help="a file beside this one: the name of class i is line i, counted from 0; what is found "
        "of a class without a name is left out",
        least=1,
    )
    resize: str = setting(
        help="fixed: to the size, whatever the shape; letterbox: to fit into the size, and padded; "
        "shortest_side: that side to the size",
        names=("fixed", "letterbox", "shortest_side"),
    )
    size: tuple[int, int] | int = setting(
        help="height and width in pixels, or the shortest side's", least=1, most=2**14
    )
    longest: int | None = setting(
        None, "most pixels of a side", least=1, most=2**14, none="no limit"
    )
    multiple: int = setting(
        1, "sides are padded to a multiple, at bottom and right", least=1, most=2**10
    )
    centered: bool = setting(True, "padded on both sides, else at bottom and right")
    pad: float | None = setting(
        None, "gray level of the padding", least=0, most=255, none="zeros of the input"
    )
    antialias: bool = setting(
        True, "bilinear as Pillow does it, over all pixels; else as OpenCV does, over four"
    )
    scores: str | None = setting(
        None,
        "of logits: sigmoid, each class for itself; softmax, the best class, and the last logit is "
        "that of no object",
        names=("sigmoid", "softmax"),
        none="not a detr",
    )
    rows: str = setting("cxcywh_classes", "what a row has", names=tuple(ROWS))
    transposed: bool = setting(False, "whether the output has a column for each row")
    normalized: bool = setting(False, "whether boxes are in [0, 1] of the input, not in pixels")
    mask_frame: str = setting("box", "what a mask is of", names=("box", "image"))
    mask_values: str | None = setting(
        None,
        "what masks hold",
        names=("logits", "probabilities"),
        none="probabilities of a mask_rcnn, else logits",
    )
    mask_threshold: float = setting(0.5, "the least probability in a mask", above=0, below=1)
    min_score: float = setting(0.05, "a detection has a score above this one", least=0, below=1)
    nms: float | None = setting(
        None, "of two boxes with a larger IoU the better stays", least=0, most=1, none="all stay"
    )
    nms_across_classes: bool = setting(False, "whether the classes of the two may differ")
    max_detections: int = setting(100, "the best ones of a picture", least=1)

    def check(self, where: str) -> None:
        """Raises UserError for what contradicts itself; `read_spec` knows which keys were given."""
        if isinstance(self.size, int) != (self.resize == "shortest_side"):
            wanted = "one number" if self.resize == "shortest_side" else "height and width"
            raise UserError(f"{where}.size={self.size}: resize={self.resize!r} wants {wanted}")
        if isinstance(self.size, int) and self.longest is not None and self.longest < self.size:
            raise UserError(f"{where}.longest={self.longest} is less than size={self.size}")
        if self.output == "detr" and self.scores is None:
            raise UserError(f"{where} has no scores: a detr needs sigmoid or softmax")
        if self.nms_across_classes and self.nms is None:
            raise UserError(f"{where}.nms_across_classes is set without nms")
        wanted = PARTS[self.output]
        known = wanted + MORE_PARTS.get(self.output, ())
        for part in self.outputs:
            if part not in known:
                near = suggestion(part, known)
                raise UserError(f"{where}.outputs: a {self.output} has no {quote(part)}{near}")
        for part in wanted:
            if part not in self.outputs:
                raise UserError(f"{where}.outputs has no {part}: a {self.output} has {wanted}")


def read_spec(path: epath.PathLike) -> Spec:
    """The description in a JSON file. Raises UserError for a key or value that cannot be."""
    where, given = os.fspath(path), read_json(path)
    spec = fields.make(Spec, given, where)
    for key in given:
        other, values = _BELONGS.get(key, ("output", tuple(PARTS)))
        if getattr(spec, other) not in values:
            raise UserError(
                f"{where}.{key} belongs to {other} {' or '.join(values)}, "
                f"but {other} is {getattr(spec, other)}"
            )
    return spec
