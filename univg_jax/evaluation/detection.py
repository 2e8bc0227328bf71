"""What a detector sees in an image, as the protocol `detect(image)` returns it."""

from collections.abc import Mapping, Sequence

from univg_jax.evaluation.metrics import Mask, Number

# x1, y1, x2, y2 in pixels, the score in [0, 1], and the object's mask if the detector has masks.
Detection = tuple[Number, Number, Number, Number, Number, Mask | None]
Detections = Mapping[str, Sequence[Detection]]  # by the name of the class


def by_score(detections: Detections, *, above: float) -> list[tuple[str, Detection]]:
    """All detections with a score above `above` and their names, the best first."""
    found = [(name, box) for name, boxes in detections.items() for box in boxes if box[4] > above]
    return sorted(found, key=lambda item: -item[1][4])
