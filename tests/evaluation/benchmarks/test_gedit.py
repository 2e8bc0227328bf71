"""GEdit-Bench: its data and layout, the parsing of replies, and the averages."""

import collections
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from tests.evaluation import evaluation_cases as data
from tests.evaluation.benchmarks.official import FILES, needs_files
from tests.evaluation.chat_server import ChatServer, images_of, prompt_of, said
from univg_jax import images
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import gedit
from univg_jax.evaluation.benchmarks.gedit import Settings, Verdict
from univg_jax.evaluation.job import generate, write_side_files
from univg_jax.evaluation.score_files import score_images
from univg_jax.evaluation.scorers.chat import Reply
from univg_jax.evaluation.scorers.endpoint import Endpoint

PROMPTS = '''
_context_no_delimit = """Context."""
_prompts_0shot_two_image_edit_rule = """Two images."""
_prompts_0shot_tie_rule_SC = """
Editing instruction: <instruction>
"""
_prompts_0shot_rule_PQ = """Quality."""
'''


def picture(seed, height=6, width=9):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def entry(seed, **changed):
    """A row of the data set, as Hugging Face writes it."""
    return {
        "key": f"{seed:032x}",
        "task_type": "subject-add",
        "instruction": f"Add number {seed}",
        "instruction_language": "en",
        "input_image": {"bytes": images.png_bytes(picture(seed)), "path": None},
        "input_image_raw": {"bytes": images.png_bytes(picture(seed, 12, 18)), "path": None},
        "Intersection_exist": seed % 2 == 0,
    } | changed


ENTRIES = [
    entry(0),
    entry(1, task_type="text_change"),
    entry(2, instruction="加上二", instruction_language="cn"),
    entry(0, instruction="Add another"),
]


def write_table(folder, entries=ENTRIES):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(entries), folder / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture
def rows(tmp_path):
    return gedit.read(write_table(tmp_path / "data"), excerpt=True)


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "vie_prompts.py").write_text(PROMPTS)
    return gedit.read_prompts(tmp_path)


def test_reads_the_data_set_in_a_language(tmp_path, rows):
    assert [(row.index, row.task, row.language, row.in_intersection) for row in rows] == [
        (0, "subject-add", "en", True),
        (1, "text_change", "en", False),
        (3, "subject-add", "en", True),
    ]
    (chinese,) = gedit.read(tmp_path / "data", Settings(language="cn"), excerpt=True)
    assert chinese.instruction == "加上二"
    zero = f"{0:032x}"
    assert gedit.image_files(rows[0]) == (f"fullset/subject-add/en/{zero}.png",)
    assert gedit.source_file(chinese) == f"fullset/subject-add/cn/{2:032x}_SRCIMG.png"


def test_rows_of_one_key_have_files_of_their_own(rows):
    zero = f"{0:032x}"
    assert gedit.image_files(rows[2]) == (f"fullset/subject-add/en/{zero}_2.png",)
    assert gedit.source_file(rows[2]) == f"fullset/subject-add/en/{zero}_2_SRCIMG.png"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (ENTRIES, "has 3 rows of language 'en' instead of 606"),
        ([], "has no rows"),
        ([entry(0, task_type="subject-ad")], "row 0: unknown task 'subject-ad'; did you mean"),
        ([entry(0, instruction_language="zh")], "row 0: unknown language 'zh'"),
        ([entry(0), entry(1, key="../up")], "row 1: the key '../up' is no plain name"),
        ([entry(0), entry(1, instruction=None)], "row 1: 'instruction' is null"),
        ([{"key": "a"}], "has no column 'task_type'"),
    ],
)
def test_other_data_is_one_line(tmp_path, entries, reason):
    path = tmp_path / "data"
    if entries:
        write_table(path, entries)
    else:
        path.mkdir()
        schema = pa.Table.from_pylist(ENTRIES).schema
        pq.write_table(pa.Table.from_pylist([], schema), path / "train.parquet")
    with pytest.raises(UserError) as error:
        gedit.read(path)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_the_language_is_that_of_the_data(tmp_path):
    with pytest.raises(UserError, match=r"gedit.language: unknown name 'zh'|'zh'.*en, cn"):
        open_benchmark("gedit:language=zh")
    path = write_table(tmp_path / "data", ENTRIES[:1])
    with pytest.raises(UserError, match="has no rows in cn"):
        open_benchmark("gedit:language=cn").read(path, excerpt=True)


