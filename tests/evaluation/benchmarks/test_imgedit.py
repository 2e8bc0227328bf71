"""ImgEdit-Bench: its lists and layout, the parsing of replies, and the averages."""

import collections
import hashlib
import json

import numpy as np
import pytest

from tests.evaluation.benchmarks.official import FILES, needs_files
from tests.evaluation.chat_server import ChatServer, images_of, prompt_of, said
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import judging, metrics
from univg_jax.evaluation.benchmarks import imgedit
from univg_jax.evaluation.scorers.endpoint import Endpoint, Reply
from univg_jax.images import png_bytes

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


def test_reads_edits_in_the_order_of_the_file(rows):
    assert [row.key for row in rows] == ["7", "12", "3", "5"]
    assert [row.edit_type for row in rows] == ["add", "adjust", "adjust", "add"]
    assert rows[1].prompts == ("Make it blue",)
    assert rows[0].source == "daily object/1.jpg"
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


def test_hard_edits_and_edits_in_a_row(tmp_path):
    write(tmp_path, {"1": {"id": "a.jpg", "prompt": "Remove it"}}, "UGE_edit.json")
    (hard,) = imgedit.read_uge(tmp_path, excerpt=True)
    assert (hard.edit_type, imgedit.image_files(hard)) == ("uge", ("1.png",))
    turns = {
        "1": {"id": "a.jpg", "turn1": "Add it", "turn2": "Move it", "turn3": "Remove it"},
        "2": {"id": "b.jpg", "turn1": "Add it", "turn2": "Move it"},
    }
    write(tmp_path, turns, "content_memory.json")
    three, two = imgedit.read_turns(tmp_path / "content_memory.json")
    assert three.prompts == ("Add it", "Move it", "Remove it")
    assert imgedit.image_files(two) == ("2_turn1.png", "2_turn2.png")


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
        (None, "missing_image", None, 1.0),
    ],
)
def test_what_has_no_score_is_left_out_or_the_least(rows, reply, outcome, official, strict):
    found = imgedit.score(rows[0], reply)
    assert found["official"].count.sum() == (official is not None)
    assert official is None or found["official"].value == official
    assert found["strict"].value == strict
    assert {name: found[name].value for name in judging.OUTCOMES if found[name].value} == {
        outcome: 1.0
    }


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
    assert (found["judged"], found["unparsed"]) == (3, 1)


def test_a_type_is_the_rounded_mean_of_rounded_replies():
    """By its definition, of many random replies."""
    rng = np.random.default_rng(0)
    names = [str(name) for name in rng.choice(list(imgedit.TYPES), 300)]
    rows = [imgedit.Row(i, str(i), name, ("x",), "a") for i, name in enumerate(names)]
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
    assert found["missing_image"] == 4


def test_hard_edits_have_one_mean():
    rows = [imgedit.Row(i, str(i), "uge", ("x",), "a") for i in range(3)]
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


def test_official_scripts_can_read_the_replies(rows):
    replies = [answered(GOOD), None, Reply(kind="failed", text="x"), answered("sorry")]
    assert json.loads(imgedit.official_replies(rows, replies)) == {"7": GOOD, "5": "sorry"}


# From pictures to numbers


@pytest.fixture
def folders(tmp_path, rows):
    """Sources of all edits, and results of all but the third."""
    sources, results = tmp_path / "sources", tmp_path / "results"
    for i, row in enumerate(rows):
        picture = np.full((4, 6, 3), 40 * i, np.uint8)
        (sources / row.source).parent.mkdir(parents=True, exist_ok=True)
        (sources / row.source).write_bytes(png_bytes(255 - picture))
        results.mkdir(exist_ok=True)
        if row.key != "3":
            (results / f"{row.key}.png").write_bytes(png_bytes(picture))
    prompts = imgedit.read_prompts(write(tmp_path, PROMPTS, "prompts.json"))
    return dict(sources=sources, results=results, prompts=prompts)


def test_from_pictures_to_numbers(monkeypatch, tmp_path, rows, folders):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def rule(request):
        if "blue" in prompt_of(request):
            return said(None, refusal="I will not")
        return GOOD if "hat" in prompt_of(request) else "sorry"

    with ChatServer(rule) as server:
        endpoint = Endpoint(url=server.url, model="m", cache=tmp_path / "answers")
        replies = imgedit.judge(endpoint, rows, **folders, quiet=True)
        found = imgedit.summary(rows, [imgedit.score(*pair) for pair in zip(rows, replies)])
        assert len(server.requests) == 3
        again = imgedit.judge(endpoint, rows[:2], **folders, quiet=True)
        assert again == replies[:2]
        assert len(server.requests) == 3
    first = next(request for request in server.requests if "hat" in prompt_of(request))
    assert prompt_of(first) == "Rate this add: Add a <b> hat!"
    assert [part["type"] for part in first["messages"][0]["content"]] == [
        *("text", "image_url", "image_url")
    ]
    assert images_of(first) == [
        ("data:image/png;base64", (folders["sources"] / "daily object/1.jpg").read_bytes()),
        ("data:image/png;base64", (folders["results"] / "7.png").read_bytes()),
    ]
    assert "temperature" not in first
    assert [found[name] for name in judging.OUTCOMES] == [1, 1, 1, 0, 1]
    assert found["official/mean_of_images"] == 4.33
    assert found["strict/mean_of_images"] == pytest.approx((4.33 + 3) / 4)


def test_a_source_that_is_not_there_is_one_line(tmp_path, rows, folders):
    (folders["sources"] / "animal/2.jpg").unlink()
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", model="m", cache=tmp_path / "answers")
    with pytest.raises(NotFoundError, match="expected the pictures of ImgEdit-Bench"):
        imgedit.judge(endpoint, rows[1:3], **folders, quiet=True)


@needs_files
def test_the_official_list():
    rows = imgedit.read(FILES / "imgedit")
    assert len(rows) == 737
    assert collections.Counter(row.edit_type for row in rows) == imgedit.TYPES
    assert rows[0].key == "1082"
