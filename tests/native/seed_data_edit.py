"""SEED-Data-Edit: three parts; the pictures of several turns are one archive in pieces."""

import gzip
import io
import json
import pathlib
import tarfile

from tests.native.drawing import write_file, write_tar
from tests.native.edits import after, before, jpg

# 2 by programs, 2 by hand, and of 2 and 1 turns both ways
RECORDS = {"train": 2 + 2 + 4 + 2}


def _lines(rows: list) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def multi_turn() -> tuple[list, dict[str, bytes]]:
    """Rows of 2 and 1 turns, and their pictures."""
    rows, files = [], {}
    for number, turns in ((4, 2), (5, 1)):
        row = {"source_image": f"multi/{number}_0.jpg"}
        files[f"multi/{number}_0.jpg"] = jpg(before(number))
        for k in range(1, turns + 1):
            files[f"multi/{number}_{k}.jpg"] = jpg(after(number, k))
            row |= {
                f"edit_image_{k}": f"multi/{number}_{k}.jpg",
                f"instruction_{k}": f"darker {k}.",
                f"inverse_instruction_{k}": f"lighter {k}",
            }
        rows.append(row)
    return rows, files


def write(root: pathlib.Path, *, pieces: int = 3) -> dict:
    """All three parts. The archive of several turns is cut in `pieces`; 0: it is unpacked."""
    auto = root / "auto_editing" / "openimages"
    rows = [
        {"source_image": f"{k}_a.jpg", "target_image": f"{k}_b.jpg", "instruction": f"darker {k}"}
        for k in (0, 1)
    ]
    rows[1] |= {"instruction_new": "please", "response": "done"}
    for k in (0, 1):
        write_file(auto / "images" / f"{k}_a.jpg", jpg(before(k)))
        write_file(auto / "images" / f"{k}_b.jpg", jpg(after(k)))
    bad = [{**rows[0], "instruction": None}, {"source_image": "0_a.jpg"}, "{not json"]
    write_file(auto / "annotations" / "openimages.jsonl", _lines([*rows, *bad]))

    real = root / "real_editing"
    rows = [
        {
            "source_image": f"images/{k}_a.jpg",
            "target_image": f"images/{k}_b.jpg",
            "instruction": f"darker {k}",
        }
        for k in (2, 3)
    ]
    write_file(real / "annotations" / "split_0001.jsonl", _lines(rows))
    files = {}
    for k in (2, 3):
        files |= {f"./images/{k}_b.jpg": jpg(after(k)), f"./images/{k}_a.jpg": jpg(before(k))}
    write_tar(real / "images" / "images.tar.gz", files, "w:gz")

    multi = root / "multi_turn_editing"
    rows, files = multi_turn()
    write_file(multi / "annotations" / "split_0001.jsonl", _lines(rows))
    if not pieces:
        for name, content in files.items():
            write_file(multi / "images" / name, content)
        return {"source": str(root)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    _cut(multi / "images" / "multi_turn.tar.gz", gzip.compress(buffer.getvalue(), mtime=0), pieces)
    return {"source": str(root)}


def two_archives(root: pathlib.Path, *, pieces: int) -> dict:
    """Part 1 as it is downloaded, with instructions that were written anew in a second folder."""
    auto = root / "auto_editing" / "openimages"
    names = [(f"source_images/{k}.jpg", f"target_images/{k}.jpg") for k in range(3)]
    rows = [
        {"source_image": first, "target_image": second, "instruction": f"darker {k}"}
        for k, (first, second) in enumerate(names)
    ]
    write_file(auto / "annotations" / "split_0001.jsonl", _lines(rows))
    anew = [rows[0] | {"instruction_new": "please, darker", "response": "done"}]
    write_file(auto / "annotations_GPT4V" / "split_0001.jsonl", _lines(anew))
    for side, picture in enumerate((before, after)):
        files = {pair[side]: jpg(picture(k)) for k, pair in enumerate(names)}
        archive = auto / "images" / f"{('source', 'target')[side]}_images.tar.gz"
        write_tar(archive, files, "w:gz")
        _cut(archive, archive.read_bytes(), pieces)
        archive.unlink()
    return {"source": str(root)}


def _cut(archive: pathlib.Path, content: bytes, pieces: int) -> None:
    size = -(-len(content) // pieces)
    for k in range(pieces):
        part = content[k * size : (k + 1) * size]
        write_file(archive.with_name(f"{archive.name}.part-a{'abcdefgh'[k]}"), part)
