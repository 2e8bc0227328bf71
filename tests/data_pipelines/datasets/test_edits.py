"""Datasets of edits: InstructPix2Pix, UltraEdit, SEED-Data-Edit, MagicBrush and any pairs."""

import importlib
import io
import json
import pathlib

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipelines import records
from data_pipelines.build import build
from data_pipelines.datasets import DATASETS
from data_pipelines.reader import Reader
from data_pipelines.sources import open_source
from tests.data_pipelines.toy import make_collator
from tests.native import instructpix2pix, magicbrush, pairs, seed_data_edit, ultraedit
from tests.native.damage import damage
from tests.native.edits import CENTER, after, before, png, struct, white_mask, write_parquet
from tests.native.reading import bad, counts, good, read
from univg_jax.errors import UserError

COLLATOR = make_collator()
NAMES = ("instructpix2pix", "magicbrush", "pairs", "seed_data_edit", "ultraedit")


@pytest.mark.parametrize("name", NAMES)
def test_native_files_become_batches(name, tmp_path):
    fixture, dataset = importlib.import_module(f"tests.native.{name}"), DATASETS[name]
    options = fixture.write(tmp_path / "native")
    assert counts(dataset, options) == fixture.RECORDS
    build(dataset, tmp_path, dataset.make_options(options), processes=1)
    source = open_source(name, "train", data_dir=str(tmp_path))
    reader = Reader("ie", source, collator=COLLATOR)
    rows = [reader.row(k, np.random.default_rng(k)) for k in range(len(source))]
    batch = COLLATOR(rows)
    assert len(source) == fixture.RECORDS["train"]
    assert batch.has_source.all()
    assert (batch.source != batch.target).any()


def decoded(found, key):
    return records.decode(good(found)[key])


def assert_center_is_marked(mask):
    assert mask[CENTER].all()
    outside = mask.copy()
    outside[CENTER] = 0
    assert outside.mean() < 0.02  # the row of pixels that a mask of another size may add


def test_magicbrush_masks_are_where_it_is_transparent_whatever_their_size(tmp_path):
    found = read(DATASETS["magicbrush"], magicbrush.write(tmp_path))
    for key, number in (("000000000", 0), ("000000001", 0), ("000000002", 1)):
        record = decoded(found, key)
        assert record["edit_mask"].shape == before(number).shape[:2]
        assert_center_is_marked(record["edit_mask"])
    second = decoded(found, "000000001")  # a second turn begins where the first ended
    np.testing.assert_array_equal(second["source"], after(0, 1))
    np.testing.assert_array_equal(second["image"], after(0, 2))
    reasons = bad(found)
    assert reasons["000000003"] == "it has no instruction"
    assert "the mask has mode RGB: expected one with transparency" in reasons["000000005"]
    assert len(reasons) == 3


def test_magicbrush_rows_are_known_by_their_coco_id(tmp_path):
    dataset = DATASETS["magicbrush"]
    options = magicbrush.write(tmp_path)
    (native,) = dataset.open(dataset.make_options(options)).values()
    entries = [e for part in native.parts("train") for e in native.entries(part)]
    assert {e.ids for e in entries[:3]} == {("100",), ("101",)}


@pytest.mark.parametrize(
    "place",
    [
        "data/test-00000-of-00001.parquet",  # beside train
        "alone/test-00000-of-00001.parquet",
        "test/part-0.parquet",
        "unpacked/edit_sessions.json",
        "test.zip",
    ],
)
def test_magicbrush_test_split_is_refused_in_every_form(place, tmp_path):
    magicbrush.write(tmp_path)
    source = (tmp_path / place).parent
    source.mkdir(exist_ok=True)
    (tmp_path / "data" / "dev-00000-of-00001.parquet").rename(tmp_path / place)
    if place.endswith(".zip"):
        source = tmp_path / place
    dataset = DATASETS["magicbrush"]
    with pytest.raises(UserError, match="test split, whose terms forbid to train on it"):
        dataset.open(dataset.make_options(dict(source=str(source))))


def test_magicbrush_dev_alone_is_no_train(tmp_path):
    magicbrush.write(tmp_path)
    source = str(tmp_path / "data" / "dev-*.parquet")
    assert counts(DATASETS["magicbrush"], {"source": source}) == {"validation": 2}


