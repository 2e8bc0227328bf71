"""Benchmarks of text-to-image, each from a tiny file of its format to its numbers.

Images are plain: white ones are right and black ones are wrong. Rules stand for networks, and a
real server on this machine for the model that answers.
"""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.chat_server import ChatServer, images_of, prompt_of, with_tokens
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import BENCHMARKS, hpsv2, t2i_compbench
from univg_jax.evaluation.job import write_side_files
from univg_jax.evaluation.official import Official
from univg_jax.evaluation.score_files import score_images
from univg_jax.evaluation.scorers import PROTOCOLS
from univg_jax.evaluation.scorers.endpoint import Endpoint
from univg_jax.images import jpeg_bytes, png_bytes

RIGHT, WRONG = np.full((40, 40, 3), 255, np.uint8), np.zeros((40, 40, 3), np.uint8)


class Clip:
    """A cosine of 1 of white pictures and any text, and of 0 of black ones."""

    def image_embed(self, images):
        return np.array([[1.0, 0.0] if image.mean() > 127 else [0.0, 1.0] for image in images])

    def text_embed(self, texts):
        return np.array([[1.0, 0.0]] * len(texts))


def answer(request):
    """White pictures show all that is asked for, and are worth three quarters of yes."""
    ((_, content),) = images_of(request)
    is_white = np.asarray(Image.open(io.BytesIO(content))).mean() > 127
    text = prompt_of(request)
    if text.startswith("Write down"):
        return "HELLO world" if is_white else "No text recognized."
    if text.startswith("How many"):
        return with_tokens("two", [("two", np.log(0.5)), ("2", np.log(0.25))])
    word = "yes" if is_white else "no"
    return with_tokens(word, [(word, np.log(0.75)), ("no" if is_white else "yes", np.log(0.25))])


def table(columns, rows, separator=","):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)
    writer.writerows([columns, *rows])
    return text.getvalue()


def asked(item, number, parents, question):
    return [item, "a red fox", number, parents, "entity", "whole", "entity - whole (fox)", question]


DSG = (
    *("item_id", "text", "proposition_id", "dependency"),
    *("category_broad", "category_detailed", "tuple", "question_natural_language"),
)
QUESTIONS = [
    asked(item, number, parents, question)
    for item in ("vrd_1", "whoops_2")
    for number, parents, question in ((1, "0", "Is there a fox?"), (2, "1", "Is the fox red?"))
]
FILES = {
    "dsg": {"dsg-1k-anns.csv": table(DSG, QUESTIONS)},
    "dpg": {"dpg_bench.csv": table(DSG, QUESTIONS)},
    "geneval2": {
        "geneval2_data.jsonl": "".join(
            json.dumps(
                dict(
                    prompt=f"{k} foxes",
                    atom_count=3,
                    vqa_list=[["Is there a fox?", "Yes"], ["How many foxes are there?", "two"]],
                    skills=["object", "count"],
                )
            )
            + "\n"
            for k in range(2)
        )
    },
    "parti": {
        "PartiPrompts.tsv": table(
            ("Prompt", "Category", "Challenge", "Note"),
            [("a fox", "Animals", "Basic", "-"), ("a car", "Vehicles", "Basic", "-")],
            separator="\t",
        )
    },
    "hpsv2": {f"{style}.json": json.dumps(["a fox"]) for style in hpsv2.STYLES},
    "longtext": {
        "text_prompts.jsonl": "".join(
            json.dumps(
                dict(prompt_id=k, prompt="a sign", text=["Hello", "World"], category="sign")
                | dict(length="short")
            )
            + "\n"
            for k in (0, 3)
        )
    },
    "coco30k": {
        "captions_val2014.json": json.dumps(
            dict(annotations=[dict(image_id=k, id=k, caption=f"fox {k}") for k in range(2)])
        )
    },
    "t2i_compbench": {
        "color_val.txt": "a red fox\na blue fox\n",
        "spatial_val.txt": "a fox on the left of a car\na car on the right of a fox\n",
        "non_spatial_val.txt": "a fox is running\na fox sleeps\n",
        "parses.jsonl": "".join(
            json.dumps(dict(prompt=text, words=[["fox", "NOUN"]], phrases=[text])) + "\n"
            for text in ("a red fox", "a blue fox")
        ),
    },
}


def detect(image):
    if image.mean() < 127:
        return {}
    return {
        "fox": [(0.0, 0.0, 200.0, 400.0, 1.0, None)],
        "car": [(250.0, 0.0, 450.0, 400.0, 1.0, None)],
    }


@pytest.fixture
def scorers(tmp_path):
    with ChatServer(answer) as server:
        endpoint = Endpoint(
            url=server.url, model="rule", cache=tmp_path / "answers", attempts=1, backoff=0.01
        )
        yield dict(
            vqa=endpoint,
            judge=endpoint,
            clip=Clip(),
            detect=detect,
            inception=lambda images: np.array([[i.mean(), i[0, 0, 0] * 2.0] for i in images]),
        )


