"""DALLE3-1M: WebDataset tars whose rows differ in their types."""

import json
import pathlib

from tests.native.drawing import picture, write_tar

RECORDS = {"train": 6}
_ABOUT = {"url": None, "resolution": "96x64", "width": 96, "height": 64, "source": "dalle3"}
ROWS = {
    "000001": (".jpg", {"short_caption": "A bar.", "long_caption": "A blue bar over a disk."}),
    "000002": (".png", {"short_caption": "A disk.", "long_caption2": ["A disk.", "A yellow one."]}),
    "000003": (
        ".jpeg",
        {
            "short_caption": "A tower.",
            "short_caption2": ["A tall tower."],
            "long_caption": "A tower in the fog.",
            "original_prompt": "tower, fog",
        },
    ),
    "000004": (".jpg", {"short_caption": None, "long_caption": "A lake.", "original_prompt": ""}),
    "000005": (".png", {"short_caption": "", "long_caption": None, "short_caption2": []}),  # none
    "000006": (".jpg", {"short_caption": ["A hut."], "long_caption": "A hut in the snow."}),
    "000007": (".jpg", {"short_caption": {"text": "A dog."}}),  # of a type that is no caption
}


def write(root: pathlib.Path) -> dict:
    files: dict[str, bytes | str] = {}
    for k, (key, (suffix, row)) in enumerate(ROWS.items()):
        files[f"{key}{suffix}"] = picture(k, suffix)
        files[f"{key}.json"] = json.dumps({**row, **_ABOUT, "image_name": f"{key}{suffix}"})
    write_tar(root / "data" / "data-000000.tar", files)
    # Another order, without a picture, and without a text.
    last = {
        "000008.json": json.dumps({"short_caption": "A road."}),
        "000009.jpg": picture(9),
        "000010.json": json.dumps({"short_caption": "Never drawn."}),
        "000008.jpg": picture(8),
    }
    write_tar(root / "data" / "data-000001.tar", last)
    return {"source": str(root / "data")}
