"""The same file gives the same row, whether training, evaluation or a user reads it. What users
ask for: pictures of any size, outpainting, boxes, options.
"""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from data_pipelines import records, renderings
from data_pipelines.collate import Row
from data_pipelines.held_out import HeldOut
from data_pipelines.mixture import Stream
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import INPUTS, TASKS
from tests.data_pipelines import toy
from tests.data_pipelines.test_renderings import make_skeleton
from univg_jax.errors import UnsupportedError, UserError
from univg_jax.images import png_bytes
from univg_jax.inputs import (
    check_seeds,
    each_of,
    extend,
    make_request,
    read_input,
    sampling_options,
)
from univg_jax.settings import Config, Data

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


# --- requests ---

DATA = Data(resolution=16, buckets=((16, 16), (16, 32), (32, 16)))
PICTURE = np.random.default_rng(1).integers(0, 256, (24, 40, 3), dtype=np.uint8)
IMAGE_TASKS = [name for name, task in TASKS.items() if task.inputs == ("image",)]


def request_of(task: str, image: np.ndarray, **given):
    prompt = "" if TASKS[task].prompt == "none" else "a pig (red block)"
    return make_request(task, prompt=prompt, image=image, data=DATA, **given)


@hypothesis.given(
    task=st.sampled_from(IMAGE_TASKS), height=st.integers(1, 70), width=st.integers(1, 70)
)
def test_a_picture_of_any_size_is_asked_in_a_shape_of_the_run_and_answered_in_its_own(
    task, height, width
):
    image = np.full((height, width, 3), 90, np.uint8)
    request = request_of(task, image)
    shape = request.example.source.shape[:2]
    assert shape in DATA.buckets
    assert request.example.target.shape == request.example.source.shape
    if 0.8 < height / width < 1.25:
        assert shape == (16, 16)
    finished, answer = request.finish(np.full((*shape, 3), 200, np.uint8))
    assert finished.size == (width, height)
    assert (np.asarray(finished) == 200).all()
    expected = {"depth": (height, width), "pose": (17, 3), "seg": (height, width)}.get(task)
    assert (None if answer is None else answer.shape) == expected


@pytest.mark.parametrize("task", IMAGE_TASKS)
@pytest.mark.parametrize("shape", DATA.buckets)
def test_a_picture_of_a_trained_size_is_given_as_it_is(task, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    request = request_of(task, image)
    np.testing.assert_array_equal(request.example.source, image)
    np.testing.assert_array_equal(np.asarray(request.finish(image)[0]), image)


def test_inpainting_keeps_the_pixels_of_the_picture_itself():
    mask = np.zeros(PICTURE.shape[:2], np.uint8)
    mask[3:9, 5:33] = 1
    request = request_of("ip", PICTURE, mask=mask)
    hole = request.example.mask[..., 0]
    assert hole.shape == (16, 32)
    assert (request.example.source[hole > 0] == renderings.GRAY).all()
    # What no picture is in is a hole, too.
    top, left, height, width = request.letterbox.window
    outside = np.ones_like(hole)
    outside[top : top + height, left : left + width] = 0
    assert outside.any()
    assert hole[outside > 0].all()
    made, _ = request.finish(np.full((16, 32, 3), 7, np.uint8))
    np.testing.assert_array_equal(np.asarray(made)[mask == 0], PICTURE[mask == 0])
    assert (np.asarray(made)[mask > 0] == 7).all()


def test_a_mask_may_be_of_another_scale_and_thinner_than_a_pixel_of_the_model():
    image = np.zeros((160, 160, 3), np.uint8)
    mask = np.zeros((320, 320), np.uint8)
    mask[100:102] = 255
    request = request_of("ip", image, mask=mask)
    assert request.example.mask.sum() == 16
    made, _ = request.finish(np.full((16, 16, 3), 7, np.uint8))
    assert (np.asarray(made)[50] == 7).all()
    assert np.asarray(made).any(axis=(1, 2)).sum() == 1


def test_decoded_joints_lie_on_the_picture():
    """A person, drawn as the model draws one, on a canvas of which the picture is the middle."""
    joints, side = make_skeleton(np.random.default_rng(5)), 64
    image = np.zeros((60, 120, 3), np.uint8)
    request = make_request("pose", image=image, data=Data(resolution=side))
    top, _, height, _ = request.letterbox.window
    placed = joints.copy()
    placed[:, 1] = (top + joints[:, 1] * height) / side
    picture, found = request.finish(renderings.render_pose(placed[None], height=side, width=side))
    assert picture.size == (120, 60)
    # The decoder's own error, a pixel and a half of the canvas (tests of renderings).
    assert np.median(np.abs(found[:, :2] - joints[:, :2]) * [side, height]) < 1.5


def test_a_decoded_mask_lies_on_the_picture():
    image = np.zeros((60, 120, 3), np.uint8)
    request = make_request("seg", prompt="it", image=image, data=Data(resolution=64))
    canvas = np.zeros((64, 64, 3), np.uint8)
    canvas[:32] = 255
    _, mask = request.finish(canvas)
    assert mask[:30].all()
    assert not mask[30:].any()


# --- outpainting ---


@hypothesis.given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    margins=st.tuples(*[st.integers(0, 9)] * 4).filter(any),
)
def test_margins_are_around_the_picture(height, width, margins):
    image = np.full((height, width, 3), 9, np.uint8)
    left, top, right, bottom = margins
    canvas, mask = extend(image, margins=margins)
    assert canvas.shape == (top + height + bottom, left + width + right, 3)
    assert mask.shape == canvas.shape[:2]
    assert mask.sum() == mask.size - height * width
    assert not mask[top : top + height, left : left + width].any()


