"""Places365: categories of folders in tars of tars, of lists, and of none."""

import os
import pathlib

import pytest

from data_pipelines.datasets.places365 import DATASET, caption_of
from tests.native import places365 as native
from tests.native.drawing import picture, write_file
from tests.native.reading import bad, batch_of, counts, good, prompts_of, read
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", ""))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)


@pytest.fixture
def options(tmp_path):
    return native.write(tmp_path)


def captions(found) -> dict[str, list[str]]:
    return {key: record["captions"] for key, record in good(found).items()}


def test_categories_of_two_or_three_folders_are_captions(options):
    found = read(DATASET, options)
    assert captions(found) == {
        f"train_256_places365standard/data_256/{name[0]}.tar/{name}": [caption]
        for name, caption in native.CAPTIONS.items()
    }
    assert all(record["caption_kinds"] == ["category"] for record in good(found).values())
    assert not bad(found)
    assert counts(DATASET, options) == native.RECORDS


def test_val_is_labeled_by_its_list_and_test_is_not(options):
    assert captions(read(DATASET, options, "validation")) == {
        "Places365_val_00000001.jpg": ["a bakery, shop"],
        "Places365_val_00000002.jpg": ["an airfield"],
    }
    assert captions(read(DATASET, options, "test")) == {
        "test_256/test_256/Places365_test_00000001.jpg": []
    }


def test_unpacked_folders_are_read_too(tmp_path):
    for k, name in enumerate(native.CAPTIONS):
        write_file(tmp_path / "data_256_standard" / name, picture(k))
    expected = {name: [caption] for name, caption in native.CAPTIONS.items()}
    assert captions(read(DATASET, {"source": str(tmp_path)})) == expected
    assert captions(read(DATASET, {"source": str(tmp_path / "data_256_standard")})) == expected
    # Of two sizes of the same pictures the larger is read.
    write_file(tmp_path / "data_large" / "a" / "airfield" / "1.jpg", picture(0))
    assert len(read(DATASET, {"source": str(tmp_path)})) == 1


def test_categories_in_words():
    assert caption_of("apartment_building/outdoor") == "an apartment building, outdoor"


def test_records_are_rows_of_inpainting(options):
    """Some of which are of the background, and have no text."""
    prompts = prompts_of(batch_of(read(DATASET, options), "ip"))
    allowed = {f"<ip> {caption}" for caption in native.CAPTIONS.values()}
    assert set(prompts) <= allowed | {"<ip>"}
    assert set(prompts) & allowed
    assert prompts_of(batch_of(read(DATASET, options, "test"), "ip")) == ["<ip>"]


def test_missing_and_damaged_files_are_named(options, tmp_path):
    for source in (tmp_path / "none", tmp_path / "filelist_places365-standard"):
        with pytest.raises(NotFoundError, match=r"expected train_256_places365standard\.tar"):
            read(DATASET, {"source": str(source)})
    path = tmp_path / "filelist_places365-standard" / "places365_val.txt"
    path.write_text("Places365_val_00000001.jpg 7\n")
    with pytest.raises(UserError, match=r"places365_val\.txt: .* is of category 7, not in"):
        read(DATASET, options, "validation")
    path.write_text("<html>\n<body class=x y>\n")
    with pytest.raises(UserError, match=r"places365_val\.txt:1 is .*: expected a path and"):
        read(DATASET, {**options, "limit": 3}, "validation")
    path = tmp_path / "train_256_places365standard.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"train_256_places365standard\.tar is not a whole"):
        read(DATASET, options)


@needs_samples
def test_real_files():
    options = {"source": str(SAMPLES / "places365")}
    assert captions(read(DATASET, options)) == {
        "data_256/data_256/a/airfield/00001.jpg": ["an airfield"],
        "data_256/data_256/b/bakery/shop/00002.jpg": ["a bakery, shop"],
    }
    assert len(good(read(DATASET, options, "test"))) == 2
