"""JourneyDB: which picture has which prompt and caption, and what is left out by name."""

import shutil

import pytest

from data_pipelines.datasets.journeydb import DATASET, clean_prompt
from tests.native import journeydb as native
from tests.native.drawing import picture, write_file, write_tar
from tests.native.reading import bad, batch_of, captions_of, counts, good, prompts_of, read
from univg_jax.errors import NotFoundError, UserError


@pytest.fixture
def options(tmp_path):
    return native.write(tmp_path)


def test_each_picture_has_its_prompt_and_caption(options):
    found = good(read(DATASET, options))
    captions = captions_of(found)
    assert captions == {
        "000/aa11": [("prompt", "a red house"), ("synthetic", "A house that is red.")],
        "000/bb22": [("prompt", "two owls")],
        "001/cc33": [("prompt", "a boat, on a lake")],
        "001/dd44": [("synthetic", "A green hill under clouds.")],
        "001/ee55": [("prompt", "fox")],
        "001/ff66": [("prompt", "an iron bridge")],
    }
    assert found["000/bb22"]["image"] == picture(1)
    assert counts(DATASET, options) == native.RECORDS


def test_what_is_left_out_is_named(options):
    reasons = bad(read(DATASET, options))
    assert set(reasons) == {"000/gone", "000/annotation", "001/0077"}
    assert reasons["000/gone"].startswith("there is no picture of it in ")
    assert "has no annotation in" in reasons["000/annotation"]
    assert reasons["001/0077"] == "it has no caption"


def test_valid_names_match_without_their_prefix(options):
    found = good(read(DATASET, options, "validation"))
    assert found["000/1234"]["captions"] == ["a clock", "A clock on a wall."]
    assert found["000/5678"]["image"] == picture(9)


def test_a_split_may_be_unpacked_and_the_folder_data_be_given(options, tmp_path):
    expected = read(DATASET, options)
    train = tmp_path / "data" / "train"
    shutil.unpack_archive(train / "imgs" / "000.tgz", train / "imgs", "gztar")
    name = "train_anno_realease_repath.jsonl"
    write_file(train / name, native.lines(native.TRAIN))
    for left in (train / "imgs" / "000.tgz", train / f"{name}.tgz", train / "train_anno.jsonl.tgz"):
        left.unlink()
    found = read(DATASET, {"source": str(tmp_path / "data")})
    assert good(found) == good(expected)
    assert set(bad(found)) == set(bad(expected))


def test_damaged_annotations_cost_only_their_own_pictures(options, tmp_path):
    rows = native.lines(native.TRAIN).splitlines()
    rows[2] = rows[2][:-5]
    rows += ["[1]", '{"img_path": 7}', '{"img_path": "./001/dd44.jpg", "prompt": 3}']
    train = tmp_path / "data" / "train"
    name = "train_anno_realease_repath.jsonl"
    write_tar(train / f"{name}.tgz", {name: "\n".join(rows)}, "w:gz")
    reasons = bad(read(DATASET, options))
    assert "has no annotation" in reasons["001/cc33"]
    assert "prompt is a int" in reasons["001/dd44"]


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("a cat --ar 3:2 --v 5", "a cat"),
        ("a cat --no dog, tree --q 2", "a cat"),
        ("https://a.b/c.png https://d.e/f.jpg a cat", "a cat"),
        ("<https://s.mj.run/abc> a cat::2 sitting::-.5", "a cat sitting"),
        ("a cat \u2014v 4", "a cat"),
        ("a cat \u2014 sitting", "a cat \u2014 sitting"),
        ("a state-of-the-art cat -- sitting", "a state-of-the-art cat"),
        ("--v 4", ""),
        (None, ""),
        ("a\n  cat,", "a cat"),
    ],
)
def test_prompts_are_cleaned(prompt, cleaned):
    assert clean_prompt(prompt) == cleaned


def test_records_are_rows_of_text_to_image(options):
    found = read(DATASET, options)
    for prompt, captions in zip(
        prompts_of(batch_of(found, "t2i")), captions_of(found).values(), strict=True
    ):
        assert prompt in {f"<t2i> {text}"[:40] for _, text in captions}


def test_missing_and_foreign_files_are_named(options, tmp_path):
    with pytest.raises(NotFoundError, match="has no folder train, valid or test"):
        read(DATASET, {"source": str(tmp_path / "data" / "train" / "imgs")})
    train = tmp_path / "data" / "train"
    write_file(train / "train_anno_realease_repath.jsonl.tgz", b"<html>")
    with pytest.raises(UserError, match=r"train_anno_realease_repath\.jsonl\.tgz is not a whole"):
        read(DATASET, options)
    name = "train_anno_realease_repath.jsonl"
    write_tar(train / f"{name}.tgz", {name: '{"file_name": "a.jpg", "text": "a"}\n'}, "w:gz")
    with pytest.raises(UserError, match=r"has no annotation of 000/, the pictures of .*000\.tgz"):
        read(DATASET, options)
    for path in train.glob("*.tgz"):
        path.unlink()
    with pytest.raises(NotFoundError, match="has no annotations: expected train_anno"):
        read(DATASET, options)
    shutil.rmtree(tmp_path / "data" / "valid" / "imgs")
    with pytest.raises(NotFoundError, match=r"has no pictures: expected imgs/000\.tgz"):
        read(DATASET, options, "validation")


def test_a_cut_archive_ends_the_build_by_name(options, tmp_path):
    path = tmp_path / "data" / "train" / "imgs" / "000.tgz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"000\.tgz is not a whole zip or tar"):
        read(DATASET, options)
