"""What the outputs of each kind of detector mean: scores, labels, boxes and masks."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from univg_jax.errors import UserError
from univg_jax.evaluation.scorers.detector_spec import ROWS, Spec
from univg_jax.evaluation.scorers.framing import Frame

Parts = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a network sees; boxes x0 y0 x1 y1 are in pixels of its input.

    `masks[source]` is the mask of each.
    """

    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"] | None  # None: those of the masks
    source: Int[np.ndarray, " n"]
    masks: Float[np.ndarray, "q mh mw"] | None = None

    def __getitem__(self, rows: Int[np.ndarray, " k"] | Bool[np.ndarray, " n"]) -> "Found":
        boxes = None if self.boxes is None else self.boxes[rows]
        return Found(self.scores[rows], self.labels[rows], boxes, self.source[rows], self.masks)


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs of a detector by its description, of classes `names`; `where` is its file."""

    spec: Spec
    names: Sequence[str]
    where: str

    def read(self, parts: Parts, frame: Frame) -> Found:
        """What the outputs say. Raises UserError if they are not those described."""
        return getattr(self, f"_{self.spec.output}")(parts, frame)

    def _detr(self, parts: Parts, frame: Frame) -> Found:
        logits = self._table(parts, "logits", len(self.names) + (self.spec.scores == "softmax"))
        boxes = self._table(parts, "boxes", 4)
        self._check_rows("boxes", boxes, logits)
        height, width = frame.input
        boxes = _corners(boxes) * np.float32([width, height, width, height])
        if self.spec.scores == "sigmoid":
            found = _pairs(sigmoid(logits))
        else:
            p = _softmax(logits)[:, :-1]
            found = Found(p.max(axis=1), p.argmax(axis=1), None, np.arange(len(p)))
        masks = self._planes(parts, "masks", logits)
        return dataclasses.replace(found, boxes=boxes[found.source], masks=masks)

    def _mask2former(self, parts: Parts, frame: Frame) -> Found:
        logits = self._table(parts, "logits", len(self.names) + 1)
        masks = self._planes(parts, "masks", logits)
        return dataclasses.replace(_pairs(_softmax(logits)[:, :-1]), masks=masks)

    def _yolo(self, parts: Parts, frame: Frame) -> Found:
        spec, prototypes, extra = self.spec, None, 0
        if "prototypes" in parts:
            prototypes = parts["prototypes"].astype(np.float32)
            prototypes = prototypes.reshape(-1, *prototypes.shape[-2:])
            extra = len(prototypes)
        has_classes, width = spec.rows != "xyxy_score_class", ROWS[spec.rows]
        columns = width + extra + (len(self.names) if has_classes else 0)
        if spec.transposed:
            rows = parts["rows"]
            parts = {**parts, "rows": rows.reshape(-1, rows.shape[-1]).T}
        rows = self._table(parts, "rows", columns)
        rows, coefficients = rows[:, : columns - extra], rows[:, columns - extra :]
        if has_classes:
            p = rows[:, width:] * (rows[:, 4:5] if width == 5 else 1)
            labels, scores, boxes = p.argmax(axis=1), p.max(axis=1), _corners(rows[:, :4])
        else:
            boxes, scores = rows[:, :4], rows[:, 4]
            labels = self._labels(rows[:, 5], scores)
        found = Found(scores, labels, self._inpixels_of(boxes, frame), np.arange(len(rows)))
        if prototypes is None:
            return found
        found = found[found.scores > spec.min_score]  # not the masks of thousands of rows
        masks = np.tensordot(coefficients[found.source], prototypes, axes=1)
        return dataclasses.replace(found, masks=masks, source=np.arange(len(masks)))

    def _mask_rcnn(self, parts: Parts, frame: Frame) -> Found:
        boxes = self._table(parts, "boxes", 4)
        scores = parts["scores"].astype(np.float32).reshape(-1)
        labels = parts["labels"].astype(np.float32).reshape(-1)
        for part, values in (("scores", scores), ("labels", labels)):
            self._check_rows(part, values, boxes)
        masks = self._planes(parts, "masks", boxes)
        labels = self._labels(labels, scores)
        return Found(scores, labels, self._inpixels_of(boxes, frame), np.arange(len(boxes)), masks)

    def _inpixels_of(self, boxes: Float[np.ndarray, "n 4"], frame: Frame) -> np.ndarray:
        height, width = frame.input
        whole = np.float32([width, height, width, height])
        return boxes * whole if self.spec.normalized else boxes

    def _labels(
        self, labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
    ) -> Int[np.ndarray, " n"]:
        """Labels as indexes of the classes; those without a score, which fill up, may be any."""
        counted = np.where(scores > self.spec.min_score, labels, 0).astype(int)
        if counted.size and not 0 <= counted.min() <= counted.max() < len(self.names):
            raise self._other(f"a label {counted[np.abs(counted).argmax()]}", "labels of a line")
        return counted

    def _table(self, parts: Parts, part: str, columns: int) -> Float[np.ndarray, "n {columns}"]:
        array = parts[part].astype(np.float32)
        if array.ndim < 2 or array.shape[-1] != columns:
            turned = array.ndim > 1 and array.shape[-2] == columns
            hint = "; should it be transposed?" if turned and part == "rows" else ""
            raise self._other(f"{part} {list(array.shape)}", f"{columns} columns{hint}")
        return array.reshape(-1, columns)

    def _planes(
        self, parts: Parts, part: str, like: np.ndarray
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
        count = f"{len(self.names)} lines of {self.spec.classes}"
        return UserError(
            f"{self.where} gives {got}: expected {expected}, by its description and the {count}"
        )


def _pairs(p: Float[np.ndarray, "q k"]) -> Found:
    """Every query as every class."""
    source, labels = (part.reshape(-1) for part in np.indices(p.shape))
    return Found(p.reshape(-1), labels, None, source)


def _corners(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """x0 y0 x1 y1 of center x y, width, height."""
    center, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([center - half, center + half], axis=1)


def sigmoid(x: Float[np.ndarray, "*s"]) -> Float[np.ndarray, "*s"]:
    return (1 + np.tanh(x / 2)) / 2


def _softmax(x: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n k"]:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
