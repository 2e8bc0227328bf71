"""Places365: a tar of tars, an unpacked folder, and lists."""

import io
import pathlib
import tarfile

from tests.native.drawing import picture, write_file, write_tar

RECORDS = {"train": 5, "validation": 2, "test": 1}
CAPTIONS = {
    "a/airfield/00000001.jpg": "an airfield",
    "a/airport_terminal/00000001.jpg": "an airport terminal",
    "b/bakery/shop/00000002.jpg": "a bakery, shop",
    "s/swimming_pool/indoor/00000003.jpg": "a swimming pool, indoor",
    "s/street/00000004.jpg": "a street",
}


def _tar(files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write(root: pathlib.Path) -> dict:
    by_letter: dict[str, dict[str, bytes]] = {}
    for k, name in enumerate(CAPTIONS):
        by_letter.setdefault(name[0], {})[name] = picture(k)
    by_letter["b"]["b/bakery/shop/._00000002.jpg"] = b"AppleDouble"
    tars = {f"./data_256/{letter}.tar": _tar(files) for letter, files in by_letter.items()}
    write_tar(root / "train_256_places365standard.tar", tars)
    for k in (1, 2):
        write_file(root / "val_256" / f"Places365_val_0000000{k}.jpg", picture(k))
    write_tar(root / "test_256.tar", {"/test_256/Places365_test_00000001.jpg": picture(3)})
    lists = root / "filelist_places365-standard"
    write_file(
        lists / "places365_val.txt", "Places365_val_00000001.jpg 1\n/Places365_val_00000002.jpg 0"
    )
    write_file(lists / "categories_places365.txt", "/a/airfield 0\n/b/bakery/shop 1\n")
    return {"source": str(root)}