def test_reads_the_list_of_uniworld(tmp_path):
    listed = {
        "ab": {
            "prompt": "Change it.",
            "id": "fullset/ps_human/en/ab.png",
            "edit_type": "ps_human",
        },
    }
    path = tmp_path / "gedit_edit.json"
    path.write_text(json.dumps(listed))
    (row,) = gedit.read(path, excerpt=True)
    assert (row.key, row.task, row.language, row.instruction) == (
        *("ab", "ps_human", "en", "Change it."),
    )
    assert row.in_intersection is None
    with pytest.raises(
        NotFoundError, match=r"ab\.png does not exist: expected a source of GEdit-B"
    ):
        row.source()
    images.write_png(tmp_path / "fullset/ps_human/en/ab.png", picture(5))
    np.testing.assert_array_equal(row.source(), picture(5))
    for value, reason in {
        "[]": "is no JSON object",
        '{"a": 3}': "has no edit in 'a'",
        json.dumps({"a": {**listed["ab"], "id": "../../x.png"}}): "is in another folder",
        json.dumps({"a": {**listed["ab"], "prompt": 3}}): "'prompt' is 3, a int: expected str",
    }.items():
        path.write_text(value)
        with pytest.raises(UserError, match=reason):
            gedit.read(path, excerpt=True)
    with pytest.raises(UserError, match="has no input_image_raw, only the pictures beside it"):
        gedit.read(path, Settings(picture="input_image_raw"), excerpt=True)


def test_sources_are_written_once_where_the_official_layout_has_them(tmp_path, rows):
    bench, out = open_benchmark("gedit"), tmp_path / "out"
    write_side_files(bench, rows, out)
    for row, seed in zip(rows, (0, 1, 0)):
        written = images.decode_rgb((out / gedit.source_file(row)).read_bytes())
        np.testing.assert_array_equal(written, picture(seed))
    (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
    write_side_files(bench, rows, out)  # reads nothing


@pytest.mark.parametrize("column", gedit.PICTURES)
def test_what_is_generated_is_an_edit_of_either_picture(tmp_path, rows, column):
    bench, out = open_benchmark(f"gedit:picture={column}"), tmp_path / "out"
    rows = bench.read(tmp_path / "data", excerpt=True)
    size = (6, 9) if column == "input_image" else (12, 18)
    assert bench.requests(rows)[0].inputs["image"]().shape[:2] == size
    answer = lambda batch, task: batch.source // 2  # noqa: E731
    generate(bench.requests(rows), out, answer=answer, collator=data.COLLATOR, batch_size=2)
    assert all((out / gedit.image_files(row)[0]).exists() for row in rows)
    assert bench.settings["picture"] == column
    np.testing.assert_array_equal(rows[1].source(), picture(1))


def test_prompts_are_put_together_from_the_official_file(prompts):
    assert prompts["SC"] == "Context.\nTwo images.\n\nEditing instruction: <instruction>\n"
    assert prompts["PQ"] == "Context.\nQuality."


def test_a_file_without_a_prompt_is_one_line(tmp_path):
    (tmp_path / "vie_prompts.py").write_text(PROMPTS.replace("_rule_PQ", "_rule_PR"))
    with pytest.raises(UserError, match="no prompt '_prompts_0shot_rule_PQ'; did you mean"):
        gedit.read_prompts(tmp_path)


# Replies


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score": [7, 9], "reasoning": "fine"}', 7),
        ('```json\n{"score" : [7,\n 9],\n "reasoning" : "a {b} c"}\n```', 7),
        ('{"score": 6}', 6),
        ('{"score": 6.5, "reasoning": ""}', 6.5),
        ('Here: ||V^=^V||\n{"score": [3]}\n||V^=^V|| {"score": [9]}', 3),
        ('||V^=^V|| {"score": [3]}', 3),
        ("The scores are [8, 5].", 5),
        ("[8,5]", 5),
        ("[11, 12]", 11),
        (" 7\n", 7),
        ("0", 0),
        ("10", 10),
        ('{"score": [12, 30]}', 12),
        ("11", None),
        ("-1", None),
        ("7.5", None),
        ("[8,  5]", None),
        ("[8]", None),
        ("[8, 5, 3]", None),
        ("[a] and [8, 5]", None),
        ("{score: [8, 5]}", None),
        ('{"score": [8, 5], "reasoning": "he said "no""}', None),
        ('{"score": []}', None),
        ('{"score": ["8", 5]}', None),
        ('{"score": [true]}', None),
        ('{"score": [NaN, 5]}', None),
        ('{"score": [1e999]}', None),
        (f'{{"score": {"9" * 400}}}', None),
        ('{"score": null}', None),
        ('{"scores": [8]}', None),
        ("[1, 2] {", 1),
        ("} [1, 2] {", None),
        ("||V^=^V||||V^=^V||", None),
        ("||V^=^V||[1, 2]||V^=^V||", None),
        ('{"a":' * 5000 + "1" + "}" * 5000, None),
        ("I'm sorry, but I can't assist with that request.", None),
        ("", None),
    ],
)
def test_the_least_score_of_a_reply(text, expected):
    assert gedit.parse(text) == expected


