"""InstructPix2Pix: folders of prompts and pairs, their zips, and both parquet releases."""

import json
import pathlib

from tests.native.drawing import write_file, write_zip
from tests.native.edits import after, before, jpg, struct, write_parquet

RECORDS = {"train": 23, "validation": 1, "test": 1}
NAMES = [f"{k:07d}" if k % 5 else f"shard-0/{k:07d}" for k in range(20)]


def _files(name: str, number: int) -> dict[str, bytes | str]:
    first = "input" if number % 2 else "caption"
    prompt = {first: "a disk", "edit": f"make it darker {number}", "output": "a dark disk"}
    files: dict[str, bytes | str] = {
        f"{name}/prompt.json": json.dumps(prompt),
        f"{name}/metadata.jsonl": '{"seed": 1}\n{"seed": 1}\n',
    }
    for seed in _seeds(number):
        files[f"{name}/{seed}_0.jpg"] = jpg(before(number))
        files[f"{name}/{seed}_1.jpg"] = jpg(after(number))
    return files


def _seeds(number: int) -> list[str]:
    return ["11", "22"] if number % 4 == 1 else ["11"]


def write(root: pathlib.Path) -> dict:
    """20 prompts: 18 of train, 1 and 1; a seed twice, one without its second picture."""
    seeds = []
    for number, name in enumerate(NAMES):
        for file, content in _files(name, number).items():
            write_file(root / file, content)
        seeds.append([name, _seeds(number)])
    seeds[2][1].append("11")
    seeds[3][1].append("33")
    write_file(root / NAMES[3] / "33_0.jpg", jpg(before(3)))
    write_file(root / "seeds.json", json.dumps(seeds))
    return {"source": str(root)}


def without_seeds(root: pathlib.Path) -> dict:
    """The same without a list."""
    options = write(root)
    (root / "seeds.json").unlink()
    return options


def zips(root: pathlib.Path) -> dict:
    """As downloaded: two zips beside seeds.json, one with a folder around all."""
    seeds = [[name, _seeds(number)] for number, name in enumerate(NAMES)]
    write_file(root / "seeds.json", json.dumps(seeds))
    for which, prefix in enumerate(("", "clip-filtered/")):
        files: dict[str, bytes | str] = {}
        for number in range(10 * which, 10 * which + 10):
            files |= {
                f"{prefix}{file}": content
                for file, content in _files(NAMES[number], number).items()
            }
        write_zip(root / f"shard-{which:02d}.zip", files)
    return {"source": str(root)}


def parquet(root: pathlib.Path, first: str = "original_image") -> dict:
    """Hugging Face's releases: two namings of the first picture."""
    rows = [
        {
            first: struct(jpg(before(k))),
            "edit_prompt": f"make it darker {k}",
            "edited_image": struct(jpg(after(k))),
        }
        | ({"edited_prompt": "a dark disk"} if first == "original_image" else {})
        for k in range(3)
    ]
    write_parquet(root / "data" / "train-00000-of-00001.parquet", rows)
    return {"source": str(root / "data")}
