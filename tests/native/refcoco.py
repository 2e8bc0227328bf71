"""RefCOCO, RefCOCO+ and Google's RefCOCOg in miniature, as their Python 2 pickles and JSON."""

import json
import pathlib
import pickle

import numpy as np

from tests.native import shapes

RECORDS = {"train": 2, "validation": 2, "test": 1}
SIZES = {11: (120, 80), 12: (70, 110), 13: (96, 96), 14: (140, 60), 15: (64, 64), 16: (80, 72)}


def square(x, y, side) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def segmentations() -> dict[int, object]:
    """By annotation: its picture is ann_id // 10."""
    mask = np.zeros((110, 70), np.uint8)
    mask[30:60, 20:50] = 1
    return {
        # Two polygons that overlap: what they share counts once.
        111: [square(10, 10, 30), square(30, 20, 30)],
        112: [square(80, 20, 30)],
        121: {"counts": shapes.runs(mask), "size": [110, 70]},
        131: [square(20, 20, 40)],
        141: [square(10, 10, 40)],
        142: [square(90, 10, 40), [1, 1, 2, 2]],
        151: [square(5, 5, 30)],
        161: [square(5, 5, 30)],
    }


REFS = {
    "refcoco": [
        (111, "train", ["Left square!", "the left one"]),
        (112, "train", ["right square"]),
        (111, "train", ["the LEFT one", "biggest thing"]),  # a second ref of one object
        (121, "train", ["middle box"]),
        (131, "val", ["the box"]),
        (141, "testA", ["left box"]),
        (142, "testB", ["right box"]),
    ],
    "refcoco+": [(112, "train", ["darker"]), (141, "testA", ["brighter square"])],
}


def write(root: pathlib.Path) -> dict:
    folder = root / "train2014"
    folder.mkdir(parents=True, exist_ok=True)
    for k, (width, height) in SIZES.items():
        picture = shapes.ground(width, height, seed=k)
        (folder / _name(k)).write_bytes(shapes.jpeg(picture))
    for subset, refs in REFS.items():
        (root / subset).mkdir(exist_ok=True)
        content = [_ref(number, *ref) for number, ref in enumerate(refs)]
        (root / subset / "refs(unc).p").write_bytes(pickle.dumps(content, protocol=0))
        (root / subset / "instances.json").write_text(json.dumps(instances()))
    google(root)
    return {"source": str(root)}


def google(root: pathlib.Path) -> None:
    """Google's own form; picture 15 is in both splits, so that it is left out of train."""
    for split, anns in {"train": {151: ["Red Box."]}, "val": {151: ["a box"], 161: ["it"]}}.items():
        if split == "val":
            anns.pop(161)
        content = dict(images={}, annotations={}, refexps={}, categories=[])
        for ann_id, texts in anns.items():
            k = ann_id // 10
            content["images"][str(k)] = {**_image(k), "image_id": k}
            content["images"][str(k)].pop("id")
            numbers = [ann_id * 10 + i for i in range(len(texts))]
            content["annotations"][str(ann_id)] = dict(
                annotation_id=ann_id,
                image_id=k,
                segmentation=segmentations()[ann_id],
                refexp_ids=numbers,
            )
            for number, text in zip(numbers, texts, strict=True):
                tokens = text.lower().strip(".").split()
                content["refexps"][str(number)] = dict(
                    refexp_id=number, raw=text, tokens=tokens, parse={}
                )
        name = f"google_refexp_{split}_201511_coco_aligned.json"
        (root / name).write_text(json.dumps(content))


def instances() -> dict:
    return dict(
        images=[_image(k) for k in SIZES],
        annotations=[
            dict(id=ann_id, image_id=ann_id // 10, iscrowd=0, segmentation=segmentation)
            for ann_id, segmentation in segmentations().items()
        ],
        categories=[dict(id=1, name="box")],
    )


def _name(k: int) -> str:
    return f"COCO_train2014_{k:012d}.jpg"


def _image(k: int) -> dict:
    width, height = SIZES[k]
    return dict(id=k, file_name=_name(k), width=width, height=height)


def _ref(number: int, ann_id: int, split: str, texts: list[str]) -> dict:
    k = ann_id // 10
    return dict(
        ref_id=number,
        ann_id=ann_id,
        image_id=k,
        category_id=1,
        split=split,
        file_name=_name(k).replace(".jpg", f"_{number}.jpg"),  # names no file
        sent_ids=list(range(len(texts))),
        sentences=[
            dict(
                sent_id=10**12 + i,  # a Python 2 long
                sent=text.lower().strip("!"),
                raw=text,
                tokens=text.split(),
            )
            for i, text in enumerate(texts)
        ],
    )