@hypothesis.given(height=st.integers(1, 40), width=st.integers(1, 40), ratio=st.floats(0.1, 10))
def test_an_aspect_is_met_by_the_smallest_canvas(height, width, ratio):
    image = np.zeros((height, width, 3), np.uint8)
    hypothesis.assume(abs(width - height * ratio) > 0.5 and abs(height - width / ratio) > 0.5)
    canvas, mask = extend(image, aspect=ratio)
    h, w = canvas.shape[:2]
    assert h == height or w == width
    assert abs(w - h * ratio) <= 0.5 + 1e-6 or abs(h - w / ratio) <= 0.5 + 1e-6
    (rows,), (columns,) = np.nonzero(~mask.all(axis=1)), np.nonzero(~mask.all(axis=0))
    assert abs(rows[0] - (h - 1 - rows[-1])) <= 1
    assert abs(columns[0] - (w - 1 - columns[-1])) <= 1


def test_aspects_are_numbers_or_two_sides():
    shapes = {extend(PICTURE, aspect=aspect)[1].shape for aspect in (2, 2.0, "2:1", "2/1", "4x2")}
    assert shapes == {(24, 48)}
    assert extend(PICTURE, size=(41, 30))[1].shape == (30, 41)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(), "outpainting needs one of margins, aspect and size"),
        (dict(margins=3, aspect=2), "outpainting needs one of margins, aspect and size"),
        (dict(margins=0), "the picture has this shape already"),
        (dict(aspect="5:3"), "the picture has this shape already"),
        (dict(margins=-1), "margins=-1: expected a whole number >= 0"),
        (dict(aspect="wide"), "aspect='wide': expected width to height, such as 1.5 or '3:2'"),
        (dict(aspect="1:0"), "aspect='1:0': expected width to height"),
        (dict(aspect=1000), "aspect=1000: expected width to height"),
        (dict(size=(30, 30)), "size=30x30: the picture has"),
        (dict(size=(0, 30)), "size=0: expected a whole number >= 1"),
        (dict(size=(10**5, 10**5)), "size=100000x100000: expected at most 32 x 2^20 pixels"),
        (dict(margins=10**5), "the extended picture=200040x200024: expected at most"),
    ],
)
def test_what_is_no_outpainting_is_said(given, message):
    with pytest.raises(UserError) as error:
        extend(PICTURE, **given)
    assert message in str(error.value)


