"""One reader for all: what is wrong with a record is one named error, whatever it was."""

import errno

import cv2
import numpy as np
import pytest

from data_pipelines.reader import DamagedRecord, Reader, UnsuitableRecord
from data_pipelines.sources import MemorySource
from tests.data_pipelines.toy import SIZE, make_collator, make_scene
from univg_jax.errors import NotFoundError, UnreachableError, UserError

RNG = np.random.default_rng(0)


def reader(record: dict, task: str = "t2i", **options) -> Reader:
    source = MemorySource("mine/train", [make_scene(0), record])
    return Reader(task, source, collator=make_collator(), **options)


class Failing(MemorySource):
    """Raises an error for every record."""

    def __init__(self, error: Exception):
        super().__init__("mine/train", [make_scene(0), make_scene(1)])
        self._error = error

    def read(self, index, fields=None):
        raise self._error


@pytest.mark.parametrize(
    "change",
    [
        dict(caption=None),
        dict(caption=7),
        dict(caption=["a pig"]),
        dict(caption=" "),
        dict(image=None),
        dict(image=np.zeros((0, 4, 3), np.uint8)),
    ],
    ids=str,
)
def test_a_wrong_field_is_damage_by_name(change):
    with pytest.raises(DamagedRecord, match=r"^mine/train\[1\] for task 't2i': ") as raised:
        reader(make_scene(1) | change).row(1, RNG)
    assert "\n" not in str(raised.value)
    assert str(raised.value).count("mine/train") == 1


@pytest.mark.parametrize(
    "error",
    [
        OSError("image file is truncated (3 bytes not processed)"),  # Pillow's: has no number
        SyntaxError("broken PNG file"),
        RuntimeError("Corrupted Riegeli/records file: chunk data hash mismatch"),
        cv2.error("!ssize.empty()"),
        UserError("record field 'image' is not a readable image"),
        KeyError("image"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_is_damage_by_name(error):
    failing = Reader("t2i", Failing(error), collator=make_collator())
    for read in (failing.row, failing.example):
        with pytest.raises(DamagedRecord, match=r"^mine/train\[1\] for task 't2i': "):
            read(1, RNG)
    with pytest.raises(DamagedRecord, match=r"^mine/train\[1\] for task 't2i': "):
        failing.record(1)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "no answer"),
        TimeoutError("no answer"),
        ConnectionResetError("no answer"),
        UnreachableError("no answer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_storage_that_does_not_answer_is_no_damage(error):
    with pytest.raises(UnreachableError, match=r"^cannot read mine/train\[1\]: .*no answer"):
        Reader("t2i", Failing(error), collator=make_collator()).row(1, RNG)


def test_what_is_missing_elsewhere_is_no_damage():
    """A cache without the prompt: every record would be quarantined."""
    with pytest.raises(NotFoundError, match=r"^cache has no embedding"):
        Reader(
            "t2i", Failing(NotFoundError("cache has no embedding")), collator=make_collator()
        ).row(1, RNG)


def test_a_sound_record_that_does_not_suit_is_told_apart():
    with pytest.raises(UnsuitableRecord, match=r"^mine/train\[1\] for task 'seg': no expression"):
        reader(make_scene(1) | dict(expressions=[""]), "seg").row(1, RNG)


def test_fields_beside_the_task_s_are_checked_too():
    with pytest.raises(UserError, match="task 't2i' cannot read mine/train: no field 'depth'"):
        reader(make_scene(1), fields=("depth",))
    wrong = make_scene(1) | dict(masks=np.ones((1, SIZE, SIZE + 3), np.uint8))
    assert reader(wrong).row(1, RNG).example.text == "pig 1"
    with pytest.raises(DamagedRecord, match=r"field 'masks' has 8x11 pixels but the image 8x8"):
        reader(wrong, fields=("masks",)).row(1, RNG)


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (3, 50)], ids=str)
def test_pictures_of_any_shape_are_rows_of_one(shape):
    image = np.full((*shape, 3), 9, np.uint8)
    row = reader(make_scene(1) | dict(image=image)).row(1, RNG)
    assert row.example.target.shape == (SIZE, SIZE, 3)
    assert (row.example.target == 9).all()
