"""GenEval's rules, one by one, and the counts of its official file."""

import collections
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation.benchmarks.official import FILES, needs_files
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmarks import geneval
from univg_jax.evaluation.benchmarks.geneval import Clause, Row, Verdict

LINES = [
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"},
    {
        "tag": "counting",
        "include": [{"class": "cup", "count": 2}],
        "exclude": [{"class": "cup", "count": 3}],
        "prompt": "two cups",
    },
    {
        "tag": "position",
        "include": [
            {"class": "cow", "count": 1},
            {"class": "cup", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a cup left of a cow",
    },
    {
        "tag": "colors",
        "include": [{"class": "cow", "count": 1, "color": "red"}],
        "prompt": "a red cow",
    },
]


def write(folder, lines=LINES, name="evaluation_metadata.jsonl"):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def row(*include: Clause, tag="two_object", exclude=()):
    return Row(0, tag, "", tuple(include), tuple(exclude), "{}")


def box(x, y, size=10.0, score=0.95, mask=None):
    return (x, y, x + size, y + size, score, mask)


def no_color(objects, name):
    raise AssertionError("nothing here has a color")


def judge(row, detections, color=no_color):
    return geneval.judge(row, detections, color)


def test_reads_rows_and_names_files(tmp_path):
    rows = geneval.read(write(tmp_path), excerpt=True)
    assert [r.tag for r in rows] == ["single_object", "counting", "position", "colors"]
    assert rows[1].exclude == (Clause("cup", 3),)
    assert rows[2].include[1] == Clause("cup", 1, None, "left of", 0)
    assert rows[3].include[0].color == "red"
    assert geneval.image_files(rows[3]) == tuple(f"00003/samples/000{k}.png" for k in range(4))
    assert geneval.side_files(rows[1]) == {"00001/metadata.jsonl": json.dumps(LINES[1])}
    assert geneval.read(tmp_path / "evaluation_metadata.jsonl", excerpt=True) == rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"tag": "colors", "incl', "is torn, line 1 is not JSON"),
        ("[]", "has no object in line 1"),
        ('{"tag": "colors", "include": []}', "has no 'prompt' in line 1"),
        ('{"tag": "a", "include": [{"class": "cow"}], "prompt": ""}', "no clause of GenEval"),
        (json.dumps(LINES[0]), "has 1 prompts instead of 553"),
        ("\xff", "is not text in UTF-8"),
        (
            json.dumps(LINES[2]).replace('"left of", 0', '"left of", 1'),
            "no relation to an earlier clause",
        ),
        (json.dumps(LINES[2]).replace("left of", "inside"), "no relation to an earlier clause"),
    ],
)
def test_another_file_is_one_line(tmp_path, content, reason):
    (tmp_path / "evaluation_metadata.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        geneval.read(tmp_path)
    assert "expected evaluation_metadata.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(NotFoundError, match=r"github\.com/djghosh13/geneval"):
        geneval.read(tmp_path)


def test_thresholds_are_exclusive_and_higher_for_numbers():
    boxes = {"cup": [box(0, 0, score=s) for s in (0.3, 0.9, 0.5, 0.95)]}
    assert [b[4] for b in geneval.kept(boxes, "colors")["cup"]] == [0.95, 0.9, 0.5]
    assert [b[4] for b in geneval.kept(boxes, "counting")["cup"]] == [0.95]


def test_scores_of_float32_are_compared_as_such():
    """float32(0.3) is above 0.3, and does not count."""
    boxes = {"cup": [box(0, 0, score=np.float32(0.3))]}
    assert float(boxes["cup"][0][4]) > 0.3
    assert geneval.kept(boxes, "colors")["cup"] == []


def test_at_most_16_of_a_class_and_no_suppression():
    boxes = {"cup": [box(0, 0, score=0.95 - k / 1000) for k in range(20)]}
    found = geneval.kept(boxes, "counting")["cup"]
    assert [b[4] for b in found] == [0.95 - k / 1000 for k in range(16)]


@given(count=st.integers(1, 5), there=st.integers(0, 8))
def test_counting_is_exact(count, there):
    counting = row(Clause("cup", count), tag="counting", exclude=(Clause("cup", count + 1),))
    verdict = judge(counting, {"cup": [box(20 * k, 0) for k in range(there)]})
    assert verdict.is_correct == (there == count)
    assert verdict.failures == (
        ("missing_object",) if there < count else ("excess",) if there > count else ()
    )


def test_only_the_best_objects_are_asked_for_their_color():
    asked = []

    def color(objects, name):
        asked.append(([b[4] for b in objects], name))
        return ["red"] * len(objects)

    boxes = {"cow": [box(0, 0, score=0.5), box(0, 0, score=0.8), box(0, 0, score=0.6)]}
    assert judge(row(Clause("cow", 2, "red")), boxes, color).is_correct
    assert asked == [([0.8, 0.6], "cow")]


def test_as_many_as_the_count_must_have_the_color():
    boxes = {"cow": [box(0, 0), box(0, 0)]}
    two = row(Clause("cow", 2, "red"))
    assert judge(two, boxes, lambda objects, name: ["red", "red"]).is_correct
    assert judge(two, boxes, lambda objects, name: ["red", "blue"]).failures == ("color",)


def test_a_class_that_is_missing_is_not_asked_for_its_color():
    assert judge(row(Clause("cow", 1, "red")), {}).failures == ("missing_object",)


LEFT = row(Clause("cow", 1), Clause("cup", 1, None, "left of", 0))


def test_position_needs_a_matched_target():
    assert judge(LEFT, {"cow": [box(50, 0)], "cup": [box(0, 0)]}).is_correct
    assert judge(LEFT, {"cow": [box(0, 0)], "cup": [box(50, 0)]}).failures == ("position",)
    assert judge(LEFT, {"cup": [box(0, 0)]}).failures == ("missing_object", "target")


def test_position_is_not_asked_where_the_color_is_wrong():
    both = row(Clause("cow", 1), Clause("cup", 1, "red", "left of", 0))
    found = {"cow": [box(0, 0)], "cup": [box(50, 0)]}
    assert judge(both, found, lambda objects, name: ["blue"]).failures == ("color",)


def test_every_pair_must_hold_the_relation():
    two = row(Clause("cow", 2), Clause("cup", 1, None, "left of", 0))
    cows = [box(50, 0), box(-50, 0, score=0.92)]
    assert judge(two, {"cow": cows, "cup": [box(0, 0)]}).failures == ("position",)
    # Only the best two cows count.
    cows = [box(50, 0), box(60, 0), box(-50, 0, score=0.92)]
    assert judge(two, {"cow": cows, "cup": [box(0, 0)]}).is_correct


def test_a_relation_by_hand():
    """Centers 30 apart, sizes 10 and 10: (30 - 2) / 30 is beyond a half."""
    assert geneval.relations(box(0, 0), box(30, 0)) == {"left of"}
    assert geneval.relations(box(0, 30), box(0, 0)) == {"below"}
    assert geneval.relations(box(0, 0), box(30, 30)) == {"left of", "above"}


def test_the_norm_is_that_of_the_whole_offset():
    """(4 - 2) / 4 is not beyond a half, though nothing but the left is left of the offset."""
    assert geneval.relations(box(0, 0), box(4, 0)) == set()
    assert geneval.relations(box(0, 0), box(4.1, 0)) == {"left of"}
    assert geneval.relations(box(0, 0), box(0, 0)) == set()
    assert geneval.relations(box(0, 0), box(1.9, 1.9)) == set()


coordinates = st.floats(-1e3, 1e3, allow_nan=False).map(lambda v: round(v, 3))
boxes = st.builds(
    lambda x, y, w, h: (x, y, x + w, y + h, 0.9, None),
    coordinates,
    coordinates,
    st.floats(0, 300).map(lambda v: round(v, 3)),
    st.floats(0, 300).map(lambda v: round(v, 3)),
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(a=boxes, b=boxes)
def test_relations_are_antisymmetric(a, b):
    there = geneval.relations(a, b)
    assert geneval.relations(b, a) == {OPPOSITE[name] for name in there}
    assert not there & {OPPOSITE[name] for name in there}


@given(a=boxes, b=boxes)
def test_relations_by_their_definition(a, b):
    """Worked out again, one axis at a time, in plain numbers."""
    offset = [(a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2 for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    left = [max(abs(o) - 0.1 * s, 0.0) for o, s in zip(offset, sizes, strict=True)]
    norm = math.hypot(*offset)
    expected = set()
    for o, rest, names in zip(
        offset, left, (("left of", "right of"), ("above", "below")), strict=True
    ):
        if max(left) >= 1e-3 and rest / norm > 0.5 + 1e-9:
            expected.add(names[o > 0])
        elif max(left) >= 1e-3 and rest / norm > 0.5 - 1e-9:
            return  # on the border, where rounding decides
    if abs(max(left) - 1e-3) > 1e-9:
        assert geneval.relations(a, b) == expected


def test_color_texts_are_three_templates_of_ten_colors():
    texts = geneval.color_texts("wine glass")
    assert list(texts) == list(geneval.COLORS)
    assert len(texts) == 10
    assert texts["red"] == (
        "a photo of a red wine glass",
        "a photo of a red-colored wine glass",
        "a photo of a red object",
    )


def test_a_crop_is_gray_beyond_the_mask_and_black_beyond_the_image():
    image = np.full((6, 8, 3), 200, np.uint8)
    mask = np.zeros((6, 8), bool)
    mask[2, 3] = True
    crop = geneval.color_crop(image, (2.4, 1.5, 9.5, 4.5, 0.9, mask))
    assert crop.shape == (2, 8, 3)  # from 2 to 10 and from 2 to 4: halves go to the even side
    assert crop[0, 1].tolist() == [200] * 3
    assert crop[0, 0].tolist() == [0x99] * 3
    assert crop[0, 7].tolist() == [0] * 3
    whole = geneval.color_crop(image, (0.0, 0.0, 8.0, 6.0, 0.9, None))
    np.testing.assert_array_equal(whole, image)
    assert geneval.color_crop(image, (2.0, 2.0, 2.0, 2.0, 0.9, None)).shape == (1, 1, 3)


def test_colors_are_averaged_as_unit_vectors():
    """The longest text must not win: vectors are normalized before and after the average."""
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(10, 3, 16))
    crops = rng.normal(size=(20, 16))
    expected = []
    for crop in crops:
        cosines = []
        for color in texts:
            mean = sum(t / np.sqrt(t @ t) for t in color) / 3
            cosines.append(crop @ mean / np.sqrt(mean @ mean) / np.sqrt(crop @ crop))
        expected.append(geneval.COLORS[int(np.argmax(cosines))])
    assert geneval.nearest_colors(crops, texts) == expected
    lengths = rng.uniform(0.1, 10, (10, 3, 1))
    assert geneval.nearest_colors(crops, texts * lengths) == expected


def verdicts(*right: bool | None) -> list[Verdict | None]:
    return [None if r is None else Verdict(r) for r in right]


def named(tag: str, metadata: str) -> Row:
    return Row(0, tag, "", (), (), metadata)


def test_the_overall_score_is_the_mean_over_tags():
    rows = [named("colors", "a"), named("colors", "b"), named("counting", "c")]
    scores = [
        geneval.score(verdicts(True, True)),
        geneval.score(verdicts(False, True)),
        geneval.score(verdicts(False, False)),
    ]
    found = geneval.summary(rows, scores)
    assert found["colors"] == 0.75
    assert found["counting"] == 0
    assert found["overall"] == 0.375
    assert found["images"] == 0.5
    assert found["prompts"] == pytest.approx(2 / 3)
    assert found["failures/missing"] == 0


def test_a_missing_image_counts_nowhere_and_is_wrong_if_strict():
    rows = [named("colors", "a"), named("counting", "b")]
    scores = [geneval.score(verdicts(True, None, None, True)), geneval.score(verdicts(None, None))]
    found = geneval.summary(rows, scores)
    assert found["overall"] == found["colors"] == 1
    assert math.isnan(found["counting"])
    assert found["prompts"] == 1
    assert found["strict/colors"] == 0.5
    assert found["strict/overall"] == 0.25
    assert found["failures/missing"] == 4


@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.booleans(), max_size=4))))
def test_the_summary_does_not_depend_on_the_order_of_rows(items):
    rows = [named(tag, str(i)) for i, (tag, _) in enumerate(items)]
    scores = [geneval.score(verdicts(*right)) for _, right in items]
    whole = geneval.summary(rows, scores)
    turned = geneval.summary(rows[::-1], scores[::-1])
    assert {k: repr(v) for k, v in whole.items()} == {k: repr(turned[k]) for k in whole}


@needs_files
def test_the_official_file():
    rows = geneval.read(FILES / "geneval")
    assert collections.Counter(r.tag for r in rows) == {
        **{"single_object": 80, "two_object": 99, "counting": 80},
        **{"colors": 94, "position": 100, "color_attr": 100},
    }
    assert len(rows) == 553
    lines = (FILES / "geneval" / "evaluation_metadata.jsonl").read_text().splitlines()
    assert [r.metadata for r in rows] == lines
    prompts = (FILES / "geneval" / "generation_prompts.txt").read_text().splitlines()
    assert [r.prompt for r in rows] == prompts
    names = set((FILES / "geneval" / "object_names.txt").read_text().splitlines())
    assert {c.name for r in rows for c in r.include} <= names
    assert {c.color for r in rows for c in r.include} == {None, *geneval.COLORS}
    # What counts is counted exactly.
    assert all(r.exclude[0].count == r.include[0].count + 1 for r in rows if r.tag == "counting")
