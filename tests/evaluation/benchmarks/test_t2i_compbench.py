"""T2I-CompBench's rules, one by one, and the counts of its official files."""

import collections
import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.evaluation.benchmarks.official import FILES, needs_files
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import t2i_compbench as compbench
from univg_jax.evaluation.benchmarks.t2i_compbench import Parse, Row

PROMPTS = {
    "color": "a green bench and a blue bowl\r\na red car\r\n",
    "shape": "an oblong cucumber\n",
    "texture": "a plastic toy\r\nrubber shoes",
    "spatial": "a giraffe next to a lamp\r\na girl on the top of a frog",
    "3d_spatial": "a dog in front of a desk\na cat hidden by a boy",
    "numeracy": "two boys\na fish, two stools, and three mice were in a pantry\n",
    "non_spatial": "A person is looking.\n",
    "complex": "The red hat was on top of the rack.\r\nThe phone lay there.\r\nBoth of it.\r\n",
}


def write(folder, **files):
    texts = {f"{name}_val": text for name, text in PROMPTS.items()} | {
        "new_objects": "boy - boys\nfish - fish\nstool - stools\nmouse - mice",
        "complex_val_spatial": "The red hat was on top of the rack.\r\n",
        "complex_val_action": "The red hat was on top of the rack.\r\nThe Phone lay there",
    }
    for name, text in (texts | files).items():
        if text is not None:
            (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


def read(folder, name):
    return compbench.read(folder, name, excerpt=True)


def box(x0, y0, x1, y1, score=0.9):
    return (x0, y0, x1, y1, score, None)


def test_lines_lose_their_carriage_returns_and_images_are_counted_through(tmp_path):
    rows = read(write(tmp_path), "color")
    assert [r.prompt for r in rows] == ["a green bench and a blue bowl", "a red car"]
    files = compbench.image_files(rows[1])
    assert files[0] == "samples/a red car_000010.png"
    assert files[9] == "samples/a red car_000019.png"
    assert len(files) == 10


def test_images_belong_to_the_prompt_in_their_name(tmp_path):
    """Whatever their number and however many: the official code takes the name's beginning."""
    rows = read(write(tmp_path), "color")
    samples = tmp_path / "theirs" / "samples"
    samples.mkdir(parents=True)
    for name in ("a red car_000000.png", "a red car_000002.png", "a red car_000010.jpg"):
        (samples / name).touch()
    for name in ("another_000001.png", "a red car_x.png", "a red car_000001.txt"):
        (samples / name).touch()
    assert compbench.found(rows, tmp_path / "theirs") == [
        [],
        [f"samples/a red car_{end}" for end in ("000000.png", "000002.png", "000010.jpg")],
    ]
    assert compbench.found(rows, tmp_path / "none") == [[], []]


def test_of_rows_with_one_prompt_each_has_its_own_numbers(tmp_path):
    row = read(write(tmp_path), "color")[1]
    rows = [dataclasses.replace(row, index=index) for index in (0, 1)]
    (tmp_path / "samples").mkdir()
    for request in rows:
        for name in compbench.image_files(request):
            (tmp_path / name).touch()
    assert [tuple(names) for names in compbench.found(rows, tmp_path)] == [
        compbench.image_files(row) for row in rows
    ]


@pytest.mark.parametrize("shape", [(768, 1024), (300, 200), (479, 480)])
def test_pictures_for_the_detector_are_made_smaller_as_torchvision_does(shape):
    """Bilinear, which its `Resize` takes unless it is told otherwise."""
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    size = compbench.detector_size(shape[1], shape[0])
    expected = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    seen = []

    def detect(image):
        seen.append(image)
        return {}

    row = compbench.Row("spatial", 0, "a cup next to a cow", "next to", ("cup", "cow"))
    benchmark = compbench.benchmark(compbench.Settings(set="spatial"))
    benchmark.score(row, [picture], {"detect": detect})
    np.testing.assert_array_equal(seen[0], expected)


@pytest.mark.parametrize("name", compbench.SETS)
def test_every_set_is_read(tmp_path, name):
    rows = read(write(tmp_path), name)
    assert {r.set for r in rows} == {name}
    assert [r.index for r in rows] == list(range(len(rows)))
    assert compbench.read(tmp_path / f"{name}_val.txt", name, excerpt=True) == rows


def test_places_have_a_relation_and_two_objects(tmp_path):
    rows = read(write(tmp_path), "spatial")
    assert [(r.relation, r.objects) for r in rows] == [
        ("next to", ("giraffe", "lamp")),
        ("on the top of", ("girl", "frog")),
    ]
    rows = read(tmp_path, "3d_spatial")
    assert [(r.relation, r.objects) for r in rows] == [
        ("in front of", ("dog", "desk")),
        ("hidden", ("cat", "boy")),
    ]


def test_numbers_and_articles_count_the_nouns_of_the_list(tmp_path):
    rows = read(write(tmp_path), "numeracy")
    assert [(r.objects, r.counts) for r in rows] == [
        (("boy",), (2,)),
        (("fish", "stool", "mouse"), (1, 2, 3)),
    ]


def test_complex_prompts_are_sorted_by_the_two_lists(tmp_path):
    """Of both lists that of places goes first; what is in neither is about everything."""
    rows = read(write(tmp_path), "complex")
    assert [r.parts for r in rows] == [
        ("attribute", "spatial"),
        ("attribute", "action"),
        ("attribute", "spatial", "action"),
    ]
    parts = {"attribute": 0.5, "spatial": 0.0, "action": 0.25}
    scores = [compbench.complex_score(r, parts) for r in rows]
    assert scores == [0.25, 0.375, 0.25]
    assert rows[0].relation == "on top of"


@pytest.mark.parametrize(
    ("name", "files", "reason"),
    [
        ("color", {}, "has 2 prompts instead of 300"),
        ("color", {"color_val": None}, "color_val.txt does not exist"),
        ("numeracy", {"new_objects": None}, "new_objects.txt does not exist"),
        ("numeracy", {"new_objects": "boy, boys"}, "has no 'ONE - MANY' in line 1"),
        ("numeracy", {"numeracy_val": "two clouds"}, "counts nothing of new_objects.txt"),
        ("complex", {"complex_val_action": None}, "complex_val_action.txt does not exist"),
        ("spatial", {"spatial_val": "a giraffe and a lamp"}, "has no place of two objects"),
        ("3d_spatial", {"3d_spatial_val": "a dog near a cat"}, "has no place of two objects"),
    ],
)
def test_another_file_is_one_line(tmp_path, name, files, reason):
    write(tmp_path, **files)
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        compbench.read(tmp_path, name, excerpt=reason[:5] != "has 2")
    assert "github.com/Karine-Huang/T2I-CompBench" in str(error.value)


def test_an_unknown_set_is_one_line(tmp_path):
    with pytest.raises(UserError, match="did you mean 'color'"):
        compbench.read(tmp_path, "colour")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (479, 479)),
        ((1024, 512), (480, 240)),
        ((512, 1024), (240, 480)),
        ((1000, 998), (479, 479)),
        ((1003, 1000), (480, 479)),
    ],
)
def test_the_detector_s_image_is_479_by_480_at_most(size, expected):
    assert compbench.detector_size(*size) == expected


