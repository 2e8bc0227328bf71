"""Labels as images and back: depth, pose and masks that a model generates, layouts that it reads.

Every `render_*` makes an RGB picture that survives a lossy codec. Its `decode_*` reads a picture
that a model generated (blurred, noisy, off in color) back into the label.

* depth: gray, near is bright: `log(FAR/d) / log(FAR/NEAR)`, NEAR = 0.5 m, FAR = 80 m. Unknown depth
  is black, like FAR.
* mask: white on black. A pixel belongs to the mask if the mean of its channels is at least
  MASK_THRESHOLD.
* pose: one line per limb on black, each limb in its own color (`LIMBS`), and a white dot for the
  nose. Lines from ears to shoulders show the head and close the trunk. Eyes are not drawn, because
  at 48 px the whole head is two lines wide. Decoded eyes lie between ears and nose, on the level of
  the ears.
* layout: filled boxes in named colors (`PALETTE`) on mid-gray, large ones first.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

NEAR, FAR = 0.5, 80.0
MASK_THRESHOLD = 0.5
GRAY = 128  # "nothing here" in canvases and holes: zero in [-1, 1]

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (230, 25, 25),
    "blue": (30, 60, 230),
    "green": (20, 160, 40),
    "yellow": (250, 225, 30),
    "purple": (140, 30, 180),
    "orange": (250, 130, 10),
    "cyan": (30, 210, 230),
    "pink": (250, 130, 190),
}


def render_depth(depth: Float32[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Depth in meters (0 or not finite = unknown) as a gray picture, near bright."""
    meters = np.clip(np.where(is_known_depth(depth), depth, FAR), NEAR, FAR)
    gray = np.log(FAR / meters) / np.log(FAR / NEAR)
    return np.repeat(np.round(gray * 255).astype(np.uint8)[..., None], 3, axis=2)


