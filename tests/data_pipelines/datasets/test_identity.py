"""Persons in pairs of pictures, from every layout to a batch."""

import os
import pathlib
import shutil

import numpy as np
import pytest

from data_pipelines.datasets.identity import DATASET
from data_pipelines.native import people
from tests.data_pipelines.datasets import building
from tests.native import identity as fixture
from tests.native import shapes
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", "."))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)


def open_native(options, **changes):
    return building.open_native(DATASET, options | changes)


def is_of(pixels: np.ndarray, person: str, number: int) -> bool:
    """Whether these are the pixels of a drawn picture, up to JPEG."""
    drawn = fixture.picture(person, number)[0]
    return pixels.shape == drawn.shape and np.abs(pixels.astype(int) - drawn).mean() < 8


def test_a_folder_for_each_person(tmp_path):
    native = open_native(fixture.write(tmp_path))
    made, skipped = building.read(native, "train")
    assert len(made) == fixture.RECORDS["train"]
    assert skipped == {"Cy/Cy_0001.jpg": "it is the only picture of its person"}
    record = made["Ada_Byron/Ada_Byron_0001.jpg"]
    assert record["caption"] == "<p> in a red shirt"
    assert made["Ada_Byron/Ada_Byron_0002.jpg"]["caption"] == "a photo of <p>"
    assert is_of(record["image"], "Ada_Byron", 0)
    assert record["person"] == people.number_of("Ada_Byron") == made[
        "Ada_Byron/Ada_Byron_0003.jpg"]["person"] != made["Bo/Bo_0001.jpg"]["person"]  # fmt: skip
    # The face is of the other picture, here its centered square.
    other = fixture.picture("Bo", 1)[0]
    side = min(other.shape[:2])
    assert made["Bo/Bo_0001.jpg"]["face"].shape == (side, side, 3)


def test_pairs_are_always_the_same(tmp_path):
    native = open_native(fixture.write(tmp_path))
    first, _ = building.read(native, "train")
    again, _ = building.read(native, "train")
    for key, record in first.items():
        np.testing.assert_array_equal(record["face"], again[key]["face"])


def test_a_zip_of_folders_gives_the_same(tmp_path):
    options = fixture.write(tmp_path / "a")
    plain, _ = building.read(open_native(options), "train")
    archive = shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path / "a")
    zipped, skipped = building.read(open_native(options, source=archive), "train")
    assert [key.removeprefix("people/") for key in zipped] == list(plain)
    assert list(skipped) == ["people/Cy/Cy_0001.jpg"]
    assert [r["caption"] for r in zipped.values()] == [r["caption"] for r in plain.values()]


def test_persons_are_held_out_as_a_whole(tmp_path):
    options = fixture.write(tmp_path)
    share = people.share_of("Bo") + 1e-9
    native = open_native(options, val_persons=share)
    assert native.splits == ("train", "validation")
    train, _ = building.read(native, "train")
    held_out, _ = building.read(native, "validation")
    persons = [{key.split("/")[0] for key in made} for made in (train, held_out)]
    assert "Bo" in persons[1]
    assert not persons[0] & persons[1]
    assert len(train) + len(held_out) == 5


def test_vggface2_with_its_boxes_and_splits(tmp_path):
    native = open_native(fixture.write_vggface2(tmp_path), margin=0.0)
    assert native.splits == ("train", "test")
    made, skipped = building.read(native, "train")
    assert sorted(made) == [f"n00000{p}/000{k}_01.jpg" for p in (1, 2) for k in (1, 2)]
    assert not skipped
    _, (x, y, side, _) = fixture.picture("n000001", 1)
    face = made["n000001/0001_01.jpg"]["face"]
    assert face.shape == (side, side, 3)
    drawn = fixture.picture("n000001", 1)[0][y : y + side, x : x + side]
    assert np.abs(face.astype(int) - drawn).mean() < 10
    assert len(building.read(native, "test")[0]) == 2
    wide, _ = building.read(open_native(dict(source=str(tmp_path)), margin=0.25), "train")
    assert wide["n000001/0001_01.jpg"]["face"].shape[0] == round(side * 1.5)


