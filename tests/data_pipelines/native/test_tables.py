"""Rows are the same from every kind of table, in parts of any process; damage is one line."""

import contextlib
import csv
import gzip
import io
import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.native import archives, table_files, table_lines
from data_pipelines.native.tables import get, open_table, picture_bytes, text_of
from univg_jax.errors import NotFoundError, UserError

ROWS = [
    {"file_name": f"{k}.jpg", "text": text, "country": "NA"}
    for k, text in enumerate(
        ["a dog", "two\nlines", 'a "quoted" one, with comma', "", "né 中文", "x"]
    )
]


def csv_bytes(rows, delimiter=",", end="\r\n") -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


def jsonl_bytes(rows) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def parquet_bytes(rows, group=4) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=group)
    return buffer.getvalue()


FORMS = {
    "rows.csv": csv_bytes,
    "lf.csv": lambda rows: csv_bytes(rows, end="\n"),
    "mark.csv": lambda rows: b"\xef\xbb\xbf" + csv_bytes(rows),
    "no_end.csv": lambda rows: csv_bytes(rows).rstrip(),
    "rows.csv.gz": lambda rows: gzip.compress(csv_bytes(rows), mtime=0),
    "rows.tsv": lambda rows: csv_bytes(rows, "\t"),
    "rows.jsonl": jsonl_bytes,
    "blank.ndjson": lambda rows: b"\n" + jsonl_bytes(rows).replace(b"\n", b"\r\n\n") + b"\n",
    "mark.jsonl": lambda rows: b"\xef\xbb\xbf" + jsonl_bytes(rows),
    "rows.jsonl.gz": lambda rows: gzip.compress(jsonl_bytes(rows), mtime=0),
    "lines.json": jsonl_bytes,
    "list.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "columns.json": lambda rows: json.dumps({c: [r[c] for r in rows] for c in rows[0]}).encode(),
    "within.json": lambda rows: json.dumps({"info": {}, "ids": [1], "data": rows}).encode(),
    "rows.parquet": parquet_bytes,
}


def read(table, columns=None):
    """All rows, each part by a table of another process; they are numbered from 0."""
    table = pickle.loads(pickle.dumps(table))
    found = [
        pair
        for part in table.parts()
        for pair in table.rows(pickle.loads(pickle.dumps(part)), columns)
    ]
    assert [number for number, _ in found] == list(range(len(found)))
    return [row for _, row in found]


def look_at(table):
    assert isinstance(table.columns, tuple)
    for row in read(table):
        assert isinstance(row, dict | UserError)


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("rows_a_part", [1, 2, 2000])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form, rows_a_part, tmp_path, monkeypatch):
    for module in (table_files, table_lines):
        monkeypatch.setattr(module, "PART_ROWS", rows_a_part)
    table = open_table(write(tmp_path / form, FORMS[form](ROWS)))
    assert table.columns == ("file_name", "text", "country")
    assert read(table) == ROWS
    assert read(table, ("text", "other")) == [{"text": row["text"]} for row in ROWS]
    table.require("text")
    with pytest.raises(
        UserError, match="has no column 'txt', expected of a table; did you mean 'text'"
    ):
        table.require("txt")


def test_a_table_is_a_folder_a_pattern_or_files(tmp_path):
    (tmp_path / "data").mkdir()
    for k in range(3):
        write(tmp_path / "data" / f"train-{k}.parquet", parquet_bytes(ROWS[2 * k : 2 * k + 2]))
    write(tmp_path / "info.json", b"{}")
    for path in (
        tmp_path,
        tmp_path / "data",
        tmp_path / "data" / "train-*.parquet",
        [str(tmp_path / "data" / f"train-{k}.parquet") for k in range(3)],
    ):
        assert read(open_table(path)) == ROWS
    for path in (tmp_path / "none", tmp_path / "*.csv"):
        with pytest.raises(NotFoundError, match="does not exist: expected captions"):
            open_table(path, what="captions")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError, match=r"has no \.parquet, \.jsonl"):
        open_table(tmp_path / "empty")
    with pytest.raises(UserError, match="is no table that can be read"):
        open_table(write(tmp_path / "a.pdf", b""))


