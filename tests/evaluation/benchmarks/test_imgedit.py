"""ImgEdit-Bench: its lists and layout, the parsing of replies, and the averages."""

import collections
import hashlib
import json

import numpy as np
import pytest

from tests.evaluation import evaluation_cases as data
from tests.evaluation.benchmarks.official import FILES, needs_files
from tests.evaluation.benchmarks.picture_scorers import plain
from tests.evaluation.chat_server import ChatServer, images_of, prompt_of, said
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import judging, metrics
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import imgedit
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.score_files import score_images
from univg_jax.evaluation.scorers.chat import Reply
from univg_jax.evaluation.scorers.endpoint import Endpoint
from univg_jax.images import decode_rgb, write_png

EDITS = {
    "7": {"id": "daily object/1.jpg", "prompt": "Add a <b> hat", "edit_type": "add"},
    "12": {"id": "animal/2.jpg", "prompt": "Make it blue", "edit_type": "alter"},
    "3": {"id": "animal/2.jpg", "prompt": "Make it red", "edit_type": "adjust"},
    "5": {"id": "daily object/1.jpg", "prompt": "Add a cat", "edit_type": "add"},
}
PROMPTS = {name: f"Rate this {name}: <edit_prompt>!" for name in imgedit.TYPES}


def write(folder, value, name="basic_edit.json"):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.fixture
def rows(tmp_path):
    return imgedit.read(write(tmp_path, EDITS), excerpt=True)


def test_reads_edits_in_the_order_of_the_file(tmp_path, rows):
    assert [row.key for row in rows] == ["7", "12", "3", "5"]
    assert [row.edit_type for row in rows] == ["add", "adjust", "adjust", "add"]
    assert rows[1].prompt == "Make it blue"
    assert rows[0].source == str(tmp_path / "daily object/1.jpg")
    assert imgedit.image_files(rows[0]) == ("7.png",)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (EDITS, "has 4 edits instead of 737"),
        ({}, "has 0 edits instead of 737"),
        ([1], "is no JSON object"),
        ('{"1": ', "is torn, the file is not JSON"),
        ({"1": {"id": "a", "prompt": "b"}}, "has no edit in '1' (KeyError('edit_type'))"),
        ({"1": {"id": 3, "prompt": "b", "edit_type": "add"}}, "something else than text in '1'"),
        ({"1": 3}, "has no edit in '1'"),
        ({"../1": EDITS["7"]}, "in another folder in '../1'"),
        ({"1": {**EDITS["7"], "id": "../../secret.png"}}, "in another folder in '1'"),
        ({"1": {**EDITS["7"], "id": "/etc/passwd"}}, "in another folder in '1'"),
        ({"1": {**EDITS["7"], "edit_type": "stile"}}, "did you mean 'style'"),
    ],
)
def test_another_file_is_one_line(tmp_path, value, reason):
    with pytest.raises(UserError) as error:
        imgedit.read(write(tmp_path, value))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_hard_edits_have_no_type(tmp_path):
    write(tmp_path, {"1": {"id": "a.jpg", "prompt": "Remove it"}}, "UGE_edit.json")
    bench = open_benchmark("imgedit:suite=uge,pictures=/p")
    (hard,) = bench.read(tmp_path, excerpt=True)
    assert (hard.edit_type, imgedit.image_files(hard), hard.source) == (
        "uge",
        ("1.png",),
        "/p/a.jpg",
    )
    with pytest.raises(UserError, match="has 1 edits instead of 47"):
        bench.read(tmp_path)


