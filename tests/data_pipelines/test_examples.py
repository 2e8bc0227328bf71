"""What labels of real datasets become: unlabeled parts, many people, expressions, objects."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import records, renderings
from data_pipelines.collate import Row
from data_pipelines.reader import Reader
from data_pipelines.sources import MemorySource
from data_pipelines.tasks import TASKS, Example, UnsuitableRecord
from tests.data_pipelines import toy
from univg_jax import images

SIZE = 32
IMAGE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)


def example(task: str, seed: int = 0, size: int = SIZE, **fields) -> Example:
    record = dict(image=IMAGE) | fields
    return TASKS[task].example(record, np.random.default_rng(seed), size, where="toy[7]")


def same(a: Example, b: Example) -> bool:
    names = ("target", "source", "mask", "loss_mask", "text")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


# --- depth ---

METERS = np.linspace(1, 60, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.float32)


def test_unknown_depth_does_not_count_and_far_depth_does():
    depth = METERS.copy()
    depth[0, :4] = [0, np.nan, np.inf, -1]
    depth[0, 4:6] = [80.1, 299]
    made = example("depth", depth=depth)
    np.testing.assert_array_equal(made.loss_mask[0, :7, 0], [0, 0, 0, 0, 1, 1, 1])
    assert made.loss_mask[1:].all()
    np.testing.assert_array_equal(made.target[0, 4:6], 0)  # known, and black like 80 m
    assert example("depth", depth=METERS).loss_mask is None
    ignored = np.zeros((SIZE, SIZE), np.uint8)
    ignored[20:] = 1
    both = example("depth", depth=depth, ignore_mask=ignored).loss_mask
    np.testing.assert_array_equal(both[..., 0], made.loss_mask[..., 0] * (1 - ignored))
    with pytest.raises(UnsuitableRecord, match=r"^toy\[7\]: no known depth"):
        example("depth", depth=np.full_like(METERS, np.nan))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), share=st.sampled_from([0.03, 0.16, 0.7]), wide=st.booleans())
def test_an_example_does_not_depend_on_what_invalid_pixels_hold(seed, share, wide):
    rng = np.random.default_rng(seed)
    known = rng.random((SIZE, SIZE)) < share
    known[::8, ::8] = True
    fields = dict(image=np.repeat(IMAGE, 2, axis=1)) if wide else {}
    made = []
    for invalid in (0.0, np.nan, np.inf, -3.0):
        depth = np.where(known, METERS, np.float32(invalid))
        depth = np.repeat(depth, 2, axis=1) if wide else depth
        made.append(example("depth", seed, 24, depth=depth, **fields))
    assert all(same(made[0], other) for other in made[1:])
    assert made[0].loss_mask is not None


def test_stored_depth_of_any_range_is_read_by_its_scale():
    levels = np.full((8, 8), 80 * 256, np.uint16)
    levels[0, 0] = 0
    stored = records.encode_levels(levels, 1 / 256)
    record = records.decode({"image": images.png_bytes(IMAGE[:8, :8]), **stored})
    assert record["depth"][1, 1] == 80
    assert record["depth"][0, 0] == 0
    assert example("depth", size=8, **record).loss_mask.sum() == 63


# --- people ---


def person(x: float = 0.5, size: float = 0.5, visibility: int = 2) -> np.ndarray:
    rng = np.random.default_rng(1)
    joints = np.full((17, 3), visibility, np.float32)
    joints[:, :2] = [x, 0.5] + size * (rng.random((17, 2)) - 0.5)
    return joints


def test_pose_draws_all_people_and_ignores_crowds():
    people = np.stack([person(0.25), person(0.75)])
    crowd = np.zeros((SIZE, SIZE), np.uint8)
    crowd[:10, :10] = 1
    made = example("pose", joints=people, ignore_mask=crowd)
    np.testing.assert_array_equal(made.loss_mask[..., 0], 1 - crowd)
    drawn = renderings.render_pose(people, height=SIZE, width=SIZE)
    np.testing.assert_array_equal(made.target[crowd == 0], drawn[crowd == 0])
    for stored in (crowd * np.uint8(255), crowd):
        assert same(example("pose", joints=people, ignore_mask=stored), made)
    assert example("pose", joints=people, ignore_mask=0 * crowd).loss_mask is None
    assert example("pose", joints=people).loss_mask is None
    with pytest.raises(UnsuitableRecord, match="nothing of the target counts"):
        example("pose", joints=people, ignore_mask=crowd * 0 + 1)


def test_a_picture_of_nobody_is_unsuitable():
    for nobody in (np.zeros((0, 17, 3), np.float32), np.zeros((2, 17, 3), np.float32)):
        with pytest.raises(UnsuitableRecord, match="no visible joint"):
            example("pose", joints=nobody)


def test_a_crowd_moves_with_the_crop_and_no_part_of_it_is_lost():
    wide = np.zeros((SIZE, 2 * SIZE), np.uint8)
    wide[:, SIZE + 3] = 1  # a line one pixel wide
    made = TASKS["pose"].example(
        dict(image=np.repeat(IMAGE, 2, axis=1), joints=person(), ignore_mask=wide),
        np.random.default_rng(0),
        8,
        center=True,
    )
    ignored = np.flatnonzero(1 - made.loss_mask[0, :, 0])
    np.testing.assert_array_equal(ignored, [(SIZE // 2 + 3) // 4])


# --- bars ---


@pytest.mark.parametrize("task", TASKS)
def test_what_lies_outside_the_picture_does_not_matter(task):
    bars = np.ones((SIZE, SIZE), np.uint8)
    bars[5:-6] = 0
    fields = dict(
        caption="a pig and <p>",
        source=IMAGE[::-1],
        instruction="turn it",
        boxes=np.float32([[0.1, 0.3, 0.6, 0.7]]),
        phrases=["a pig"],
        depth=METERS,
        joints=person(),
        masks=np.ones((1, SIZE, SIZE), np.uint8),
        expressions=["it"],
        face=IMAGE,
    )
    fields = {name: fields[name] for name in fields if name in TASKS[task].fields(fields)}
    for seed in range(8):  # in- and outpainting draws its holes
        plain = example(task, seed, image=IMAGE, **fields)
        made = [
            example(task, seed, image=image, ignore_mask=bars, **fields)
            for image in (IMAGE, np.where(bars[..., None], np.uint8(0), IMAGE))
        ]
        if plain.source is not None and not TASKS[task].draws_source:
            made[1] = dataclasses.replace(made[1], source=made[0].source)  # given, not made
        assert same(*made)
        inside = bars == 0
        np.testing.assert_array_equal(made[0].loss_mask[..., 0], inside)
        np.testing.assert_array_equal(made[0].target[inside], plain.target[inside])
        np.testing.assert_array_equal(made[0].target[0], made[0].target[5])
    with pytest.raises(UnsuitableRecord, match="nothing of the target counts"):
        example(task, ignore_mask=np.ones_like(bars), **fields)


# --- expressions ---


def test_several_expressions_of_one_mask():
    masks = np.zeros((2, SIZE, SIZE), np.uint8)
    masks[0, :8], masks[1, 20:] = 1, 1
    fields = dict(
        masks=masks, expressions=["pig", "sow", "", "apple"], expression_masks=[0, 0, 1, 1]
    )
    seen = set()
    for seed in range(40):
        made = example("seg", seed, **fields)
        expected = masks[1 if made.text == "apple" else 0]
        np.testing.assert_array_equal(made.target, renderings.render_mask(expected))
        seen.add(made.text)
    assert seen == {"pig", "sow", "apple"}
    empty = dict(masks=masks, expressions=["pig", "apple"], expression_masks=[])
    plain = dict(masks=masks, expressions=["pig", "apple"])
    assert same(example("seg", 3, **empty), example("seg", 3, **plain))


def test_what_lies_in_an_ignored_region_does_not_matter():
    masks = np.zeros((1, SIZE, SIZE), np.uint8)
    masks[:, :8] = 1
    crowd = np.zeros((SIZE, SIZE), np.uint8)
    crowd[4:20, 4:20] = 1
    other = masks ^ crowd
    made = [example("seg", masks=m, expressions=["it"], ignore_mask=crowd) for m in (masks, other)]
    assert same(*made)
    np.testing.assert_array_equal(made[0].loss_mask[..., 0], 1 - crowd)


# --- holes ---

OBJECTS = np.zeros((2, SIZE, SIZE), np.uint8)
OBJECTS[0, 4:14, 4:14], OBJECTS[1, 0, 0] = 1, 1  # one pixel is no object to paint


def test_ip_needs_pictures_alone():
    made = [example("ip", seed) for seed in range(50)]
    assert {e.text for e in made} == {""}
    assert all(0 < e.mask.mean() < 1 for e in made)
    assert all(same(e, example("ip", seed, masks=OBJECTS)) for seed, e in enumerate(made))


def test_ip_cuts_out_objects_where_the_text_names_them():
    objects = 0
    for seed in range(200):
        made = example("ip", seed, caption="a pig", masks=OBJECTS)
        plain = example("ip", seed, caption="a pig")
        assert made.text == plain.text
        if np.array_equal(made.mask, plain.mask):
            continue
        objects += 1
        assert made.text == "a pig"
        hole = made.mask[..., 0]
        assert hole[4:14, 4:14].all()
        assert hole.sum() > 100
        assert not hole[:, 18:].any()
        assert not hole[18:].any()
        np.testing.assert_array_equal(made.source[hole > 0], renderings.GRAY)
    assert 25 < objects < 80  # a quarter; five standard deviations are 30


@pytest.mark.parametrize("masks", [OBJECTS[1:], OBJECTS * 0 + 1, OBJECTS[:0]])
def test_objects_of_no_sensible_area_leave_the_hole(masks):
    for seed in range(40):
        fields = dict(caption="a pig", masks=masks)
        assert same(example("ip", seed, **fields), example("ip", seed, caption="a pig"))


# --- to a batch ---


def test_the_loss_mask_reaches_the_batch():
    config = toy.make_config(depth=1.0)
    collator = toy.make_collator(config)
    depth = np.ones((2, toy.SIZE, toy.SIZE), np.float32)
    depth[0, :3] = 0
    image = np.zeros((toy.SIZE, toy.SIZE, 3), np.uint8)
    items = [dict(image=image, depth=plane) for plane in depth]
    reader = Reader("depth", MemorySource("toy", items), collator=collator)
    rows: list[Row] = [reader.row(i, np.random.default_rng(i)) for i in range(2)]
    batch = collator(rows)
    np.testing.assert_array_equal(batch.loss_mask[..., 0], depth > 0)
    assert batch.loss_mask.dtype == np.uint8
    assert collator.spec(2).loss_mask.shape == batch.loss_mask.shape
    dropped = collator.drop_conditions(batch, "both")
    np.testing.assert_array_equal(dropped.loss_mask, batch.loss_mask)
