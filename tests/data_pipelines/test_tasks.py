import re

import numpy as np
import pytest
from absl import logging

from data_pipelines import renderings, tasks
from data_pipelines.tasks import TASKS, find_task
from univg_jax.errors import UserError

SIZE = 16


def make_record(**changes) -> dict:
    """A record with every field, small enough to check pixel by pixel."""
    rng = np.random.default_rng(0)
    masks = np.zeros((2, SIZE, SIZE), np.uint8)
    masks[0, 4:12, 2:6] = 1
    masks[1, 4:8, 8:16] = 1
    joints = np.full((17, 3), 0.5, np.float32)
    joints[:, 0] = np.linspace(0.1, 0.9, 17)
    joints[:, 2] = 1
    record = dict(
        image=rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8),
        source=rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8),
        caption="a pig and an apple on grass",
        instruction="remove the pig",
        edit_mask=masks[0],
        depth=np.linspace(1, 20, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE),
        boxes=np.array(
            [[2 / 16, 4 / 16, 6 / 16, 12 / 16], [8 / 16, 4 / 16, 1, 8 / 16]], np.float32
        ),
        phrases=["a pig", "an apple"],
        masks=masks,
        expressions=["", "the apple"],
        joints=joints,
        face=rng.integers(0, 256, (8, 8, 3)).astype(np.uint8),
        person=3,
    )
    return record | changes


def example(task: str, *, seed: int = 0, **changes) -> tasks.Example:
    return TASKS[task].example(
        make_record(**changes), np.random.default_rng(seed), SIZE, where="toy/train[7]"
    )


def test_the_order_is_that_of_the_batch_field():
    assert list(TASKS) == ["t2i", "ie", "ip", "lg", "depth", "pose", "seg", "id"]


def test_t2i_is_the_image_and_its_caption():
    record, e = make_record(), example("t2i")
    np.testing.assert_array_equal(e.target, record["image"])
    assert (e.source, e.mask, e.face, e.text) == (None, None, None, record["caption"])


def test_ie_goes_from_source_to_image_by_the_instruction():
    record, e = make_record(), example("ie")
    np.testing.assert_array_equal(e.target, record["image"])
    np.testing.assert_array_equal(e.source, record["source"])
    assert (e.mask, e.face, e.text) == (None, None, "remove the pig")


def test_ip_blanks_the_hole_and_half_have_no_caption():
    record = make_record()
    texts = []
    for seed in range(200):
        e = example("ip", seed=seed)
        np.testing.assert_array_equal(e.target, record["image"])
        hole = e.mask[..., 0] == 1
        assert 0 < hole.sum() < SIZE * SIZE
        assert (e.source[hole] == 128).all()
        np.testing.assert_array_equal(e.source[~hole], record["image"][~hole])
        texts.append(e.text)
    assert set(texts) == {"", record["caption"]}
    assert 70 < texts.count("") < 130  # four standard deviations of a fair coin


def test_lg_names_the_block_of_each_object():
    record, e = make_record(), example("lg")
    np.testing.assert_array_equal(e.target, record["image"])
    pig = e.text.split("a pig (")[1].split(" block)")[0]
    apple = e.text.split("an apple (")[1].split(" block)")[0]
    assert pig != apple
    assert e.text == f"a pig ({pig} block) and an apple ({apple} block) on grass"
    expected = np.full((SIZE, SIZE, 3), 128, np.uint8)
    expected[4:12, 2:6] = renderings.PALETTE[pig]
    expected[4:8, 8:16] = renderings.PALETTE[apple]
    np.testing.assert_array_equal(e.source, expected)
    assert e.mask is None


@pytest.mark.parametrize(
    ("caption", "phrases", "expected"),
    [
        ("two pigs on sand", ["two pigs", "two pigs"], "two pigs ({0} and {1} blocks) on sand"),
        ("a pig and a pig", ["a pig", "a pig"], "a pig ({0} block) and a pig ({1} block)"),
        (
            "A dog in a dog house",
            ["a dog", "a dog house"],
            "A dog ({0} block) in a dog house ({1} block)",
        ),
        (
            "a catfish near a cat",
            ["a cat", "a catfish"],
            "a catfish ({1} block) near a cat ({0} block)",
        ),
        ("a pig by a tree", ["a pig", "a rock"], "a pig ({0} block) by a tree"),
    ],
)
def test_lg_finds_each_phrase_in_the_caption(caption, phrases, expected):
    e = example("lg", caption=caption, phrases=phrases)
    number = sum(f"{{{i}}}" in expected for i in (0, 1))
    colors = np.random.default_rng(0).permutation(list(renderings.PALETTE))[:number]
    assert e.text == expected.format(*colors)