def test_celeba_with_its_partition_and_landmarks(tmp_path):
    native = open_native(fixture.write_celeba(tmp_path), margin=0.0)
    assert native.splits == ("train", "validation", "test")
    made, _ = building.read(native, "train")
    assert sorted(made) == [f"{k:06d}.jpg" for k in range(1, 6)]
    assert made["000001.jpg"]["person"] == 2880
    # The landmarks are in the middle of the face, whose side they tell.
    _, (x, y, side, _) = fixture.picture("2880", 1)
    face = made["000001.jpg"]["face"]
    assert abs(face.shape[0] - side) <= 2
    drawn = fixture.picture("2880", 1)[0][y : y + side, x : x + side].mean()
    assert abs(face.mean() - drawn) < 20
    validation, _ = building.read(native, "validation")
    assert sorted(validation) == ["000006.jpg", "000007.jpg"]
    _, skipped = building.read(native, "test")
    assert list(skipped) == ["000008.jpg"]


def test_a_person_of_celeba_in_two_partitions_is_of_the_last(tmp_path):
    options = fixture.write_celeba(tmp_path)
    path = tmp_path / "list_eval_partition.txt"
    path.write_text(path.read_text().replace("000002.jpg 0", "000002.jpg 2"))
    native = open_native(options)
    made, skipped = building.read(native, "train")
    assert "000001.jpg" not in made | skipped


def test_tables_and_lists(tmp_path):
    options = fixture.write_table(tmp_path)
    for source in ("people.jsonl", "people.parquet", "people.txt"):
        native = open_native(options, source=str(tmp_path / source))
        made, skipped = building.read(native, "train")
        assert len(made) == 5, source
        assert len(skipped) == 1
        captions = sorted(record["caption"] for record in made.values())
        if source == "people.txt":
            assert captions == ["a photo of <p>"] * 5
        else:
            assert captions == ["<p> smiles"] * 5  # by name, too
    native = open_native(options, caption_column="person")
    assert {r["caption"] for r in building.read(native, "train")[0].values()} == {"<p>"}


