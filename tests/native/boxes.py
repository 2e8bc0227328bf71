"""Boxes in COCO's form in miniature: instances with captions, and MDETR's captions with spans."""

import json
import pathlib

from tests.native.drawing import SIZES, picture, write_file, write_zip

RECORDS = {"train": 3, "validation": 1}
CATEGORIES = {1: "dog", 2: "hot dog", 3: "person", 17: "dining table"}
# Of picture k: its category, box, crowd. Pictures of `drawing`.
THINGS = {
    0: [(1, (10, 5, 40.5, 30), 0), (1, (60, 8, 36.4, 20), 0), (3, (0, 0, 20, 64), 0)],
    1: [(17, (0, 50, 64, 46), 0), (1, (5, 5, 10, 10), 0), (3, (1, 1, 60, 90), 1)],
    2: [(2, (10, 10, 30, 30), 0)],
    3: [(3, (0, 0, 128, 56), 1)],  # only a crowd
    5: [(3, (200, 5, 10, 10), 0), (3, (5, 5, -2, 10), 0)],  # outside, inverted
    4: [(3, (6, 10, 40, 100), 0)],
}
CAPTIONS = {
    0: ["Two dogs and a man.", "A person pets a dog", "A hot dog stand"],
    1: ["Dinner is on the Dining Table .", ""],
    2: ["Lunch &amp; more"],
    5: ["Nobody"],
    4: ["A person stands."],
    6: ["Nothing has a box here."],
}
SPLITS = {"train": (0, 1, 2, 3, 5, 6), "val": (4,)}


def write(root: pathlib.Path) -> dict:
    """COCO's layout: pictures of train in a folder, those of val in a zip."""
    for split, numbers in SPLITS.items():
        things = [
            dict(image_id=k, category_id=category, bbox=list(box), iscrowd=crowd, segmentation=[])
            for k in numbers
            for category, box, crowd in THINGS.get(k, ())
        ]
        said = [dict(image_id=k, caption=text) for k in numbers for text in CAPTIONS.get(k, ())]
        categories = [dict(id=k, name=name) for k, name in CATEGORIES.items()]
        images = [_image(k) for k in numbers]
        for kind, anns in (("instances", things), ("captions", said)):
            anns = [{"id": number, **ann} for number, ann in enumerate(anns)]
            content = dict(images=images, annotations=anns, categories=categories)
            name = f"{kind}_{split}2017.json"
            write_file(root / "annotations" / name, json.dumps(content))
        files = {f"{split}2017/{k:012d}.jpg": picture(k) for k in numbers}
        if split == "val":
            write_zip(root / f"{split}2017.zip", files)
        else:
            for name, content in files.items():
                write_file(root / name, content)
    return {"source": str(root)}


def write_spans(root: pathlib.Path) -> dict:
    """MDETR's layout: a caption for each image, whose picture may be there twice."""
    images = [
        _image(0) | dict(id=70, original_img_id=9, caption="a red disk  and a blue bar"),
        _image(0) | dict(id=71, original_img_id=9, caption="the disk is beside its bar"),
        _image(1) | dict(id=72, original_img_id=12, caption="a disk"),
    ]
    anns = [
        dict(image_id=70, bbox=[8, 16, 48, 32], tokens_positive=[[0, 1], [2, 10]]),
        dict(image_id=70, bbox=[48, 5, 39.5, 3], tokens_positive=[[16, 22], [23, 26]]),
        dict(image_id=71, bbox=[8, 16, 48, 32], tokens_positive=[[0, 8], [19, 22]]),
        dict(image_id=72, bbox=[0, 0, 10, 10], tokens_positive=[[2, 40]]),
    ]
    for number, ann in enumerate(anns):
        ann |= dict(id=number, category_id=1, iscrowd=0)
    content = dict(images=images, annotations=anns, categories=[dict(id=1, name="object")])
    write_file(root / "final_toy_train.json", json.dumps(content))
    for k in (0, 1):
        write_file(root / "images" / f"{k:012d}.jpg", picture(k))
    return {"source": str(root)}


def _image(k: int) -> dict:
    width, height = SIZES[k % len(SIZES)]
    return dict(id=k, file_name=f"{k:012d}.jpg", width=width, height=height)
