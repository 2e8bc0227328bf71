"""Captioned pictures in every usual form. `write` is what img2dataset writes."""

import csv
import io
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.native.drawing import picture, write_file, write_tar, write_zip

RECORDS = {"train": 4}
TEXTS = ("a yellow disk", "Tom &amp; <b>Jerry</b>\n", "né d'un œuf", 'a "quoted", bar', "\u96ea")
CLEAN = ("a yellow disk", "Tom & Jerry", "né d'un œuf", 'a "quoted", bar', "\u96ea")


def _csv(rows: list[dict], delimiter: str = ",") -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return "\ufeff" + buffer.getvalue().rstrip()


def _parquet(path: pathlib.Path, rows: list[dict], **types: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.append_column(name, pa.nulls(len(rows), kind))
    pq.write_table(table, path, row_group_size=2)


def _about(k: int, **more: Any) -> dict:
    """What img2dataset says of a picture."""
    row = {"caption": TEXTS[k], "url": f"https://x.y/{k}.jpg", "key": f"{k:09d}", "NSFW": None}
    return {**row, "status": "success", "error_message": None, "width": 96, "height": 64, **more}


def write(root: pathlib.Path) -> dict:
    """Two tars: keys not in order, files of a sample apart, a failed download, a parquet beside."""
    rows = [_about(k) for k in range(4)]
    failed = _about(4, status="failed_to_download", error_message="404", width=None, height=None)
    files: dict[str, bytes | str] = {}
    for k in (2, 0):
        files[f"{k:09d}.jpg"] = picture(k)
        files[f"{k:09d}.txt"] = TEXTS[k]
    for k in (2, 0):
        files[f"{k:09d}.json"] = json.dumps(rows[k])
    files["000000004.json"] = json.dumps(failed)
    files["._000000002.jpg"] = b"AppleDouble"
    write_tar(root / "00000.tar", files)
    files = {}
    for k in (1, 3):
        files |= {f"{k:09d}.json": json.dumps(rows[k]), f"{k:09d}.jpg": picture(k)}
    write_tar(root / "00001.tar", files)
    _parquet(root / "00000.parquet", [*rows[::2], failed])
    _parquet(root / "00001.parquet", rows[1::2])
    write_file(root / "sizes.json", json.dumps({"00000.tar": 3, "00001.tar": 2}))
    write_file(root / "00000_stats.json", json.dumps({"count": 3, "successes": 2}))
    return {"source": str(root)}


def webdataset(root: pathlib.Path) -> dict:
    """Keys end at the first dot; a compressed tar; pictures of two formats."""
    files: dict[str, bytes | str] = {}
    for k in range(4):
        suffix = (".jpg", ".png", ".webp", ".jpeg")[k]
        files |= {f"./a/{k}{suffix}": picture(k, suffix), f"./a/{k}.txt": TEXTS[k]}
    files |= {"a/4.seg.png": picture(9, ".png"), "a/4.jpg": picture(4), "a/4.caption": TEXTS[4]}
    write_tar(root / "train-0.tar.gz", files, "w:gz")
    return {"source": str(root)}


def parquet_with_pictures(root: pathlib.Path) -> dict:
    """Hugging Face's struct; a column without a type in one of the files."""
    rows = [
        {"image": {"bytes": picture(k), "path": f"{k}.jpg"}, "text": TEXTS[k], "alt": "x"}
        for k in range(5)
    ]
    _parquet(root / "data" / "train-00000-of-00002.parquet", rows[:3])
    rows = [{name: row[name] for name in ("text", "image")} for row in rows[3:]]
    _parquet(root / "data" / "train-00001-of-00002.parquet", rows, alt=pa.null())
    return {"source": str(root / "data"), "captions": ("text",)}


def parquet_of_img2dataset(root: pathlib.Path) -> dict:
    """Bytes in the column `jpg`; failed rows have none."""
    rows = [{"jpg": picture(k), **_about(k)} for k in range(4)]
    _parquet(root / "00000.parquet", [*rows, {"jpg": None, **_about(4, status="failed_to_resize")}])
    return {"source": str(root)}


def parquet_with_names(root: pathlib.Path) -> dict:
    _pictures(root / "images", range(5))
    _parquet(root / "rows.parquet", [{"path": f"{k}.jpg", "text": TEXTS[k]} for k in range(5)])
    return {"source": str(root / "rows.parquet"), "folder": str(root / "images")}


def imagefolder(root: pathlib.Path) -> dict:
    """metadata.csv, beside whose pictures its names begin, for two splits."""
    for split, numbers in (("train", (0, 1, 2)), ("test", (3, 4))):
        _pictures(root / split, numbers)
        rows = [{"file_name": f"{k}.jpg", "text": TEXTS[k]} for k in numbers]
        write_file(root / split / "metadata.csv", _csv(rows))
    return {"source": str(root)}


def jsonl_in_zip(root: pathlib.Path) -> dict:
    """Names in a zip; the columns are told."""
    write_zip(root / "pictures.zip", {f"p/{k}.jpg": picture(k) for k in range(5)})
    rows = [{"im": f"/p/{k}.jpg", "about": {"said": TEXTS[k], "tag": "t"}} for k in range(5)]
    lines = "\n".join(map(json.dumps, rows))
    write_file(root / "rows.jsonl", lines + '\n{"im": 3}\nnot json\n')
    return {
        "source": str(root / "rows.jsonl"),
        "folder": str(root / "pictures.zip"),
        "image": "im",
        "captions": ("about.said=alt",),
    }


def sbu(root: pathlib.Path) -> dict:
    """A dict of columns; pictures named by the end of the address, or by the row's number."""
    addresses = [f"http://static.flickr.com/26/{k}_b.jpg?zz=1" for k in range(5)]
    columns = {"image_urls": addresses, "user_ids": ["u"] * 5, "captions": list(TEXTS)}
    write_file(root / "sbu-captions-all.json", json.dumps(columns))
    for k, name in enumerate(("0_b.jpg", "1_b.jpg", "000000002.jpg", "3.jpg", "4_b.jpg")):
        write_file(root / "images" / name, picture(k))
    return {"source": str(root / "sbu-captions-all.json"), "folder": str(root / "images")}


def wit(root: pathlib.Path) -> dict:
    """Several columns of captions; texts with line ends."""
    rows = [
        {
            "language": "fr",
            "image_url": f"https://upload.w.org/c/{k}_%C3%A9.jpg",
            "caption_reference_description": TEXTS[k],
            "caption_alt_text_description": "" if k else "alternative",
            "context_page_description": "two\nlines\twith a tab",
        }
        for k in range(5)
    ]
    write_file(root / "wit.tsv", _csv(rows, "\t"))
    for k in range(5):
        write_file(root / "images" / f"{k}_\u00e9.jpg", picture(k))
    return {"source": str(root / "wit.tsv"), "folder": str(root / "images")}


def texts_beside(root: pathlib.Path) -> dict:
    """a.jpg and a.txt, as tools for fine-tuning take them."""
    for k in range(5):
        suffix = ".png" if k == 2 else ".jpg"
        write_file(root / "10_person" / f"my.photo {k}{suffix}", picture(k, suffix))
        write_file(root / "10_person" / f"my.photo {k}.{'caption' if k == 1 else 'txt'}", TEXTS[k])
    write_file(root / "10_person" / "alone.jpg", picture(9))
    return {"source": str(root)}


def _pictures(folder: pathlib.Path, numbers: Iterable[int]) -> None:
    for k in numbers:
        write_file(folder / f"{k}.jpg", picture(k))


FORMS: Mapping[str, Any] = {
    one.__name__: one
    for one in (
        *(webdataset, parquet_with_pictures, parquet_with_names, imagefolder, jsonl_in_zip, sbu),
        *(wit, texts_beside, parquet_of_img2dataset, write),
    )
}
