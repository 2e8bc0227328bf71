"""PhraseCut: unions of instances and their phrases, from native files to a batch."""

import json
import shutil

import numpy as np
import pytest

from data_pipelines.datasets import phrasecut
from data_pipelines.datasets.phrasecut import DATASET
from tests.data_pipelines.datasets import building
from tests.native import phrasecut as fixture
from tests.native import shapes
from univg_jax.errors import NotFoundError, UserError


@pytest.fixture
def options(tmp_path):
    return fixture.write(tmp_path)


def change(path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_a_record_of_each_picture_with_all_its_phrases(options):
    native = building.open_native(DATASET, options)
    for split, count in fixture.RECORDS.items():
        made, skipped = building.read(native, split)
        assert len(made) == count
        assert not skipped
    made, _ = building.read(native, "train")
    record = made["21"]
    assert record["expressions"] == ["red squares", "squares on the left", "corner"]
    assert record["expression_masks"].tolist() == [0, 0, 1]  # the same regions, once
    union, corner = record["masks"]
    # Points are cut to whole pixels, and edges belong to the region.
    expected = np.zeros((80, 120), np.uint8)
    expected[10:31, 10:31] = expected[15:36, 20:41] = 1
    np.testing.assert_array_equal(union, expected)
    assert corner[60:, 100:].all()
    assert corner.sum() == 400


def test_polygons_are_scaled_to_the_file(options):
    made, _ = building.read(building.open_native(DATASET, options), "train")
    (mask,) = made["23"]["masks"]
    assert mask.shape == (48, 48)
    np.testing.assert_array_equal(np.argwhere(mask)[[0, -1]], [[10, 10], [30, 30]])


def test_val_goes_without_miniv(options):
    native = building.open_native(DATASET, options)
    assert list(building.read(native, "validation")[0]) == ["24"]
    native = building.open_native(DATASET, dict(options, miniv=True))
    assert list(building.read(native, "validation")[0]) == ["25"]


def test_the_other_name_of_the_sizes_and_parts_of_visual_genome(options, tmp_path):
    (tmp_path / "image_data_split3000.json").rename(tmp_path / "image_data_split.json")
    (tmp_path / "VG_100K").mkdir()
    (tmp_path / "images" / "21.jpg").rename(tmp_path / "VG_100K" / "21.jpg")
    (tmp_path / "images").rename(tmp_path / "VG_100K_2")
    assert len(building.read(building.open_native(DATASET, options), "train")[0]) == 3


def test_a_batch_of_segmentations(options):
    made, _ = building.read(building.open_native(DATASET, options), "train")
    batch = building.batch([made["22"], made["23"]], "seg")
    assert batch.target.any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
    ("polygons", "message"),
    [
        (None, "the Polygons are None"),
        ([3], "the Polygons are [3]"),
        ([["a"]], "a polygon is 'a'"),
        ([[[[1, 2, 3]]]], "expected a list of x, y"),
        ([[[[1, None], [3, 4]]]], "expected a list of x, y"),
        ([[[[1, 1], [1e8, 4]]]], "far outside"),
        ([[[[1, 1], [1e300, 4]]]], "expected a list of x, y"),
        ([], "no phrase of the picture has a region"),
    ],
)
def test_a_region_that_cannot_be_leaves_its_picture_out(options, tmp_path, polygons, message):
    change(tmp_path / "refer_train.json", lambda c: c[2].update(Polygons=polygons))
    made, skipped = building.read(building.open_native(DATASET, options), "train")
    assert sorted(made) == ["21", "23"]
    assert message in skipped["22"]


def test_a_picture_of_another_shape_or_unknown_size_is_left_out(options, tmp_path):
    native = building.open_native(DATASET, options)
    path = tmp_path / "images" / "22.jpg"
    path.write_bytes(shapes.jpeg(shapes.ground(100, 70, seed=1)))
    _, skipped = building.read(native, "train")
    assert "100 x 70 pixels and its annotations are for 70 x 100" in skipped["22"]
    change(tmp_path / "image_data_split3000.json", lambda c: c.pop(1))
    _, skipped = building.read(native, "train")
    assert "has no picture 22" in skipped["22"]
    path.unlink()
    assert phrasecut._scale((480, 640), (240, 320)) == (0.5, 0.5)


def test_missing_and_foreign_files_are_named(options, tmp_path):
    with pytest.raises(NotFoundError, match=r"refer_train\.json or .*: expected PhraseCut's"):
        building.open_native(DATASET, dict(source=str(tmp_path / "images")))
    native = building.open_native(DATASET, options)
    path = tmp_path / "refer_train.json"
    path.write_text('{"images": []}')
    with pytest.raises(UserError, match=r"refer_train\.json has not a list: expected PhraseCut's"):
        native.parts("train")
    path.write_text('[{"image_id": "x"}]')
    with pytest.raises(UserError, match=r"refer_train\.json: task 0: 'image_id' is 'x'"):
        native.parts("train")
    fixture.write(tmp_path)
    (tmp_path / "image_data_split3000.json").unlink()
    with pytest.raises(NotFoundError, match=r"image_data_split3000\.json or .*sizes"):
        native.parts("train")
    fixture.write(tmp_path)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(NotFoundError, match="no pictures"):
        native.parts("train")
