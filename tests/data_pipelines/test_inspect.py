"""The page of a config: an example of every task and source, and what a run would stumble on."""

import base64
import collections
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from data_pipelines import inspect, survey
from data_pipelines.build import write_dataset
from data_pipelines.collate import Collator
from data_pipelines.dataset_files import SKIPPED
from data_pipelines.sources import MemorySource, open_source
from data_pipelines.tokenizer import TokenizedText
from univg_jax.batch import BatchShape
from univg_jax.images import png_bytes
from univg_jax.settings import Config

HOSTILE = "<script>alert('pig')</script>"


@pytest.fixture(scope="module", autouse=True)
def _few_rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(survey, "MIN_ROWS", 48)
        yield


def tokenize(text: str, num_tokens: int) -> TokenizedText:
    """Words as tokens."""
    count = len(text.split())
    filled = np.arange(num_tokens) < count
    return TokenizedText(
        tokens=filled.astype(np.int32),
        text_mask=filled,
        identity_slot=np.zeros_like(filled),
        num_truncated=max(0, count - num_tokens),
    )


def make_config(name: str = "toy & co", **weights: float) -> Config:
    weights = weights or dict(t2i=3.0, lg=1.0, pose=1.0)
    tasks = {
        name: dict(weight=weight, sources=("toy",), drop_text=0.0, drop_image=0.0, drop_both=0.0)
        for name, weight in weights.items()
    }
    if "lg" in tasks:
        tasks["lg"]["drop_text"] = 0.5
        tasks["lg"]["sources"] = ("toy", "other")
    data = dict(dir="memory", resolution=16, num_tokens=8, face_resolution=4, batch_size=4)
    return Config.of(dict(seed=0, name=name, tasks=tasks, data=data, train=dict(steps=50)))


def make_collator() -> Collator:
    return Collator(tokenizer=tokenize, shape=BatchShape.of(make_config().data))


def make_record(k: int) -> dict:
    joints = np.full((1, 17, 3), 0.5, np.float32)
    joints[..., 0], joints[..., 2] = np.linspace(0.1, 0.9, 17), 1
    crowd = np.zeros((16, 16), np.uint8)
    crowd[:, :4] = 1
    return dict(
        image=np.full((16, 16, 3), k, np.uint8),
        caption="a <b>pig</b> on grass",
        boxes=np.array([[0.25, 0.25, 0.75, 0.75]], np.float32),
        phrases=["pig"],
        masks=np.pad(np.ones((1, 4, 4), np.uint8), ((0, 0), (4, 8), (4, 8))),
        joints=joints,
        ignore_mask=crowd,
    )


def inspect_toy(tmp_path, config=None, num_examples=1, **sources: list[dict]) -> str:
    """The page of a config on lists of records."""
    found = {name: MemorySource(name, records) for name, records in sources.items()}
    return inspect_sources(tmp_path, config, num_examples, **found)


def inspect_sources(tmp_path, config=None, num_examples=1, **sources) -> str:
    toy = MemorySource("toy", [make_record(k) for k in range(5)])
    out = tmp_path / "new" / "page.html"
    inspect.write_inspection(
        config or make_config(),
        out,
        collator=make_collator(),
        num_examples=num_examples,
        sources=dict(toy=toy, other=MemorySource("other", toy._items[:2])) | sources,
    )
    return out.read_text()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return inspect_toy(tmp_path_factory.mktemp("inspect"), num_examples=3)


def articles(page: str) -> list[str]:
    return re.findall("<article.*?</article>", page, re.DOTALL)


def figures(article: str) -> list[str]:
    return re.findall(r'<figure class="(\w+)', article)


