"""COCO keypoints: the joints of all people in a picture."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.native import TRAIN, VALIDATION, CocoOptions, Dataset, Entry
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.fields import setting

_SIDES = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
JOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear"),
    *(f"{side}_{name}" for name in _SIDES for side in ("left", "right")),
)
_NATIVE_SPLITS = {TRAIN: "train", VALIDATION: "val"}
_YEARS = ("2017", "2014", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoPoseOptions(CocoOptions):
    """Where the annotations and the pictures are."""

    year: str = setting("", "release to take; empty: 2017 if it is there", names=("", *_YEARS[:2]))
    pictures: str = setting(
        "", "folder or zip of the pictures; empty: looked for in source", is_path=True
    )


@dataclasses.dataclass(frozen=True)
class CocoPose:
    """A record of each picture that shows people."""

    options: CocoPoseOptions
    files: Mapping[str, str]  # by split
    fields: tuple[str, ...] = ("image", "joints", "ignore_mask")

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def parts(self, split: str) -> Sequence[Any]:
        from data_pipelines.native import coco

        file = self.files[split]
        category, order = _category(file)
        people: dict[int, list[dict[str, Any]]] = {}
        for ann in coco.read_list(file, "annotations"):
            if ann.get("category_id") == category:
                people.setdefault(_id(ann, "image_id", file), []).append(_person(ann))
        rows = []
        for image in coco.read_list(file, "images"):
            image_id = _id(image, "id", file)
            if image_id in people:
                row = {key: image.get(key) for key in ("file_name", "height", "width")}
                rows.append({"id": image_id, **row, "people": people[image_id], "order": order})
        names = [str(row["file_name"]) for row in rows]
        coco.Pictures.find(self._places(), names, where=file)
        return coco.slices(os.path.basename(file), rows)

    def entries(self, part: Any) -> Iterator[Entry]:
        for row in part.rows():
            yield Entry(key=str(row["id"]), raw=row, ids=(str(row["id"]),))

    def make(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        from data_pipelines.native import coco, tables

        height, width = coco.image_size(raw)
        joints, ignore = [], np.zeros((height, width), np.uint8)
        for person in raw["people"]:
            if person["iscrowd"]:
                ignore |= coco.segment(person["segmentation"], height, width)
                continue
            found = _joints(person["keypoints"], height, width)
            if found[:, 2].any():
                joints.append(found[list(raw["order"])])
            else:
                ignore |= _region(person, height, width)
        if not joints:
            raise UserError("no person with a labeled joint")
        places = tuple(place for place in self._places() if os.path.exists(place))
        image = coco.Pictures(places).read(tables.get(raw, "file_name", str))
        coco.check_size(image, height, width)
        return dict(
            image=image,
            joints=np.stack(joints).astype(np.float32),
            ignore_mask=coco.png_mask(ignore),
        )

    def _places(self) -> list[str]:
        if self.options.pictures:
            return [self.options.pictures]
        # Which year and split is told by the name; all are looked into, 2017's first.
        root = self.options.source
        years = (self.options.year,) if self.options.year else _YEARS
        return [
            os.path.join(root, folder, f"{split}{year}{suffix}")
            for year in years
            for folder in ("", "images")
            for split in _NATIVE_SPLITS.values()
            for suffix in ("", ".zip")
        ] + [os.path.join(root, "images")]


def _category(file: str) -> tuple[int, list[int]]:
    """The id of the category of people, and where each of JOINTS stands in its keypoints."""
    from data_pipelines.native import coco

    named = []
    for category in coco.read_list(file, "categories"):
        names = category.get("keypoints")
        if isinstance(names, list) and set(map(str, names)) == set(JOINTS) and len(names) == 17:
            return _id(category, "id", file), [names.index(name) for name in JOINTS]
        named.append(names)
    raise UserError(
        f"{file}: its categories name the keypoints {quote(named)}: expected COCO's 17, from "
        f"{JOINTS[0]} to {JOINTS[-1]}"
    )


def _id(item: Mapping, key: str, file: str) -> int:
    from data_pipelines.native import tables

    try:
        return tables.get(item, key, int)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _person(ann: Mapping) -> dict[str, Any]:
    """What of an annotation is needed: the segmentations of most people are not."""
    keypoints, is_crowd = ann.get("keypoints"), bool(ann.get("iscrowd"))
    person: dict[str, Any] = {"iscrowd": is_crowd, "keypoints": keypoints}
    if is_crowd or not isinstance(keypoints, list) or not any(keypoints[2::3]):
        person |= {"segmentation": ann.get("segmentation"), "bbox": ann.get("bbox")}
    return person


def _joints(keypoints: Any, height: int, width: int) -> np.ndarray:
    """[17, 3]: x, y as fractions, of the middle of a joint's pixel; 0 where it has no label."""
    is_numbers = isinstance(keypoints, list) and all(type(v) in (int, float) for v in keypoints)
    if not is_numbers or len(keypoints) != 51:
        raise UserError(f"the keypoints of a person are {quote(keypoints)}: expected 51 numbers")
    joints = np.array(keypoints, np.float64).reshape(17, 3)
    if not np.isin(joints[:, 2], (0, 1, 2)).all():
        raise UserError(f"the visibility of a joint is {joints[:, 2].max():g}: expected 0, 1, 2")
    is_known = joints[:, 2] > 0
    xy = (joints[:, :2] + 0.5) / (width, height)
    pixel = np.array([1 / width, 1 / height])
    # A comparison with NaN is False, so this finds NaNs too.
    if not ((xy > -pixel) & (xy < 1 + pixel))[is_known].all():
        raise UserError(f"a joint is outside its picture of {width} x {height}")
    joints[:, :2] = np.where(is_known[:, None], np.clip(xy, 0, 1), 0)
    return joints


