"""COCO's keypoints as a benchmark: from annotations over skeletons in pictures to AP and PCK."""

import json

import numpy as np
import pytest

from data_pipelines import renderings
from tests.evaluation import evaluation_cases as data
from tests.evaluation.benchmarks.picture_scorers import plain
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import score
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.score_files import score_images
from univg_jax.images import write_png

pytest.importorskip("pycocotools")

HEIGHT, WIDTH = 192, 256
BENCH = open_benchmark("coco_pose")
JOINTS = [
    *((128, 30), (134, 26), (122, 26), (140, 28), (116, 28)),
    *((150, 62), (106, 62), (166, 96), (90, 96), (170, 130), (86, 130)),
    *((142, 118), (114, 118), (146, 150), (110, 150), (148, 180), (108, 180)),
]


def person(number, image_id, *, dx=0, visible=2):
    joints = [v for x, y in JOINTS for v in ((x + dx, y, 2) if visible else (0, 0, 0))]
    return dict(
        id=number,
        image_id=image_id,
        category_id=1,
        iscrowd=0,
        num_keypoints=17 if visible else 0,
        keypoints=joints,
        bbox=[80 + dx, 20, 96, 166],
        area=9000.0 - number,
        segmentation=[],
    )


def write(root, *, people=None):
    """Four pictures: with one person, two, one without labeled joints, and nobody."""
    if people is None:
        both = [person(12, 7), person(13, 7, dx=80)]
        people = [person(11, 5), *both, person(14, 9, visible=0)]
    image = dict(height=HEIGHT, width=WIDTH)
    content = dict(
        images=[dict(image, id=k, file_name=f"{k:012}.jpg") for k in (9, 5, 7, 2)],
        annotations=people,
        categories=[dict(id=1, name="person")],
    )
    file = root / "annotations" / "person_keypoints_val2017.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return root


def skeleton(dx=0):
    """What a model would paint, as a square of the whole picture."""
    joints = np.ones((1, 17, 3), np.float32)
    joints[0, :, :2] = (np.array(JOINTS) + (dx, 0) + 0.5) / (WIDTH, HEIGHT)
    return renderings.render_pose(joints, height=224, width=224)


def summary(bench, rows, out):
    return score_images(bench, rows, out, {}).summary(bench, rows)


@pytest.fixture
def rows(tmp_path):
    return BENCH.read(write(tmp_path / "coco"), excerpt=True)


@pytest.fixture
def out(tmp_path):
    """The largest person of two pictures; black where nobody is, and nothing of the fourth."""
    for image_id in (5, 7):
        write_png(tmp_path / "out" / f"{image_id:012}.png", skeleton())
    write_png(tmp_path / "out" / f"{2:012}.png", plain((0, 0, 0)))
    return tmp_path / "out"


def test_reads_all_pictures_or_those_with_labeled_people(tmp_path, rows):
    assert [(row.image_id, len(row.people)) for row in rows] == [(2, 0), (5, 1), (7, 2), (9, 1)]
    assert rows[1].picture == str(tmp_path / "coco" / "val2017" / "000000000005.jpg")
    bench = open_benchmark("coco_pose:choice=labeled,pictures=/p")
    labeled = bench.read(tmp_path / "coco", excerpt=True)
    assert [row.picture for row in labeled] == [f"/p/{k:012}.jpg" for k in (5, 7)]
    assert bench.settings == {"split": "val2017", "choice": "labeled"}


def test_ap_is_of_all_people_and_pck_of_the_largest(rows, out):
    found = summary(BENCH, rows, out)
    # Two of three people are found at every precision up to their OKS.
    assert found["AP50"] == pytest.approx(67 / 101, abs=1e-6)
    assert found["AR50"] == pytest.approx(2 / 3)
    assert found["pck@0.1"] == found["pck@0.2"] == 1
    assert found["oks"] > 0.7
    assert (found["strict/pck@0.1"], found["failures/missing"]) == (
        1,
        1,
    )  # the fourth has no joints


def test_a_missing_picture_finds_nobody(rows, out):
    (out / f"{5:012}.png").unlink()
    found = summary(BENCH, rows, out)
    assert found["AR50"] == pytest.approx(1 / 3)
    assert found["pck@0.1"] == 1
    assert found["strict/pck@0.1"] == 0.5
    assert found["strict/oks"] == pytest.approx(found["oks"] / 2)


def test_a_skeleton_where_nobody_is_lowers_ap_alone(rows, out):
    before = summary(BENCH, rows, out)
    write_png(out / f"{2:012}.png", skeleton())
    after = summary(BENCH, rows, out)
    assert after["AP"] <= before["AP"]
    assert after["oks"] == before["oks"]
    assert after["AR"] == before["AR"]


def test_shards_have_the_numbers_of_the_whole(rows, out):
    scores = score_images(BENCH, rows, out, {}).rows
    table = score.gather(dict(reversed(list(enumerate(scores)))), count=4, template=scores[0])
    again = [{name: ratios[k] for name, ratios in table.items()} for k in range(4)]
    np.testing.assert_equal(BENCH.summary(rows, again), BENCH.summary(rows, scores))
    assert BENCH.quality(scores[1]) > 0.7
    assert np.isnan(BENCH.quality(scores[0]))


def test_what_is_generated_is_scored(tmp_path, rows):
    """An answer that paints one skeleton into everything."""

    def answer(batch, task):
        assert task == "pose"
        return np.broadcast_to(skeleton(), (batch.size, 224, 224, 3))

    for row in rows:
        write_png(tmp_path / "coco" / "val2017" / f"{row.image_id:012}.jpg", plain("red", 192, 256))
    generate(
        BENCH.requests(rows), tmp_path / "out", answer=answer, collator=data.COLLATOR, batch_size=2
    )
    found = summary(BENCH, rows, tmp_path / "out")
    assert found["pck@0.1"] == 1
    assert found["failures/missing"] == 0


def test_another_file_is_one_line(tmp_path):
    with pytest.raises(NotFoundError, match=r"val2017.json does not exist: expected COCO's keyp"):
        BENCH.read(tmp_path)
    with pytest.raises(UserError, match="has 4 pictures instead of 5000"):
        BENCH.read(write(tmp_path))
    for reason, change in {
        "keypoints of annotation 1 is not 51 numbers": dict(keypoints=[1, 2]),
        "annotation 1 is of no picture of the list": dict(image_id=4),
        "'area' is null": dict(area=None),
    }.items():
        write(tmp_path, people=[{**person(1, 5), **change}])
        with pytest.raises(UserError, match=reason):
            BENCH.read(tmp_path, excerpt=True)
