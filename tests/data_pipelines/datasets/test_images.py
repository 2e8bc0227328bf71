"""Any folder, zip or tar of pictures; what is none is left out by name."""

import os
import pathlib

import numpy as np
import pytest

from data_pipelines.datasets.images import DATASET
from tests.native import images as native
from tests.native.drawing import picture, write_file, write_tar
from tests.native.reading import bad, batch_of, counts, good, prompts_of, read
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", ""))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)


@pytest.fixture
def options(tmp_path):
    return native.write(tmp_path)


def test_pictures_of_folders_archives_and_tars_in_tars_are_found(options):
    found = good(read(DATASET, options))
    assert {key: record["image"] for key, record in found.items()} == {
        "train/a/1.JPG": picture(0),
        "train/a/2.webp": picture(1, ".webp"),
        "train/a/3.png": picture(2, ".png"),
        "train/more/x/6.jpg": picture(3),
        "train/nested/9.jpg": picture(9),
        **{f"train/nested/{tar}.tar/{k}.jpg": picture(k) for tar in "cd" for k in (7, 8)},
    }
    assert counts(DATASET, options) == native.RECORDS


def test_what_is_no_picture_is_named(options):
    reasons = bad(read(DATASET, options))
    assert reasons.pop("train/b/empty.jpeg") == "the picture is empty"
    assert "is not a readable image" in reasons.pop("train/b/text.JPG")
    assert not reasons


def test_a_folder_of_one_split_or_an_archive_is_all_train(options, tmp_path):
    assert counts(DATASET, {"source": str(tmp_path / "train")}) == {"train": 9}
    assert counts(DATASET, {"source": str(tmp_path / "val")}) == {"train": 1}
    assert counts(DATASET, {"source": str(tmp_path / "train" / "nested.tar")}) == {"train": 5}


def test_records_are_rows_of_inpainting(options):
    batch = batch_of(read(DATASET, options), "ip")
    assert set(prompts_of(batch)) == {"<ip>"}
    assert np.asarray(batch.mask).any(axis=(1, 2, 3)).all()


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(NotFoundError, match="none does not exist: expected pictures"):
        read(DATASET, {"source": str(tmp_path / "none")})
    with pytest.raises(NotFoundError, match="source does not exist"):
        read(DATASET, {})
    write_file(tmp_path / "a" / "list.txt", "x")
    with pytest.raises(NotFoundError, match="a has no pictures: expected pictures"):
        read(DATASET, {"source": str(tmp_path / "a")})
    write_tar(tmp_path / "b.tar", {"list.txt": "x"})
    with pytest.raises(UserError, match=r"b\.tar has no pictures: expected \.jpg"):
        read(DATASET, {"source": str(tmp_path / "b.tar")})


@needs_samples
def test_real_files():
    found = read(DATASET, {"source": str(SAMPLES / "image_folder" / "dataset")})
    assert set(bad(found)) == {"3.jpeg", "a/1.JPG", "b/2.jpeg", "b/subb/3.jpg"}
    found = read(DATASET, {"source": str(SAMPLES / "celeba" / "img_align_celeba.zip")})
    assert len(good(found)) == 6
    found = read(DATASET, {"source": str(SAMPLES / "webdataset" / "mnist_sample.tgz")})
    assert len(good(found)) == 90