def test_lg_gives_equal_boxes_one_block():
    boxes = np.array([[0, 0, 0.5, 1], [0.5, 0.5, 1, 1], [0, 0, 0.5, 1]], np.float32)
    phrases = ["a girl", "a dog", "her"]
    found = example("lg", caption="a girl and a dog of her", boxes=boxes, phrases=phrases)
    girl, dog, her = re.findall(r"\((\w+) block\)", found.text)
    assert girl == her != dog
    assert (found.source[2, 2] == renderings.PALETTE[girl]).all()


def test_lg_leaves_out_what_a_crop_cut_away():
    record = make_record()
    wide = dict(
        image=np.zeros((16, 64, 3), np.uint8),
        boxes=np.array([[0.4, 0, 0.6, 1], [0, 0, 0.1, 1]], np.float32),
    )
    e = TASKS["lg"].example(record | wide, np.random.default_rng(0), SIZE, center=True)
    assert "a pig (" in e.text
    assert "an apple on grass" in e.text
    with pytest.raises(tasks.UnsuitableRecord, match="no box"):
        example("lg", phrases=["a cow", "a tree"])


def test_depth_pose_and_seg_are_read_off_the_image():
    record = make_record()
    depth, pose, seg = example("depth"), example("pose"), example("seg")
    for e in (depth, pose, seg):
        np.testing.assert_array_equal(e.source, record["image"])
        assert e.mask is None
        assert e.face is None
    assert depth.text == pose.text == ""
    np.testing.assert_array_equal(depth.target, renderings.render_depth(record["depth"]))
    np.testing.assert_array_equal(
        pose.target, renderings.render_pose(record["joints"][None], height=SIZE, width=SIZE)
    )
    assert seg.text == "the apple"  # the only expression that is not empty
    np.testing.assert_array_equal(
        seg.target, np.where(record["masks"][1][..., None], 255, 0) * np.ones(3, int)
    )


def test_seg_picks_among_all_expressions():
    texts = {
        example("seg", seed=seed, expressions=["the pig", "the apple"]).text for seed in range(20)
    }
    assert texts == {"the pig", "the apple"}


def test_id_needs_the_placeholder():
    record = make_record(caption="a drawing of <p>")
    e = example("id", caption="a drawing of <p>")
    np.testing.assert_array_equal(e.target, record["image"])
    np.testing.assert_array_equal(e.face, record["face"])
    assert (e.source, e.mask, e.text) == (None, None, "a drawing of <p>")
    with pytest.raises(
        ValueError, match=r"^toy/train\[7\]: field 'caption' has no <p>: 'a pig"
    ) as error:
        example("id")
    assert not isinstance(error.value, tasks.UnsuitableRecord)


def test_a_tag_alone_is_the_null_text():
    assert tasks.prompt("ie", "make it snow") == "<ie> make it snow"
    assert tasks.prompt("ip", "") == "<ip>"