def answered(*texts):
    return [Reply(kind="answered", text=text) for text in texts]


def test_a_pair_of_replies_has_one_verdict():
    good = gedit.verdict_of(answered("[8, 5]", '{"score": [6, 9]}'))
    assert (good.outcome, good.sc, good.pq) == ("judged", 5, 6)
    assert gedit.verdict_of(answered("[8, 5]", "sorry")).outcome == "unparsed"
    assert gedit.verdict_of(answered("[8, 5]", '{"score": [-6]}')).outcome == "unparsed"
    refused, failed = Reply(kind="refused", text=""), Reply(kind="failed", text="")
    assert gedit.verdict_of([*answered("sorry"), refused]).outcome == "refused"
    assert gedit.verdict_of([failed, refused]).outcome == "failed"


# Averages


def test_scores_of_an_edit(rows):
    found = gedit.score(rows[0], Verdict("judged", 4.0, 9.0))
    assert [found[f"official/{name}"].value for name in gedit.METRICS] == [4, 9, 6]
    assert found["strict/O"].value == 6
    lost = gedit.score(rows[0], Verdict("refused"))
    assert [lost[f"strict/{name}"].value for name in gedit.METRICS] == [0, 0, 0]
    assert not any(lost[f"official/{name}"].count.sum() for name in gedit.METRICS)
    assert set(found) == set(lost)


