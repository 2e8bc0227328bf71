"""Measured labels: what a task needs of a record is checked, and brought into the picture.

Annotation tools leave a box or a joint outside its picture by a rounding error, and resizing makes
planes that differ by a pixel. What is wrong by less than a pixel is mended and the record kept:

* boxes are clipped to the picture; those that are then empty are dropped with their phrases;
* joints are clipped; those of one person, [17, 3], are those of one of several;
* depth and masks of any kind get the picture's size; a mask may have 255 for 1.

All else is an error, above all what has other units: pixels instead of [0, 1], millimeters instead
of meters. So is a list that has not an entry for each of its partner's, and an index that points
to nothing.
"""

from collections.abc import Callable, Collection

import numpy as np
from jaxtyping import Float32, UInt8

from data_pipelines import transforms
from data_pipelines.transforms import Record
from univg_jax.errors import UserError

_METERS = (0.05, 1000.0)  # where the median of known depths lies, whatever the picture shows


def check(
    record: Record, needs: Collection[str], *, uses: Collection[str] = (), where: str
) -> Record:
    """The decoded record, the labels among its needed fields brought into the picture.

    So are those of the fields `uses`, which it has, too, but whose text may be empty. Raises
    UserError, in one line: where, which field, what is wrong.
    """
    for field in needs:
        if field not in record:
            has = ", ".join(sorted(record))
            raise UserError(f"{where}: field {field!r} is missing (has {has})")
    clean = dict(record)
    checks = [(field, _CHECKS.get(field)) for field in needs]
    checks += [(field, found) for field in uses if (found := _CHECKS.get(field)) is not _text]
    for field, function in checks:
        try:
            if function:
                function(clean, field)
        except UserError as error:
            raise UserError(f"{where}: field {field!r} {error}") from None
    if "boxes" in needs:
        _drop_empty_boxes(clean, {*needs, *uses})
    return clean


def lay_on(
    mask: UInt8[np.ndarray, "mask_h mask_w"], image: UInt8[np.ndarray, "h w 3"]
) -> UInt8[np.ndarray, "h w"]:
    """The mask at the image's size. Raises UserError if the image has another shape."""
    height, width = image.shape[:2]
    if not _is_shape(mask.shape, (height, width)):
        turned = _is_shape(mask.shape[::-1], (height, width))
        raise UserError(
            "the mask has {1}x{0} pixels and the image {3}x{2}: ".format(*mask.shape, height, width)
            + (
                "the image's EXIF data turn it, so turn the mask too"
                if turned
                else "expected a mask of the image's shape"
            )
        )
    return transforms.resize({"edit_mask": mask}, height=height, width=width)["edit_mask"]


def _is_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether (height, width) are those of `other` at another scale, rounded to whole pixels."""
    (h, w), (height, width) = size, other
    return abs(h - w * height / width) <= 0.5 or abs(w - h * width / height) <= 0.5


def _text(record: Record, field: str) -> None:
    if not record[field].strip():
        raise UserError("is empty")


def _picture(record: Record, field: str) -> None:
    pixels = record[field]
    is_array = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.size > 0
    if not (is_array and pixels.ndim == 3 and pixels.shape[-1] == 3):
        found = getattr(pixels, "shape", type(pixels).__name__)
        raise UserError(f"is {found}, expected uint8 pixels [h, w, 3]")


def _source(record: Record, field: str) -> None:
    _picture(record, field)
    if record[field].shape != record["image"].shape:
        raise _other_size(record[field].shape[:2], record["image"].shape[:2])


def _plane(record: Record, field: str) -> None:
    """A plane of labels gets the picture's size if it differs by at most a pixel a side."""
    found, size = record[field].shape[-2:], record["image"].shape[:2]
    # There may be no mask at all, which then has no size.
    if found != size and len(record[field]):
        if np.abs(np.subtract(found, size)).max() > 1:
            raise _other_size(found, size)
        resized = transforms.resize({field: record[field]}, height=size[0], width=size[1])
        record[field] = resized[field]


def _other_size(found: tuple[int, ...], size: tuple[int, ...]) -> UserError:
    turned = found == size[::-1] and ", which its EXIF data turn: turn this field too"
    return UserError("has {}x{} pixels but the image {}x{}".format(*found, *size) + (turned or ""))


def _depth(record: Record, field: str) -> None:
    _plane(record, field)
    some = record[field][::4, ::4]
    some = some[np.isfinite(some) & (some > 0)]
    if len(some) and not _METERS[0] <= (median := np.median(some)) <= _METERS[1]:
        raise UserError(
            f"has a median of {median:g} m; expected meters (depth_scale times 16-bit levels)"
        )


def _masks(record: Record, field: str) -> None:
    if record[field].size and (high := record[field].max()) > 1:
        if not np.isin(record[field], (0, 255)).all():
            raise UserError(f"has the value {high}; expected 0 and 1")
        record[field] = (record[field] > 0).astype(np.uint8)
    _plane(record, field)


