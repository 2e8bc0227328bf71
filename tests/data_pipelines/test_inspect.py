import base64
import dataclasses
import html
import io
import re

import numpy as np
import pytest
from PIL import Image

from data_pipelines import inspect
from data_pipelines.collate import Collator
from data_pipelines.sources import MemorySource
from data_pipelines.tokenizer import TokenizedText
from univg_jax.batch import BatchShape
from univg_jax.settings import Config


def tokenize(text: str, num_tokens: int) -> TokenizedText:
    """Words as tokens."""
    filled = np.arange(num_tokens) < len(text.split())
    return TokenizedText(
        tokens=filled.astype(np.int32),
        text_mask=filled,
        identity_slot=np.zeros_like(filled),
        num_truncated=0,
    )


def make_config() -> Config:
    weights = dict(t2i=3.0, lg=1.0, pose=1.0)
    tasks = {
        name: dict(weight=weight, sources=("toy",), drop_text=0.0, drop_image=0.0, drop_both=0.0)
        for name, weight in weights.items()
    }
    tasks["lg"]["drop_text"] = 0.5
    data = dict(dir="memory", resolution=16, num_tokens=8, face_resolution=4, batch_size=4)
    return Config.of(dict(seed=0, name="toy & co", tasks=tasks, data=data))


def make_collator() -> Collator:
    return Collator(tokenizer=tokenize, shape=BatchShape.of(make_config().data))


def make_record(k: int) -> dict:
    joints = np.full((17, 3), 0.5, np.float32)
    joints[:, 0], joints[:, 2] = np.linspace(0.1, 0.9, 17), 1
    return dict(
        image=np.full((16, 16, 3), k, np.uint8),
        caption="a <b>pig</b> on grass",
        boxes=np.array([[0.25, 0.25, 0.75, 0.75]], np.float32),
        phrases=["pig"],
        masks=np.pad(np.ones((1, 4, 4), np.uint8), ((0, 0), (4, 8), (4, 8))),
        joints=joints,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("inspect") / "new" / "page.html"
    toy = MemorySource("toy", [make_record(k) for k in range(5)])
    inspect.write_inspection(
        make_config(), out, collator=make_collator(), num_examples=4, sources=dict(toy=toy)
    )
    return out.read_text()


def test_the_page_shows_each_task_and_needs_nothing_else(page):
    assert re.findall(r'<h2 id="(\w+)"', page) == ["t2i", "lg", "pose"]
    assert page.count("<article") == 12
    urls = re.findall(r'src="([^"]*)"', page)
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    assert not re.findall(r"https?://", page)
    for url in urls:
        Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).load()


def test_prompts_are_escaped_and_withheld_conditions_named(page):
    assert "toy &amp; co" in page
    prompts = [html.unescape(p) for p in re.findall(r'<p class="prompt">([^<]*)</p>', page)]
    assert prompts[:4] == ["<t2i> a <b>pig</b> on grass"] * 4
    for prompt, facts in zip(
        prompts[4:8], re.findall(r'<p class="facts">(.*)</p>', page)[4:8], strict=True
    ):
        assert (prompt == "<lg>") == ("without text" in facts)
        assert re.match(r"#\d+ · toy\[\d\] · \d tokens", facts)


def test_the_histogram_has_the_shares(page):
    shares = re.findall(r"([\d.]+)% of ([\d.]+)%", page)
    assert [expected for _, expected in shares] == ["60.0", "20.0", "20.0"]
    # 512 rows of a golden rotation: at most two rows off
    assert all(abs(float(realized) - float(expected)) < 0.5 for realized, expected in shares)


def test_it_says_how_far_it_is(tmp_path, capsys):
    toy = MemorySource("toy", [make_record(k) for k in range(5)])
    inspect.write_inspection(
        make_config(),
        tmp_path / "page.html",
        collator=make_collator(),
        num_examples=1,
        sources=dict(toy=toy),
    )
    assert f"{inspect.MIN_ROWS}/{inspect.MIN_ROWS}" in capsys.readouterr().err


def test_damaged_records_are_counted_and_fields_that_no_task_needs_may_be(tmp_path):
    config = dataclasses.replace(make_config(), tasks={"t2i": make_config().tasks["t2i"]})
    records = [make_record(k) for k in range(5)]
    records[2]["caption"] = ""
    records[3]["boxes"] = np.full((1, 4), np.nan, np.float32)  # nobody asked for it
    toy, out = MemorySource("toy", records), tmp_path / "page.html"
    inspect.write_inspection(config, out, collator=make_collator(), sources=dict(toy=toy))
    page = out.read_text()
    assert "1 cannot be used" in page
    assert set(re.findall(r"toy\[(\d)\]", page)) == {"0", "1", "3", "4"}


def test_the_page_may_go_to_a_bucket(bucket):
    toy = MemorySource("toy", [make_record(k) for k in range(5)])
    inspect.write_inspection(
        make_config(),
        str(bucket / "new" / "page.html"),
        collator=make_collator(),
        num_examples=1,
        sources=dict(toy=toy),
    )
    assert "toy &amp; co" in (bucket / "new" / "page.html").read_text()