def test_means_are_over_tasks_and_not_over_images():
    """By their definition, of random verdicts, in both languages and in the intersection."""
    rng = np.random.default_rng(1)
    tasks = [*gedit.TASKS, *rng.choice(gedit.TASKS, 100)]
    rows = [
        gedit.Row(i, str(i), str(task), language, "x", in_intersection=bool(i % 3) or i < 11)
        for language in gedit.LANGUAGES
        for i, task in enumerate(tasks)
    ]
    verdicts = [
        Verdict("judged", *map(float, rng.integers(0, 11, 2)))
        if row.index < 11 or rng.random() < 0.9
        else Verdict("missing")
        for row in rows
    ]
    found = gedit.summary(rows, [gedit.score(*pair) for pair in zip(rows, verdicts)])
    for language in gedit.LANGUAGES:
        for name in ("full", "intersection"):
            chosen = [
                (row.task, verdict)
                for row, verdict in zip(rows, verdicts)
                if row.language == language and (name == "full" or row.in_intersection)
            ]
            means = []
            for task in gedit.TASKS:
                judged = [v for t, v in chosen if t == task and v.outcome == "judged"]
                means.append(np.mean([(v.sc, v.pq, math.sqrt(v.sc * v.pq)) for v in judged], 0))
            expected = np.mean(means, axis=0)
            got = [found[f"official/{language}/{name}/{metric}"] for metric in gedit.METRICS]
            np.testing.assert_allclose(got, expected, rtol=1e-12)
            assert found[f"official/{language}/{name}/O/ps_human"] == pytest.approx(
                means[gedit.TASKS.index("ps_human")][2]
            )
            assert found[f"strict/{language}/{name}/O"] < expected[2]
    assert found["failures/missing"] == sum(v.outcome == "missing" for v in verdicts)


def test_a_task_without_a_score_has_no_mean(rows):
    verdicts = [Verdict("judged", 4.0, 4.0), *[Verdict("failed")] * 2]
    found = gedit.summary(rows, [gedit.score(*pair) for pair in zip(rows, verdicts)])
    assert math.isnan(found["official/en/full/O"])
    assert found["official/en/full/O/subject-add"] == 4
    assert math.isnan(found["official/en/full/O/text_change"])
    assert found["strict/en/full/O/text_change"] == 0
    assert found["strict/en/full/O/subject-add"] == 2


def test_without_an_intersection_there_is_no_mean_of_it():
    row = gedit.Row(0, "a", "ps_human", "en", "x")
    found = gedit.summary([row], [gedit.score(row, Verdict("judged", 4.0, 4.0))])
    assert not any("intersection" in name or "cn" in name for name in found)


# From pictures to numbers


@pytest.fixture
def results(tmp_path, rows):
    """Results of other sizes than the sources, where the official layout has them."""
    out = tmp_path / "out"
    for row in rows:
        images.write_png(out / gedit.image_files(row)[0], picture(100 + row.index, 10, 10))
    return out


