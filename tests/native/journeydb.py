"""JourneyDB: archives of pictures, and one file of annotations of all of them."""

import json
import pathlib

from tests.native.drawing import picture, write_file, write_tar

RECORDS = {"train": 6, "validation": 2}


def _row(path: str, prompt, task=..., **more) -> dict:
    row = {"img_path": path, "prompt": prompt, "Task3": {"Style": [], "Content": []}, **more}
    return row if task is ... else {**row, "Task2": task}


TRAIN = [
    _row("./000/aa11.jpg", "a red house --ar 3:2 --v 5", {"Caption": "A house that is red."}),
    # The file is a .jpg.
    _row(
        "./000/bb22.png",
        "<https://s.mj.run/x> two owls::2 \u2014ar 16:9",
        {"Caption": None},
    ),
    _row("./001/cc33.jpg", "a boat, https://x.y/z.png on a lake --no people, text --q 2"),
    _row("./001/dd44.jpg", "--v 4", {"Caption": "A green hill under clouds."}),
    _row("./001/ee55.jpg", "fox", {"Caption": "ok"}),  # too short a caption
    _row("./001/ff66.jpg", "an iron bridge", {"Caption": "None"}),
    _row("./001/0077.jpg", None, {"Caption": None}),  # neither: left out
    _row("./000/gone.jpg", "its picture is missing", {"Caption": "Its picture is missing."}),
    _row("./009/other.jpg", "its archive is missing", {"Caption": "Its archive is missing."}),
]
VALID = [
    _row("./000/user_1234.jpg", "a clock", {"Caption": "A clock on a wall."}),
    _row("./000/5678.jpg", "rain", {"Caption": "Rain on a window."}),
]


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(root: pathlib.Path) -> dict:
    data = root / "data"
    write_tar(
        data / "train" / "imgs" / "000.tgz",
        {
            "000/aa11.jpg": picture(0),
            "000/._aa11.jpg": b"AppleDouble",
            "000/bb22.jpg": picture(1),
            "000/no_annotation.jpg": picture(2),
        },
        "w:gz",
    )
    for k, name in enumerate(("cc33", "dd44", "ee55", "ff66", "0077")):
        write_file(data / "train" / "imgs" / "001" / f"{name}.jpg", picture(3 + k))
    # The first release has other paths.
    old = [{**row, "img_path": "./zzz/" + row["img_path"][6:]} for row in TRAIN]
    for name, rows in (("train_anno.jsonl", old), ("train_anno_realease_repath.jsonl", TRAIN)):
        write_tar(data / "train" / f"{name}.tgz", {name: lines(rows)}, "w:gz")
    write_tar(
        data / "valid" / "imgs" / "000.tgz",
        {"./000/1234.jpg": picture(8), "./000/other_5678.jpg": picture(9)},
        "w:gz",
    )
    write_file(data / "valid" / "valid_anno_repath.jsonl", lines(VALID))
    return {"source": str(root)}