BOXES = [("a pig", (0.1, 0.1, 0.5, 0.5))]


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("depth", dict(image=PICTURE, size=(8, 8)), "takes no size: its answer has that of the im"),
        ("t2i", dict(prompt="a pig", boxes=BOXES), "task 't2i' takes no boxes"),
        ("ie", dict(prompt="a", image=PICTURE, margins=3), "task 'ie' takes no margins"),
        ("depth", dict(image=PICTURE, aspect="1:1"), "task 'depth' takes no aspect"),
    ],
)
def test_what_a_task_does_not_take_is_unsupported(task, given, message):
    with pytest.raises(UnsupportedError) as error:
        make_request(task, data=DATA, **given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("lg", dict(prompt="a pig", image=PICTURE, boxes=BOXES), "boxes and a canvas"),
        ("lg", dict(prompt="a pig"), "task 'lg' needs an image"),
        ("ip", dict(image=PICTURE), "task 'ip' needs a mask"),
        ("ip", dict(margins=3), "task 'ip' needs an image"),
        (
            "ip",
            dict(image=PICTURE, mask=np.ones((24, 40), np.uint8), margins=3),
            "outpainting needs no mask",
        ),
        ("t2i", dict(prompt="a pig", size=(3, 0)), "size=0: expected a whole"),
    ],
)
def test_what_is_missing_or_too_much_is_said(task, given, message):
    with pytest.raises(UserError) as error:
        make_request(task, data=DATA, **given)
    assert message in str(error.value)


def test_boxes_are_a_canvas():
    request = make_request("lg", prompt="a pig on grass", boxes=BOXES, size=(40, 20), data=DATA)
    assert request.example.text == "a pig (red block) on grass"
    assert request.example.source.shape == (16, 32, 3)
    assert request.finish(request.example.source)[0].size == (40, 20)
    # Sequences of one picture's boxes are a list of pictures.
    assert [row["boxes"] for row in each_of({"boxes": BOXES})] == [BOXES]
    assert [row["boxes"] for row in each_of({"boxes": [BOXES, BOXES], "seed": 3})] == [BOXES] * 2


# --- options ---

CONFIG = Config(tasks={name: Config().tasks["t2i"] for name in TASKS}, data=DATA)


def test_options_replace_the_runs_settings_of_one_task():
    assert sampling_options(CONFIG, "t2i") == {}
    found = sampling_options(CONFIG, "ie", guidance=7, steps=3, solver="heun")
    stored = CONFIG.to_dict()["sampling"]["guidance"]
    assert found == {
        "steps": 3,
        "solver": "heun",
        "guidance": {**stored, "ie": {"text": 7.0, "image": 1.5}},
    }
    found = sampling_options(CONFIG, "seg", guidance=2.0, image_guidance=0.0)
    assert found["guidance"]["seg"] == {"text": 2.0, "image": 0.0}


@pytest.mark.parametrize(
    ("task", "given", "kind", "message"),
    [
        ("depth", dict(guidance=2.0), UnsupportedError, "task 'depth' takes no guidance"),
        ("pose", dict(negative_prompt="x"), UnsupportedError, "takes no negative_prompt"),
        ("t2i", dict(image_guidance=2.0), UnsupportedError, "task 't2i' takes no image_guidance"),
        ("id", dict(image_guidance=2.0), UnsupportedError, "task 'id' takes no image_guidance"),
        ("seg", dict(image_guidance=2.0), UserError, "guidance needs a text scale when it has"),
        ("seg", dict(negative_prompt="x"), UserError, "'seg' is sampled with guidance=None, so"),
        (
            "t2i",
            dict(negative_prompt="x", guidance=1),
            UserError,
            "prompt changes nothing",
        ),
        ("t2i", dict(guidance=-1), UserError, "guidance=-1: expected a finite number >= 0"),
        ("t2i", dict(guidance=float("nan")), UserError, "guidance=nan: expected a finite number"),
        ("t2i", dict(steps=0), UserError, "steps=0: expected a whole number >= 1"),
        ("t2i", dict(solver="eular"), UserError, "unknown solver 'eular'; did you mean 'euler'?"),
    ],
)
def test_options_that_cannot_be_are_said(task, given, kind, message):
    with pytest.raises(kind) as error:
        sampling_options(CONFIG, task, **given)
    assert message in str(error.value)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7", None, True])
def test_what_is_no_seed_is_said(seed):
    assert check_seeds([0, np.int64(3), 2**32 - 1]) == [0, 3, 2**32 - 1]
    with pytest.raises(UserError, match=f"^seed={seed!r}: expected a whole number"):
        check_seeds([1, seed])