def test_questions_are_noun_phrases_without_places():
    parse = Parse((), ("The cat", "top", "the side", "the left", "the right", "a mat"))
    assert compbench.questions(parse) == ("The cat?", "a mat?")
    many = Parse((), tuple(f"phrase {k}" for k in range(9)))
    assert compbench.questions(many) == tuple(f"phrase {k}?" for k in range(8))


def test_yes_is_weighed_against_no():
    assert compbench.yes_probability({"yes": 0.6, "no": 0.2, "maybe": 0.2}) == pytest.approx(0.75)
    assert compbench.yes_probability({"yes": 0.1}) == 1
    assert compbench.yes_probability({"Yes": 1.0}) is None


def test_attributes_are_a_product_that_is_rounded_twice():
    assert compbench.attributes([0.5, 0.5, 0.5]) == 0.125
    assert compbench.attributes([0.00004, 1.0]) == 0  # 0.0000
    assert compbench.attributes([0.33336, 0.5]) == 0.1667  # 0.3334 / 2, not 0.16668
    assert compbench.attributes([0.12344, 0.1]) == 0.0123
    assert compbench.attributes([]) == 1


FAR = {"lamp": [box(0, 0, 10, 10, 0.8)], "cup": [box(100, 0, 110, 10, 0.6)]}