# The first row's images are right, the second's wrong.
NUMBERS = {
    "dsg": {"official/overall": 50, "fixed/relation": 100, "fixed/defying": 0, "unusable": 0},
    "dpg": {"fixed/overall": 50, "strict/overall": 50, "unusable": 0},
    "geneval2": {"am": 100 * (0 + 0 + 2 * 0.75) / 4, "tifa": 75},
    "parti": {"overall": 0.5, "category/Animals": 1, "challenge/Basic": 0.5, "missing": 0},
    "hpsv2": {"v2.1/average": 25, "v2.1/anime": 100, "v2.1/photo": 0},
    "hpsv2:weights=v2.0": {"v2.0/average": 25},
    "longtext:images=1": {"overall": 0.5, "category/sign": 0.5},
    "coco30k": {"clip": 0.5, "missing": 0},
    "t2i_compbench:set=spatial": {"official/spatial": 0.5, "missing/spatial": 0},
    "t2i_compbench:set=non_spatial": {"official/non_spatial": 0.5},
    "t2i_compbench:set=color,parses=PARSES": {"official/color": 0.5},
}
# geneval2: "yes" is in no spelling of the exact case but "yes": 0.75 of the white one's first
# question, and 0.5 + 0.25 of both second ones.
NUMBERS["geneval2"]["am"] = 100 * np.mean([(0.75 + 0.75) / 2, (0.25 + 0.75) / 2])
NUMBERS["t2i_compbench:set=color,parses=PARSES"]["official/color"] = (0.75 + 0.25) / 2


def write(folder, name):
    folder.mkdir(exist_ok=True)
    for file, content in FILES[name].items():
        (folder / file).write_text(content, newline="")
    return folder


def fill(bench, rows, folder):
    """White images of the first row, black ones of all others."""
    for k, request in enumerate(bench.requests(rows)):
        image = RIGHT if k == 0 else WRONG
        for name in request.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            is_jpeg = name.endswith(".jpg")
            content = jpeg_bytes(image, quality=90) if is_jpeg else png_bytes(image)
            (folder / name).write_bytes(content)
    write_side_files(bench, rows, folder)
    return folder


@pytest.mark.parametrize("spec", NUMBERS)
def test_from_the_official_file_to_the_numbers(spec, scorers, tmp_path):
    name = spec.partition(":")[0]
    data = write(tmp_path / "data", name)
    if name == "coco30k":
        for k in range(2):
            real = data / "val2014" / f"COCO_val2014_{k:012}.jpg"
            real.parent.mkdir(exist_ok=True)
            real.write_bytes(jpeg_bytes((RIGHT, WRONG)[k], quality=90))
    bench = open_benchmark(spec.replace("PARSES", str(data / "parses.jsonl")))
    rows = bench.read(data, excerpt=True)
    with pytest.raises(UserError, match=r"instead of .*--excerpt"):
        bench.read(data)
    folder = fill(bench, rows, tmp_path / "images")
    used = {need: scorers[need] for need in bench.needs}
    scored = score_images(bench, rows, folder, used)
    found = scored.summary(bench, rows)
    for number, value in NUMBERS[spec].items():
        assert found[number] == pytest.approx(value), number
    assert bench.primary in found
    assert bench.quality(scored.rows[0]) > bench.quality(scored.rows[1])
    if name == "coco30k":
        assert found["fid"] == pytest.approx(0, abs=2)  # of jpegs against pngs


def test_without_a_scorer_its_numbers_are_left_out(scorers, tmp_path):
    data = write(tmp_path / "data", "coco30k")
    bench = open_benchmark("coco30k")
    rows = bench.read(data, excerpt=True)
    folder = fill(bench, rows, tmp_path / "images")
    scored = score_images(bench, rows, folder, dict(clip=scorers["clip"]))
    assert scored.summary(bench, rows, without=["inception"]) == {"clip": 0.5, "missing": 0}


def test_replies_that_cannot_be_used_are_counted_and_never_scored(tmp_path):
    data = write(tmp_path / "data", "dsg")
    bench = open_benchmark("dsg")
    rows = bench.read(data, excerpt=True)
    folder = fill(bench, rows, tmp_path / "images")

    def rubbish(request):
        is_first = "red" in prompt_of(request)
        return (
            (400, {}, {"error": {"message": "content_filter", "code": "content_filter"}})
            if (is_first)
            else answer(request)
        )

    with ChatServer(rubbish) as server:
        endpoint = Endpoint(
            url=server.url, model="rule", cache=tmp_path / "answers", attempts=1, backoff=0.01
        )
        found = score_images(bench, rows, folder, dict(vqa=endpoint)).summary(bench, rows)
    assert found["unusable"] == 2
    assert found["fixed/overall"] == pytest.approx(25)  # of the first image, one of two


def test_a_prompt_without_a_parse_is_named(tmp_path, scorers):
    data = write(tmp_path / "data", "t2i_compbench")
    bench = open_benchmark("t2i_compbench")
    rows = bench.read(data, excerpt=True)
    folder = fill(bench, rows, tmp_path / "images")
    with pytest.raises(UserError, match="has no parse of 'a red fox': give parses=FILE"):
        score_images(bench, rows, folder, scorers)
    (data / "parses.jsonl").write_text('{"prompt": "a", "words": ["fox"], "phrases": []}')
    with pytest.raises(UserError, match="has no words with parts of speech in line 1"):
        t2i_compbench.read_parses(data / "parses.jsonl")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_holds_for_every_benchmark(name):
    bench = open_benchmark(name)
    assert bench.name == name
    if isinstance(bench, Official):
        assert set(bench.needs) <= set(PROTOCOLS)
        assert set(bench.scoring) <= set(bench.settings)
        assert json.loads(json.dumps(bench.settings)) is not None
        assert bench.primary
