"""The embedded dataset: exact labels, grammatical text, held-out combinations, one build."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import records
from data_pipelines.build import build
from data_pipelines.datasets import DATASETS, emoji_scenes
from data_pipelines.datasets.emoji_scenes import (
    FAMILIES,
    PICTURES,
    SPLITS,
    Options,
    captions,
    edits,
    examples,
    portraits,
    puppet,
    scene,
    splits,
    sprites,
)
from univg_jax.errors import UserError

OPTIONS = Options(resolution=48, num_scenes=200, seed=3, nouns=10)
IMAGES = ("image", "source", "edit_mask", "depth", "face")


def decoded(family: str, index: int, *, split: str = "train", options: Options = OPTIONS) -> dict:
    return records.decode(examples.example(options, family, split, index))


def read(data_dir, family: str, split: str) -> list[dict]:
    builder = tfds.builder_from_directory(data_dir / family)
    skip = {name: tfds.decode.SkipDecoding() for name in IMAGES if name in builder.info.features}
    return [records.decode(record) for record in builder.as_data_source(split, decoders=skip)]


# --- scenes --------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, 10**6), resolution=st.sampled_from([16, 37, 48, 96]))
def test_scene_labels_are_exact(index, resolution):
    options = Options(resolution=resolution, num_scenes=200, seed=1, nouns=40)
    record = decoded("scenes", index, options=options)
    spec, _ = examples.sample_scene(options, "train", index)
    assert record["image"].shape == (resolution, resolution, 3)
    assert (
        len(record["boxes"])
        == len(record["masks"])
        == len(record["phrases"])
        == len(record["expressions"])
    )
    for thing, box, mask, phrase in zip(
        spec.things, record["boxes"], record["masks"], record["phrases"]
    ):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        # float32 of a ratio of small integers
        np.testing.assert_allclose(box * resolution, extent, rtol=0, atol=1e-4)
        assert phrase in record["caption"]
        # Stored in whole millimetres: half of one is lost, and a little of float32.
        np.testing.assert_allclose(record["depth"][mask == 1], thing.depth, rtol=0, atol=5.1e-4)
    assert (record["masks"].sum(0) <= 1).all()  # a pixel is seen to belong to one thing
    assert (record["depth"] > 0).all()
    assert record["depth"].max() <= scene.FAR


def test_nearer_things_are_larger_lower_and_less_deep():
    near, far = scene.Thing("pig", None, 0.3, 0.45), scene.Thing("pig", None, 0.7, 0.3)
    rendered = scene.render(scene.Scene((near, far), "grass", "blue", 0.4), 64)
    boxes = [examples.extent(mask) for mask in rendered.masks]
    depths = [rendered.depth[mask == 1].mean() for mask in rendered.masks]
    assert depths[0] < depths[1]
    assert boxes[0][3] > boxes[1][3]
    assert boxes[0][3] - boxes[0][1] > boxes[1][3] - boxes[1][1]


def test_nearer_things_hide_farther_ones():
    things = (scene.Thing("pig", None, 0.5, 0.45), scene.Thing("frog", None, 0.5, 0.3))
    for order in (things, things[::-1]):
        rendered = scene.render(scene.Scene(order, "grass", "blue", 0.4), 64)
        pig, frog = (
            rendered.masks[[thing.noun for thing in order].index(noun)] for noun in ("pig", "frog")
        )
        assert pig.sum() > 10 * frog.sum()


def test_objects_are_large():
    heights = [box[3] - box[1] for k in range(60) for box in decoded("scenes", k)["boxes"]]
    assert 0.35 < np.median(heights) < 0.6


def test_expressions_refer_to_one_thing():
    things = (scene.Thing("apple", "red", 0.25, 0.4), scene.Thing("apple", "blue", 0.75, 0.4))
    spec = scene.Scene(things, "sand", "pink", 0.4)
    for seed in range(20):
        first, second = captions.expressions(spec, np.random.default_rng(seed))
        assert first in ("the red apple", "the apple on the left")
        assert second in ("the blue apple", "the apple on the right")
    same = (things[0], scene.Thing("apple", "red", 0.35, 0.4))
    assert captions.expressions(
        scene.Scene(same, "sand", "pink", 0.4), np.random.default_rng(0)
    ) == ["", ""]


# --- language ------------------------------------------------------------------------------------


def test_caption_grammar():
    apple, other, pig = (
        scene.Thing("apple", "orange", 0.8, 0.4),
        scene.Thing("apple", "orange", 0.2, 0.4),
        scene.Thing("pig", None, 0.5, 0.4),
    )

    def say(*things):
        return captions.caption(scene.Scene(things, "grass", "blue", 0.4))

    assert say(apple) == "an orange apple on grass under a blue sky"
    assert say(apple, pig) == "a pig and an orange apple on grass under a blue sky"
    assert say(apple, other, pig) == "two orange apples and a pig on grass under a blue sky"
    assert captions.enumeration(["a", "b", "c"]) == "a, b and c"


def test_every_noun_has_artwork_and_an_article_by_its_spelling():
    assert len(sprites.NOUNS) == len(sprites.WHITELIST)
    for noun in sprites.WHITELIST:
        pixels = sprites.sprite(noun.name, noun.color, 40)
        assert pixels.shape[0] == 40
        assert pixels[-1, :, 3].max() > 0  # it stands on its last row
        # Spelled with a vowel but sounded with a consonant, or the other way round.
        assert not noun.name.startswith(("uni", "use", "eu", "hour", "hon"))
        assert noun.plural != noun.name
    assert {
        sprites.NOUNS[name].plural
        for name in ("cactus", "octopus", "fox", "mouse", "butterfly", "monkey")
    } == {*("cacti", "octopuses", "foxes", "mice", "butterflies", "monkeys")}


@pytest.mark.parametrize(
    "noun", [noun for noun in sprites.WHITELIST if noun.color], ids=lambda noun: noun.name
)
def test_painting_moves_the_color_toward_the_one_named(noun):
    own = sprites.sprite(noun.name, noun.color, 64).astype(float)
    for color, rgb in sprites.COLORS.items():
        if color == noun.color:
            continue
        painted = sprites.sprite(noun.name, color, 64).astype(float)
        np.testing.assert_array_equal(painted[..., 3], own[..., 3])  # the shape stays
        moved = (painted[..., :3] != own[..., :3]).any(-1) & (own[..., 3] > 250)
        assert moved.sum() > 0.08 * (own[..., 3] > 250).sum()
        before, after = (np.abs(p[moved][:, :3] - rgb).sum(-1).mean() for p in (own, painted))
        assert after < before


# --- edits ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, 10**6))
def test_edit_mask_is_exactly_what_differs(index):
    record = decoded("edits", index)
    np.testing.assert_array_equal(
        record["edit_mask"], (record["source"] != record["image"]).any(-1)
    )
    assert record["edit_mask"].any()


def test_every_kind_of_edit_occurs_in_every_split():
    starts = {"remove", "add", "replace", "swap", "change", "make", "move"}
    for split in SPLITS:
        said = [examples.sample_edit(OPTIONS, split, k).instruction for k in range(28)]
        assert {instruction.split()[0] for instruction in said} == starts


def test_edits_do_what_they_say():
    rng = np.random.default_rng(0)
    nouns = list(examples.noun_names(OPTIONS))
    for _ in range(20):
        removed = edits.KINDS["remove"](rng, nouns)
        assert removed.instruction.removeprefix("remove the ") not in captions.caption(
            removed.after
        )
        added = edits.KINDS["add"](rng, nouns)
        (new,) = set(added.after.things) - set(added.before.things)
        assert (
            added.instruction
            == f"add {captions.with_article(captions.name(new))} {captions.side(new.x)}"
        )
        recolored = edits.KINDS["recolor"](rng, nouns)
        (new,) = set(recolored.after.things) - set(recolored.before.things)
        assert recolored.instruction == f"make the {new.noun} {new.color}"
        moved = edits.KINDS["move"](rng, nouns)
        place = moved.instruction.split()[-1]
        assert (moved.after.things[0].x < moved.before.things[0].x) == (place == "left")
        swapped = edits.KINDS["swap"](rng, nouns)
        assert [t.noun for t in swapped.after.things] == [t.noun for t in swapped.before.things][
            ::-1
        ]
        changed = edits.KINDS["background"](rng, nouns)
        assert changed.instruction.split()[-1] in captions.caption(changed.after)
        assert changed.after.things == changed.before.things


# --- splits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nouns", [4, 10, 40])
def test_held_out_combinations_are_never_trained(nouns):
    options = Options(resolution=48, num_scenes=200, seed=0, nouns=nouns)
    held = splits.held_out(examples.noun_names(options))
    assert held["validation"].isdisjoint(held["test"])
    for index in range(80):
        trained = [examples.sample_scene(options, "train", index)[0]]
        edit = examples.sample_edit(options, "train", index)
        for spec in (*trained, edit.before, edit.after):
            assert splits.combinations(spec).isdisjoint(held["validation"] | held["test"])
        for split, other in (("validation", "test"), ("test", "validation")):
            shown = splits.combinations(examples.sample_scene(options, split, index)[0])
            assert shown & held[split]
            assert not shown & held[other]


def test_persons_of_the_splits_are_other_faces():
    numbers = {
        split: {
            decoded("persons", k, split=split)["person"]
            for k in range(OPTIONS.count("persons", split))
        }
        for split in SPLITS
    }
    assert sum(map(len, numbers.values())) == len(set.union(*numbers.values()))
    faces = portraits.identities(OPTIONS.seed)
    assert len(set(faces)) == len(faces)


# --- puppets and persons -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(index=st.integers(0, 10**6))
def test_puppet_joints_lie_in_the_picture_and_its_box(index):
    record = decoded("puppets", index)
    (joints,), (box,) = record["joints"], record["boxes"]
    assert ((joints[:, :2] > 0) & (joints[:, :2] < 1)).all()
    assert (joints[:, 2] == 1).all()
    pixel = (
        1 / OPTIONS.resolution
    )  # the box is that of whole pixels that are more than half covered
    assert (joints[:, :2] >= box[:2] - pixel).all()
    assert (joints[:, :2] <= box[2:] + pixel).all()
    assert box[3] - box[1] > 0.4


def test_puppet_faces_us():
    joints = dict(zip(puppet.JOINTS, decoded("puppets", 0)["joints"][0]))
    for part in ("eye", "ear", "shoulder", "hip"):
        # its own left is on the viewer's right
        assert joints[f"left_{part}"][0] > joints[f"right_{part}"][0]


def test_person_has_another_picture_of_the_same_face():
    for index in range(8):
        record = decoded("persons", index)
        assert record["caption"].count("<p>") == 1
        assert (record["image"] != record["face"]).any()
        assert record["person"] == index // PICTURES


def test_portrait_shows_the_wall_of_its_caption():
    portrait = portraits.sample_portraits(np.random.default_rng(0), 5)[0]
    image = portraits.render_portrait(portrait, seed=0, resolution=64)
    assert tuple(image[2, 2]) == portraits.WALLS[portrait.wall]
    assert portrait.caption.endswith(f"{portrait.wall} wall")


# --- the build -----------------------------------------------------------------------------------


BUILT = Options(resolution=24, num_scenes=80, nouns=8)
TINY = Options(resolution=16, num_scenes=8, nouns=4)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("emoji")
    build(emoji_scenes.DATASET, data_dir, BUILT, processes=1)
    return data_dir


def test_build_reads_back_through_tfds(built):
    wanted = Options(resolution=24, num_scenes=80, seed=0, nouns=8)
    for family, fields in FAMILIES.items():
        for split in SPLITS:
            stored = read(built, family, split)
            assert len(stored) == wanted.count(family, split) >= 16
            assert set(stored[0]) == set(fields)
    expected = decoded("scenes", 0, options=wanted)
    (found,) = (
        r for r in read(built, "scenes", "train") if np.array_equal(r["image"], expected["image"])
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_build_does_not_depend_on_processes(built, tmp_path):
    build(emoji_scenes.DATASET, tmp_path, BUILT, processes=2)
    files = sorted(path.relative_to(built) for path in built.rglob("*array_record*"))
    assert len(files) == len(FAMILIES) * len(SPLITS)
    for file in files:
        assert (built / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize("is_old", [False, True])
def test_a_build_of_before_is_complete(built, tmp_path, is_old):
    """Its record of arguments is compared key by key; older builds have it beside the families."""
    if is_old:
        arguments = json.loads((built / "scenes" / "build.json").read_text())["arguments"]
        built = shutil.copytree(built, tmp_path / "old")
        for family in FAMILIES:
            (built / family / "build.json").unlink()
        (built / "build.json").write_text(json.dumps(arguments))
        with pytest.raises(UserError, match="num_scenes=80, not 81"):
            build(emoji_scenes.DATASET, built, dataclasses.replace(BUILT, num_scenes=81))
    stamps = {path: path.stat().st_mtime_ns for path in built.rglob("*")}
    build(emoji_scenes.DATASET, built, BUILT)
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*")} == stamps


def test_another_build_is_refused(built):
    with pytest.raises(UserError, match="num_scenes=80, not 81"):
        build(emoji_scenes.DATASET, built, dataclasses.replace(BUILT, num_scenes=81))
    arguments = json.loads((built / "scenes" / "build.json").read_text())["arguments"]
    assert arguments == dict(resolution=24, num_scenes=80, seed=0, nouns=8, version="1.0.0")


def test_all_nouns_are_the_default(tmp_path):
    build(emoji_scenes.DATASET, tmp_path, dataclasses.replace(TINY, nouns=0))
    found = json.loads((tmp_path / "scenes" / "build.json").read_text())["arguments"]
    assert found["nouns"] == len(sprites.WHITELIST)


@pytest.mark.parametrize(
    ("field", "value"),
    [("resolution", 8), ("num_scenes", 0), ("nouns", 3), ("nouns", 1000), ("seed", -1)],
)
def test_options_out_of_range_name_themselves(tmp_path, field, value):
    dataset = DATASETS["emoji_scenes"]
    with pytest.raises(UserError, match=rf"{field}( is |=){value}"):
        build(dataset, tmp_path, dataset.make_options({field: value}))
    assert not list(tmp_path.iterdir())


def test_other_seeds_give_other_records():
    other = Options(resolution=48, num_scenes=200, seed=4, nouns=10)
    for family in FAMILIES:
        a, b = (examples.example(options, family, "train", 0) for options in (OPTIONS, other))
        assert a["image"] != b["image"]
