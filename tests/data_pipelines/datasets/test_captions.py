"""Captioned pictures of every usual form give the same records."""

import json
import os
import pathlib

import pytest

from data_pipelines.datasets.captions import DATASET
from data_pipelines.native import captioned
from tests.native import captions as native
from tests.native.drawing import picture, write_file, write_tar
from tests.native.reading import bad, batch_of, captions_of, counts, good, prompts_of, read
from univg_jax.errors import NotFoundError, UserError

SAMPLES = pathlib.Path(os.environ.get("UNIVG_SAMPLES", ""))
needs_samples = pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
MISSING = {"write": {4}, "parquet_of_img2dataset": {4}}  # failed downloads
PNG = {"webdataset": {1: ".png", 2: ".webp", 3: ".jpeg"}, "texts_beside": {2: ".png"}}


@pytest.mark.parametrize("form", native.FORMS)
def test_every_form_gives_the_same_pictures_and_texts(form, tmp_path):
    options = native.FORMS[form](tmp_path)
    (dataset,) = DATASET.open(DATASET.make_options(options)).values()
    found = [
        (record["image"], record["captions"][0])
        for split in dataset.splits
        for record in good(read(DATASET, options, split)).values()
    ]
    expected = [
        (picture(k, PNG.get(form, {}).get(k, ".jpg")), native.CLEAN[k])
        for k in range(5)
        if k not in MISSING.get(form, ())
    ]
    assert sorted(found) == sorted(expected)


def test_img2dataset_tars_have_keys_of_tar_and_sample_and_failures_are_named(tmp_path):
    found = read(DATASET, native.write(tmp_path))
    assert list(good(found)) == [
        *("00000/000000002", "00000/000000000", "00001/000000001", "00001/000000003"),
    ]
    assert bad(found) == {
        "00000/000000004": "its status is 'failed_to_download': it was not downloaded"
    }
    assert counts(DATASET, {"source": f"{tmp_path}/*.tar"}) == native.RECORDS
    assert len(read(DATASET, {"source": f"{tmp_path}/00001.tar"})) == 2


def test_kinds_are_told_by_the_usual_names_or_the_options(tmp_path):
    row = {
        "caption": "c",
        "alt": "a",
        "short_caption": "s",
        "long_caption": ["l", "m"],
        "prompt": "p",
    }
    row |= {"re_caption": "r", "url": "u", "other": "o", "text": "c"}
    write_tar(tmp_path / "a.tar", {"1.jpg": picture(1), "1.json": json.dumps(row), "1.txt": "c"})
    options = {"source": str(tmp_path / "a.tar")}
    (found,) = captions_of(read(DATASET, options)).values()
    kinds = {"c": "original", "a": "alt", "s": "short", "l": "long", "m": "long", "p": "prompt"}
    assert {text: kind for kind, text in found} == {**kinds, "r": "synthetic"}
    (found,) = captions_of(read(DATASET, {**options, "captions": ("other=mine", "alt")})).values()
    assert found == [("mine", "o"), ("alt", "a")]


def test_rows_can_be_excluded_by_names_and_ids(tmp_path):
    (dataset,) = DATASET.open(DATASET.make_options(native.sbu(tmp_path))).values()
    (part,) = dataset.parts("train")
    entries = list(dataset.entries(part))
    assert [entry.key for entry in entries] == [f"{k:09d}" for k in range(5)]
    assert "http://static.flickr.com/26/2_b.jpg?zz=1" in entries[2].ids


def test_rows_of_one_picture_are_its_captions(tmp_path):
    """As in Flickr30k's table, whose columns are parted by pipes."""
    write_file(
        tmp_path / "results.csv",
        "image_name| comment_number| comment\n"
        + "".join(f"{k}.jpg| {n}|  the {n}. of {k} .\n" for k in range(2) for n in range(3)),
    )
    for k in range(2):
        write_file(tmp_path / f"{k}.jpg", picture(k))
    found = good(read(DATASET, {"source": str(tmp_path)}))
    assert {key: record["captions"] for key, record in found.items()} == {
        f"00000000{3 * k}": [f"the {n}. of {k} ." for n in range(3)] for k in range(2)
    }


