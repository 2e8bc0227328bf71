"""OSV-5M: zips of numbered folders, and a folder that is unpacked already."""

import pathlib

from tests.native.drawing import picture, write_file, write_zip

RECORDS = {"train": 5, "test": 2}
_CSV = "id,latitude,longitude,country,city\n101,-22.5,17.0,NA,Windhoek\n"


def write(root: pathlib.Path) -> dict:
    images = root / "images"
    write_zip(images / "train" / "00.zip", {f"00/{k}.jpg": picture(k) for k in (101, 102)})
    write_zip(images / "train" / "01.zip", {"deep/er/103.jpg": picture(103)})
    for k in (104, 105):
        write_file(images / "train" / "02" / f"{k}.jpg", picture(k))
    write_zip(images / "test" / "00.zip", {f"00/{k}.jpg": picture(k) for k in (201, 202)})
    write_file(root / "train.csv", _CSV)
    write_file(root / "test.csv", _CSV)
    return {"source": str(root)}