def test_a_turn_edits_the_result_of_the_one_before(tmp_path):
    """An answer that halves what it is given, so that a file tells how often it was edited."""
    turns = {
        "1": {"id": "a.png", "turn1": "Add it", "turn2": "Move it", "turn3": "Remove it"},
        "2": {"id": "b.png", "turn1": "Add it", "turn2": "Move it"},
    }
    path = write(tmp_path, turns, "content_memory.json") / "content_memory.json"
    for name in ("a", "b"):
        write_png(tmp_path / f"{name}.png", plain((200, 200, 200)))
    bench, out = open_benchmark("imgedit:suite=multiturn"), tmp_path / "out"
    rows = bench.read(path)
    assert [row.prompt for row in rows[:3]] == ["Add it", "Move it", "Remove it"]
    answer = lambda batch, task: batch.source // 2  # noqa: E731
    generate(bench.requests(rows), out, answer=answer, collator=data.COLLATOR, batch_size=2)
    for name, level in {"1_turn1": 100, "1_turn3": 25, "2_turn2": 50}.items():
        assert (decode_rgb((out / f"{name}.png").read_bytes()) == level).all()
    (out / "2_turn2.png").unlink()
    found = score_images(bench, rows, out, {}).summary(bench, rows)
    assert found == {"made": 4 / 5, "failures/missing": 1.0, "failures/unreadable": 0.0}
    with pytest.raises(UserError, match="has no judge's prompts: people judge it"):
        open_benchmark(f"imgedit:suite=multiturn,prompts={path}")


def test_prompts_are_of_the_official_file(tmp_path):
    texts = {"alter" if name == "adjust" else name: text for name, text in PROMPTS.items()}
    write(tmp_path, texts, "prompts.json")
    prompts = imgedit.read_prompts(tmp_path)
    assert prompts["adjust"] == PROMPTS["adjust"]
    content = (tmp_path / "prompts.json").read_bytes()
    assert prompts.sha256 == hashlib.sha256(content).hexdigest()
    write(tmp_path, {"add": "x"}, "prompts.json")
    with pytest.raises(UserError, match=r"prompts.json has no prompt 'extract'"):
        imgedit.read_prompts(tmp_path)
    (tmp_path / "UGE_bench.py").write_text(
        'from openai import x\nprompt = """Rate <edit_prompt>."""'
    )
    assert imgedit.read_uge_prompts(tmp_path)["uge"] == "Rate <edit_prompt>."


# Replies

GOOD = "Brief reasoning: fine.\nPrompt Compliance: 5\nVisual Seamlessness: 4\nPhysical Detail: 4"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 4.33),
        ("  A: 4  \r\nB: 5", 4.5),
        ("Whatever: 77", 77.0),
        ("A: 1\nB: 1\nC: 2", 1.33),
        ("A: 2\nB: \uff14", 3.0),
        ("A: 4.\nB: 4/5\nC: **4**\nD:4", None),
        ("A: b: 4", None),
        ("**A: 4**", None),
        ("4", None),
        ("- A: 3", 3.0),
        ("Brief reasoning: natural. Score: 3 (Acceptable)", None),
        ("I'm sorry, I can't help with that.", None),
        ("A: 5\nB: \u00b2", None),
        ("", None),
        ("A: ", None),
        ("A: -1", None),
    ],
)
def test_a_line_of_a_label_and_digits_is_a_score(text, expected):
    assert imgedit.parse(text) == expected


def answered(text):
    return Reply(kind="answered", text=text)


@pytest.mark.parametrize(
    ("reply", "outcome", "official", "strict"),
    [
        (answered("A: 4\nB: 5"), "judged", 4.5, 4.5),
        (answered("sorry"), "unparsed", None, 1.0),
        (Reply(kind="refused", text="no"), "refused", None, 1.0),
        (Reply(kind="failed", text="HTTP 500"), "failed", None, 1.0),
        (None, "missing", None, 1.0),
    ],
)
def test_what_has_no_score_is_left_out_or_the_least(rows, reply, outcome, official, strict):
    found = imgedit.score(rows[0], reply)
    assert found["official"].count.sum() == (official is not None)
    assert official is None or found["official"].value == official
    assert found["strict"].value == strict
    column = outcome if outcome == "judged" else f"failures/{outcome}"
    names = judging.outcome_columns("judged")
    assert {name: found[name].value for name in names if found[name].value} == {column: 1.0}