def test_an_object_gives_a_quarter_of_its_confidence_and_the_place_a_half():
    found = compbench.spatial("on the left of", ("lamp", "cup"), FAR)
    assert found == pytest.approx(0.25 * 0.8 + 0.25 * 0.6 + 0.5)


def test_less_than_a_half_in_the_plane_is_nothing():
    assert compbench.spatial("on the right of", ("lamp", "cup"), FAR) == 0
    assert compbench.spatial("near", ("lamp", "dog"), FAR) == 0
    assert compbench.spatial("near", (None, None), FAR) == 0
    sure = {name: [(*boxes[0][:4], 1.0, None)] for name, boxes in FAR.items()}
    assert compbench.spatial("on the right of", ("lamp", "cup"), sure) == 0.5


def test_only_the_best_detection_above_one_half_counts():
    boxes = {
        "lamp": [box(300, 0, 310, 10, 0.7), box(0, 0, 10, 10, 0.9)],
        "cup": [box(100, 0, 110, 10, 0.5)],
    }
    assert compbench.spatial("on the left of", ("lamp", "cup"), boxes) == 0
    boxes["cup"] = [box(100, 0, 110, 10, 0.51)]
    found = compbench.spatial("on the left of", ("lamp", "cup"), boxes)
    assert found == pytest.approx(0.25 * 0.9 + 0.25 * 0.51 + 0.5)


@pytest.mark.parametrize("name", ["boy", "girl", "man", "woman"])
def test_people_are_persons(name):
    boxes = {"person": FAR["lamp"], "cup": FAR["cup"]}
    assert compbench.spatial("near", (name, "cup"), boxes) > 0.5


CENTER = box(95, 95, 105, 105)


def at(x, y):
    return box(x - 5, y - 5, x + 5, y + 5)


def test_directions_are_those_of_the_first_object():
    assert compbench.place("on the left of", at(50, 100), CENTER) == 1
    assert compbench.place("on the right of", at(150, 100), CENTER) == 1
    assert compbench.place("on the top of", at(100, 50), CENTER) == 1
    assert compbench.place("on the bottom of", at(100, 150), CENTER) == 1
    assert compbench.place("on the left of", at(150, 100), CENTER) == 0
    assert compbench.place("on the left of", at(50, 50), CENTER) == 0  # no larger part


def test_on_top_of_without_the_article_has_no_rule():
    assert compbench.place("on top of", at(100, 50), CENTER) == 0
    assert compbench.place(None, at(100, 50), CENTER) == 0
    assert compbench.relation_of("The hat was on top of the rack.") == "on top of"


def test_overlap_makes_a_direction_worth_less():
    a, b = box(0, 0, 10, 10), box(5, 0, 15, 10)  # IoU 1/3
    assert compbench.place("on the left of", a, b) == pytest.approx(0.3)
    assert compbench.place("on the left of", box(0, 0, 10, 10), box(9, 0, 19, 10)) == 1


@pytest.mark.parametrize("relation", ["next to", "near", "on side of"])
def test_beside_is_within_150_pixels_in_x_or_y(relation):
    assert compbench.place(relation, at(0, 0), at(149, 400)) == 1
    assert compbench.place(relation, at(0, 0), at(400, 149)) == 1
    assert compbench.place(relation, at(0, 0), at(-150, 300)) == 0.5
    assert compbench.place(relation, at(0, 0), at(150, 150)) == 1


sides = st.floats(0, 400).map(lambda v: round(v, 2))
corners = st.tuples(sides, sides, st.floats(1, 200), st.floats(1, 200))
boxes = corners.map(lambda c: box(c[0], c[1], c[0] + round(c[2], 2), c[1] + round(c[3], 2)))
OPPOSITE = {
    "on the left of": "on the right of",
    "on the right of": "on the left of",
    "on the top of": "on the bottom of",
    "on the bottom of": "on the top of",
    "near": "near",
}