def _boxes(record: Record, field: str) -> None:
    pixel = _pixel(record)
    for k, box in enumerate(record[field]):
        # A comparison with NaN is False, so this finds NaNs too.
        if not ((box > -np.tile(pixel, 2)) & (box < 1 + np.tile(pixel, 2))).all():
            raise UserError(
                f"has box {k} outside the image: {_shown(box)}, expected x0 y0 x1 y1 in [0, 1]"
                f"{_pixels_hint(box)}"
            )
        if not (box[2:] - box[:2] > -pixel).all():
            raise UserError(f"has box {k} inverted: {_shown(box)}, expected x0 < x1 and y0 < y1")
    record[field] = np.clip(record[field], 0, 1)


def _drop_empty_boxes(record: Record, needs: Collection[str]) -> None:
    boxes = record["boxes"]
    keep = np.flatnonzero((boxes[:, :2] < boxes[:, 2:]).all(axis=1))
    record["boxes"] = boxes[keep]
    if "phrases" in needs:
        record["phrases"] = [record["phrases"][k] for k in keep]
    if "phrase_captions" in needs and len(record["phrase_captions"]):
        record["phrase_captions"] = record["phrase_captions"][keep]


def _joints(record: Record, field: str) -> None:
    joints, pixel = record[field], _pixel(record)
    if joints.shape == (17, 3):
        joints = joints[None]
    if joints.ndim != 3 or joints.shape[1:] != (17, 3):
        raise UserError(f"has shape {joints.shape}, expected (people, 17, 3)")
    xy, visibility = joints[..., :2], joints[..., 2:]
    if not (known := np.isin(visibility, (0, 1, 2))).all():
        raise UserError(f"has visibility {visibility[~known][0]:g}, expected 0, 1 or 2")
    # A comparison with NaN is False, so this finds NaNs too.
    is_inside = ((xy > -pixel) & (xy < 1 + pixel)).all(axis=-1)
    for p, k in np.argwhere(~is_inside & (visibility[..., 0] > 0)):
        of = f" of person {p}" if len(joints) > 1 else ""
        raise UserError(
            f"has joint {k}{of} outside the image: {_shown(xy[p, k])}, expected x y in [0, 1]"
            f"{_pixels_hint(xy[p, k])}"
        )
    inside = np.where(visibility > 0, np.clip(xy, 0, 1), 0.0)
    record[field] = np.concatenate([inside, visibility], -1).astype(np.float32)


def _parallel(partner: str) -> Callable[[Record, str], None]:
    """The check of a list that has an entry for each of its partner's."""

    def check(record: Record, field: str) -> None:
        found, wanted = len(record[field]), len(record[partner])
        if found != wanted:
            raise UserError(f"has {found} entries for {wanted} {partner}")

    return check


def _captions(record: Record, field: str) -> None:
    if isinstance(record[field], str):
        raise UserError(f"is one text, expected a list of them: {record[field][:50]!r}")


def _kinds(record: Record, field: str) -> None:
    if len(record[field]):
        _parallel("captions")(record, field)


def _expressions(record: Record, field: str) -> None:
    if not len(record.get("expression_masks", ())):
        _parallel("masks")(record, field)


def _index(target: str, partner: str) -> Callable[[Record, str], None]:
    """The check of an index into `target` for each entry of `partner`; it may be empty."""

    def check(record: Record, field: str) -> None:
        record[field] = indices = np.asarray(record[field], np.int64)
        if not len(indices):
            return
        _parallel(partner)(record, field)
        size = len(record[target])
        if (outside := indices[(indices < 0) | (indices >= size)]).size:
            raise UserError(f"has the index {outside[0]} for {size} {target}")

    return check


def _pixel(record: Record) -> Float32[np.ndarray, "2"]:
    """A pixel's width and height, as fractions of the picture's."""
    height, width = record["image"].shape[:2]
    return np.array([1 / width, 1 / height], np.float32)


def _shown(values: np.ndarray) -> str:
    return " ".join(f"{v:g}" for v in values)


def _pixels_hint(values: np.ndarray) -> str:
    return " of width and height, not pixels" if np.abs(values).max() > 2 else ""


_CHECKS: dict[str, Callable[[Record, str], None]] = {
    "image": _picture,
    "face": _picture,
    "caption": _text,
    "instruction": _text,
    "source": _source,
    "depth": _depth,
    "edit_mask": _masks,
    "masks": _masks,
    "ignore_mask": _masks,
    "boxes": _boxes,
    "joints": _joints,
    "phrases": _parallel("boxes"),
    "captions": _captions,
    "caption_kinds": _kinds,
    "phrase_captions": _index("captions", "phrases"),
    "expressions": _expressions,
    "expression_masks": _index("masks", "expressions"),
}