def test_averages_of_types_and_of_images(rows):
    texts = ["A: 4\nB: 4\nC: 5", "A: 1", "sorry", "A: 2"]
    scores = [imgedit.score(row, answered(text)) for row, text in zip(rows, texts)]
    found = imgedit.summary(rows, scores)
    # 4.33 and 2 have the mean 3.165, whose nearest float is below it
    assert found["official/add"] == round((4.33 + 2.0) / 2, 2)
    assert found["official/adjust"] == 1.0
    assert found["official/mean_of_types"] == pytest.approx((found["official/add"] + 1) / 2)
    assert found["official/mean_of_images"] == pytest.approx((4.33 + 1 + 2) / 3)
    assert found["strict/adjust"] == 1.0
    assert found["strict/mean_of_images"] == pytest.approx((4.33 + 1 + 1 + 2) / 4)
    assert (found["judged"], found["failures/unparsed"]) == (3, 1)


def test_a_type_is_the_rounded_mean_of_rounded_replies():
    """By its definition, of many random replies."""
    rng = np.random.default_rng(0)
    names = [str(name) for name in rng.choice(list(imgedit.TYPES), 300)]
    rows = [imgedit.Row(str(i), name, "x", "a") for i, name in enumerate(names)]
    marks = [rng.integers(1, 6, rng.integers(0, 4)) for _ in rows]
    texts = ["\n".join(f"A: {mark}" for mark in some) for some in marks]
    scores = [imgedit.score(row, answered(text)) for row, text in zip(rows, texts)]
    by_type = collections.defaultdict(list)
    for name, some in zip(names, marks):
        if len(some):
            by_type[name].append(round(int(some.sum()) / len(some), 2))
    found = imgedit.summary(rows, scores)
    for name, values in by_type.items():
        assert found[f"official/{name}"] == round(sum(values) / len(values), 2)


def test_the_mean_of_nothing_is_no_number(rows):
    found = imgedit.summary(rows, [imgedit.score(row, None) for row in rows])
    assert np.isnan(found["official/mean_of_types"])
    assert found["strict/mean_of_types"] == 1.0
    assert found["failures/missing"] == 4


def test_hard_edits_have_one_mean():
    rows = [imgedit.Row(str(i), "uge", "x", "a") for i in range(3)]
    scores = [imgedit.score(row, answered(f"Score: {i + 3}")) for i, row in enumerate(rows)]
    found = imgedit.summary(rows, scores)
    assert found["official/mean"] == found["strict/mean"] == 4.0
    assert "official/mean_of_types" not in found


def test_shards_add_up(rows):
    """Rows travel as sums and counts."""
    texts = [GOOD, "A: 1", "sorry", "A: 2"]
    scores = [imgedit.score(row, answered(text)) for row, text in zip(rows, texts)]
    travelled = [
        {name: metrics.Ratio(ratio.total.copy(), ratio.count.copy()) for name, ratio in one.items()}
        for one in scores
    ]
    assert imgedit.summary(rows, travelled) == imgedit.summary(rows, scores)


# From pictures to numbers


@pytest.fixture
def folders(tmp_path):
    """The list with its sources, prompts, and results of all but the third edit."""
    write(tmp_path, EDITS)
    for i, (key, edit) in enumerate(EDITS.items()):
        picture = np.full((4, 6, 3), 40 * i, np.uint8)
        write_png(tmp_path / "sources" / edit["id"], 255 - picture)
        if key != "3":
            write_png(tmp_path / "results" / f"{key}.png", picture)
    write(tmp_path, PROMPTS, "prompts.json")
    return tmp_path


def bench_of(folder, **options):
    named = dict(pictures=folder / "sources", prompts=folder / "prompts.json") | options
    return open_benchmark("imgedit:" + ",".join(f"{k}={v}" for k, v in named.items()))


def endpoint(folder, url="http://127.0.0.1:9/v1"):
    return Endpoint(url=url, model="m", cache=folder / "answers", concurrency=2)