@given(a=boxes, b=boxes, relation=st.sampled_from(sorted(OPPOSITE)))
def test_places_are_antisymmetric(a, b, relation):
    there = compbench.place(relation, a, b)
    assert 0 <= there <= 1
    assert compbench.place(OPPOSITE[relation], b, a) == pytest.approx(there)


@given(a=boxes, b=boxes)
def test_at_most_one_direction_holds(a, b):
    names = [name for name in OPPOSITE if name != "near"]
    assert sum(compbench.place(name, a, b) > 0 for name in names) <= 1


def depth(relation, detections, nearness, objects=("dog", "desk")):
    return compbench.depth(relation, objects, detections, nearness)


SIDE = np.zeros((40, 40))
SIDE[:, :20] = 1.0  # what is on the left is nearer
OVERLAP = {"dog": [box(0, 0, 20, 20, 0.8)], "desk": [box(10, 0, 30, 20, 0.6)]}  # IoU 1/3


def test_the_nearer_object_is_in_front():
    whole = 0.25 * 0.8 + 0.25 * 0.6
    assert depth("in front of", OVERLAP, SIDE)["fixed"] == pytest.approx(whole + 1 / 3)
    for relation in ("behind", "hidden"):
        assert depth(relation, OVERLAP, SIDE)["fixed"] == pytest.approx(whole)
        assert depth(relation, OVERLAP, 1 - SIDE)["fixed"] == pytest.approx(whole + 1 / 3)


def test_the_official_map_has_x_and_y_exchanged():
    whole = 0.25 * 0.8 + 0.25 * 0.6
    assert depth("in front of", OVERLAP, SIDE)["official"] == pytest.approx(whole)
    assert depth("in front of", OVERLAP, SIDE.T)["official"] == pytest.approx(whole + 1 / 3)


def test_there_is_no_cut_at_one_half_in_depth():
    assert depth("in front of", {"dog": OVERLAP["dog"]}, SIDE) == {
        "official": pytest.approx(0.2),
        "fixed": pytest.approx(0.2),
    }


def test_labels_of_depth_contain_the_name():
    boxes = {"hot dog": OVERLAP["dog"], "desk": OVERLAP["desk"]}
    assert depth("in front of", boxes, SIDE) == depth("in front of", OVERLAP, SIDE)
    people = {"person": OVERLAP["dog"], "desk": OVERLAP["desk"]}
    found = depth("in front of", people, SIDE, objects=("woman", "desk"))
    assert found == depth("in front of", OVERLAP, SIDE)


def test_an_overlap_of_exactly_one_half_is_officially_none():
    boxes = {"dog": [box(0, 0, 20, 20, 0.8)], "desk": [box(0, 0, 20, 10, 0.6)]}
    nearness = np.zeros((40, 40))
    nearness[10:20] = nearness[:, 10:20] = 1.0  # of the dog alone, in both orders of the axes
    found = depth("in front of", boxes, nearness)
    assert found["fixed"] == pytest.approx(0.35 + 0.5)
    assert found["official"] == pytest.approx(0.35)


def test_boxes_that_do_not_overlap_have_no_depth_and_boxes_beyond_the_map_none_either():
    apart = {"dog": [box(0, 0, 10, 10)], "desk": [box(20, 0, 30, 10)]}
    assert depth("in front of", apart, SIDE)["fixed"] == pytest.approx(0.45)
    wide = {"dog": [box(50, 0, 60, 10)], "desk": [box(55, 0, 65, 10)]}
    nearness = np.zeros((20, 80))
    nearness[:, :55] = 1.0
    found = depth("in front of", wide, nearness)
    assert found["official"] == pytest.approx(0.45)  # rows 50 to 60 of a map that has 20
    assert found["fixed"] == pytest.approx(0.45 + (1 / 3))


@st.composite
def scenes(draw):
    count = draw(st.integers(0, 6))
    labels = [draw(st.sampled_from(["dog", "hot dog", "desk", "cup"])) for _ in range(count)]
    return list(zip(labels, draw(st.lists(boxes, min_size=count, max_size=count)), strict=True))