def _region(person: Mapping, height: int, width: int) -> np.ndarray:
    """Where a person without joints is: the segment or, without one, the box."""
    from data_pipelines.native import coco

    if person["segmentation"]:
        return coco.segment(person["segmentation"], height, width)
    box = person["bbox"]
    is_numbers = isinstance(box, list) and all(type(v) in (int, float) for v in box)
    if not is_numbers or len(box) != 4 or not np.isfinite(box).all():
        raise UserError(f"the bbox of a person is {quote(box)}: expected x, y, width, height")
    # Boxes pass the border by a fraction of a pixel.
    x0, y0 = np.floor(np.clip(box[:2], 0, (width, height))).astype(int)
    x1, y1 = np.ceil(np.clip(np.add(box[:2], box[2:]), 0, (width, height))).astype(int)
    region = np.zeros((height, width), np.uint8)
    region[y0:y1, x0:x1] = 1
    return region


def _open(options: CocoPoseOptions) -> dict[str, CocoPose]:
    files, looked = {}, []
    for year in (options.year,) if options.year else _YEARS:
        for split, name in _NATIVE_SPLITS.items():
            file = f"person_keypoints_{name}{year}.json"
            for folder in ("annotations", ""):
                path = os.path.join(options.source, folder, file)
                looked.append(path)
                if os.path.isfile(path):
                    files.setdefault(split, path)
        if files:
            return {"coco_pose": CocoPose(options, files)}
    raise NotFoundError(
        f"{options.source} has no annotations of keypoints: expected {looked[0]} or {looked[2]}"
    )


DATASET = Dataset(
    name="coco_pose",
    summary="COCO keypoints: pictures with the joints of all people in them",
    tasks=("pose",),
    options=CocoPoseOptions,
    open=_open,
    size="64,000 pictures with people of 118,000 (2017), 19 GB",
    license="annotations CC BY 4.0; pictures under Flickr's terms",
    where="COCO's download page: train2017, val2017 and the 2017 annotations (or 2014's)",
    layout=(
        "annotations/person_keypoints_{train,val}{2017,2014}.json; {train,val}{2017,2014}/ or .zip"
    ),
    quirks=(
        "annotations are streamed, not held whole",
        "crowds and people without labeled joints go into ignore_mask and do not count in the loss",
        "joints without a label (visibility 0) are never drawn",
        "a joint is at the middle of its pixel; keypoints are pixel indices, boxes are not",
        "the order of joints is read from the category's names; other or no names are refused",
        "pictures without people are left out",
    ),
    example="--source=coco --exclude=refcoco:refer/data",
)
