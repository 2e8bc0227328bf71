"""Grounded SBU in miniature: two tables, embeddings, several spans, lines that are damaged."""

import base64
import json
import pathlib

from tests.native.drawing import picture, write_file

RECORDS = {"train": 6}
CAPTION = "My dog &amp; a cat on the dog bed"
ROWS = {  # caption, (box, spans) of each; picture k of `drawing`
    "0001": (CAPTION, [((10, 5, 40.5, 30), [[0, 6]]), ((60, 8, 37, 56), [[13, 18]])]),
    "0002": (
        "a man sits, he has his hat",
        # His spans lie apart; those of the hat are side by side.
        [((0, 0, 64, 96), [[0, 5], [12, 14]]), ((4, 6, 10, 20), [[23, 26], [19, 22]])],
    ),
    "0003": ("a tower", [((-0.5, -0.5, 20, 80.9), [[0, 7]]), ((5, 5, -3, 4), [[0, 7]])]),
    "0004": ("two boats", [((1, 2, 30, 40), [[0, 9]]), ((50, 2, 30, 40), [[0, 9]])]),
    "0005": ("a lake", [((0, 0, 56, 120), [[0, 6]])]),
    "0006": ("the hill", [((200, 10, 20, 20), [[0, 8]])]),  # outside: left out
    "0007": ("snow", [((0, 0, 10, 10), [[0, 4]])]),
}


def write(root: pathlib.Path) -> dict:
    """Two tables, with the index that is not needed."""
    lines = {key: line(key, k) for k, key in enumerate(ROWS)}
    first = "".join(f"{lines[key]}\n" for key in ("0001", "0002", "0003"))
    first += "no tab is here\n"
    # The last line has no end.
    second = "\r\n".join(lines[key] for key in ("0004", "0005", "0006", "0007"))
    write_file(root / "train-0000.tsv", first)
    write_file(root / "train-0001.tsv", second)
    write_file(root / "train-0000.lineidx", "0\n")
    return {"source": str(root)}


def line(key: str, k: int, **changes) -> str:
    """A line of a table, without its end."""
    caption, annos = ROWS[key]
    embedding = base64.b64encode(bytes(3072)).decode()
    names = [
        f"{kind}_embedding_{when}" for kind in ("text", "image") for when in ("before", "after")
    ]
    row = dict(
        data_id=k,
        file_name=f"{key}.jpg",
        caption=caption,
        image=base64.b64encode(picture(k)).decode(),
        annos=[
            dict(bbox=list(box), tokens_positive=spans) | dict.fromkeys(names, embedding)
            for box, spans in annos
        ],
    )
    return f"{key}\t{json.dumps(row | changes)}"