@pytest.mark.parametrize("task", TASKS)
def test_an_example_is_a_function_of_record_and_seed(task):
    caption = "<p> and a pig and an apple"
    a, b = (example(task, seed=3, caption=caption) for _ in range(2))
    for name in ("target", "source", "mask", "face"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.text == b.text


@pytest.mark.parametrize("task", TASKS)
def test_other_sizes_arrive_at_the_resolution(task):
    record = make_record(caption="<p> and a pig and an apple")
    e = TASKS[task].example(record, np.random.default_rng(0), 24)
    assert e.target.shape == (24, 24, 3)
    assert e.source is None or e.source.shape == (24, 24, 3)


BOX = np.array([[0.1, 0.1, 0.5, 0.5]], np.float32)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        (
            "ie",
            dict(source=np.zeros((8, 16, 3), np.uint8)),
            "field 'source' has 8x16 pixels but the image 16x16",
        ),
        (
            "depth",
            dict(depth=np.ones((16, 8), np.float32)),
            "field 'depth' has 16x8 pixels but the image 16x16",
        ),
        (
            "seg",
            dict(masks=np.ones((2, 8, 8), np.uint8)),
            "field 'masks' has 8x8 pixels but the image 16x16",
        ),
        ("t2i", dict(caption="  "), "field 'caption' is empty"),
        ("ie", dict(instruction=""), "field 'instruction' is empty"),
        (
            "lg",
            dict(boxes=BOX + 0.6, phrases=["a pig"]),
            "field 'boxes' has box 0 outside the image: 0.7 0.7 1.1 1.1",
        ),
        (
            "lg",
            dict(boxes=BOX[:, [2, 1, 0, 3]], phrases=["a pig"]),
            "box 0 inverted: 0.5 0.1 0.1 0.5",
        ),
        ("lg", dict(phrases=["a pig"]), "field 'phrases' has 1 entries for 2 boxes"),
        ("seg", dict(expressions=["the pig"]), "field 'expressions' has 1 entries for 2 masks"),
        (
            "seg",
            dict(expression_masks=[0, 1, 1]),
            "field 'expression_masks' has 3 entries for 2 expressions",
        ),
        ("seg", dict(expression_masks=[0, 2]), "field 'expression_masks' has the index 2 for 2"),
        (
            "t2i",
            dict(captions=["a pig"], caption_kinds=["short", "long"]),
            "field 'caption_kinds' has 2 entries for 1 captions",
        ),
        ("t2i", dict(captions="a pig"), "field 'captions' is one text, expected a list of them"),
        (
            "lg",
            dict(captions=["a pig"], phrase_captions=[0, -1]),
            "field 'phrase_captions' has the index -1 for 1 captions",
        ),
        (
            "pose",
            dict(ignore_mask=np.full((16, 16), 7, np.uint8)),
            "field 'ignore_mask' has the value 7; expected 0 and 1",
        ),
        (
            "pose",
            dict(joints=np.full((2, 16, 3), 0.5, np.float32)),
            "field 'joints' has shape (2, 16, 3), expected (people, 17, 3)",
        ),
        ("lg", dict(boxes=BOX * np.nan, phrases=["a pig"]), "outside the image"),
    ],
)
def test_a_wrong_record_is_named_with_its_field(task, changes, message):
    with pytest.raises(UserError, match=r"^toy/train\[7\]: ") as error:
        example(task, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", TASKS)
def test_a_missing_field_is_named(task):
    for field in TASKS[task].needs[1:]:
        record = make_record()
        del record[field]
        with pytest.raises(UserError, match=f"record: field '{field}' is missing"):
            TASKS[task].example(record, np.random.default_rng(0), SIZE)


# --- a user's inputs ---

PICTURE = np.full((20, 30, 3), 90, np.uint8)
FACE = np.full((9, 9, 3), 40, np.uint8)


def from_inputs(task: str, **inputs) -> tasks.Example:
    return TASKS[task].from_inputs(resolution=SIZE, **inputs)


def test_each_task_says_what_it_takes_from_a_user():
    table = {name: (task.inputs, task.prompt) for name, task in TASKS.items()}
    assert table == {
        "t2i": ((), "needed"),
        "ie": (("image",), "needed"),
        "ip": (("image", "mask"), "optional"),
        "lg": (("image",), "needed"),
        "depth": (("image",), "none"),
        "pose": (("image",), "none"),
        "seg": (("image",), "needed"),
        "id": (("face",), "needed"),
    }


@pytest.mark.parametrize("task", TASKS)
def test_a_users_inputs_have_the_form_of_a_training_example(task):
    given = dict(image=PICTURE, mask=np.ones((20, 30), np.uint8), face=FACE)
    inputs = {name: given[name] for name in TASKS[task].inputs}
    prompt = "" if TASKS[task].prompt == "none" else " <p> smiles "
    made = from_inputs(task, prompt=prompt, **inputs)
    trained = example(task, caption="<p> and a pig and an apple")
    assert made.text == prompt.strip()
    assert not made.target.any()
    for name in ("target", "source", "mask"):
        a, b = getattr(made, name), getattr(trained, name)
        assert (a is None) == (b is None)
        assert a is None or (a.shape, a.dtype) == (b.shape, b.dtype)
    assert (made.face is None) == (trained.face is None)


def test_a_picture_is_cropped_to_its_centered_square():
    wide = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    wide[:, SIZE : 2 * SIZE] = 200
    made = from_inputs("depth", image=wide)
    np.testing.assert_array_equal(made.source, np.full((SIZE, SIZE, 3), 200, np.uint8))


@pytest.mark.parametrize("scale", [1, 2, 0.5])
def test_a_mask_lies_on_its_image_at_any_scale(scale):
    image = np.zeros((2 * SIZE, 4 * SIZE, 3), np.uint8)
    image[:SIZE, SIZE : 3 * SIZE] = 200  # the upper half of the centered square
    mask = np.zeros((int(2 * SIZE * scale), int(4 * SIZE * scale)), np.uint8)
    mask[: len(mask) // 2] = 1
    made = from_inputs("ip", image=image, mask=mask)
    np.testing.assert_array_equal(made.mask[: SIZE // 2], 1)
    np.testing.assert_array_equal(made.mask[SIZE // 2 :], 0)
    np.testing.assert_array_equal(
        made.source, np.where(made.mask > 0, renderings.GRAY, 0) * np.ones(3, int)
    )


@pytest.mark.parametrize("is_users", [True, False])
def test_a_crop_is_told_once(is_users, monkeypatch, caplog):
    monkeypatch.setattr(logging, "_log_counter_per_token", {})
    square, wide = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((20, 30, 3), np.uint8)
    for image in (square, wide, wide):
        if is_users:
            from_inputs("depth", image=image)
        else:
            example("t2i", image=image)
    what, where = ("", "its center") if is_users else (" of toy/train[7]", "a random place")
    (message,) = caplog.messages
    assert message.startswith(
        f"the image{what} has 30x20 pixels: the square of 20x20 at {where} is used"
    )


def test_a_face_is_the_center_of_its_picture():
    wide = np.zeros((8, 14, 3), np.uint8)
    wide[:, 3:11] = np.arange(8)[:, None]
    given = from_inputs("id", prompt="<p>", face=wide).face
    np.testing.assert_array_equal(given, wide[:, 3:11])
    np.testing.assert_array_equal(example("id", caption="<p>", face=wide).face, given)


@pytest.mark.parametrize(
    ("task", "inputs", "message"),
    [
        ("t2i", dict(), "task 't2i' needs a prompt"),
        ("ie", dict(prompt="  ", image=PICTURE), "task 'ie' needs a prompt"),
        ("ie", dict(prompt="make it snow"), "task 'ie' needs an image"),
        ("ip", dict(image=PICTURE), "task 'ip' needs a mask"),
        ("t2i", dict(prompt="a pig", image=PICTURE), "task 't2i' takes no image"),
        ("depth", dict(image=PICTURE, face=FACE), "task 'depth' takes no face"),
        ("depth", dict(image=PICTURE, prompt="a pig"), "task 'depth' takes no prompt, but has 'a"),
        ("pose", dict(image=PICTURE, prompt="a pig"), "task 'pose' takes no prompt"),
        ("id", dict(prompt="<p> smiles"), "task 'id' needs a face"),
        ("id", dict(prompt="a person", face=FACE), "prompt 'a person' has no <p>"),
        (
            "ip",
            dict(image=PICTURE, mask=np.zeros((20, 30), np.uint8)),
            "the mask has no white pixel: nothing to generate",
        ),
        (
            "ip",
            dict(image=PICTURE, mask=np.ones((20, 20), np.uint8)),
            "the mask has 20x20 pixels and the image 30x20: expected a mask of the image's shape",
        ),
        (
            "ip",
            dict(image=PICTURE, mask=np.ones((30, 20), np.uint8)),
            "the mask has 20x30 pixels and the image 30x20: the image's EXIF data turn it, so turn",
        ),
    ],
)
def test_inputs_that_do_not_fit_a_task_are_named(task, inputs, message):
    with pytest.raises(UserError) as error:
        from_inputs(task, **inputs)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_is_found_by_all_of_its_names_however_they_are_spelled(task):
    for name in (task.name, task.title, *task.aliases):
        for spelled in (name, name.upper(), name.replace(" ", "_"), name.replace("-", " ")):
            assert find_task(spelled) is task


@pytest.mark.parametrize(
    ("near", "name"),
    [("edti", "ie"), ("inpaitning", "ip"), ("segmentatoin", "seg"), ("texttoimage", "t2i")],
)
def test_a_task_that_is_nearly_named_is_suggested(near, name):
    with pytest.raises(UserError, match=f"unknown task '{near}'; did you mean '{name}'"):
        find_task(near)
    with pytest.raises(UserError, match="instruction editing") as error:
        find_task("x" * 10_000)
    assert len(str(error.value)) < 500