def is_known_depth(depth: Float32[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where there is a depth: beyond FAR it is known, and drawn like FAR."""
    return np.isfinite(depth) & (depth > 0)


def fill_unknown(
    picture: UInt8[np.ndarray, "h w 3"], known: UInt8[np.ndarray, "h w 1"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with each pixel that is not known like the nearest that is (one at least).

    So an encoder that sees more than a pixel at a time sees neither holes nor what stood in them.
    """
    plane = known[..., 0] > 0
    _, nearest = cv2.distanceTransformWithLabels(
        (~plane).astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    # A label is the number of a known pixel, which stands there, too.
    places = np.zeros(nearest.max() + 1, np.intp)
    places[nearest[plane]] = np.flatnonzero(plane)
    return picture.reshape(-1, 3)[places[nearest]]


def decode_depth(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "h w"]:
    """The depth that `render_depth` drew, in meters: `FAR (NEAR/FAR)^gray`.

    What a model generates is in meters only as far as the model knows the scale.
    """
    gray = image.astype(np.float32).mean(axis=-1) / 255
    return (FAR * (NEAR / FAR) ** gray).astype(np.float32)


def render_mask(mask: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """White where the mask is 1, on black."""
    return np.repeat((mask[..., None] > 0).astype(np.uint8) * 255, 3, axis=2)


def decode_mask(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w"]:
    """1 where the mean of the channels, as a fraction of white, is at least MASK_THRESHOLD."""
    return (image.astype(np.float32).mean(axis=-1) / 255 >= MASK_THRESHOLD).astype(np.uint8)


def render_layout(
    boxes: Float32[np.ndarray, "k 4"], colors: Sequence[str], *, height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Each box filled with its PALETTE color, the largest at the back, each at least a pixel."""
    canvas = np.full((height, width, 3), GRAY, np.uint8)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for k in np.argsort(-area, kind="stable"):
        x0, y0, x1, y1 = np.round(boxes[k] * np.float32([width, height] * 2)).astype(int)
        canvas[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = PALETTE[colors[k]]
    return canvas


NOSE, LEFT_EYE, RIGHT_EYE, LEFT_EAR, RIGHT_EAR, LEFT_SHOULDER, RIGHT_SHOULDER = range(7)
LEFT_ELBOW, RIGHT_ELBOW, LEFT_WRIST, RIGHT_WRIST, LEFT_HIP, RIGHT_HIP = range(7, 13)
LEFT_KNEE, RIGHT_KNEE, LEFT_ANKLE, RIGHT_ANKLE = range(13, 17)


@dataclasses.dataclass(frozen=True)
class Limb:
    """A line between two joints, or a dot on one. Limbs that touch have colors far apart in hue."""

    start: int
    end: int
    color: tuple[int, int, int]


# In drawing order: head and trunk first, so that arms in front of them stay whole. The hues of the
# twelve lines are 30 degrees apart.
LIMBS = (
    Limb(LEFT_SHOULDER, LEFT_EAR, (128, 255, 0)),
    Limb(RIGHT_SHOULDER, RIGHT_EAR, (255, 0, 128)),
    Limb(LEFT_SHOULDER, LEFT_HIP, (0, 0, 255)),
    Limb(RIGHT_SHOULDER, RIGHT_HIP, (255, 0, 0)),
    Limb(LEFT_HIP, LEFT_KNEE, (0, 255, 0)),
    Limb(RIGHT_HIP, RIGHT_KNEE, (255, 255, 0)),
    Limb(LEFT_KNEE, LEFT_ANKLE, (255, 0, 255)),
    Limb(RIGHT_KNEE, RIGHT_ANKLE, (0, 255, 255)),
    Limb(LEFT_SHOULDER, LEFT_ELBOW, (0, 255, 128)),
    Limb(RIGHT_SHOULDER, RIGHT_ELBOW, (255, 128, 0)),
    Limb(LEFT_ELBOW, LEFT_WRIST, (128, 0, 255)),
    Limb(RIGHT_ELBOW, RIGHT_WRIST, (0, 128, 255)),
    Limb(NOSE, NOSE, (255, 255, 255)),
)
_COLORS = np.array([limb.color for limb in LIMBS], np.float32) / 255
_EYES = ((LEFT_EYE, LEFT_EAR, RIGHT_EAR), (RIGHT_EYE, RIGHT_EAR, LEFT_EAR))
_THICKNESS = 0.055  # of a line, as a fraction of the image's side (the mean of both)
_DOT = 1.4  # diameter of the nose's dot, as a multiple of a line's thickness
_WHOLE = 0.4  # of the image's side: the extent of a person whose lines have their whole width
_OVERSAMPLING = 4  # drawn larger and averaged, for smooth edges


def render_pose(
    joints: Float32[np.ndarray, "p 17 3"], *, height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """The skeletons of people's joints (x, y in [0, 1], visibility).

    A limb is drawn where both of its joints have a visibility above 0. The largest person, which is
    mostly the nearest, is drawn last. Lines of people below _WHOLE in height and width are thinner.
    """
    canvas = np.zeros((height * _OVERSAMPLING, width * _OVERSAMPLING, 3), np.uint8)
    seen = [person for person in joints if (person[:, 2] > 0).any()]
    extents = [np.ptp(person[person[:, 2] > 0, :2], axis=0) for person in seen]
    for k in sorted(range(len(seen)), key=lambda k: extents[k].prod()):
        share = min(1.0, float(extents[k].max()) / _WHOLE)
        _draw_person(canvas, seen[k], _thickness(canvas) * share)
    return cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)


def _thickness(image: UInt8[np.ndarray, "h w 3"]) -> float:
    """Of a line, in pixels."""
    return _THICKNESS * math.sqrt(image.shape[0] * image.shape[1])


def _draw_person(
    canvas: UInt8[np.ndarray, "h w 3"], joints: Float32[np.ndarray, "17 3"], width: float
) -> None:
    points = np.round(joints[:, :2] * canvas.shape[1::-1] - 0.5).astype(int)
    for limb in LIMBS:
        if joints[limb.start, 2] > 0 and joints[limb.end, 2] > 0:
            ends = tuple(map(int, points[limb.start])), tuple(map(int, points[limb.end]))
            thickness = max(1, round(width * (_DOT if limb.start == limb.end else 1)))
            cv2.line(canvas, *ends, color=limb.color, thickness=thickness)


def decode_pose(image: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, "17 3"]:
    """Joints (x, y, confidence, all in [0, 1]) of one skeleton, from `render_pose` or a model.

    Each pixel is split between limbs by color. A limb is the largest blob of its color, and its
    ends are the extremes of the blob along its principal axis. Which end is which joint is chosen
    so that limbs meet where they share a joint. A shared joint is the mean of the ends that meet in
    it. A joint that no limb shows has confidence 0 and lies at the center of the image.
    """
    height, width = image.shape[:2]
    segments = _find_limbs(image)
    joints = np.zeros((17, 3), np.float32)
    joints[:, :2] = 0.5
    flipped = _orient(segments)
    for j in range(17):
        meeting = [
            (k, int((LIMBS[k].end == j) != flipped[k]))
            for k in segments
            if j in (LIMBS[k].start, LIMBS[k].end)
        ]
        if meeting:
            # A line's round end reaches half a thickness past the joint. The limb in front shows
            # this end, and hides as much of the limbs behind it.
            front, half = meeting[-1][0], _thickness(image) / 2
            points = [segments[k].end(side, -half if k == front else half) for k, side in meeting]
            if j == NOSE:
                points = [segments[front].center]
            joints[j, :2] = np.mean(points, axis=0) / (width, height)
            joints[j, 2] = max(segments[k].confidence for k, _ in meeting)
    for eye, ear, other in _EYES:
        if joints[ear, 2] > 0 and joints[NOSE, 2] > 0:
            # Two fifths of the way from the nose to the ear. If both ears are seen, from the point
            # on the line through them that is nearest to the nose.
            root = joints[NOSE, :2]
            if joints[other, 2] > 0 and (along := joints[ear, :2] - joints[other, :2]).any():
                root = joints[ear, :2] + along * ((root - joints[ear, :2]) @ along) / (
                    along @ along
                )
            joints[eye, :2] = root + 0.4 * (joints[ear, :2] - root)
            joints[eye, 2] = min(joints[ear, 2], joints[NOSE, 2])
    return joints


@dataclasses.dataclass(frozen=True)
class _Segment:
    """What is seen of a limb: a stretch of a line through its center, in pixels."""

    center: Float[np.ndarray, "2"]
    axis: Float[np.ndarray, "2"]  # the line's direction, of length 1
    reach: tuple[float, float]  # where the stretch begins and ends, from the center along the axis
    confidence: float

    def end(self, side: int, extra: float = 0.0) -> Float[np.ndarray, "2"]:
        """The first (side 0) or last (1) point of the stretch, `extra` pixels further out."""
        return self.center + (self.reach[side] + (extra if side else -extra)) * self.axis


def _find_limbs(image: UInt8[np.ndarray, "h w 3"]) -> dict[int, _Segment]:
    """The visible limbs, by index into LIMBS."""
    thickness = _thickness(image)
    pixels = cv2.GaussianBlur(image.astype(np.float32) / 255, (0, 0), thickness / 4)
    # `amount`: least-squares share of limb k's color in a pixel. `miss`: what it does not explain.
    amount = np.clip(pixels @ _COLORS.T / (_COLORS**2).sum(axis=1), 1e-3, 1)
    miss = np.linalg.norm(pixels[:, :, None] - amount[..., None] * _COLORS, axis=-1) / amount
    nearest = np.arange(len(LIMBS)) == miss.argmin(axis=-1)[..., None]
    weights = amount * (nearest & (amount > 0.35) & (miss < 0.5))

    found = {}
    for k in range(len(LIMBS)):
        weight = np.ascontiguousarray(weights[..., k])
        count, labels = cv2.connectedComponents((weight > 0).astype(np.uint8), connectivity=8)
        masses = np.bincount(labels.ravel(), weights=weight.ravel(), minlength=count)
        masses[0] = 0
        blob = int(masses.argmax())
        # Where two limbs meet, their colors blend into that of a third: a small fringe, no limb.
        if masses[blob] < 0.5 * thickness**2:
            continue
        y, x = np.nonzero(labels == blob)
        if len(y) < 2:  # in a tiny picture: a point has no direction
            continue
        mass = weight[y, x]
        points = np.stack([x, y], axis=1) + 0.5
        center = np.average(points, axis=0, weights=mass)
        _, axes = np.linalg.eigh(np.cov(points.T, aweights=mass) + 1e-6 * np.eye(2))
        axis = axes[:, 1]
        along = (points - center) @ axis
        order = np.argsort(along)
        cumulative = np.cumsum(mass[order]) / mass.sum()
        # Not the minimum and maximum, which a single stray pixel would move.
        low, high = np.interp([0.01, 0.99], cumulative, along[order])
        confidence = float(min(1, np.average(mass, weights=mass)))
        found[k] = _Segment(center=center, axis=axis, reach=(low, high), confidence=confidence)
    return found


def _orient(segments: dict[int, _Segment]) -> dict[int, bool]:
    """For each segment, whether its first point is its limb's `end` rather than its `start`.

    Of all combinations this is the one in which the ends that share a joint are closest together.
    """
    names = [k for k in segments if LIMBS[k].start != LIMBS[k].end]
    both = [
        np.array([[segments[k].end(i) for i in order] for order in ((0, 1), (1, 0))]) for k in names
    ]
    choices = np.array(list(itertools.product((0, 1), repeat=len(names))), int)  # 2^12 at most
    cost = np.zeros(len(choices))
    for a, b in itertools.combinations(range(len(names)), 2):
        for i, j in itertools.product((0, 1), (0, 1)):
            first, second = LIMBS[names[a]], LIMBS[names[b]]
            if (first.start, first.end)[i] == (second.start, second.end)[j]:
                gap = np.linalg.norm(both[a][:, None, i] - both[b][None, :, j], axis=-1)
                cost += gap[choices[:, a], choices[:, b]]
    best = choices[cost.argmin()]
    return dict.fromkeys(segments, False) | {k: bool(best[n]) for n, k in enumerate(names)}
