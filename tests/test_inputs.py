"""The same file gives the same row, whether training, evaluation or a user reads it."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines import records
from data_pipelines.collate import Row
from data_pipelines.held_out import HeldOut
from data_pipelines.mixture import Stream
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import INPUTS, TASKS
from tests.data_pipelines import toy
from univg_jax.errors import UserError
from univg_jax.images import png_bytes
from univg_jax.inputs import read_input
from univg_jax.settings import Config

SIDE = toy.SIZE
SHAPES = {"as large": (SIDE, SIDE), "larger": (5 * SIDE, 5 * SIDE), "smaller": (5, 5)}
OBLONG = {"wide": (11, 20), "high": (40, 9)}


class Files(MemorySource):
    """Records in their stored form."""

    def read(self, index, fields=None):
        return records.decode(super().read(index, fields))


def stored(shape: tuple[int, int]) -> dict:
    """A record with every field that a task needs, its pictures of this shape."""
    rng = np.random.default_rng(0)

    def picture():
        return png_bytes(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))

    # What the labels show is in the center, where every crop leaves it.
    mask = np.full(shape, 255, np.uint8)
    return dict(
        image=picture(),
        source=picture(),
        caption="<p> and a pig",
        instruction="remove it",
        boxes=np.array([[0.4, 0.4, 0.6, 0.6]], np.float32),
        phrases=["a pig"],
        masks=[png_bytes(mask)],
        expressions=["the pig"],
        depth=png_bytes(np.full(shape, 3000, np.uint16)),
        joints=np.tile(np.array([[0.5, 0.5, 1]], np.float32), (17, 1)),
        face=picture(),
    )


def as_user(task: str, row: Row, record: dict, folder) -> Row:
    """The row that a user gets who gives the record's own files."""
    files = dict(
        image=record["source"] if task == "ie" else record["image"],
        mask=None if row.example.mask is None else png_bytes(row.example.mask[..., 0]),
        face=record["face"],
    )
    if task == "lg":  # users paint the canvas
        files["image"] = png_bytes(row.example.source)
    given = {}
    for name in TASKS[task].inputs:
        (folder / name).write_bytes(files[name])
        given[name] = read_input(name, folder / name)
    example = TASKS[task].from_inputs(prompt=row.example.text, **given, resolution=SIDE)
    return toy.make_collator().row(example, task=task, sample_id=0)


def assert_same_inputs(row: Row, other: Row) -> None:
    for name in ("source", "mask", "face"):
        a, b = getattr(row.example, name), getattr(other.example, name)
        assert (a is None) == (b is None), name
        np.testing.assert_array_equal(a, b, err_msg=name)
    np.testing.assert_array_equal(row.prompt.tokens, other.prompt.tokens)


def rows(task: str, record: dict) -> tuple[Row, Row]:
    """The row of a record in the stream, and among held-out examples."""
    config = Config.of(toy.make_config(**{task: 1.0}))
    options = dict(collator=toy.make_collator(), sources={})
    for name in ("scenes", "persons"):
        options["sources"][name] = Files(name, [record])
    stream = Stream(config, **options)
    return stream.row(0), HeldOut(config, task, split="validation", **options).row(0)


def shapes_of(task: str) -> dict:
    # A user's mask for in- and outpainting is the row's own here, which has the row's size.
    return {"as large": SHAPES["as large"]} if "mask" in TASKS[task].inputs else SHAPES


@pytest.mark.parametrize(
    ("task", "shape"), [(task, shape) for task in TASKS for shape in shapes_of(task).values()]
)
def test_a_file_gives_one_row(task, shape, tmp_path):
    record = stored(shape)
    trained, held_out = rows(task, record)
    assert_same_inputs(as_user(task, held_out, record, tmp_path), held_out)
    assert_same_inputs(as_user(task, trained, record, tmp_path), trained)


@pytest.mark.parametrize("shape", OBLONG.values(), ids=OBLONG)
@pytest.mark.parametrize("task", ["ie", "depth", "pose", "seg", "lg", "id"])
def test_of_an_oblong_picture_the_center_counts(task, shape, tmp_path):
    """Only training also takes other squares of an image, and never of a face."""
    record = stored(shape)
    trained, held_out = rows(task, record)
    assert_same_inputs(as_user(task, held_out, record, tmp_path), held_out)
    if "face" in TASKS[task].inputs:
        assert_same_inputs(trained, held_out)


@pytest.mark.parametrize("task", [name for name in TASKS if "image" in TASKS[name].inputs])
def test_a_path_a_picture_and_an_array_are_one_input(task, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (11, 20, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(png_bytes(pixels))
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels):
        np.testing.assert_array_equal(read_input("image", given), pixels)
    assert all(read_input(name, None) is None for name in INPUTS)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("image", "/", "--image=/ is a folder; expected a picture"),
        ("image", "nowhere.png", "--image=nowhere.png does not exist"),
        pytest.param("face", "x" * 9999, "x' does not exist", id="a long name"),
        ("image", __file__, ".py is not a readable image: none of PNG, JPEG, WEBP"),
        ("mask", np.arange(16, dtype=np.uint8).reshape(4, 4), "--mask is no mask: values 0 to 15"),
        ("image", np.zeros((4, 4, 3)), "--image is float64 [4, 4, 3], expected uint8 [h, w, 3]"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(name, given, message):
    with pytest.raises(UserError) as error:
        read_input(name, given, label=f"--{name}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_file_may_lie_below_the_home_folder(tmp_path, monkeypatch):
    """A shell leaves `~` alone after `--image=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.png").write_bytes(png_bytes(np.full((2, 3, 3), 7, np.uint8)))
    assert read_input("image", "~/a.png").shape == (2, 3, 3)
