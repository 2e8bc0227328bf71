"""Datasets of edits: InstructPix2Pix, UltraEdit, SEED-Data-Edit, MagicBrush and any pairs."""

import importlib
import pathlib

import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.build import build
from data_pipelines.datasets import DATASETS
from data_pipelines.reader import Reader
from data_pipelines.sources import open_source
from tests.data_pipelines.toy import make_collator
from tests.native import instructpix2pix, magicbrush, pairs, seed_data_edit, ultraedit
from tests.native.damage import damage
from tests.native.edits import CENTER, after, before
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
    assert "the mask has mode RGB: expected one that is transparent" in reasons["000000005"]
    assert len(reasons) == 3


def test_magicbrush_rows_are_known_by_their_coco_id(tmp_path):
    dataset = DATASETS["magicbrush"]
    options = magicbrush.write(tmp_path)
    (native,) = dataset.open(dataset.make_options(options)).values()
    entries = [e for part in native.parts("train") for e in native.entries(part)]
    assert {e.ids for e in entries[:3]} == {("100",), ("101",)}


def test_magicbrush_test_split_is_refused(tmp_path):
    magicbrush.write(tmp_path)
    data = tmp_path / "data"
    (data / "dev-00000-of-00001.parquet").rename(data / "test-00000-of-00001.parquet")
    dataset = DATASETS["magicbrush"]
    with pytest.raises(UserError, match="test split, whose terms forbid to train on it"):
        dataset.open(dataset.make_options(dict(source=str(data))))


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
