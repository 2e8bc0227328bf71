"""`detect`: any detector that somebody exported to ONNX, run by onnxruntime.

Beside `yolo.onnx` stand `yolo.json`, which says what the model's file does not (`Spec`: how a
picture becomes its input and what its outputs mean), and a text file with the names of the classes.
docs/detectors.md has the descriptions of public models.
"""

import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int, UInt8

from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.detection import Detection
from univg_jax.evaluation.scorers.detector_outputs import Found, Outputs, sigmoid
from univg_jax.evaluation.scorers.detector_spec import Spec, read_spec
from univg_jax.evaluation.scorers.framing import Frame, framed, pixels_of
from univg_jax.evaluation.scorers.onnx_network import OnnxNetwork
from univg_jax.pretrained import local_path

_TRIAL = (48, 64)  # height and width of the blank picture that tries a model


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

    `digest` is of the model, its description and its classes, and `classes` are the names of what
    it can find.
    """

    def __init__(self, network: OnnxNetwork, spec: Spec, classes: Sequence[str]) -> None:
        self.digest, self.classes = network.digest, frozenset(filter(None, classes))
        self._network, self._spec, self._names = network, spec, classes
        self._named = np.array([name != "" for name in classes])
        self._outputs = Outputs(spec, classes, network.where)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"]) -> dict[str, list[Detection]]:
        """Boxes within the picture in its pixels, by the name of the class, the best first.

        A mask has the picture's size. Raises UserError if the outputs are not those described.
        """
        spec = self._spec
        values, frame = framed(image, spec)
        found = self._outputs.read(self._network(values), frame)
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
        self, found: Found, row: int, box: Float[np.ndarray, "4"], frame: Frame
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
            only[pixels_of(box, frame.picture)] = True
            mask &= only
        return mask

    def _by_masks(self, found: Found, frame: Frame) -> dict[str, list[Detection]]:
        """Mask2Former's detections: a box around each mask, and

        score = p(class) mean(p(pixel) over the pixels of the mask)
        """
        items = []
        for label, score, source in zip(found.labels, found.scores, found.source):
            logits = frame.of_input(found.masks[source])
            mask = logits > 0
            ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            score = np.float32(score * sigmoid(logits[mask]).mean()) if len(ys) else 0
            if score > self._spec.min_score:
                box = np.array([xs[0], ys[0], xs[-1] + 1, ys[-1] + 1], float)
                items.append((label, box, score, mask))
        if not items:
            return {}
        labels, boxes, scores = (np.array([item[k] for item in items]) for k in range(3))
        return self._by_name(items[i] for i in self._best(boxes, scores, labels))


def open_detector(
    path: epath.PathLike, *, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> OnnxDetector:
    """The detector of an ONNX file with its description beside it, tried on a blank picture.

    `providers` are onnxruntime's. Raises UserError where the model, its description and its classes
    do not fit together, and NotFoundError where one is missing.
    """
    model = local_path(path)
    description = model.with_suffix(".json")
    for file, what in ((model, "an ONNX file"), (description, f"the description of {model.name}")):
        if not file.is_file():
            raise NotFoundError(f"{file} does not exist: expected {what}")
    spec = read_spec(description)
    named = description.parent / spec.classes
    classes = _read_classes(named, where=description)
    size = None if isinstance(spec.size, int) else spec.size
    network = OnnxNetwork(
        model, spec, outputs=spec.outputs, size=size, beside=[named], providers=providers
    )
    detector = OnnxDetector(network, spec, classes)
    detector(np.zeros((*_TRIAL, 3), np.uint8))
    return detector


def _read_classes(path: pathlib.Path, *, where: pathlib.Path) -> list[str]:
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
