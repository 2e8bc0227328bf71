"""PhraseCut in miniature: unions, degenerate polygons, miniv inside val, a scaled picture."""

import json
import pathlib

from tests.native import shapes

RECORDS = {"train": 3, "validation": 1, "test": 1}
SIZES = {21: (120, 80), 22: (70, 100), 23: (96, 96), 24: (64, 48), 25: (90, 60), 26: (80, 80)}


def square(x, y, side) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


TASKS = {  # by file: picture, phrase, Polygons
    "refer_train.json": [
        (21, "red squares", [[square(10.7, 10.2, 20)], [square(20, 15, 20), [[3, 3]], []]]),
        (21, "squares on the left", [[square(10.7, 10.2, 20)], [square(20, 15, 20)]]),
        (22, "tall box", [[square(10, 10, 50)]]),
        (21, "corner", [[square(100, 60, 30)]]),  # over the border
        (23, "half size", [[square(20, 20, 40)]]),
    ],
    "refer_val.json": [(24, "a box", [[square(5, 5, 20)]]), (25, "mini", [[square(5, 5, 20)]])],
    "refer_miniv.json": [(25, "mini", [[square(5, 5, 20)]])],
    "refer_test.json": [(26, "a line", [[[[5, 5], [40, 40]]]])],
}


def write(root: pathlib.Path) -> dict:
    (root / "images").mkdir(parents=True, exist_ok=True)
    for k, (width, height) in SIZES.items():
        # The file of 23 is half as large as Visual Genome states.
        shown = (width // 2, height // 2) if k == 23 else (width, height)
        (root / "images" / f"{k}.jpg").write_bytes(shapes.jpeg(shapes.ground(*shown, seed=k)))
    for name, tasks in TASKS.items():
        (root / name).write_text(
            json.dumps(
                [
                    dict(
                        task_id=f"{image}__{number}",
                        image_id=image,
                        ann_ids=[number],  # may differ in number from Polygons
                        instance_boxes=[[0, 0, 1, 1]],
                        Polygons=polygons,
                        phrase=phrase,
                        phrase_structure={"name": "box", "attributes": []},
                    )
                    for number, (image, phrase, polygons) in enumerate(tasks)
                ]
            )
        )
    splits = {name: name[6:-5] for name in TASKS}
    images = {image: splits[name] for name, tasks in TASKS.items() for image, *_ in tasks}
    (root / "image_data_split3000.json").write_text(
        json.dumps(
            [
                dict(image_id=k, width=SIZES[k][0], height=SIZES[k][1], split=split, coco_id=None)
                for k, split in images.items()
            ]
        )
    )
    return {"source": str(root)}