def test_the_page_has_examples_of_every_task_and_source(page):
    assert re.findall(r'<h2 id="(\w+)"', page) == ["t2i", "lg", "pose"]
    shown = collections.Counter(
        (re.search("&lt;([^&]*)&gt;", article)[1], re.search(r" (\w+)\[\d\]", article)[1])
        for article in articles(page)
    )
    pairs = [("t2i", "toy"), ("lg", "toy"), ("lg", "other"), ("pose", "toy")]
    assert shown == dict.fromkeys(pairs, 3)


def test_it_needs_nothing_else(page):
    urls = re.findall(r'src="([^"]*)"', page)
    assert len(urls) == sum(len(figures(article)) for article in articles(page))
    for url in urls:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", url).groups()
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.format.lower() == kind
            picture.load()
    rest = re.sub(r'src="[^"]*"', "", page)
    assert not re.findall(r"https?:|//\w|url\(|@import|<link|<iframe|<object", rest)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', page))


def test_photos_are_jpeg_and_shrunk(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), dtype=np.uint8)
    page = inspect_toy(tmp_path, make_config(t2i=1.0), toy=[dict(image=noise, caption="noise")])
    assert re.findall("data:image/(jpeg|png)", page) == ["png", "jpeg"]  # target, record
    assert len(page) < 400_000


def test_rows_show_what_the_model_gets_and_the_labels(page):
    shown = {re.search("&lt;([^&]*)&gt;", a)[1]: a for a in articles(page)}
    assert figures(shown["t2i"]) == ["target", "record"]
    assert figures(shown["lg"]) == ["source", "target", "record"]
    assert figures(shown["pose"]) == ["source", "target", "record"]
    assert "75% counts in the loss" in shown["pose"]
    assert "1 person, 17 hidden joints hollow, ignored hatched" in shown["pose"]


def test_prompts_are_escaped_and_withheld_conditions_named(page):
    assert "toy &amp; co" in page
    rows = [
        (html.unescape(prompt), facts)
        for prompt, facts in re.findall(
            r'<p class="prompt">([^<]*)</p>\n<p class="facts">(.*)</p>', page
        )
    ]
    assert [prompt for prompt, _ in rows[:3]] == ["<t2i> a <b>pig</b> on grass"] * 3
    assert {prompt == "<lg>" for prompt, _ in rows[3:9]} == {True, False}
    for prompt, facts in rows[3:9]:
        assert (prompt == "<lg>") == ("without text" in facts)
        assert re.match(r"#\d+ · \w+\[\d\] ", facts)
        # The tokens of a text that is withheld are none that the model gets.
        assert (prompt != "<lg>") == bool(re.search(r"\d tokens", facts))


def test_nothing_that_a_dataset_says_is_markup(tmp_path):
    record = make_record(0) | dict(
        caption=HOSTILE, phrases=[HOSTILE], expressions=[HOSTILE], expression_masks=np.array([0])
    )
    bad = make_record(1) | dict(caption=HOSTILE, phrases=[""])
    page = inspect_toy(tmp_path, make_config(HOSTILE, lg=1, seg=1), toy=[record] * 8 + [bad])
    assert page.count(html.escape(HOSTILE, quote=False).replace("'", "&#39;")) > 4
    assert page.count("<script") == 1
    assert HOSTILE not in page


def test_it_shows_shares_buckets_prompts_and_what_is_cut(tmp_path):
    toy = [make_record(k) | dict(caption=f"pig {'grunts ' * (2 * k)}") for k in range(5)]
    page = inspect_toy(tmp_path, toy=toy)
    section = lambda name: re.search(f'id="{name}".*?</section>', page, re.DOTALL)[0]  # noqa: E731
    shares = re.findall(r"([\d.]+)% / ([\d.]+)%", section("mixture"))
    assert [weight for _, weight in shares] == ["60.0", "14.3", "5.7", "20.0"]
    # 200 rows of a golden rotation: at most two rows off
    assert all(abs(float(share) - float(weight)) <= 1 for share, weight in shares)
    assert "100.0% / 100.0%" in section("buckets")
    assert "16\u00d716" in section("buckets")
    assert "7 records" in section("buckets")
    # With a tag and "pig" lengths are 2, 4, 6, 8 and 10, and 8 is the limit.
    heights = re.findall(
        r'<div( class="cut")? style="height: ([\d.]+)%" title="(\d+)', section("lengths")
    )
    cut, whole = (
        {
            int(first)
            for is_cut, height, first in heights
            if bool(is_cut) == wanted and height != "0.0"
        }
        for wanted in (True, False)
    )
    assert whole >= {2, 4, 6, 8}
    assert max(whole) == 8
    assert min(cut) > 8
    assert re.search(r"t2i</a> toy.*?([\d.]+)% of \d+", section("cut"), re.DOTALL)[1] != "0.0"


