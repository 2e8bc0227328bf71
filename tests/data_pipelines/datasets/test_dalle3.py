"""DALLE3-1M: all captions of rows whose types differ, in tars of any order."""

import pytest

from data_pipelines.datasets.dalle3 import DATASET
from tests.native import dalle3 as native
from tests.native.drawing import picture, write_file, write_tar
from tests.native.reading import bad, batch_of, captions_of, counts, good, prompts_of, read
from univg_jax.errors import NotFoundError, UserError


@pytest.fixture
def options(tmp_path):
    return native.write(tmp_path)


def test_all_captions_are_kept_with_their_kinds(options):
    found = good(read(DATASET, options))
    captions = captions_of(found)
    assert captions == {
        "data-000000/000001": [("short", "A bar."), ("long", "A blue bar over a disk.")],
        "data-000000/000002": [("short", "A disk."), ("long", "A yellow one.")],
        "data-000000/000003": [
            ("short", "A tower."),
            ("short", "A tall tower."),
            ("long", "A tower in the fog."),
            ("prompt", "tower, fog"),
        ],
        "data-000000/000004": [("long", "A lake.")],
        "data-000000/000006": [("short", "A hut."), ("long", "A hut in the snow.")],
        "data-000001/000008": [("short", "A road.")],
    }
    assert found["data-000000/000002"]["image"] == picture(1, ".png")
    assert found["data-000001/000008"]["image"] == picture(8)
    assert counts(DATASET, options) == native.RECORDS


def test_what_is_left_out_is_named(options):
    assert bad(read(DATASET, options)) == {
        "data-000000/000005": "it has no caption",
        "data-000000/000007": "{'text': 'A dog.'} is a dict: expected a text",
        "data-000001/000009": "it has no .json with captions, but jpg",
        "data-000001/000010": "it has no picture, but json",
    }


def test_one_tar_is_a_source(options, tmp_path):
    found = good(read(DATASET, {"source": str(tmp_path / "data" / "data-000001.tar")}))
    assert list(found) == ["data-000001/000008"]


def test_records_are_rows_of_text_to_image(options):
    prompts = prompts_of(batch_of(read(DATASET, options), "t2i"))
    assert prompts[3] == "<t2i> A lake."
    assert prompts[5] == "<t2i> A road."


def test_missing_and_foreign_files_are_named(options, tmp_path):
    write_file(tmp_path / "empty" / "a.txt", "")
    with pytest.raises(NotFoundError, match=r"has no tar: expected data/data-000000\.tar"):
        read(DATASET, {"source": str(tmp_path / "empty")})
    path = tmp_path / "other.tar"
    write_tar(path, {"a.jpg": picture(0), "a.txt": "a"})
    with pytest.raises(UserError, match=r"other\.tar has no sample with a \.json: expected a tar"):
        read(DATASET, {"source": str(path)})
    path.write_bytes((tmp_path / "data" / "data-000000.tar").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"other\.tar is not a whole zip or tar"):
        read(DATASET, {"source": str(path)})
