"""Official input files: what is missing or torn is one line that names what was expected."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines.native.tables import open_table
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.inputs import InputFile, TablePictures
from univg_jax.images import png_bytes

FILE = InputFile("rows.csv", "the rows of Example: example.org")


def test_a_path_is_the_file_or_its_folder(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    (tmp_path / "renamed.csv").write_text("a,b\n3,4\n")
    assert FILE.table(tmp_path, "ab") == [{"a": "1", "b": "2"}]
    assert FILE.table(tmp_path / "rows.csv", "ab") == [{"a": "1", "b": "2"}]
    assert FILE.table(tmp_path / "renamed.csv", "ab") == [{"a": "3", "b": "4"}]


@pytest.mark.parametrize("path", ["", "rows.csv", "other/rows.csv"])
def test_a_missing_file_says_what_was_expected_where(tmp_path, path):
    expected = f"{tmp_path / path if path else tmp_path / 'rows.csv'} does not exist: "
    expected += "expected rows.csv, the rows of Example: example.org"
    with pytest.raises(NotFoundError, match=f"^{re.escape(expected)}$"):
        FILE.text(tmp_path / path)


def test_text_is_utf_8_with_or_without_a_mark_and_ends_lines_as_it_likes(tmp_path):
    (tmp_path / "rows.csv").write_bytes("\ufeffé\r\n\r\nb\n\n".encode())
    assert FILE.lines(tmp_path) == ["é", "", "b"]
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n \n\t\n\n")
    assert FILE.lines(tmp_path) == ["a,b", "1,2"]
    assert FILE.table(tmp_path, "ab") == [{"a": "1", "b": "2"}]
    (tmp_path / "rows.csv").write_bytes(b"\xe9")
    with pytest.raises(UserError, match="is not text in UTF-8: expected rows"):
        FILE.text(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('a,b\n1,"2\n', "is torn at line"),
        ("a,b\n1\n", "is torn at row 1"),
        ("a,b\n1,2\n1,2,3\n", "is torn at row 2"),
        ("a\n1\n", "has no column 'b'"),
    ],
)
def test_a_torn_table_is_one_line(tmp_path, content, reason):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(UserError, match=re.escape(reason)):
        FILE.table(tmp_path, "ab")


def test_counts_are_those_of_the_official_file_or_fewer_in_an_excerpt(tmp_path):
    (tmp_path / "rows.csv").write_text("")

    def check(found, *, excerpt):
        FILE.check_count(tmp_path, found=found, official=3, what="rows", excerpt=excerpt)

    check(3, excerpt=False)
    check(2, excerpt=True)
    for found, excerpt in ((2, False), (4, True), (4, False), (0, True)):
        with pytest.raises(UserError, match=f"has {found} rows instead of 3"):
            check(found, excerpt=excerpt)


def test_json_that_is_nested_without_end_is_one_line(tmp_path):
    (tmp_path / "rows.csv").write_text("[" * 100_000)
    with pytest.raises(UserError, match="is torn, the file is not JSON"):
        FILE.json(tmp_path)


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_pictures_of_a_table_in_any_order_by_any_number_of_threads(tmp_path, monkeypatch, order):
    """Of two files with two groups of rows each, where three pictures are kept."""
    monkeypatch.setattr(TablePictures, "KEPT", 3)
    files = [[png_bytes(np.full((2, 2, 3), 5 * k + j, np.uint8)) for j in range(5)] for k in (0, 1)]
    for k, content in enumerate(files):
        table = pa.table({"number": range(5), "picture": content})
        pq.write_table(table, tmp_path / f"{k}.parquet", row_group_size=3)
    pictures = TablePictures(open_table(tmp_path), "picture")
    asked = {
        "forward": list(range(10)),
        "backward": list(range(10))[::-1],
        "shuffled": np.random.default_rng(0).integers(0, 10, 40).tolist(),
    }[order]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(pictures, asked))
    assert [int(picture[0, 0, 0]) for picture in found] == asked


def test_a_picture_of_a_table_that_is_none_is_named(tmp_path):
    whole = png_bytes(np.zeros((2, 2, 3), np.uint8))
    pq.write_table(pa.table({"picture": [whole, b"no"]}), tmp_path / "a.parquet")
    pictures = TablePictures(open_table(tmp_path), "picture")
    with pytest.raises(UserError, match=r"a.parquet row 1: picture is not a readable image"):
        pictures(1)
    assert pictures(0).shape == (2, 2, 3)