def test_parquet_columns_are_unified_by_name_and_null_ones_are_absent(tmp_path):
    picture = {"bytes": b"png", "path": None}
    first = pa.table({"text": ["a"], "mask": pa.nulls(1), "image": [picture]})
    second = pa.table(
        {"image": [picture], "mask": [picture], "text": pa.array(["b"], pa.large_string())}
    )
    for name, table in (("1.parquet", first), ("2.parquet", second)):
        pq.write_table(table, tmp_path / name)
    table = open_table(tmp_path)
    assert set(table.columns) == {"text", "image", "mask"}
    assert read(table) == [
        {"text": "a", "image": picture},
        {"text": "b", "image": picture, "mask": picture},
    ]
    assert read(table, ("mask",)) == [{}, {"mask": picture}]


def test_a_row_that_cannot_be_read_is_an_error_in_its_place(tmp_path):
    lines = [b'{"a": 1}', b"[1]", b'{"a": ', b'{"a": "\xff"}', b"[" * 100_000, b'{"a": 2}']
    rows = read(open_table(write(tmp_path / "a.jsonl", b"\n".join(lines))))
    assert [row for row in rows if isinstance(row, dict)] == [{"a": 1}, {"a": 2}]
    assert [type(row) for row in rows[1:5]] == [UserError] * 4
    rows = read(open_table(write(tmp_path / "a.csv", b"a,b\n1,2\n1\n\xff,2\n1,2,3\n3,4\n")))
    assert [type(row) for row in rows] == [dict, UserError, UserError, UserError, dict]
    assert str(rows[1]) == "the row has 1 fields, the header 2"
    text = pa.array([b"good", b"\xff"]).cast(pa.string(), safe=False).view(pa.string())
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    rows = read(open_table(tmp_path / "a.parquet"))
    assert rows[0] == {"text": "good"}
    assert isinstance(rows[1], UserError)


def test_fields_may_be_large(tmp_path):
    rows = [{"image": "x" * 1_000_000, "text": "a"}]
    assert read(open_table(write(tmp_path / "a.tsv", csv_bytes(rows, "\t")))) == rows


def test_columns_can_be_named_where_there_is_no_header(tmp_path):
    path = write(tmp_path / "a.tsv", b"a dog\thttp://1\na cat\thttp://2")
    rows = read(open_table(path, columns=("text", "url")))
    assert rows == [{"text": "a dog", "url": "http://1"}, {"text": "a cat", "url": "http://2"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "has no header of columns, expected captions"),
        ("a.csv", b"a,a\n1,2", "has the column 'a' twice"),
        ("a.csv", "a,b\n".encode("utf-16"), "is in UTF-16"),
        ("a.jsonl", b"\x89PNG\r\n", "has no lines of JSON objects, expected captions"),
        ("a.jsonl", b"", "it is empty"),
        ("a.json", b'{"a": 1}', "has no list of rows; expected captions"),
        ("a.json", b'{"a": [1], "b": [1, 2]}', "columns of different lengths"),
        ("a.json", b'{"a": [{}], "b": [{}]}', "has the lists 'a', 'b'"),
        ("a.json", b'[{"a": 1}', "not JSON"),
        ("a.json", b"\xff", "not in UTF-8"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl.gz", gzip.compress(jsonl_bytes(ROWS), mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"PAR1", "is not whole parquet, of captions"),
        ("a.parquet", parquet_bytes(ROWS)[:-9], "is not whole parquet, of captions"),
    ],
)
def test_a_file_that_is_no_table_is_named(name, content, message, tmp_path):
    table = open_table(write(tmp_path / name, content), what="captions")
    with pytest.raises(UserError, match=message) as caught:
        look_at(table)
    assert str(tmp_path / name) in str(caught.value)


def test_a_list_of_a_json_file_can_be_chosen(tmp_path):
    path = write(tmp_path / "a.json", b'{"a": [{"x": 1}], "b": [{"x": 2}]}')
    assert read(open_table(path, key="b")) == [{"x": 2}]
    with pytest.raises(UserError, match="no list named 'c'"):
        read(open_table(path, key="c"))