@pytest.fixture
def judged(monkeypatch, tmp_path, rows, prompts, results):
    """The scores and the summary by a judge that follows a rule, and the requests it had."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def judged(rule, rows=rows, again=False, concurrency=4, **options):
        named = dict(prompts=tmp_path / "vie_prompts.py") | options
        bench = open_benchmark("gedit:" + ",".join(f"{k}={v}" for k, v in named.items()))
        with ChatServer(rule) as server:
            endpoint = Endpoint(
                url=server.url, model="m", cache=tmp_path / "answers", concurrency=concurrency
            )
            for _ in range(1 + again):
                scored = score_images(bench, rows, results, {"judge": endpoint})
        return scored.rows, scored.summary(bench, rows), server.requests

    return judged


def resized(seed):
    return np.asarray(Pillow.fromarray(picture(100 + seed, 10, 10)).resize((9, 6)))


def numbers(entry):
    return [entry[f"official/{name}"].value for name in gedit.METRICS]


def test_from_pictures_to_numbers(judged, prompts):
    def rule(request):
        if "Quality" in prompt_of(request):
            return '{"score": [9, 8]}'
        return "[2, 3]" if "number 0" in prompt_of(request) else '{"score": [7, 6]}'

    scores, found, asked = judged(rule, again=True)
    assert len(asked) == 6
    assert [numbers(entry) for entry in scores] == [[2, 8, 4], *[[6, 8, math.sqrt(48)]] * 2]
    assert found["official/en/full/SC/subject-add"] == 4
    assert found["judged"] == 3
    sc = next(request for request in asked if "number 1" in prompt_of(request))
    assert prompt_of(sc) == prompts["SC"].replace("<instruction>", "Add number 1")
    assert sc["max_tokens"] == 1400
    assert "temperature" not in sc
    assert [part["type"] for part in sc["messages"][0]["content"]] == [
        *("text", "image_url", "image_url")
    ]
    shown = [images.jpeg_bytes(p, quality=75) for p in (picture(1), resized(1))]
    assert images_of(sc) == [("data:image/jpeg;base64", jpeg) for jpeg in shown]
    pq_requests = [r for r in asked if "Quality" in prompt_of(r)]
    assert [len(images_of(request)) for request in pq_requests] == [1] * 3
    assert images_of(pq_requests[0])[0][1] in [
        images.jpeg_bytes(resized(i), quality=75) for i in (0, 1, 3)
    ]


def test_the_other_official_judge_is_shown_png_first(judged, rows):
    _, _, asked = judged(lambda request: "[2, 3]", rows[:1], judge="qwen2.5-vl-72b")
    request = next(r for r in asked if "Quality" not in prompt_of(r))
    assert [part["type"] for part in request["messages"][0]["content"]][-1] == "text"
    assert (request["temperature"], request["max_tokens"]) == (0.0, 512)
    np.testing.assert_array_equal(images.decode_rgb(images_of(request)[1][1]), resized(0))


def test_both_are_asked_once_more_where_one_does_not_parse(judged, rows):
    times = collections.Counter()

    def rule(request):
        times[prompt_of(request)] += 1
        if "Quality" in prompt_of(request):
            return f"[{times[prompt_of(request)]}, 9]"
        if "number 1" in prompt_of(request):
            return "sorry"
        return "sorry" if times[prompt_of(request)] == 1 else "[4, 5]"

    (good, bad), found, asked = judged(rule, rows[:2], again=True, concurrency=1)
    assert len(asked) == 8
    assert numbers(good) == [4, 2, math.sqrt(8)]
    assert bad["failures/unparsed"].value == 1
    assert (found["judged"], found["failures/unparsed"]) == (1, 1)


def test_how_items_end_is_counted(judged, rows, results, caplog):
    (results / gedit.image_files(rows[2])[0]).unlink()

    def rule(request):
        if "number 0" in prompt_of(request):
            return said(None, refusal="I will not")
        return (400, {}, b"no") if "number 1" in prompt_of(request) else "[1, 2]"

    _, found, _ = judged(rule)
    assert {name: found[name] for name in found if name.startswith("failures/")} == {
        "failures/unparsed": 0,
        "failures/refused": 1,
        "failures/failed": 1,
        "failures/missing": 1,
        "failures/unreadable": 0,
    }
    assert "3 of 3 judgments have no score" in caplog.text


def test_without_prompts_there_is_no_score(tmp_path, rows, results):
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", model="m", cache=tmp_path / "answers")
    with pytest.raises(UserError, match="gedit:prompts=FILE"):
        score_images(open_benchmark("gedit"), rows, results, {"judge": endpoint})


def test_settings_are_stored(tmp_path, prompts):
    bench = open_benchmark(f"gedit:language=cn,prompts={tmp_path / 'vie_prompts.py'}")
    stored = json.loads(json.dumps(bench.settings))
    assert (stored["language"], stored["prompts"]) == ("cn", prompts.sha256)
    assert stored["sampling"]["quality"] == 75
    assert bench.primary == "official/cn/full/O"
    assert {entry.metric for entry in bench.published} == {bench.primary}


@needs_files
def test_the_list_of_uniworld():
    rows = gedit.read(FILES / "gedit" / "gedit_edit.json")
    assert len(rows) == 604
    assert collections.Counter(row.task for row in rows) == {
        **dict.fromkeys(gedit.TASKS, 40),
        **{"ps_human": 70, "style_change": 60, "subject-add": 60, "subject-replace": 60},
        **{"subject-remove": 55, "text_change": 99},
    }
    assert {row.language for row in rows} == {"en"}
    listed = json.loads((FILES / "gedit" / "gedit_edit.json").read_text()).values()
    assert [gedit.image_files(row) for row in rows] == [(entry["id"],) for entry in listed]
