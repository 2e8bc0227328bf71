"""A task of text alone reads large JPEG files at a part of their size; all others read them whole.

What comes out is the picture all the same, and a function of the record and the random numbers.
"""

import cv2
import numpy as np
import pytest

from data_pipelines.build import write_dataset
from data_pipelines.reader import Reader
from data_pipelines.sources import MemorySource, open_source
from tests.data_pipelines.toy import SIZE, make_collator
from univg_jax.images import decode_rgb, png_bytes

SIZES = [(96, 160), (201, 90), (15, 40), (64, 64)]  # 15: less than twice SIZE


def photograph(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def stored(k: int) -> dict:
    pixels = photograph(*SIZES[k])
    diagonal = np.linspace(0.05, 0.95, 17)
    joints = np.stack([diagonal, diagonal, np.full(17, 2)], -1)[None].astype(np.float32)
    file = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    mask = png_bytes(np.full(pixels.shape[:2], 255, np.uint8))
    return dict(
        image=file,
        source=file,
        caption="<p> smiles",
        instruction="do",
        masks=[mask],
        expressions=["it"],
        boxes=np.array([[0, 0, 1, 1]], np.float32),
        phrases=["smiles"],
        joints=joints,
        depth=png_bytes(np.full(pixels.shape[:2], 2000, np.uint16)),
        face=file,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photographs"
    write_dataset(folder, {"train": map(stored, range(len(SIZES)))})
    return open_source("photographs", "train", data_dir=str(folder.parent))


@pytest.fixture(scope="module")
def whole(source):
    """The same, whose pictures are always decoded whole."""
    return MemorySource(source.name, [source.read(k) for k in range(len(source))])


def row(task: str, source, k: int, **options) -> np.ndarray:
    reader = Reader(task, source, collator=make_collator())
    return reader.row(k, np.random.default_rng(3), **options).example


@pytest.mark.parametrize("k", range(len(SIZES)))
def test_a_picture_for_text_alone_is_read_smaller_and_looks_the_same(source, whole, k):
    small = source.read_reduced(k, ("image",), least=(2 * SIZE, 2 * SIZE))["image"]
    height, width = SIZES[k]
    factor = min(8, 2 ** int(np.log2(max(1, min(height, width) / (2 * SIZE)))))
    assert small.shape == (-(-height // factor), -(-width // factor), 3)
    for task in ("t2i", "id"):
        # At the center: a random place is chosen among those of the decoded picture. The
        # pictures have much contrast in few pixels.
        found, expected = (row(task, s, k, center=True).target for s in (source, whole))
        assert (
            np.abs(found.astype(int) - expected).mean() < 6
        )  # of pictures with much contrast, in few pixels
        np.testing.assert_array_equal(row(task, source, k).target, row(task, source, k).target)


@pytest.mark.parametrize("task", ["ie", "ip", "lg", "depth", "pose", "seg"])
def test_a_picture_with_something_on_it_is_read_whole(source, whole, task):
    for k in range(len(SIZES)):
        found, expected = row(task, source, k), row(task, whole, k)
        np.testing.assert_array_equal(found.target, expected.target)
        np.testing.assert_array_equal(found.source, expected.source)


def test_so_it_is_with_fields_beside_the_task_s_and_for_evaluation(source, whole):
    def example(source, **options):
        reader = Reader("t2i", source, collator=make_collator(), **options)
        return reader.example(0, np.random.default_rng(3)).target

    more = dict(fields=("masks",))
    np.testing.assert_array_equal(example(source, **more), example(whole, **more))
    records = [Reader("t2i", s, collator=make_collator()).record(0) for s in (source, whole)]
    np.testing.assert_array_equal(records[0]["image"], records[1]["image"])


def test_a_source_may_decode_all_that_it_has(source):
    np.testing.assert_array_equal(source.read(0)["image"], decode_rgb(stored(0)["image"]))
