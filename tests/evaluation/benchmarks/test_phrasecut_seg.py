"""PhraseCut as a benchmark: unions at the stated size, accuracy that exceeds, phrases apart."""

import json

import numpy as np
import pytest

from data_pipelines import renderings
from tests.native import phrasecut as release
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import phrasecut_seg
from univg_jax.evaluation.benchmarks.phrasecut_seg import BENCHMARK
from univg_jax.evaluation.score_files import score_images
from univg_jax.images import write_png

TASKS = [  # picture, phrase, instances
    (24, "two boxes", [[release.square(2, 2, 9)], [release.square(20, 20, 9), [[1, 1]]]]),
    (24, "a box", [[release.square(2, 2, 9)]]),
    (23, "half size", [[release.square(20, 20, 39)]]),
]


def change(root, tasks=None, split="test"):
    """Writes these phrases in place of the split's."""
    content = [
        dict(task_id=f"{image}__{k}", image_id=image, phrase=phrase, Polygons=polygons)
        for k, (image, phrase, polygons) in enumerate(TASKS if tasks is None else tasks)
    ]
    (root / f"refer_{split}.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path):
    release.write(tmp_path)
    change(tmp_path)
    return tmp_path


def box(shape, *sides) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    x0, y0, x1, y1 = sides
    mask[y0:y1, x0:x1] = 1
    return mask


def test_every_phrase_is_a_sample_of_the_union_of_its_regions(root):
    rows = phrasecut_seg.read(root)
    assert [(r.image_id, r.phrase) for r in rows] == [(i, p) for i, p, _ in TASKS]
    both = box((48, 64), 2, 2, 12, 12) | box((48, 64), 20, 20, 30, 30)
    np.testing.assert_array_equal(rows[0].mask, both)  # edges are of the region; a point is not
    np.testing.assert_array_equal(rows[1].mask, box((48, 64), 2, 2, 12, 12))
    assert [phrasecut_seg.image_files(r)[0] for r in rows][2] == "test/000002.png"


def test_the_truth_has_the_stated_size_and_not_that_of_the_file(root):
    """The file of 23 is half as large as is stated."""
    row = phrasecut_seg.read(root)[2]
    np.testing.assert_array_equal(row.mask, box((96, 96), 20, 20, 60, 60))
    found = phrasecut_seg.score(
        row, [renderings.render_mask(row.mask[::2, ::2].astype(np.uint8))], {}
    )
    assert found["official/miou"].value > 0.9


@pytest.mark.parametrize(("rows_of_box", "accurate"), [(5, 0), (6, 1)])
def test_accuracy_exceeds_its_number(root, rows_of_box, accurate):
    """Of ten rows five are an IoU of exactly one half."""
    row = phrasecut_seg.read(root)[1]
    answer = renderings.render_mask(box((48, 64), 2, 2, 12, 2 + rows_of_box))
    found = phrasecut_seg.score(row, [answer], {})
    assert found["official/miou"].value == pytest.approx(rows_of_box / 10)
    assert found["official/accuracy@0.5"].value == accurate
    assert not any("precision" in name for name in found)


def test_numbers_of_a_folder(root, tmp_path):
    rows = phrasecut_seg.read(root)
    folder = tmp_path / "out"
    write_png(folder / "test/000000.png", renderings.render_mask(box((48, 64), 2, 2, 12, 12)))
    write_png(folder / "test/000001.png", renderings.render_mask(rows[1].mask.astype(np.uint8)))
    found = score_images(BENCHMARK, rows, folder, {}).summary(BENCHMARK, rows)
    assert found["test/official/oiou"] == 200 / 300
    assert found["test/official/miou"] == (1 / 2 + 1) / 2
    assert found["test/strict/miou"] == pytest.approx(1.5 / 3)
    assert found["test/strict/oiou"] == 200 / (300 + 1600)
    assert (found["failures/missing"], found["failures/mask_elsewhere"]) == (1, 0)


def test_requests_are_of_the_whole_picture(root):
    request = BENCHMARK.requests(open_benchmark("phrasecut_seg:pictures=VG").read(root))[1]
    assert request.inputs == {"prompt": "a box", "image": "VG/24.jpg"}
    assert (request.task, request.whole) == ("seg", True)


def test_splits_are_by_the_files(root):
    bench = open_benchmark("phrasecut_seg:split=miniv")
    (row,) = bench.read(root)
    assert (row.split, row.phrase) == ("miniv", "mini")
    assert (bench.primary, bench.settings["split"]) == ("miniv/official/miou", "miniv")
    with pytest.raises(UserError, match=r"unknown phrasecut_seg\.split 'train'"):
        open_benchmark("phrasecut_seg:split=train")


def test_another_file_is_one_line(root):
    change(root, [])
    with pytest.raises(UserError, match=r"refer_test\.json has no phrases: expected PhraseCut's"):
        phrasecut_seg.read(root)
    change(root, [(99, "x", [])])
    with pytest.raises(UserError, match=r"test\.json: task 0: image_data_.* has no picture 99"):
        phrasecut_seg.read(root)
    change(root, [(24, "x", [[["a"]]])])
    with pytest.raises(UserError, match=r"phrase 0 of test: a polygon is"):
        phrasecut_seg.read(root)[0].mask  # noqa: B018
    (root / "image_data_split3000.json").unlink()
    with pytest.raises(NotFoundError, match=r"has no image_data_split3000\.json or"):
        phrasecut_seg.read(root)
    (root / "refer_test.json").unlink()
    with pytest.raises(NotFoundError, match=r"refer_test\.json does not exist"):
        phrasecut_seg.read(root)