@given(scenes(), st.sampled_from(["in front of", "behind", "hidden"]))
def test_the_official_boxes_are_the_last_until_both_are_seen(scene, relation):
    """The loop of the official code, written out; scores fall, so the order is that of the list."""
    scene = [(label, (*b[:4], 0.9 - k / 100, None)) for k, (label, b) in enumerate(scene)]
    detections = collections.defaultdict(list)
    for label, b in scene:
        detections[label].append(b)
    first = second = None
    names = {label for label, _ in scene}
    is_there = [any(n in label for label in names) for n in ("dog", "desk")]
    for label, b in scene:
        if "dog" in label and (all(is_there) or first is None):
            first = b
        if "desk" in label and (all(is_there) or second is None):
            second = b
        if first is not None and second is not None:
            break
    expected = sum(0.25 * b[4] for b in (first, second) if b is not None)
    found = depth(relation, dict(detections), np.zeros((500, 500)))
    assert found["official"] == pytest.approx(expected)


def counted(*pairs):
    objects, counts = zip(*pairs, strict=True)
    return Row("numeracy", 0, "", objects=objects, counts=counts)


def apart(count, score=0.9):
    return [box(40 * k, 0, 40 * k + 10, 10, score) for k in range(count)]


@given(asked=st.integers(1, 8), there=st.integers(0, 9))
def test_presence_is_a_half_and_the_exact_number_another(asked, there):
    found = compbench.numeracy(counted(("cup", asked)), {"cup": apart(there)})
    assert found == (0.5 if there else 0) + (0.5 if there == asked else 0)


def test_objects_share_one_point():
    found = compbench.numeracy(
        counted(("cup", 2), ("dog", 1), ("fish", 3)), {"cup": apart(2), "dog": apart(2)}
    )
    assert found == pytest.approx((1 + 0.5 + 0) / 3)


def test_detections_at_one_half_do_not_count():
    assert compbench.numeracy(counted(("cup", 1)), {"cup": apart(1, score=0.5)}) == 0


@pytest.mark.parametrize(
    "other",
    [
        box(0, 0, 100, 95),  # IoU 0.95
        box(10, 10, 20, 20),  # inside
        box(-50, -50, 200, 200),  # around
        box(95, 0, 200, 100),  # no overlap to speak of
    ],
)
def test_boxes_that_overlap_by_more_than_90_percent_are_one(other):
    boxes = {"cup": [box(0, 0, 100, 100), (*other[:4], 0.8, None)]}
    found = compbench.numeracy(counted(("cup", 1)), boxes)
    assert found == (0.5 if other[0] == 95 else 1)
    assert compbench.numeracy(counted(("cup", 1)), {**boxes, "mug": [CENTER]}) == found


def test_boxes_include_their_border():
    """9 of 10 pixels are 0.9 without the border, and 10 of 11 more than 0.9 with it."""
    boxes = {"cup": [box(0, 0, 10, 10), box(0, 0, 9, 10, 0.8)]}
    assert compbench.numeracy(counted(("cup", 1)), boxes) == 1
    boxes = {"cup": [box(0, 0, 10, 10), box(2, 2, 12, 12, 0.8)]}
    assert compbench.numeracy(counted(("cup", 1)), boxes) == 0.5


@pytest.mark.parametrize(
    ("name", "label"),
    [
        *(("boy", "person"), ("girl", "person"), ("man", "person"), ("woman", "person")),
        *(("ship", "boat"), ("painting", "picture"), ("goldfish", "fish")),
    ],
)
def test_names_that_the_detector_has_otherwise(name, label):
    assert compbench.numeracy(counted((name, 1)), {label: apart(1)}) == 1


def test_a_name_that_is_not_there_takes_labels_that_contain_it():
    boxes = {"street lamp": apart(1), "table lamp": apart(1)}
    assert compbench.numeracy(counted(("lamp", 2)), boxes) == 1
    # But not beside a label that is the name itself.
    assert compbench.numeracy(counted(("lamp", 2)), {**boxes, "lamp": apart(1)}) == 0.5


