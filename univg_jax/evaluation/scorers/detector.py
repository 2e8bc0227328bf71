"""`detect`: any detector that somebody exported to ONNX, run by onnxruntime.

Beside `yolo.onnx` stand `yolo.json`, which says what the model's file does not (`Spec`: how a
picture becomes its input and what its outputs mean), and a text file with the names of the classes.
docs/detectors.md has the descriptions of public models.

Pixel (x, y) of the input shows the point ((x - left) / scale_x, (y - top) / scale_y) of the
picture, where a pixel's center lies at half a pixel. Boxes go that way; masks are sampled the other
way, once, at the center of every pixel of the picture.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, Num, UInt8
from PIL import Image

from univg_jax import fields
from univg_jax.errors import NotFoundError, UserError, needs_extra, quote, suggestion
from univg_jax.evaluation.detection import Detection
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
# Where the channels, rows and columns of a picture are.
LAYOUTS = {"nchw": (1, 2, 3), "nhwc": (3, 1, 2), "chw": (0, 1, 2), "hwc": (2, 0, 1)}
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
_INPUT_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}
_TRIAL = (48, 64)  # height and width of the blank picture that tries a model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
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
    input: str | None = setting(None, "the input's name", none="the only one")
    layout: str = setting("nchw", "order of the input's axes", names=tuple(LAYOUTS))
    color: str = setting("rgb", "order of the channels", names=("rgb", "bgr"))
    scale: float = setting(1 / 255, "the input is (scale x - mean) / std, x in 0..255", above=0)
    mean: tuple[float, float, float] = setting((0.0, 0.0, 0.0), "in the order of the channels")
    std: tuple[float, float, float] = setting((1.0, 1.0, 1.0), "in the same order", above=0)
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


@dataclasses.dataclass(frozen=True)
class _Frame:
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
        inside = _pixels(box, self.picture)
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


def _pixels(box: Float[np.ndarray, "4"], picture: tuple[int, int]) -> tuple[slice, slice]:
    """The rows and columns of the pixels whose centers are in a box."""
    x0, y0, x1, y1 = np.ceil(box - 0.5)
    starts = [min(max(int(v), 0), n) for v, n in zip((y0, x0), picture)]
    stops = [min(max(int(v), s), n) for v, s, n in zip((y1, x1), starts, picture)]
    return tuple(map(slice, starts, stops))


def _placed(spec: Spec, height: int, width: int) -> tuple[tuple[int, int], _Frame]:
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
    return new, _Frame((height, width), whole, (new[0] / height, new[1] / width), start)


def network_input(
    image: UInt8[np.ndarray, "h w 3"], spec: Spec
) -> tuple[Float[np.ndarray, "..."], _Frame]:
    """A picture as the network takes it, and how it lies there."""
    (height, width), frame = _placed(spec, *image.shape[:2])
    if spec.antialias:
        small = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.asarray(small)
    else:
        pixels = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    pixels = pixels if spec.color == "rgb" else pixels[..., ::-1]
    mean, std = np.float32(spec.mean), np.float32(spec.std)

    def normalized(x: Num[np.ndarray, "*any 3"]) -> Float[np.ndarray, "*any 3"]:
        return (x.astype(np.float32) * np.float32(spec.scale) - mean) / std

    padding = np.zeros(3, np.float32) if spec.pad is None else normalized(np.full(3, spec.pad))
    canvas = np.broadcast_to(padding, (*frame.input, 3)).copy()
    (top, left) = frame.start
    canvas[top : top + height, left : left + width] = normalized(pixels)
    if "hwc" not in spec.layout:
        canvas = canvas.transpose(2, 0, 1)
    return np.ascontiguousarray(canvas[None] if spec.layout.startswith("n") else canvas), frame


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a network sees; boxes x0 y0 x1 y1 are in pixels of its input. `masks[source]` is the
    mask of each.
    """

    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"] | None  # None: those of the masks
    source: Int[np.ndarray, " n"]
    masks: Float[np.ndarray, "q mh mw"] | None = None

    def __getitem__(self, rows: Int[np.ndarray, " k"] | Bool[np.ndarray, " n"]) -> "_Found":
        boxes = None if self.boxes is None else self.boxes[rows]
        return _Found(self.scores[rows], self.labels[rows], boxes, self.source[rows], self.masks)


