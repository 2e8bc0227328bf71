"""Pictures of a few shapes, in different aspect ratios; the same number gives the same bytes."""

import io
import pathlib
import tarfile
import zipfile
from collections.abc import Mapping

import cv2
import numpy as np

SIZES = ((96, 64), (64, 96), (80, 80), (128, 56), (56, 120), (160, 100), (72, 48))  # width, height


def pixels(number: int) -> np.ndarray:
    """A disk and a bar on a shade; uint8 [h w 3]."""
    width, height = SIZES[number % len(SIZES)]
    picture = np.full((height, width, 3), (40 * number % 200 + 30, 120, 200), np.uint8)
    cv2.circle(picture, (width // 3, height // 2), min(width, height) // 4, (240, 230, 20), -1)
    cv2.rectangle(picture, (width // 2, 5), (width - 9, 5 + 3 * (number % 9)), (20, 20, 60), -1)
    return picture


def picture(number: int, suffix: str = ".jpg") -> bytes:
    """The file of a picture, in the format of a suffix."""
    return cv2.imencode(suffix, pixels(number)[:, :, ::-1])[1].tobytes()


def write_file(path: pathlib.Path, content: bytes | str) -> None:
    """Writes a file and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_tar(path: pathlib.Path, files: Mapping[str, bytes | str], mode: str = "w") -> None:
    """Writes a tar of these files, compressed by `mode`, the same at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_zip(path: pathlib.Path, files: Mapping[str, bytes | str]) -> None:
    """Writes a zip of these files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