def test_labels_stay_taken_for_the_objects_that_follow():
    boxes = {"hot dog": apart(1)}
    assert compbench.numeracy(counted(("dog", 1), ("hot dog", 1)), boxes) == 0.5


def parse(text: str) -> Parse:
    words = [tuple(word.split("/")) for word in text.split()]
    return Parse(tuple((word, kind) for word, kind in words), ())


HAT = "The/DET red/ADJ hat/NOUN was/AUX on/ADP top/NOUN of/ADP the/DET {} ./PUNCT"


def test_complex_objects_are_the_nouns_around_the_preposition():
    found = parse(HAT.format("brown/ADJ coat/NOUN rack/NOUN"))
    assert compbench.complex_objects(found) == ("hat", "coat")
    side = "The/DET cat/NOUN is/AUX on/ADP the/DET left/ADJ of/ADP a/DET soft/ADJ mat/NOUN ./PUNCT"
    assert compbench.complex_objects(parse(side)) == ("cat", "mat")
    next_to = "The/DET Rex/PROPN sat/VERB next/ADV to/ADP it/PRON and/CCONJ trees/NOUN"
    assert compbench.complex_objects(parse(next_to)) == ("Rex", "trees")


def test_complex_objects_may_be_a_proper_name_whose_last_word_counts():
    found = parse(HAT.format("New/PROPN York/PROPN"))
    assert compbench.complex_objects(found) == ("hat", "York")


def test_complex_objects_are_two_or_none():
    assert compbench.complex_objects(parse("A/DET cat/NOUN sat/VERB ./PUNCT")) == (None, None)
    twice = "A/DET cat/NOUN near/ADP a/DET mat/NOUN near/ADP a/DET door/NOUN"
    assert compbench.complex_objects(parse(twice)) == (None, None)
    assert compbench.complex_objects(parse("near/ADP a/DET door/NOUN")) == (None, None)


def test_clip_reads_complex_prompts_without_adjectives():
    found = parse(HAT.format("brown/ADJ rack/NOUN"))
    assert compbench.without_adjectives(found) == "The hat was on top of the rack ."


def test_a_set_is_the_mean_over_its_images():
    rows = [Row("color", 0, ""), Row("color", 1, ""), Row("3d_spatial", 0, "")]
    scores = [
        compbench.score([0.5, 1.0]),
        compbench.score([0.0, None]),
        compbench.score([{"official": 0.25, "fixed": 0.75}, None]),
    ]
    found = compbench.summary(rows, scores)
    assert found["official/color"] == found["fixed/color"] == 0.5
    assert found["strict/official/color"] == 0.375
    assert found["official/3d_spatial"] == 0.25
    assert found["fixed/3d_spatial"] == 0.75
    assert found["strict/fixed/3d_spatial"] == 0.375
    assert math.isnan(compbench.summary(rows[:1], [compbench.score([None])])["official/color"])


@needs_files
@pytest.mark.parametrize("name", compbench.SETS)
def test_the_official_files(name):
    rows = compbench.read(FILES / "t2i_compbench", name)
    assert len(rows) == 300
    assert not any("\r" in r.prompt or "/" in r.prompt or "_" in r.prompt for r in rows)


@needs_files
def test_the_relations_and_parts_of_the_official_files():
    folder = FILES / "t2i_compbench"
    assert collections.Counter(r.relation for r in compbench.read(folder, "spatial")) == {
        **{"on the top of": 56, "on the right of": 56, "on the bottom of": 52},
        **{"on the left of": 51, "on side of": 37, "next to": 24, "near": 24},
    }
    assert collections.Counter(r.relation for r in compbench.read(folder, "3d_spatial")) == {
        **{"hidden": 115, "in front of": 102, "behind": 83},
    }
    parts = collections.Counter(r.parts for r in compbench.read(folder, "complex"))
    assert parts == {
        ("attribute", "spatial"): 58,
        ("attribute", "action"): 212,
        ("attribute", "spatial", "action"): 30,
    }
    numbers = collections.Counter(len(r.objects) for r in compbench.read(folder, "numeracy"))
    assert numbers == {1: 91, 2: 89, 3: 48, 4: 37, 5: 35}
