"""Labels drawn on the picture of a record, for people to look at (`data_pipelines.inspect`).

Object k has the color `color(k)` in every drawing and list. What does not count is hatched.
"""

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from data_pipelines import renderings, transforms
from data_pipelines.transforms import Record

Picture = UInt8[np.ndarray, "h w 3"]
Drawing = UInt8[np.ndarray, "drawn_h drawn_w 3"]  # of another size

SIDE = 480  # the longer side of a record's drawing, in pixels
MODEL_SIDE = 384  # at most, of a picture that the model gets
_LEAST_HATCHED = 192  # the shorter side, on which stripes can be seen
_EDIT = (255, 0, 160)


def color(k: int) -> tuple[int, int, int]:
    """Of object k; after the palette's last it begins anew."""
    colors = list(renderings.PALETTE.values())
    return colors[k % len(colors)]


def draw_record(record: Record) -> Drawing:
    """The image at SIDE pixels with its masks, edit mask, boxes, joints and ignored regions.

    Masks are tinted and outlined, boxes numbered from 1. A joint that is seen is a filled dot in
    its person's color, one that is hidden a dark dot in a ring of it.
    """
    image = _at_side(record["image"])
    height, width = image.shape[:2]
    for k, mask in enumerate(record.get("masks", ())):
        _draw_mask(image, _large(mask, image), color(k))
    if "edit_mask" in record:
        outline = _outline(_large(record["edit_mask"], image))
        cv2.drawContours(image, outline, -1, (255, 255, 255), 5)
        cv2.drawContours(image, outline, -1, _EDIT, 2)
    for k, box in enumerate(record.get("boxes", ())):
        x0, y0, x1, y1 = (int(v) for v in np.round(box * [width, height, width, height]))
        cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), color(k), 2)
    for k, box in enumerate(record.get("boxes", ())):  # after all boxes, which cannot hide them
        _draw_number(image, k, box)
    people = np.reshape(record.get("joints", ()), (-1, 17, 3))
    for k, joints in enumerate(people):
        _draw_person(image, joints, color(k))
    if "ignore_mask" in record:
        image = hatch(image, _large(record["ignore_mask"], image) > 0)
    return image


def draw_target(target: Picture, loss_mask: UInt8[np.ndarray, "h w 1"] | None) -> Drawing:
    """The target, what of it does not count in the loss hatched over it."""
    target = shrink(target)
    if loss_mask is None:
        return target
    times = max(1, -(-_LEAST_HATCHED // min(target.shape[:2])))
    large = target.repeat(times, axis=0).repeat(times, axis=1)
    return hatch(large, _large(loss_mask[..., 0], large) == 0)


def hatch(image: Picture, where: Bool[np.ndarray, "h w"]) -> Picture:
    """The image, dimmed and striped where it does not count."""
    y, x = np.indices(where.shape)
    stripes = (x + y) % 12 < 4
    dim = image.astype(np.float32) * 0.35 + 28
    striped = np.where(stripes[..., None], np.float32([214, 214, 222]) * 0.55 + dim * 0.3, dim)
    return np.where(where[..., None], striped.astype(np.uint8), image)


def shrink(image: Picture) -> Drawing:
    """The image, at most MODEL_SIDE pixels a side."""
    scale = MODEL_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return transforms.resize_image(image, height=height, width=width)


def _at_side(image: Picture) -> Drawing:
    """A copy whose longer side has SIDE pixels."""
    scale = SIDE / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.array(transforms.resize_image(image, height=height, width=width))


def _large(mask: UInt8[np.ndarray, "mask_h mask_w"], image: Picture) -> UInt8[np.ndarray, "h w"]:
    return cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)


def _outline(mask: UInt8[np.ndarray, "h w"]) -> tuple:
    return cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]


def _draw_mask(image: Picture, mask: UInt8[np.ndarray, "h w"], rgb: tuple[int, int, int]) -> None:
    inside = mask > 0
    image[inside] = (image[inside] * 0.6 + np.float32(rgb) * 0.4).astype(np.uint8)
    cv2.drawContours(image, _outline(mask), -1, rgb, 2)


def _draw_number(image: Picture, k: int, box: Float32[np.ndarray, "4"]) -> None:
    """The box's number, from 1, in its upper left corner."""
    font, text = cv2.FONT_HERSHEY_SIMPLEX, str(k + 1)
    (width, height), _ = cv2.getTextSize(text, font, 0.45, 1)
    x, y = (int(v) for v in np.round(box[:2] * image.shape[1::-1]))
    x, y = min(x, image.shape[1] - width - 6), min(y, image.shape[0] - height - 6)
    cv2.rectangle(image, (x, y), (x + width + 5, y + height + 5), color(k), -1)
    ink = (0, 0, 0) if np.dot(color(k), [0.3, 0.6, 0.1]) > 120 else (255, 255, 255)
    cv2.putText(image, text, (x + 3, y + height + 2), font, 0.45, ink, 1, cv2.LINE_AA)


def _draw_person(
    image: Picture, joints: Float32[np.ndarray, "17 3"], rgb: tuple[int, int, int]
) -> None:
    points = [tuple(map(int, np.round(xy * image.shape[1::-1]))) for xy in joints[:, :2]]
    for limb in renderings.LIMBS:
        if joints[limb.start, 2] > 0 and joints[limb.end, 2] > 0:
            for rgb_of_line, width in (((255, 255, 255), 4), (rgb, 2)):
                ends = points[limb.start], points[limb.end]
                cv2.line(image, *ends, rgb_of_line, width, cv2.LINE_AA)
    for point, visibility in zip(points, joints[:, 2], strict=True):
        if visibility > 0:
            inner = rgb if visibility == 2 else (25, 25, 25)
            for radius, fill in ((6, (255, 255, 255)), (5, rgb), (3, inner)):
                cv2.circle(image, point, radius, fill, -1, cv2.LINE_AA)