def test_a_table_without_a_header_is_read_by_names_of_its_columns(tmp_path):
    write_file(tmp_path / "cc3m.tsv", "a dog\thttp://a.b/1.jpg?x=2\na cat\thttp://a.b/2.jpg\n")
    for k in (1, 2):
        write_file(tmp_path / "images" / f"{k}.jpg", picture(k))
    options = {"source": str(tmp_path / "cc3m.tsv"), "folder": str(tmp_path / "images")}
    found = good(read(DATASET, {**options, "columns": ("caption", "url")}))
    assert [record["captions"] for record in found.values()] == [["a dog"], ["a cat"]]


def test_captions_of_coco_are_read(tmp_path):
    images = [{"id": k, "file_name": f"COCO_{k}.jpg", "license": 1} for k in range(2)]
    pairs = [(n, k) for n in (1, 2) for k in (0, 1)]
    annotations = [{"image_id": k, "id": n, "caption": f"{n} of {k}\n"} for n, k in pairs]
    value = {"info": {}, "images": images, "annotations": annotations, "licenses": [{"id": 1}]}
    write_file(tmp_path / "captions_val2014.json", json.dumps(value))
    for k in range(2):
        write_file(tmp_path / "val2014" / f"COCO_{k}.jpg", picture(k))
    source = str(tmp_path / "captions_val2014.json")
    options = {"source": source, "folder": str(tmp_path / "val2014")}
    found = good(read(DATASET, options))
    assert [record["captions"] for record in found.values()] == [
        ["1 of 0", "2 of 0"],
        ["1 of 1", "2 of 1"],
    ]


def test_a_table_in_an_archive_is_to_be_unpacked(tmp_path):
    write_tar(tmp_path / "sbu.tar.gz", {"sbu-captions-all.json": '{"captions": []}'}, "w:gz")
    with pytest.raises(UserError, match=r"has no pictures in it, but 'sbu-captions-all\.json'"):
        read(DATASET, {"source": str(tmp_path / "sbu.tar.gz")})


def test_splits_are_told_by_names(tmp_path):
    assert counts(DATASET, native.imagefolder(tmp_path)) == {"train": 3, "test": 2}
    assert counts(DATASET, {"source": str(tmp_path / "test")}) == {"train": 2}


def test_null_and_missing_captions_are_left_out_by_name(tmp_path):
    texts = ("a", None, "None", ["b"], 7)
    rows = [{"image": f"{k}.jpg", "text": text} for k, text in enumerate(texts)]
    for k in range(4):
        write_file(tmp_path / f"{k}.jpg", picture(k))
    write_file(tmp_path / "rows.json", json.dumps(rows))
    found = read(DATASET, {"source": str(tmp_path)})
    assert [r["captions"] for r in good(found).values()] == [["a"], ["b"]]
    reasons = bad(found)
    assert reasons["000000001"] == reasons["000000002"] == "it has no caption"
    assert reasons["000000004"].startswith("there is no '4.jpg' in ")


