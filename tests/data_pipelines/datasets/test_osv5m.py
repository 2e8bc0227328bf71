"""OSV-5M: zips and unpacked folders, found by walking."""

import pytest

from data_pipelines.datasets.osv5m import DATASET
from tests.native import osv5m as native
from tests.native.drawing import picture
from tests.native.reading import bad, batch_of, counts, good, prompts_of, read
from univg_jax.errors import NotFoundError, UserError


def test_pictures_are_found_wherever_they_lie(tmp_path):
    options = native.write(tmp_path)
    found = read(DATASET, options)
    assert not bad(found)
    assert {key: record["image"] for key, record in good(found).items()} == {
        "00/00/101.jpg": picture(101),
        "00/00/102.jpg": picture(102),
        "01/deep/er/103.jpg": picture(103),
        "02/104.jpg": picture(104),
        "02/105.jpg": picture(105),
    }
    assert counts(DATASET, options) == native.RECORDS
    assert counts(DATASET, {"source": f"{tmp_path}/images"}) == native.RECORDS


def test_an_entry_can_be_excluded_by_its_id(tmp_path):
    (dataset,) = DATASET.open(DATASET.make_options(native.write(tmp_path))).values()
    ids = [entry.ids for part in dataset.parts("test") for entry in dataset.entries(part)]
    assert ids == [("201.jpg", "201"), ("202.jpg", "202")]


def test_records_are_rows_of_inpainting(tmp_path):
    batch = batch_of(read(DATASET, native.write(tmp_path)), "ip")
    assert prompts_of(batch) == ["<ip>"] * 5


def test_missing_and_cut_files_are_named(tmp_path):
    with pytest.raises(NotFoundError, match="has no images/train or images/test: expected images/"):
        read(DATASET, {"source": str(tmp_path)})
    options = native.write(tmp_path)
    path = tmp_path / "images" / "train" / "00.zip"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"00\.zip is not a whole zip or tar"):
        read(DATASET, options)