def test_from_pictures_to_numbers(monkeypatch, folders):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def rule(request):
        if "blue" in prompt_of(request):
            return said(None, refusal="I will not")
        return GOOD if "hat" in prompt_of(request) else "sorry"

    bench = bench_of(folders, temperature=0)
    rows = bench.read(folders, excerpt=True)
    with ChatServer(rule) as server:
        scorers = {"judge": endpoint(folders, server.url)}
        scored = score_images(bench, rows, folders / "results", scorers)
        found = scored.summary(bench, rows)
        assert len(server.requests) == 3
        again = score_images(bench, rows, folders / "results", scorers)
        assert again.summary(bench, rows) == found
        assert len(server.requests) == 3
    first = next(request for request in server.requests if "hat" in prompt_of(request))
    assert prompt_of(first) == "Rate this add: Add a <b> hat!"
    assert [part["type"] for part in first["messages"][0]["content"]] == [
        *("text", "image_url", "image_url")
    ]
    assert images_of(first) == [
        ("data:image/png;base64", (folders / "sources" / "daily object/1.jpg").read_bytes()),
        ("data:image/png;base64", (folders / "results" / "7.png").read_bytes()),
    ]
    assert first["temperature"] == 0
    assert {name: x for name, x in found.items() if name.startswith("failures/")} == {
        "failures/unparsed": 1,
        "failures/refused": 1,
        "failures/failed": 0,
        "failures/missing": 1,
        "failures/unreadable": 0,
    }
    assert found["official/mean_of_images"] == 4.33
    assert found["strict/mean_of_images"] == pytest.approx((4.33 + 3) / 4)
    assert [bench.quality(entry) for entry in scored.rows[:2]] == [
        4.33,
        pytest.approx(np.nan, nan_ok=True),
    ]


def test_hard_edits_are_judged_by_the_prompt_of_their_script(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    write(tmp_path, {"1": {"id": "a.png", "prompt": "Remove it"}}, "UGE_edit.json")
    (tmp_path / "UGE_bench.py").write_text('prompt = """Rate <edit_prompt>."""')
    write_png(tmp_path / "a.png", plain("red"))
    write_png(tmp_path / "out" / "1.png", plain("blue"))
    bench = open_benchmark(f"imgedit:suite=uge,prompts={tmp_path / 'UGE_bench.py'}")
    rows = bench.read(tmp_path, excerpt=True)
    with ChatServer(lambda request: "Reasons.\nScore: 3") as server:
        scorers = {"judge": endpoint(tmp_path, server.url)}
        found = score_images(bench, rows, tmp_path / "out", scorers).summary(bench, rows)
        assert server.prompts == ["Rate Remove it."]
    assert found[bench.primary] == 3


def test_what_is_generated_is_an_edit_of_the_source(folders):
    bench = bench_of(folders)
    rows = bench.read(folders, excerpt=True)
    requests = bench.requests(rows)
    assert requests[0].inputs["image"] == str(folders / "sources" / "daily object/1.jpg")
    answer = lambda batch, task: batch.source  # noqa: E731
    out = folders / "out"
    generate(requests, out, answer=answer, collator=data.COLLATOR, batch_size=2)
    assert (decode_rgb((out / "12.png").read_bytes()) == 255 - 80).all()


def test_the_hash_of_the_prompts_and_the_sampling_are_stored(folders):
    settings = json.loads(json.dumps(bench_of(folders).settings))
    content = (folders / "prompts.json").read_bytes()
    assert settings["prompts"] == hashlib.sha256(content).hexdigest()
    assert settings["suite"] == "basic"
    assert settings["sampling"]["temperature"] is None


def test_a_source_or_prompts_that_are_not_there_are_one_line(folders):
    (folders / "sources" / "animal/2.jpg").unlink()
    bench, scorers = bench_of(folders), {"judge": endpoint(folders)}
    rows = bench.read(folders, excerpt=True)[1:3]
    with pytest.raises(NotFoundError, match="expected the pictures of ImgEdit-Bench"):
        score_images(bench, rows, folders / "results", scorers)
    with pytest.raises(UserError, match="imgedit:prompts=FILE"):
        score_images(open_benchmark("imgedit"), rows, folders / "results", scorers)


@needs_files
def test_the_official_list():
    rows = imgedit.read(FILES / "imgedit")
    assert len(rows) == 737
    assert collections.Counter(row.edit_type for row in rows) == imgedit.TYPES
    assert rows[0].key == "1082"