def test_records_are_rows_of_text_to_image_and_inpainting(tmp_path):
    found = read(DATASET, native.wit(tmp_path))
    prompts = prompts_of(batch_of(found, "t2i"))
    assert prompts[0] in ("<t2i> a yellow disk", "<t2i> alternative")
    assert prompts[1:] == [f"<t2i> {text}" for text in native.CLEAN[1:]]
    assert len(prompts_of(batch_of(found, "ip"))) == 5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no captioned pictures: expected tars, a table"),
        ({"a.jpg": "x"}, "it has 1 pictures"),
        ({"a.csv": "image,text\n1.jpg,a", "b.json": "[]"}, "has several things to read"),
        ({"a.csv": "image,text\n1.jpg,a", "b.tar": "x"}, "has several things to read"),
        ({"a.csv": "pic,text\n1.jpg,a"}, "no column of pictures .*it has pic, text.*image="),
        ({"a.csv": "image,words\n1.jpg,a"}, "no column of captions .*captions="),
        ({"a.csv": "url,text\nhttp://a/1.jpg,a"}, "no column of pictures, but their addresses"),
        (
            {"a.csv": "image,text\n1.jpg,a"},
            "no picture in column 'image' of its first rows: there is no",
        ),
        ({"a.csv": "image,text\n"}, "has no rows"),
        ({"a.tar": "x"}, "is not a whole zip or tar"),
        ({"a.parquet": "x"}, "is not whole parquet"),
    ],
    ids=str,
)
def test_what_is_not_a_collection_is_named(files, message, tmp_path):
    for name, content in files.items():
        write_file(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read(DATASET, {"source": str(tmp_path)})


def test_wrong_options_are_named(tmp_path):
    options = native.parquet_with_pictures(tmp_path)
    with pytest.raises(UserError, match=r"has no column 'imag', .*did you mean 'image'"):
        read(DATASET, {**options, "image": "imag"})
    with pytest.raises(UserError, match=r"has no column 'txt', .*did you mean 'text'"):
        read(DATASET, {**options, "captions": ("txt",)})
    with pytest.raises(NotFoundError, match="none does not exist"):
        read(DATASET, {**native.parquet_with_names(tmp_path), "folder": str(tmp_path / "none")})
    with pytest.raises(NotFoundError, match="none does not exist: expected captioned pictures"):
        read(DATASET, {"source": str(tmp_path / "none")})
    found = read(DATASET, {**native.webdataset(tmp_path / "w"), "image": "seg.png"})
    assert good(found)["train-0/a/4"]["image"] == picture(9, ".png")
    assert bad(found)["train-0/a/0"] == "it has no picture .seg.png, but jpg, txt"


def test_samples_of_a_compressed_tar_may_lie_apart_within_memory(tmp_path, monkeypatch):
    files = {f"{k}.jpg": picture(k) for k in range(8)} | {f"{k}.txt": "a" for k in range(8)}
    write_tar(tmp_path / "a.tar", files)
    write_tar(tmp_path / "a.tgz", files, "w:gz")
    one, other = (dict(captioned.samples(str(tmp_path / name))) for name in ("a.tar", "a.tgz"))
    assert one == other
    monkeypatch.setattr(captioned, "MAX_PENDING_BYTES", 2000)
    with pytest.raises(UserError, match="lie too far apart"):
        dict(captioned.samples(str(tmp_path / "a.tgz")))


@needs_samples
def test_real_files():
    found = good(read(DATASET, {"source": str(SAMPLES / "webdataset/laion_img2dataset_00000.tar")}))
    assert {key: r["captions"] for key, r in found.items()} == {
        "laion_img2dataset_00000/000000002": ["Happy little girl on the meadow - Stock fotografie"],
        "laion_img2dataset_00000/000000000": [
            "2 bed Terraced property to rent in Crofts Lane, Ross-on-Wye"
        ],
        "laion_img2dataset_00000/000000001": [
            "Teleflora's Simply Sweet in Cleveland TN, Jimmie's Flowers"
        ],
    }
    found = good(read(DATASET, {"source": str(SAMPLES / "csv_folder")}))
    assert [r["captions"] for r in found.values()] == [["a dog"]]
    found = read(DATASET, {"source": str(SAMPLES / "webdataset" / "mnist_sample.tgz")})
    assert set(bad(found).values()) == {"it has no caption, but cls, png"}
    with pytest.raises(UserError, match="no column of pictures, but their addresses"):
        read(DATASET, {"source": str(SAMPLES / "parquet")})
    with pytest.raises(UserError, match="no column of pictures, but their addresses"):
        read(DATASET, {"source": str(SAMPLES / "tsv_captions")})


@needs_samples
def test_real_wit_rows_with_pictures_of_their_names(tmp_path):
    for name in ("MGS_logo.JPG", "Noctilio_albiventris.jpg"):
        write_file(tmp_path / name, picture(1))
    found = read(DATASET, {"source": str(SAMPLES / "tsv_captions"), "folder": str(tmp_path)})
    captions = [pair for pairs in captions_of(found).values() for pair in pairs]
    assert ("attribution", "Galego: Logo do Movemento Galego ao Socialismo") in captions
    assert ("attribution", "English: Lesser bulldog bat (Noctilio albiventris)") in captions
