"""Persons in all layouts: folders with captions, VGGFace2, CelebA, tables and lists."""

import json
import pathlib
import zipfile

import cv2
import numpy as np

from tests.native import shapes

# Of `write`, the folders: Ada has three pictures, Bo two, Cy one.
RECORDS = {"train": 5}
PERSONS = {"Ada_Byron": 3, "Bo": 2, "Cy": 1}
SIZES = ((64, 80), (96, 64), (72, 72), (60, 100))
SHIRTS = {"Ada_Byron": (160, 40, 40), "Bo": (40, 140, 60), "Cy": (60, 60, 160)}


def picture(person: str, number: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A drawn person and the box x, y, width, height of the face."""
    width, height = SIZES[(number + len(person)) % len(SIZES)]
    pixels = shapes.ground(width, height, seed=number + len(person))
    side = min(width, height) // 3
    x, y = (width - side) // 2 + 4 * number - 4, height // 8
    color = SHIRTS.get(person, (90, 90, 90))
    cv2.rectangle(pixels, (x - 6, y + side), (x + side + 6, height), color, -1)
    cv2.rectangle(pixels, (x, y), (x + side - 1, y + side - 1), (225, 180, 150), -1)
    for eye in (x + side // 3, x + 2 * side // 3):
        cv2.circle(pixels, (eye, y + side // 3), 2, (30, 30, 30), -1)
    return pixels, (x, y, side, side)


def write(root: pathlib.Path) -> dict:
    """A folder for each person; some pictures have a caption beside them."""
    for person, count in PERSONS.items():
        folder = root / "people" / person
        folder.mkdir(parents=True, exist_ok=True)
        for k in range(count):
            name = f"{person}_{k + 1:04d}"
            (folder / f"{name}.jpg").write_bytes(shapes.jpeg(picture(person, k)[0]))
        (folder / f"{person}_0001.txt").write_text("A young woman in a red shirt\n")
    (root / "people" / "ReadME.txt").write_text("drawn")
    return {"source": str(root), "val_persons": 0.0}


def write_vggface2(root: pathlib.Path) -> dict:
    (root / "bb_landmark").mkdir(parents=True)
    for split, persons in {"train": ("n000001", "n000002"), "test": ("n000003",)}.items():
        lines = ["NAME_ID,X,Y,W,H"]
        for person in persons:
            (root / split / person).mkdir(parents=True)
            for k in range(2):
                pixels, box = picture(person, k)
                name = f"{k + 1:04d}_01"
                (root / split / person / f"{name}.jpg").write_bytes(shapes.jpeg(pixels))
                lines.append(f'"{person}/{name}",' + ",".join(map(str, box)))
        path = root / "bb_landmark" / f"loose_bb_{split}.csv"
        path.write_text("\r\n".join(lines))
    return {"source": str(root)}


def write_celeba(root: pathlib.Path) -> dict:
    """Eight pictures of four persons in a zip out of order; CRLF and double spaces in one list."""
    root.mkdir(parents=True, exist_ok=True)
    names = [f"{k:06d}.jpg" for k in range(1, 9)]
    persons = ["2880", "2880", "17", "17", "17", "9", "9", "4"]
    partition = [0, 0, 0, 0, 0, 1, 1, 2]
    made = {n: picture(p, k % 3) for k, (n, p) in enumerate(zip(names, persons, strict=True))}
    with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
        for name in reversed(names):
            archive.writestr(f"img_align_celeba/{name}", shapes.jpeg(made[name][0]))
    lines = [f"{n} {p}" for n, p in zip(names, persons, strict=True)]
    (root / "identity_CelebA.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{n} {p}" for n, p in zip(names, partition, strict=True)]
    (root / "list_eval_partition.txt").write_text("\n".join(lines))  # no last newline
    lines = [str(len(names)), "lefteye_x lefteye_y righteye_x righteye_y nose_x nose_y ..."]
    for name in names:
        x, y, w, h = made[name][1]
        points = [(0.3, 0.35), (0.7, 0.35), (0.5, 0.55), (0.35, 0.75), (0.65, 0.75)]
        values = [round(v) for px, py in points for v in (x + px * w, y + py * h)]
        lines.append(f"{name} " + "  ".join(map(str, values)))
    (root / "list_landmarks_align_celeba.txt").write_bytes(("\r\n".join(lines) + "\r\n").encode())
    return {"source": str(root)}


def write_table(root: pathlib.Path) -> dict:
    """jsonl with names, and the same as parquet with the pictures inside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "pictures").mkdir(parents=True)
    rows = []
    for person, count in PERSONS.items():
        for k in range(count):
            pixels, box = picture(person, k)
            name = f"pictures/{person}{k}.png"
            (root / name).write_bytes(shapes.png(pixels))
            caption = f"{person.replace('_', ' ')} smiles" if k else "an old man smiles"
            rows.append(dict(file_name=name, person=person, caption=caption, bbox=list(box)))
    rows = rows[::2] + rows[1::2]  # the pictures of a person are not together
    (root / "people.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pa.table(
        dict(
            image=[dict(bytes=(root / r["file_name"]).read_bytes(), path=None) for r in rows],
            identity=[r["person"] for r in rows],
            text=[r["caption"] for r in rows],
        )
    )
    pq.write_table(table, root / "people.parquet", row_group_size=2)
    lines = [f"{r['file_name']} {r['person']}" for r in rows]
    (root / "people.txt").write_text("\n".join(lines))
    return {"source": str(root / "people.jsonl"), "val_persons": 0.0}