def test_a_source_of_another_scale_gets_the_size_of_its_target(tmp_path):
    """The first turns of MagicBrush: 500x500 before, 1024x1024 after."""
    large = cv2.resize(after(0), None, fx=2, fy=2)
    height, width = large.shape[:2]
    row = magicbrush.row(0, 1, target_img=struct(png(large)))
    write_parquet(tmp_path / "train-0.parquet", [row])
    record = decoded(read(DATASETS["magicbrush"], {"source": str(tmp_path)}), "000000000")
    np.testing.assert_array_equal(record["image"], large)
    assert record["source"].shape == (height, width, 3)
    small = cv2.resize(record["source"], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - before(0)).mean() < 4
    rows, columns = (slice(2 * s.start, 2 * s.stop) for s in CENTER)
    assert record["edit_mask"][rows, columns].all()
    assert record["edit_mask"].sum() == pytest.approx(4 * 20 * 20, rel=0.15)


def test_ultraedit_has_masks_where_it_edits_regions(tmp_path):
    found = read(DATASETS["ultraedit"], ultraedit.write(tmp_path))
    for key in ("000000000", "000000002"):
        assert decoded(found, key)["edit_mask"].all()
    assert_center_is_marked(decoded(found, "000000003")["edit_mask"])
    assert decoded(found, "000000003")["caption"] == "dark picture 3"
    assert bad(found) == {"000000005": "the mask marks nothing: it is white nowhere"}
    found = read(DATASETS["ultraedit"], ultraedit.lines(tmp_path / "lines"))
    assert_center_is_marked(decoded(found, "000000000")["edit_mask"])
    for key in ("000000001", "000000002"):
        assert decoded(found, key)["edit_mask"].all()


def test_instructpix2pix_splits_follow_its_list(tmp_path):
    options = instructpix2pix.write(tmp_path)
    found = read(DATASETS["instructpix2pix"], options)
    assert f"{instructpix2pix.NAMES[0]}/11" in found
    record = decoded(found, f"{instructpix2pix.NAMES[1]}/22")
    assert record["instruction"] == "make it darker 1"
    assert record["caption"] == "a dark disk"
    (reason,) = bad(found).values()
    assert reason.startswith("there is no '0000003/33_1.jpg' in ")
    (test,) = good(read(DATASETS["instructpix2pix"], options, "test"))
    assert test == f"{instructpix2pix.NAMES[19]}/11"


def test_instructpix2pix_in_every_form(tmp_path):
    dataset = DATASETS["instructpix2pix"]
    assert counts(dataset, instructpix2pix.without_seeds(tmp_path / "a")) == {"train": 25}
    assert counts(dataset, instructpix2pix.zips(tmp_path / "b")) == instructpix2pix.RECORDS
    for first in ("original_image", "input_image"):
        options = instructpix2pix.parquet(tmp_path / first, first)
        assert counts(dataset, options) == {"train": 3}


def test_seed_pairs_of_several_turns(tmp_path):
    options = seed_data_edit.write(tmp_path)
    found = read(DATASETS["seed_data_edit"], options)
    row = "multi_turn_editing/annotations/split_0001/0000000"
    back = good(found)[f"{row}/2-1"]
    assert back["instruction"] == "lighter 2"
    assert set(good(found)) >= {f"{row}/{turn}" for turn in ("0-1", "1-0", "1-2", "2-1")}
    assert len(bad(found)) == 3
    combined = read(DATASETS["seed_data_edit"], {**options, "combined": True})
    assert good(combined)[f"{row}/0-2"]["instruction"] == "darker 1, then darker 2"
    forward = read(DATASETS["seed_data_edit"], {**options, "backward": False})
    assert len(good(forward)) == len(good(found)) - 3


def test_an_archive_in_pieces_is_the_same_as_its_files(tmp_path):
    packed = read(DATASETS["seed_data_edit"], seed_data_edit.write(tmp_path / "a"))
    loose = read(DATASETS["seed_data_edit"], seed_data_edit.write(tmp_path / "b", pieces=0))
    assert good(packed) == good(loose)


@pytest.mark.parametrize("pieces", [1, 3])
def test_pictures_before_and_after_in_archives_of_their_own(pieces, tmp_path):
    """Part 1 as downloaded: source_images and target_images, each in pieces."""
    found = read(DATASETS["seed_data_edit"], seed_data_edit.two_archives(tmp_path, pieces=pieces))
    assert not bad(found)
    instructions = {key.split("/")[-3]: [] for key in found}
    for key, record in found.items():
        instructions[key.split("/")[-3]].append(record["instruction"])
        np.testing.assert_array_equal(
            records.decode(record)["image"].shape, after(int(key[-1])).shape
        )
    # What GPT-4V wrote anew stands in place of what it was.
    assert sorted(instructions["annotations"]) == ["darker 0", "darker 1", "darker 2"]
    assert instructions["annotations_GPT4V"] == ["please, darker"]