def test_it_says_how_far_it_is(tmp_path, capsys):
    inspect_toy(tmp_path)
    assert "48/48" in capsys.readouterr().err


def test_damaged_records_are_counted_and_fields_that_no_task_needs_may_be(tmp_path):
    records = [make_record(k) for k in range(5)]
    records[2]["caption"] = ""
    records[3]["boxes"] = np.full((1, 4), np.nan, np.float32)  # nobody asked for it
    page = inspect_toy(tmp_path, make_config(t2i=1.0), num_examples=9, toy=records)
    assert "1 cannot be used" in page
    assert set(re.findall(r"toy\[(\d)\]", "".join(articles(page)))) == {"0", "1", "3", "4"}


def test_damaged_records_are_named_with_their_shard_key_and_reason(tmp_path):
    image = png_bytes(np.zeros((16, 16, 3), np.uint8))
    records = [dict(image=image, caption="" if k == 2 else f"pig {k}") for k in range(5)]
    write_dataset(tmp_path / "mine", dict(train=records))
    toy = open_source("mine", "train", data_dir=str(tmp_path))
    page = inspect_sources(tmp_path, make_config(t2i=1.0), toy=toy)
    (section,) = re.findall('<section class="panel quarantined">.*?</section>', page, re.DOTALL)
    (row,) = re.findall(r"<tr><td>(.*)</td></tr>", section)
    *place, reason = re.split("</td><td[^>]*>", row)
    shard, key = toy.where(2)
    assert place == ["mine/train", "2", shard, str(key), "t2i"]
    assert html.unescape(reason) == "field 'caption' is empty"


def test_a_source_of_which_nothing_can_be_used_is_shown_beside_the_others(tmp_path):
    broken = [make_record(k) | dict(phrases=[]) for k in range(5)]
    page = inspect_toy(tmp_path, other=broken)
    assert len(articles(page)) == 3
    assert "the run would end at lg from other" in page
    assert re.search(r"<h3.*other.*5 records in succession of other cannot serve task", page)


def test_what_the_build_left_out_is_listed(tmp_path):
    image = png_bytes(np.zeros((16, 16, 3), np.uint8))
    write_dataset(tmp_path / "mine", dict(train=[dict(image=image, caption="pig")] * 3))
    entries = [dict(split="train", key=f"pig{k}", reason=HOSTILE) for k in range(120)]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "mine" / SKIPPED).write_text(lines)
    toy = open_source("mine", "train", data_dir=str(tmp_path))
    page = inspect_sources(tmp_path, make_config(t2i=1.0), toy=toy)
    assert "mine/train: 120" in page
    keys = re.findall(r"<td>(pig\d+)</td>", page)
    assert keys == [f"pig{k}" for k in range(inspect.MAX_LISTED)]
    assert HOSTILE not in page


def test_the_page_may_go_to_a_bucket(bucket):
    toy = MemorySource("toy", [make_record(k) for k in range(5)])
    out = bucket / "new" / "page.html"
    inspect.write_inspection(
        make_config(t2i=1.0), str(out), collator=make_collator(), sources=dict(toy=toy)
    )
    assert "toy &amp; co" in out.read_text()