def test_the_box_of_a_row_and_of_a_file(tmp_path):
    options = fixture.write_table(tmp_path)
    made, _ = building.read(open_native(options, margin=0.0), "train")
    sides = {record["face"].shape[0] for record in made.values()}
    assert sides == {min(size) // 3 for size in fixture.SIZES} & sides
    lines = ["image x y w h", *(f"pictures/Bo{k}.png 4 4 10 12" for k in range(2))]
    (tmp_path / "faces.txt").write_text("\n".join(lines))
    source = str(tmp_path / "people.txt")
    native = open_native(options, source=source, faces=str(tmp_path / "faces.txt"), margin=0.0)
    made, _ = building.read(native, "train")
    assert made["pictures/Bo0.png"]["face"].shape == (12, 12, 3)


def test_a_batch_of_identities(tmp_path):
    made, _ = building.read(open_native(fixture.write(tmp_path)), "train")
    batch = building.batch(made.values(), "id")
    assert batch.has_face.all()
    assert batch.identity_slot.any(axis=1).all()


def test_what_is_wrong_with_one_picture_leaves_it_out(tmp_path):
    options = fixture.write_vggface2(tmp_path)
    path = tmp_path / "bb_landmark" / "loose_bb_train.csv"
    lines = path.read_text().splitlines()
    for row, message in [
        ('"n000001/0002_01",900,1,5,5', "box 900 1 5 5 is outside its picture"),
        ('"n000001/0002_01",1,1,0,5', "expected x, y, width, height or 5 points"),
    ]:
        path.write_text("\n".join([lines[0], lines[1], row, *lines[3:]]))
        made, skipped = building.read(open_native(options), "train")
        assert message in skipped["n000001/0001_01.jpg"]
        assert len(made) == 3
    (tmp_path / "train" / "n000002" / "0001_01.jpg").write_bytes(b"no picture")
    _, skipped = building.read(open_native(options), "train")
    assert "is not a readable image" in skipped["n000002/0002_01.jpg"]
    table = fixture.write_table(tmp_path / "t")
    rows = (tmp_path / "t" / "people.jsonl").read_text().splitlines()
    rows += ['{"file_name": "x.png", "person": null}', "{", '{"file_name": 3, "person": "Bo"}']
    (tmp_path / "t" / "people.jsonl").write_text("\n".join(rows))
    _, skipped = building.read(open_native(table), "train")
    assert "its person is None" in skipped["000000006"]
    assert "000000007" in skipped
    assert "there is no picture" in skipped["000000008"]


def test_missing_and_foreign_sources_are_named(tmp_path):
    with pytest.raises(NotFoundError, match=r"nowhere' does not exist: expected a folder with one"):
        open_native(dict(source=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match="empty has no pictures in folders"):
        open_native(dict(source=str(tmp_path / "empty")))
    with pytest.raises(NotFoundError, match=r"there is no .*identity_CelebA\.txt"):
        open_native(dict(source=str(tmp_path / "empty"), layout="celeba"))
    options = fixture.write_celeba(tmp_path / "c")
    (tmp_path / "c" / "list_eval_partition.txt").write_text("000001.jpg 7\n")
    with pytest.raises(UserError, match=r"partition\.txt has the partition '7': expected 0, 1"):
        open_native(options).parts("train")
    (tmp_path / "c" / "img_align_celeba.zip").unlink()
    with pytest.raises(NotFoundError, match=r"no pictures of CelebA: expected .*img_align_celeba"):
        open_native(options)
    fixture.write_table(tmp_path / "t")
    (tmp_path / "t" / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"x\.csv has no column of the image: name it by image_co"):
        open_native(dict(source=str(tmp_path / "t" / "x.csv")))
    with pytest.raises(UserError, match=r"template='a photo' has no <p>"):
        open_native(options, template="a photo")
    with pytest.raises(NotFoundError, match="detector=nowhere does not exist"):
        open_native(fixture.write(tmp_path / "f"), detector="nowhere")


@needs_samples
def test_real_lfw():
    made, skipped = building.read(open_native(dict(source=str(SAMPLES / "lfw"))), "train")
    more, _ = building.read(open_native(dict(source=str(SAMPLES / "lfw"))), "validation")
    assert len(made) + len(more) == 8
    assert not skipped


@needs_samples
def test_real_vggface2_with_boxes():
    native = open_native(dict(source=str(SAMPLES / "vggface2")))
    assert native.splits == ("train",)
    made, skipped = building.read(native, "train")
    assert sorted(made) == ["n000002/0001_01.jpg", "n000002/0002_01.jpg"]
    assert list(skipped) == ["n000001/0001_01.jpg"]
    assert made["n000002/0002_01.jpg"]["face"].shape == (3, 3, 3)  # of a box 2 x 2, with a margin


@needs_samples
def test_real_celeba(tmp_path):
    native = open_native(dict(source=str(SAMPLES / "celeba")))
    found = [building.read(native, split) for split in native.splits]
    # Each person has one picture in this sample.
    assert not any(made for made, _ in found)
    assert sum(len(skipped) for _, skipped in found) == 6
    # Two of them as one person.
    for path in (SAMPLES / "celeba").iterdir():
        shutil.copy(path, tmp_path)
    identities = tmp_path / "identity_CelebA.txt"
    identities.chmod(0o644)
    identities.write_text(identities.read_text().replace("2937", "2880"))
    made, _ = building.read(open_native(dict(source=str(tmp_path))), "train")
    assert sorted(made) == ["000001.jpg", "000002.jpg"]
    assert made["000001.jpg"]["person"] == 2880


def test_fixture_sizes_differ():
    assert len({shapes.ground(*size, seed=0).shape for size in fixture.SIZES}) == 4
