"""PhraseCut: phrases of Visual Genome, and the regions that they speak of."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from data_pipelines.native import TEST, TRAIN, VALIDATION, Dataset, Entry, Options
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.fields import setting

_FILES = {TRAIN: "refer_train.json", VALIDATION: "refer_val.json", TEST: "refer_test.json"}
_MINIV = "refer_miniv.json"
_IMAGE_FILES = ("image_data_split3000.json", "image_data_split.json")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhraseCutOptions(Options):
    """Where the pictures are."""

    pictures: str = setting(
        "", "folder or zip of the pictures; empty: images or VG_100K* in source", is_path=True
    )
    miniv: bool = setting(
        False, "the split validation is the 100 pictures of refer_miniv.json, not refer_val.json"
    )


@dataclasses.dataclass(frozen=True)
class PhraseCut:
    """A record of each picture, with all its phrases and a mask of each."""

    options: PhraseCutOptions
    splits: tuple[str, ...]
    fields: tuple[str, ...] = ("image", "masks", "expressions", "expression_masks")

    def parts(self, split: str) -> Sequence[Any]:
        from data_pipelines.native import coco

        file = os.path.join(self.options.source, _file(self.options, split))
        phrases: dict[int, list[Any]] = {}
        for number, task in enumerate(coco.read_list(file, what="PhraseCut's phrases")):
            image_id = _image_id(task, f"{file}: task {number}")
            phrases.setdefault(image_id, []).append([task.get("phrase"), task.get("Polygons")])
        excluded = self._miniv() if split == VALIDATION and not self.options.miniv else frozenset()
        sizes = self._sizes(phrases)
        rows = [
            {"id": image_id, "size": sizes.get(image_id), "phrases": phrases[image_id]}
            for image_id in sorted(phrases)
            if image_id not in excluded
        ]
        names = [f"{row['id']}.jpg" for row in rows]
        coco.Pictures.find(self._places(), names, where=file)
        return coco.slices(file, rows)

    def entries(self, part: Any) -> Iterator[Entry]:
        for row in part.rows():
            yield Entry(key=str(row["id"]), raw=row, ids=(str(row["id"]),))

    def make(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        from data_pipelines.native import coco, tables

        if raw["size"] is None:
            raise UserError(f"{' or '.join(_IMAGE_FILES)} has no picture {raw['id']}")
        height, width = coco.image_size(raw["size"])
        places = tuple(place for place in self._places() if os.path.exists(place))
        image = coco.Pictures(places).read(f"{raw['id']}.jpg")
        shape = coco.size_of(image)
        scale = _scale((height, width), shape)
        masks: dict[bytes, int] = {}
        expressions, expression_masks = [], []
        for phrase, polygons in raw["phrases"]:
            text = tables.text_of(phrase)
            mask = union(polygons, *shape, scale)
            if text and mask.any():
                # Several phrases may be of the same regions.
                number = masks.setdefault(coco.png_mask(mask), len(masks))
                expressions.append(text)
                expression_masks.append(number)
        if not masks:
            raise UserError("no phrase of the picture has a region")
        return dict(
            image=image,
            masks=list(masks),
            expressions=expressions,
            expression_masks=expression_masks,
        )

    def _places(self) -> list[str]:
        if self.options.pictures:
            return [self.options.pictures]
        names = ("images", "VG_100K", "VG_100K_2")
        inside = [os.path.join(self.options.source, name) for name in names]
        return [place + suffix for place in inside for suffix in ("", ".zip")]

    def _miniv(self) -> frozenset[int]:
        from data_pipelines.native import coco

        file = os.path.join(self.options.source, _MINIV)
        if not os.path.isfile(file):
            return frozenset()  # refer_val.json of the release goes without these by itself
        tasks = coco.read_list(file, what="PhraseCut's phrases")
        return frozenset(_image_id(task, file) for task in tasks)

    def _sizes(self, wanted: Mapping[int, Any]) -> dict[int, dict[str, Any]]:
        from data_pipelines.native import coco

        paths = [os.path.join(self.options.source, name) for name in _IMAGE_FILES]
        there = [path for path in paths if os.path.isfile(path)]
        if not there:
            raise NotFoundError(f"there is no {' or '.join(paths)}: expected the pictures' sizes")
        sizes = {}
        for image in coco.read_list(there[0], what="the pictures' sizes"):
            image_id = _image_id(image, there[0])
            if image_id in wanted:
                sizes[image_id] = {key: image.get(key) for key in ("height", "width")}
        return sizes


def union(
    instances: Any, height: int, width: int, scale: tuple[float, float] = (1, 1)
) -> UInt8[np.ndarray, "h w"]:
    """1 where any polygon of any instance is, drawn as PhraseCut's own tools do.

    `instances` are lists of polygons, each a list of x, y; `scale` multiplies these. A point is the
    pixel that it is in, and edges belong to the region. Polygons of less than two points are left
    out. Raises UserError for anything else.
    """
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    far = 2 * max(height, width)
    for polygon in _polygons(instances):
        points = [(int(x * scale[0]), int(y * scale[1])) for x, y in polygon]
        if any(abs(v) > far for point in points for v in point):
            raise UserError(f"a polygon is far outside its picture of {width} x {height}")
        if len(points) >= 2:
            draw.polygon(points, outline=1, fill=1)
    return np.asarray(canvas)


def _polygons(instances: Any) -> Iterator[list[tuple[float, float]]]:
    if not isinstance(instances, list) or not all(isinstance(one, list) for one in instances):
        raise UserError(f"the Polygons are {quote(instances)}: expected lists of polygons")
    for polygon in (polygon for instance in instances for polygon in instance):
        is_points = isinstance(polygon, list) and all(
            isinstance(point, list)
            and len(point) == 2
            and all(type(v) in (int, float) and abs(v) < 1e9 for v in point)
            for point in polygon
        )
        if not is_points:
            raise UserError(f"a polygon is {quote(polygon)}: expected a list of x, y")
        yield [(x, y) for x, y in polygon]


def _scale(stated: tuple[int, int], found: tuple[int, int]) -> tuple[float, float]:
    """What to multiply x and y by, where the file has another size than Visual Genome states.

    Raises UserError for another shape, beyond the rounding of a side.
    """
    (h, w), (height, width) = stated, found
    if abs(w * height / h - width) > 1 and abs(h * width / w - height) > 1:
        turned = (w, h) == found
        raise UserError(
            f"the picture has {width} x {height} pixels and its annotations are for {w} x {h}"
            + (": its EXIF data turn it" if turned else "")
        )
    return width / w, height / h


def _image_id(task: Mapping, where: str) -> int:
    from data_pipelines.native import tables

    try:
        return tables.get(task, "image_id", int)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _file(options: PhraseCutOptions, split: str) -> str:
    return _MINIV if split == VALIDATION and options.miniv else _FILES[split]


def _open(options: PhraseCutOptions) -> dict[str, PhraseCut]:
    files = {split: os.path.join(options.source, _file(options, split)) for split in _FILES}
    splits = tuple(split for split, file in files.items() if os.path.isfile(file))
    if not splits:
        raise NotFoundError(f"there is no {' or '.join(files.values())}: expected PhraseCut's")
    return {"phrasecut": PhraseCut(options, splits)}


DATASET = Dataset(
    name="phrasecut",
    summary="PhraseCut: phrases and the regions that they speak of, in Visual Genome's pictures",
    tasks=("seg", "ip"),
    options=PhraseCutOptions,
    open=_open,
    size="345,486 phrases of 77,262 pictures, 15 GB",
    license="none stated for PhraseCut; Visual Genome is CC BY 4.0",
    where="ChenyunWu/PhraseCutDataset on GitHub; pictures of Visual Genome 1.2, both parts",
    layout=(
        "refer_{train,val,test,miniv}.json, image_data_split3000.json (or image_data_split.json), "
        "images/<image_id>.jpg (or VG_100K and VG_100K_2, also as zips)"
    ),
    quirks=(
        "a phrase's mask is the union over its instances, drawn as by PhraseCut's own tools",
        "polygons of less than two points are left out",
        "val goes without the 100 pictures of miniv (option miniv takes these alone)",
        "polygons are scaled where a picture's file has another size than is stated",
        "one record a picture; equal masks are stored once",
    ),
    example="--source=phrasecut --pictures=VisualGenome/images",
)
