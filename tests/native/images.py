"""Pictures of anybody: folders, zips and tars, with files that are none."""

import io
import pathlib
import tarfile

from tests.native.drawing import picture, write_file, write_tar, write_zip

RECORDS = {"train": 9, "validation": 1}


def write(root: pathlib.Path) -> dict:
    train = root / "train"
    write_file(train / "a" / "1.JPG", picture(0))
    write_file(train / "a" / "2.webp", picture(1, ".webp"))
    write_file(train / "a" / "3.png", picture(2, ".png"))
    write_file(train / "b" / "empty.jpeg", b"")
    write_file(train / "b" / "text.JPG", "this is no picture")
    write_file(train / "b" / "._4.jpg", b"AppleDouble")
    write_file(train / ".cache" / "5.jpg", picture(3))
    write_file(train / "list.txt", "a/1.JPG 0\n")
    write_zip(train / "more.zip", {"x/6.jpg": picture(3), "__MACOSX/x/._6.jpg": b"AppleDouble"})
    write_file(train / "more" / "x" / "6.jpg", picture(3))  # unpacked beside it
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        for k in (7, 8):
            info = tarfile.TarInfo(f"./{k}.jpg")
            info.size = len(content := picture(k))
            tar.addfile(info, io.BytesIO(content))
    files = {"c.tar": inner.getvalue(), "d.tar": inner.getvalue(), "9.jpg": picture(9)}
    write_tar(train / "nested.tar", files)
    write_file(root / "val" / "10.jpg", picture(10))
    return {"source": str(root)}