def suppress(
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    labels: Int[np.ndarray, " n"],
    *,
    iou: float,
) -> Int[np.ndarray, " k"]:
    """Which boxes stay, the best first; of equal scores the earlier is the better.

    A box goes if a better one that stays has the same label and an IoU above `iou` with it.
    """
    left, kept = np.argsort(-scores, kind="stable"), []
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    while left.size:
        best, left = left[0], left[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[left, :2])
        high = np.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = np.maximum(high - low, 0).prod(axis=1)
        # Without a division, so that boxes without an area are no exception.
        overlaps = shared > iou * (area[best] + area[left] - shared)
        left = left[~(overlaps & (labels[left] == labels[best]))]
    return np.array(kept, int)


class OnnxDetector:
    """A detector of the protocol `detect`, made by `open_detector`. May be called by threads.

    `digest` are 16 digits of the SHA-256 of the model, its description and its classes, and
    `classes` the names of what it can find.
    """

    def __init__(
        self, session: Any, spec: Spec, classes: Sequence[str], *, where: str, digest: str
    ):
        self.digest, self.classes = digest, frozenset(filter(None, classes))
        self._session, self._spec, self._names, self._where = session, spec, classes, where
        self._named = np.array([name != "" for name in classes])
        self._input, self._dtype = _checked_input(session, spec, where)
        self._outputs = _checked_outputs(session, spec, where)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> dict[str, list[Detection]]:
        """Boxes within the picture in its pixels, by the name of the class, the best first.

        A mask has the picture's size. Raises UserError if the outputs are not those described.
        """
        spec = self._spec
        found, frame = self._found(image)
        found = found[(found.scores > spec.min_score) & self._named[found.labels]]
        if found.boxes is None:
            best = np.argsort(-found.scores, kind="stable")[: spec.max_detections]
            return self._by_masks(found[best], frame)
        exact = frame.boxes(found.boxes.astype(np.float64))
        height, width = frame.picture
        inside = np.clip(exact, 0, [width, height, width, height])
        rows = np.flatnonzero((inside[:, :2] < inside[:, 2:]).all(axis=1))
        rows = rows[self._best(inside[rows], found.scores[rows], found.labels[rows])]
        return self._by_name(
            (found.labels[row], inside[row], found.scores[row], self._mask(found, row, box, frame))
            for row, box in zip(rows.tolist(), exact[rows])
        )

    def _best(
        self,
        boxes: Float[np.ndarray, "n 4"],
        scores: Float[np.ndarray, " n"],
        labels: Int[np.ndarray, " n"],
    ) -> Int[np.ndarray, " k"]:
        """The detections that are given, the best first."""
        spec = self._spec
        if spec.nms is None:
            order = np.argsort(-scores, kind="stable")
        else:
            rivals = np.zeros_like(labels) if spec.nms_across_classes else labels
            order = suppress(boxes, scores, rivals, iou=spec.nms)
        return order[: spec.max_detections]

    def _by_name(
        self, found: Iterable[tuple[int, np.ndarray, float, np.ndarray | None]]
    ) -> dict[str, list[Detection]]:
        detections: dict[str, list[Detection]] = {}
        for label, box, score, mask in found:
            item = (*map(float, box), np.float32(score), mask)
            detections.setdefault(self._names[label], []).append(item)
        return detections

    def _mask(
        self, found: _Found, row: int, box: Float[np.ndarray, "4"], frame: _Frame
    ) -> Bool[np.ndarray, "h w"] | None:
        """The mask of a detection, whose box is not cut off at the picture's border."""
        if found.masks is None:
            return None
        spec, plane = self._spec, found.masks[found.source[row]]
        is_rcnn = spec.output == "mask_rcnn"
        of_box = is_rcnn and spec.mask_frame == "box"
        values = frame.of_box(plane, box) if of_box else frame.of_input(plane)
        holds = spec.mask_values or ("probabilities" if is_rcnn else "logits")
        p = spec.mask_threshold
        mask = values > (p if holds == "probabilities" else np.log(p / (1 - p)))
        if spec.output == "yolo":  # its masks mean nothing outside of the box
            only = np.zeros_like(mask)
            only[_pixels(box, frame.picture)] = True
            mask &= only
        return mask

    def _by_masks(self, found: _Found, frame: _Frame) -> dict[str, list[Detection]]:
        """Mask2Former's detections: a box around each mask, and

        score = p(class) mean(p(pixel) over the pixels of the mask)
        """
        items = []
        for label, score, source in zip(found.labels, found.scores, found.source):
            logits = frame.of_input(found.masks[source])
            mask = logits > 0
            ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            score = np.float32(score * _sigmoid(logits[mask]).mean()) if len(ys) else 0
            if score > self._spec.min_score:
                box = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], float)
                items.append((label, box, score, mask))
        if not items:
            return {}
        labels, boxes, scores = (np.array([item[k] for item in items]) for k in range(3))
        return self._by_name(items[i] for i in self._best(boxes, scores, labels))

    def _found(self, image: UInt8[np.ndarray, "h w 3"]) -> tuple[_Found, _Frame]:
        """What the network sees in a picture."""
        values, frame = network_input(image, self._spec)
        names = list(self._outputs.values())
        try:
            arrays = self._session.run(names, {self._input: values.astype(self._dtype)})
        except Exception as error:  # onnxruntime's own kinds
            raise UserError(f"{self._where} does not run: {_reason(error)}") from None
        parts = dict(zip(self._outputs, map(np.asarray, arrays)))
        for part, array in parts.items():
            if not np.isfinite(array).all():
                raise UserError(f"{self._where}: {part} are not finite")
        return getattr(self, f"_{self._spec.output}")(parts, frame), frame

    def _detr(self, parts: dict[str, np.ndarray], frame: _Frame) -> _Found:
        logits = self._table(parts, "logits", len(self._names) + (self._spec.scores == "softmax"))
        boxes = self._table(parts, "boxes", 4)
        self._check_rows("boxes", boxes, logits)
        height, width = frame.input
        boxes = _corners(boxes) * np.float32([width, height, width, height])
        if self._spec.scores == "sigmoid":
            found = _pairs(_sigmoid(logits))
        else:
            p = _softmax(logits)[:, :-1]
            found = _Found(p.max(axis=1), p.argmax(axis=1), None, np.arange(len(p)))
        masks = self._planes(parts, "masks", logits)
        return dataclasses.replace(found, boxes=boxes[found.source], masks=masks)

    def _mask2former(self, parts: dict[str, np.ndarray], frame: _Frame) -> _Found:
        logits = self._table(parts, "logits", len(self._names) + 1)
        masks = self._planes(parts, "masks", logits)
        return dataclasses.replace(_pairs(_softmax(logits)[:, :-1]), masks=masks)

    def _yolo(self, parts: dict[str, np.ndarray], frame: _Frame) -> _Found:
        spec, prototypes, extra = self._spec, None, 0
        if "prototypes" in parts:
            prototypes = parts["prototypes"].astype(np.float32)
            prototypes = prototypes.reshape(-1, *prototypes.shape[-2:])
            extra = len(prototypes)
        has_classes, width = spec.rows != "xyxy_score_class", ROWS[spec.rows]
        columns = width + extra + (len(self._names) if has_classes else 0)
        if spec.transposed:
            rows = parts["rows"]
            parts = parts | {"rows": rows.reshape(-1, rows.shape[-1]).T}
        rows = self._table(parts, "rows", columns)
        rows, coefficients = rows[:, : columns - extra], rows[:, columns - extra :]
        if has_classes:
            p = rows[:, width:] * (rows[:, 4:5] if width == 5 else 1)
            labels, scores, boxes = p.argmax(axis=1), p.max(axis=1), _corners(rows[:, :4])
        else:
            boxes, scores = rows[:, :4], rows[:, 4]
            labels = self._labels(rows[:, 5], scores)
        found = _Found(scores, labels, self._in_pixels(boxes, frame), np.arange(len(rows)))
        if prototypes is None:
            return found
        found = found[found.scores > spec.min_score]  # not the masks of thousands of rows
        masks = np.tensordot(coefficients[found.source], prototypes, axes=1)
        return dataclasses.replace(found, masks=masks, source=np.arange(len(masks)))

    def _mask_rcnn(self, parts: dict[str, np.ndarray], frame: _Frame) -> _Found:
        boxes = self._table(parts, "boxes", 4)
        scores = parts["scores"].astype(np.float32).reshape(-1)
        labels = parts["labels"].astype(np.float32).reshape(-1)
        for part, values in (("scores", scores), ("labels", labels)):
            self._check_rows(part, values, boxes)
        masks = self._planes(parts, "masks", boxes)
        labels = self._labels(labels, scores)
        return _Found(scores, labels, self._in_pixels(boxes, frame), np.arange(len(boxes)), masks)

    def _in_pixels(self, boxes: Float[np.ndarray, "n 4"], frame: _Frame) -> np.ndarray:
        height, width = frame.input
        whole = np.float32([width, height, width, height])
        return boxes * whole if self._spec.normalized else boxes

    def _labels(
        self, labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """Labels as indexes of the classes; those without a score, which fill up, may be any."""
        counted = np.where(scores > self._spec.min_score, labels, 0).astype(int)
        if counted.size and not 0 <= counted.min() <= counted.max() < len(self._names):
            raise self._other(f"a label {counted[np.abs(counted).argmax()]}", "labels of a line")
        return counted

    def _table(
        self, parts: dict[str, np.ndarray], part: str, columns: int
    ) -> Float[np.ndarray, "n {columns}"]:
        array = parts[part].astype(np.float32)
        if array.ndim < 2 or array.shape[-1] != columns:
            turned = array.ndim > 1 and array.shape[-2] == columns
            hint = "; should it be transposed?" if turned and part == "rows" else ""
            raise self._other(f"{part} {list(array.shape)}", f"{columns} columns{hint}")
        return array.reshape(-1, columns)

    def _planes(
        self, parts: dict[str, np.ndarray], part: str, like: np.ndarray
    ) -> Float[np.ndarray, "n mh mw"] | None:
        if part not in parts:
            return None
        array = parts[part].astype(np.float32)
        if array.ndim < 3:
            raise self._other(f"{part} {list(array.shape)}", "planes")
        planes = array.reshape(-1, *array.shape[-2:])
        self._check_rows(part, planes, like)
        return planes

    def _check_rows(self, part: str, array: np.ndarray, like: np.ndarray) -> None:
        if len(array) != len(like):
            raise self._other(f"{len(array)} {part}", f"{len(like)}, as the other outputs have")

    def _other(self, got: str, expected: str) -> UserError:
        count = f"{len(self._names)} lines of {self._spec.classes}"
        return UserError(
            f"{self._where} gives {got}: expected {expected}, by its description and the {count}"
        )


def _pairs(p: Float[np.ndarray, "q k"]) -> _Found:
    """Every query as every class."""
    source, labels = (part.reshape(-1) for part in np.indices(p.shape))
    return _Found(p.reshape(-1), labels, None, source)


def _corners(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """x0 y0 x1 y1 of center x y, width, height."""
    center, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([center - half, center + half], axis=1)


def _sigmoid(x: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    return (1 + np.tanh(x / 2)) / 2


def _softmax(x: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def open_detector(
    path: epath.PathLike, *, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> OnnxDetector:
    """The detector of an ONNX file with its description beside it, tried on a blank picture.

    `providers` are onnxruntime's. Raises UserError where the model, its description and its classes
    do not fit together, and NotFoundError where one is missing.
    """
    with needs_extra("data", "a detector"):
        import onnxruntime
    path = epath.Path(path)
    described = path.with_suffix(".json")
    for file, what in ((path, "an ONNX file"), (described, f"the description of {path.name}")):
        if not file.is_file():
            raise NotFoundError(f"{file} does not exist: expected {what}")
    spec = read_spec(described)
    classes = _read_classes(path.parent / spec.classes, where=described)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.use_deterministic_compute = True
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's own kinds
        reason = _reason(error)
        raise UserError(f"{path} is no model that onnxruntime runs: {reason}") from None
    digest = hashlib.sha256()
    for file in sorted(path.parent.iterdir()):
        if file.name.startswith(path.name):  # also the files that large weights have of their own
            digest.update(file.read_bytes())
    digest.update(json.dumps([dataclasses.asdict(spec), classes], sort_keys=True).encode())
    detector = OnnxDetector(
        session, spec, classes, where=os.fspath(path), digest=digest.hexdigest()[:16]
    )
    detector(np.zeros((*_TRIAL, 3), np.uint8))
    return detector


def _read_classes(path: epath.Path, *, where: epath.Path) -> list[str]:
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist: expected the classes that {where} names")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path} is no text: expected a name of a class in each line") from None
    classes = [line.strip() for line in lines]
    named = [name for name in classes if name]
    if not named:
        raise UserError(f"{path} is empty: expected a name of a class in each line")
    if len(set(named)) < len(named):
        twice = next(name for name in named if named.count(name) > 1)
        raise UserError(f"{path} has the class {twice!r} twice")
    return classes


def _checked_input(session: Any, spec: Spec, where: str) -> tuple[str, Any]:
    """The input's name and dtype."""
    inputs = {item.name: item for item in session.get_inputs()}
    name = spec.input or next(iter(inputs))
    if name not in inputs:
        raise UserError(f"{where} has no input {quote(name)}{suggestion(name, inputs)}")
    if others := [other for other in inputs if other != name]:
        raise UserError(
            f"{where} has the input {others[0]!r} beside {name!r}: "
            "expected a model that is given the picture alone"
        )
    given = inputs[name]
    if given.type not in _INPUT_TYPES:
        raise UserError(f"{where}: its input is a {given.type}: expected {', '.join(_INPUT_TYPES)}")
    is_plain = (spec.scale, spec.mean, spec.std) == (1, (0, 0, 0), (1, 1, 1))
    if given.type == "tensor(uint8)" and not is_plain:
        raise UserError(f"{where} takes bytes: its description has to say scale 1, no mean, no std")
    axes = LAYOUTS[spec.layout]
    if len(given.shape) != len(spec.layout):
        raise UserError(f"{where} takes {given.shape}, which is not layout {spec.layout!r}")
    channels, *sides = (given.shape[axis] for axis in axes)
    if isinstance(channels, int) and channels != 3:
        raise UserError(f"{where} takes {given.shape}, without 3 channels in {spec.layout!r}")
    fixed = spec.resize != "shortest_side"
    for side, size in zip(sides, spec.size if fixed else (spec.size, spec.size)):
        if isinstance(side, int) and (not fixed or side != size):
            takes = " x ".join(map(str, sides))
            raise UserError(
                f"{where} takes pictures of {takes} alone, "
                f"but its description has resize {spec.resize}, size {spec.size}"
            )
    return name, _INPUT_TYPES[given.type]


def _checked_outputs(session: Any, spec: Spec, where: str) -> dict[str, str]:
    names = [item.name for item in session.get_outputs()]
    for part, name in spec.outputs.items():
        if name not in names:
            raise UserError(
                f"{where} has no output {quote(name)} ({part}){suggestion(name, names)}"
            )
    return dict(spec.outputs)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