def test_turns_end_at_a_null_and_those_before_are_kept(tmp_path):
    options = seed_data_edit.write(tmp_path, pieces=0)
    file = tmp_path / "multi_turn_editing" / "annotations" / "split_0001.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    whole = good(read(DATASETS["seed_data_edit"], options))
    names = ("edit_image_3", "instruction_3", "inverse_instruction_3")
    rows[0] |= dict.fromkeys(names)
    file.write_text("\n".join(map(json.dumps, rows)))
    assert good(read(DATASETS["seed_data_edit"], options)) == whole


def test_a_missing_piece_is_one_line(tmp_path):
    options = seed_data_edit.write(tmp_path)
    images = tmp_path / "multi_turn_editing" / "images"
    (images / "multi_turn.tar.gz.part-ac").unlink()
    with pytest.raises(UserError, match=r"part-aa is not a whole zip or tar"):
        read(DATASETS["seed_data_edit"], options)


def test_pairs_of_ones_own(tmp_path):
    options = pairs.write(tmp_path)
    found = read(DATASETS["pairs"], options)
    assert decoded(found, "000000000")["edit_mask"].all()
    assert_center_is_marked(decoded(found, "000000001")["edit_mask"])
    reasons = bad(found)
    assert reasons["000000004"] == "the picture has 160x100 pixels before and 96x64 after" or (
        "pixels before and" in reasons["000000004"]
    )
    assert "there is no 'p/3b.jpg' in" in reasons["000000003"]
    dataset = DATASETS["pairs"]
    wrong = dataset.make_options({**options, "before": "first"})
    (native,) = dataset.open(wrong).values()
    with pytest.raises(UserError, match=r"has no column 'first', expected of rows of edits"):
        native.parts("train")


def _picture_of(mode: str) -> bytes:
    """A mask of the center that is none to a fixed limit of gray."""
    mask = white_mask(0) > 127
    if mode == "palette":
        picture = Image.fromarray(mask.astype(np.uint8)).convert("P")
        picture.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)  # VOC's dark red
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()
    color = dict(red=(90, 0, 0), hidden=(255, 255, 255), hole=(255, 255, 255), ink=(0, 0, 0))[mode]
    rgb = np.full((*mask.shape, 3), color, np.uint8)
    if mode == "red":
        return png(rgb * mask[..., None])
    return png(np.dstack([rgb, np.where(mask == (mode != "hole"), 255, 0).astype(np.uint8)]))


@pytest.mark.parametrize(
    ("mode", "mask_is"),
    [
        ("palette", "colored"),
        ("red", "colored"),
        ("hidden", "white"),
        ("hidden", "opaque"),
        ("hole", "transparent"),
        ("ink", "black"),
    ],
)
def test_masks_of_any_kind_are_what_they_are_said_to_be(mode, mask_is, tmp_path):
    row = dict(source=png(before(0)), target=png(after(0)), instruction="darker")
    write_parquet(tmp_path / "pairs.parquet", [row | {"mask": _picture_of(mode)}])
    options = {"source": str(tmp_path / "pairs.parquet"), "mask_is": mask_is}
    found = decoded(read(DATASETS["pairs"], options), "000000000")["edit_mask"]
    np.testing.assert_array_equal(found, white_mask(0) > 127)


def test_instructpix2pix_ends_splits_as_its_authors_do(tmp_path):
    """At the whole number below 90 and 95%: of 13 prompts, 11, 1 and 1."""
    options = instructpix2pix.write(tmp_path)
    seeds = json.loads((tmp_path / "seeds.json").read_text())
    (tmp_path / "seeds.json").write_text(json.dumps(seeds[:13]))
    last = {
        split: list(read(DATASETS["instructpix2pix"], options, split))
        for split in ("validation", "test")
    }
    assert {key.rpartition("/")[0] for key in last["validation"]} == {instructpix2pix.NAMES[11]}
    assert {key.rpartition("/")[0] for key in last["test"]} == {instructpix2pix.NAMES[12]}


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_give_one_line_or_are_left_out(name, tmp_path):
    fixture, dataset = importlib.import_module(f"tests.native.{name}"), DATASETS[name]
    options = fixture.write(tmp_path)
    files = sorted(path for path in pathlib.Path(tmp_path).rglob("*") if path.is_file())
    rng = np.random.default_rng(0)
    for _ in range(30):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        file.write_bytes(damage(content, rng))
        lines = ""
        try:
            read(dataset, options)
        except UserError as error:
            lines = str(error)
        assert "\n" not in lines
        file.write_bytes(content)
