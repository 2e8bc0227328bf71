"""COCO keypoints in miniature: two people, crowds in both encodings, people without joints."""

import json
import pathlib
import zipfile

import numpy as np

from data_pipelines.datasets.coco_pose import JOINTS
from tests.native import shapes

RECORDS = {"train": 4, "validation": 1}
BOX = {1: (20, 10, 40, 60), 2: (90, 15, 36, 58)}  # of picture 1


def write(root: pathlib.Path) -> dict:
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    pictures = {
        1: (160, 96),
        2: (96, 128),
        3: (120, 120),
        4: (64, 48),  # nobody
        5: (100, 70),  # only a person without joints
        6: (72, 150),
    }
    drawn = {k: shapes.ground(*size, seed=k) for k, size in pictures.items()}
    people = []
    for box in BOX.values():
        shapes.draw_person(drawn[1], box)
    people.append(_person(1, BOX[1], hidden=(9,), unlabeled=(3, 16)))
    people.append(_person(1, BOX[2]))
    people += [_person(2, (10, 10, 30, 100)), _crowd(2, (96, 128), (50, 20, 40, 90))]
    people += [_person(3, (5, 5, 50, 110)), _person(3, (70, 40, 30, 60), unlabeled=range(17))]
    people += [_person(5, (10, 10, 20, 50), unlabeled=range(17))]
    people += [
        # The box passes the border, and is all that says where this one is.
        _person(6, (40, 110, 32.5, 40.7), unlabeled=range(17)) | {"segmentation": []},
        _person(6, (5, 5, 40, 90)),
        _crowd(6, (72, 150), (48, 5, 20, 40), compressed=True),
    ]
    for person in people:
        if person["num_keypoints"]:
            shapes.draw_person(drawn[person["image_id"]], [int(v) for v in person["bbox"]])
    _write(root, "train", pictures, people)
    folder = root / "train2017"
    folder.mkdir(exist_ok=True)
    for k, pixels in drawn.items():
        (folder / f"{k:012d}.jpg").write_bytes(shapes.jpeg(pixels))
    picture = shapes.ground(128, 90, seed=7)
    shapes.draw_person(picture, (30, 10, 40, 70))
    _write(root, "val", {7: (128, 90)}, [_person(7, (30, 10, 40, 70))])
    with zipfile.ZipFile(root / "val2017.zip", "w") as archive:
        archive.writestr("val2017/000000000007.jpg", shapes.jpeg(picture))
    return {"source": str(root)}


def _write(root, split, pictures, people) -> None:
    content = dict(
        info={"description": "drawn"},
        images=[
            dict(id=k, file_name=f"{k:012d}.jpg", width=width, height=height)
            for k, (width, height) in pictures.items()
        ],
        annotations=[{**person, "id": 900 + k} for k, person in enumerate(people)],
        categories=[
            dict(id=1, name="person", keypoints=list(JOINTS), skeleton=[[16, 14], [14, 12]])
        ],
    )
    path = root / "annotations" / f"person_keypoints_{split}2017.json"
    path.write_text(json.dumps(content))


def _person(image_id, box, hidden=(), unlabeled=()) -> dict:
    x, y, w, h = box
    keypoints = shapes.keypoints(box, hidden, unlabeled)
    return dict(
        image_id=image_id,
        category_id=1,
        iscrowd=0,
        bbox=[float(v) for v in box],
        area=w * h / 2,
        keypoints=keypoints,
        num_keypoints=sum(v > 0 for v in keypoints[2::3]),
        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
    )


def _crowd(image_id, size, box, compressed=False) -> dict:
    width, height = size
    x, y, w, h = box
    mask = np.zeros((height, width), np.uint8)
    mask[y : y + h, x : x + w] = 1
    counts = shapes.runs(mask)
    if compressed:
        from pycocotools import mask as rle

        counts = rle.frPyObjects({"counts": counts, "size": [height, width]}, height, width)
        counts = counts["counts"].decode()
    return dict(
        image_id=image_id,
        category_id=1,
        iscrowd=1,
        bbox=list(box),
        area=w * h,
        keypoints=[0] * 51,
        num_keypoints=0,
        segmentation={"counts": counts, "size": [height, width]},
    )