def test_what_coco_says_of_captions_is_put_together(tmp_path):
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}, 3]
    annotations = [{"image_id": 2, "caption": "b"}, {"image_id": 2, "caption": "c"}, {"caption": 1}]
    value = {"info": {}, "images": images, "annotations": annotations}
    rows = read(open_table(write(tmp_path / "a.json", json.dumps(value).encode())))
    assert [row.get("captions") for row in rows[:2]] == [[], ["b", "c"]]
    assert isinstance(rows[2], UserError)
    path = write(tmp_path / "b.json", b'{"1.jpg": {"text": "a"}, "2.jpg": {"text": "b"}}')
    assert read(open_table(path)) == [
        {"file_name": "1.jpg", "text": "a"},
        {"file_name": "2.jpg", "text": "b"},
    ]


def test_names_in_messages_are_one_line(tmp_path):
    path = write(tmp_path / "a.csv", b'"a\nb","c\x1b[2J"\n1,2\n')
    with pytest.raises(UserError, match="has no column 'text'") as caught:
        open_table(path).require("text")
    assert str(caught.value).isprintable()
    with pytest.raises(UserError, match="there is no 'x'") as caught:
        get({"a\nb": 1}, "x", str)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("mark", [",", ";", "|", "\t"])
def test_other_marks_between_columns_are_found(mark, tmp_path):
    content = csv_bytes(ROWS, mark)
    assert read(open_table(write(tmp_path / "a.csv", content))) == ROWS


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_one_line(data, tmp_path_factory):
    form = data.draw(st.sampled_from(list(FORMS)))
    content = bytearray(FORMS[form](ROWS))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = write(tmp_path_factory.getbasetemp() / form, bytes(content))
    os.utime(path, ns=(len(content), data.draw(st.integers(0, 2**40))))  # for the cache of JSON
    with contextlib.suppress(UserError):
        look_at(open_table(path))


@pytest.mark.parametrize(
    ("native", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        ("None", ""),
        (" null\n", ""),
        ("NA", "NA"),
        ("  a\tdog \r\n", "a dog"),
        ("Tom &amp; Jerry&#39;s <b>best</b>", "Tom & Jerry's best"),
        ("a <3 b, x < y > z", "a <3 b, x < y > z"),
        ("e\u0301", "\u00e9"),
        ("a\0b\ud800c", "a b c"),
        (b"caf\xc3\xa9", "café"),
        (7, "7"),
    ],
)
def test_texts_are_cleaned(native, text):
    assert text_of(native) == text


@given(st.text())
@settings(max_examples=50)
def test_cleaned_texts_are_one_line_of_unicode(text):
    assert text_of(text).encode().splitlines() in ([], [text_of(text).encode()])


def test_what_is_no_text_is_refused():
    for value in (["a"], {"a": 1}, True, b"caf\xe9"):
        with pytest.raises(UserError, match="expected a text"):
            text_of(value)


def test_get_says_what_was_expected():
    row = {"a": "12", "b": 3.0, "c": True, "d": None, "e": "x", "f": [1], "g": "nan", "h": 10**400}
    assert get(row, "a", int) == 12
    assert get(row, "a", float) == 12.0
    assert get(row, "a", str) == "12"
    assert get(row, "b", int) == 3
    assert get(row, "c", bool) is True
    assert get(row, "d", str, None) is None
    assert get(row, "z", list, []) == []
    assert get(row, "f", (dict, list)) == [1]
    for key, kind in [("c", int), ("e", int), ("e", float), ("f", str), ("g", float), ("h", float)]:
        with pytest.raises(UserError, match=f"'{key}' is .*: expected {kind.__name__}"):
            get(row, key, kind)
    with pytest.raises(UserError, match="there is no 'aa'; did you mean 'a'"):
        get(row, "aa", str)


def test_pictures_are_bytes_structs_or_names(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"jpg")
    store = archives.Store(tmp_path)
    for value in (
        b"jpg",
        {"bytes": b"jpg", "path": "x"},
        "a.jpg",
        {"bytes": None, "path": "a.jpg"},
    ):
        assert picture_bytes(value, store) == b"jpg"
    for value, message in [
        (None, "there is no picture, but None"),
        (b"", "is empty"),
        ({"bytes": None, "path": None}, "there is no picture"),
        (3, "there is no picture, but 3"),
        ("https://x/a.jpg", "is an address"),
        ("b.jpg", "there is no 'b.jpg' in"),
    ]:
        with pytest.raises(UserError, match=message):
            picture_bytes(value, store)
    with pytest.raises(UserError, match="no folder is given"):
        picture_bytes("a.jpg")
