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
from univg_jax.evaluation.benchmarks import hpsv2, t2i_compbench
from univg_jax.evaluation.job import write_side_files
from univg_jax.evaluation.score_files import score_images, unreadable
from univg_jax.evaluation.scorers.endpoint import Endpoint
from univg_jax.images import jpeg_bytes, png_bytes, write_png

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
    yes = 0.75 if is_white else 0.25
    tokens = [("yes", np.log(yes)), ("No", np.log(1 - yes))]
    return with_tokens("yes" if is_white else "No", tokens)


def table(columns, rows, separator=","):
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=separator)
    writer.writerows([columns, *rows])
    return text.getvalue()


def asked(item, number, parents, question):
    return [item, "a red fox", number, parents, "entity", "whole", "entity - whole (fox)", question]


PARSED = ("color", "shape", "texture", "complex")  # sets of T2I-CompBench that need a grammar
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
        **{f"{name}_val.txt": "a red fox\r\na blue fox\r\n" for name in PARSED},
        "spatial_val.txt": "a fox on the left of a car\na car on the right of a fox\n",
        "3d_spatial_val.txt": "a fox in front of a tree\na fox behind a tree\n",
        "numeracy_val.txt": "a fox and two cars\ntwo foxes\n",
        "non_spatial_val.txt": "a fox is running\na fox sleeps\n",
        "new_objects.txt": "fox - foxes\ncar - cars",
        "complex_val_spatial.txt": "",
        "complex_val_action.txt": "a red fox\na blue fox",
        "parses.jsonl": "".join(
            json.dumps(dict(prompt=text, words=[["fox", "NOUN"]], phrases=[text])) + "\n"
            for text in ("a red fox", "a blue fox")
        ),
    },
}


class Detector:
    """White pictures have a fox on the left, a car on the right, and a tree where the fox is."""

    classes = ("fox", "car", "tree")

    def __call__(self, image):
        if image.mean() < 127:
            return {}
        left, right = (0.0, 0.0, 200.0, 400.0, 1.0, None), (250.0, 0.0, 450.0, 400.0, 1.0, None)
        return {"fox": [left], "car": [right], "tree": [(0.0, 0.0, 180.0, 300.0, 1.0, None)]}


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
            detect=Detector(),
            depth=lambda image: np.linspace(1, 0, len(image))[:, None] + np.zeros(image.shape[:2]),
            inception=lambda images: np.array([[i.mean(), i[0, 0, 0] * 2.0] for i in images]),
        )


CLIP = {"failures/missing": 0}
ASKED = {"failures/missing": 0, "failures/refused": 0, "failures/failed": 0}
COMPBENCH = ASKED | {"judged": 20, "failures/unparsed": 0, "failures/no_class": 0}


def compbench(name, value):
    return {f"official/{name}": value, f"fixed/{name}": value, f"strict/fixed/{name}": value}


# The first row's images are right, the second's wrong.
NUMBERS = {
    "dsg": {
        **{"official/overall": 50, "fixed/relation": 100, "fixed/defying": 0},
        **ASKED | {"judged": 4, "failures/entity": 2, "failures/attribute": 0},
    },
    "dpg": {
        # The official code does not read the first question, on which the second hangs.
        **{"official/overall": 0, "dropped": 1, "fixed/overall": 50, "strict/overall": 50},
        **ASKED | {"judged": 16, "failures/entity": 8},
    },
    # "No" and "yes" of 0.75 or 0.25, and 0.5 + 0.25 of both second questions.
    "geneval2": {
        **{"am": 100 * (0.75 + 0.5) / 2, "tifa": 75, "skill/object": 50, "skill/count": 75},
        **ASKED | {"judged": 4, "failures/object": 1, "failures/count": 0},
    },
    "parti": {"overall": 0.5, "category/Animals": 1, "challenge/Basic": 0.5, **CLIP},
    "hpsv2": {"v2.1/average": 25, "v2.1/anime": 100, "v2.1/photo": 0, **CLIP},
    "hpsv2:weights=v2.0": {"v2.0/average": 25},
    "longtext:images=1": {
        **{"overall": 0.5, "strict/overall": 0.5, "category/sign": 0.5},
        **ASKED | {"judged": 2},
    },
    "coco30k": {"clip": 0.5, **CLIP},
    **{f"t2i_compbench:set={name},parses=PARSES": compbench(name, 0.5) for name in PARSED[:3]},
    # Half of it is CLIP's cosine of 1 or 0.
    "t2i_compbench:set=complex,parses=PARSES": compbench("complex", (0.75 + 0.25 + 1) / 4),
    "t2i_compbench:set=spatial": compbench("spatial", 0.5),
    # Of a white picture: the fox and the tree are there, and the fox's mean depth is farther.
    "t2i_compbench:set=3d_spatial": {"fixed/3d_spatial": 0.25, "official/3d_spatial": 0.25},
    # The fox is there, and one car instead of two.
    "t2i_compbench:set=numeracy": compbench("numeracy", (0.5 + 0.25) / 2),
    "t2i_compbench:set=non_spatial": compbench("non_spatial", 0.5),
}
NUMBERS |= {s: v | COMPBENCH for s, v in NUMBERS.items() if s.startswith("t2i_compbench")}


def write(folder, name):
    folder.mkdir(exist_ok=True)
    for file, content in FILES[name].items():
        (folder / file).write_text(content, newline="")
    return folder


def write_real(folder, number):
    file = folder / "val2014" / f"COCO_val2014_{number:012}.jpg"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(jpeg_bytes((RIGHT, WRONG)[number], quality=90))


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
    for k in range(2):
        write_real(data, k)
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
    found = scored.summary(bench, rows, without=["inception"])
    assert found == {"clip": 0.5, "failures/missing": 0, "failures/unreadable": 0}


REFUSED = (400, {}, {"error": {"message": "no", "code": "content_filter"}})
WITHOUT_YES = with_tokens("maybe", [("maybe", -0.1)])


# About a white picture; and what is left: one of two questions, or nothing.
LOST = ("Is the fox red?", "Is there a fox? Answer in one word.", "a red fox?", "Write down")
UNUSABLE = {
    "dsg": ({"fixed/overall": 25}, 1),
    "dpg": ({"fixed/overall": 25}, 4),
    "geneval2": ({"am": 100 * ((0 + 0.75) / 2 + (0.25 + 0.75) / 2) / 2}, 1),
    "longtext:images=1": ({"overall": 0, "strict/overall": 0}, 1),
    "t2i_compbench:set=color,parses=PARSES": (
        {"official/color": 0.25, "strict/official/color": 0.125},
        10,
    ),
}


# Only T2I-CompBench needs a yes or a no: elsewhere any text is an answer.
KINDS = [(spec, kind) for spec in UNUSABLE for kind in ("refused", "failed")]


@pytest.mark.parametrize(("spec", "kind"), [*KINDS, ([*UNUSABLE][-1], "unparsed")])
def test_replies_that_cannot_be_used_are_counted_and_never_scored(spec, kind, tmp_path):
    name = spec.partition(":")[0]
    data = write(tmp_path / "data", name)
    bench = open_benchmark(spec.replace("PARSES", str(data / "parses.jsonl")))
    rows = bench.read(data, excerpt=True)
    folder = fill(bench, rows, tmp_path / "images")
    unusable = {"refused": REFUSED, "failed": (400, {}, b"no"), "unparsed": WITHOUT_YES}[kind]

    def rule(request):
        ((_, content),) = images_of(request)
        is_white = np.asarray(Image.open(io.BytesIO(content))).mean() > 127
        is_lost = prompt_of(request).startswith(LOST)
        return unusable if is_white and is_lost else answer(request)

    with ChatServer(rule) as server:
        endpoint = Endpoint(
            url=server.url, model="rule", cache=tmp_path / "answers", attempts=1, backoff=0.01
        )
        scored = score_images(bench, rows, folder, dict(vqa=endpoint, judge=endpoint))
    found = scored.summary(bench, rows)
    numbers, count = UNUSABLE[spec]
    for number, value in numbers.items():
        assert found[number] == pytest.approx(value), number
    assert found[f"failures/{kind}"] == count
    assert sum(found[f"failures/{k}"] for k in ("refused", "failed", "unparsed")) == count


@pytest.mark.parametrize("spec", NUMBERS)
def test_images_that_are_not_there_are_counted(spec, scorers, tmp_path):
    """Where none but one is there."""
    name = spec.partition(":")[0]
    data = write(tmp_path / "data", name)
    for k in range(2):
        write_real(data, k)
    bench = open_benchmark(spec.replace("PARSES", str(data / "parses.jsonl")))
    rows = bench.read(data, excerpt=True)
    folder = fill(bench, rows, tmp_path / "images")
    (folder / bench.requests(rows)[1].files[0]).unlink()
    used = {need: scorers[need] for need in bench.needs}
    found = score_images(bench, rows, folder, used).summary(bench, rows)
    questions = {"dsg": 2, "dpg": 8, "geneval2": 2}.get(name, 1)
    assert found["failures/missing"] == questions
    if "judged" in NUMBERS[spec]:
        assert found["judged"] == NUMBERS[spec]["judged"] - questions


def test_cells_of_a_grid_are_asked_about_one_by_one(scorers, tmp_path):
    data = write(tmp_path / "data", "dpg")
    bench = open_benchmark("dpg")
    rows = bench.read(data, excerpt=True)
    assert [request.cells for request in bench.requests(rows)] == [4, 4]
    for k, request in enumerate(bench.requests(rows)):
        grid = np.concatenate([np.concatenate([WRONG, RIGHT], 1), np.concatenate([RIGHT] * 2, 1)])
        write_png(tmp_path / "images" / request.files[0], grid if k == 0 else np.zeros_like(grid))
    scored = score_images(bench, rows, tmp_path / "images", dict(vqa=scorers["vqa"]))
    assert scored.rows[0]["fixed"].value == 0.75
    (tmp_path / "images" / "vrd_1.png").write_bytes(png_bytes(np.zeros((40, 42, 3), np.uint8)))
    found = score_images(bench, rows, tmp_path / "images", dict(vqa=scorers["vqa"]))
    assert found.summary(bench, rows)["failures/unreadable"] == 1
    (bad,) = unreadable(bench, bench.requests(rows), found.rows, tmp_path / "images").values()
    ((name, why),) = bad.items()
    assert name == "vrd_1.png"
    assert why.startswith("is no grid of DPG-Bench: 42 x 40 pixels")


def test_grids_may_have_any_format_that_the_official_code_takes(scorers, tmp_path):
    bench = open_benchmark("dpg")
    rows = bench.read(write(tmp_path / "data", "dpg"), excerpt=True)
    folder = tmp_path / "images"
    folder.mkdir()
    right = np.tile(RIGHT, (2, 2, 1))
    names = [request.files[0].removesuffix(".png") for request in bench.requests(rows)]
    (folder / f"{names[0]}.jpg").write_bytes(jpeg_bytes(right, quality=100))
    (folder / f"{names[1]}.webp").write_bytes(b"no picture")
    write_png(folder / f"{names[1]}.png", right)
    (folder / "dpg-bench_results.txt").write_text("0.5")
    numbers = score_images(bench, rows, folder, dict(vqa=scorers["vqa"])).summary(bench, rows)
    assert (numbers["failures/missing"], numbers["failures/unreadable"]) == (0, 0)


def test_real_pictures_may_be_statistics(scorers, tmp_path):
    """Of two images with the features (255, 510) and (0, 0)."""
    data = write(tmp_path / "data", "coco30k")
    spread = np.outer((255, 510), (255, 510)) / 2
    np.savez(tmp_path / "same.npz", mu=np.array([127.5, 255]), sigma=spread)
    np.savez(tmp_path / "moved.npz", mu=np.array([130.5, 259]), sigma=spread)
    options = {}
    for name, distance in {"same": 0, "moved": 9 + 16}.items():
        bench = open_benchmark(f"coco30k:stats={tmp_path / name}.npz")
        rows = bench.read(data, excerpt=True)
        folder = fill(bench, rows, tmp_path / "images")
        scored = score_images(bench, rows, folder, {"inception": scorers["inception"]})
        assert scored.summary(bench, rows)["fid"] == pytest.approx(distance, abs=1e-6)
        options[name] = bench.settings
    assert options["same"] != options["moved"]  # results of one are not those of the other
    with pytest.raises(UserError, match=r"no.npz does not exist: expected STATS.npz"):
        open_benchmark(f"coco30k:stats={tmp_path / 'no.npz'}")


def test_real_pictures_that_are_not_there_are_one_line(scorers, tmp_path):
    data = write(tmp_path / "data", "coco30k")
    bench = open_benchmark(f"coco30k:real={tmp_path / 'coco'}")
    rows = bench.read(data, excerpt=True)
    folder = fill(bench, rows, tmp_path / "images")
    with pytest.raises(UserError, match=r"coco/val2014/COCO_val2014_0+.jpg does not exist: exp"):
        score_images(bench, rows, folder, {"inception": scorers["inception"]})


def test_the_clip_of_hpsv2_is_given_pictures_in_its_way(tmp_path):
    data = write(tmp_path / "data", "hpsv2")
    bench, clip = open_benchmark("hpsv2"), Clip()
    rows = bench.read(data, excerpt=True)
    folder = fill(bench, rows, tmp_path / "images")
    clip.opened_with = {"preprocessing": "openai"}
    with pytest.raises(UserError, match="hpsv2 has preprocessing=hpsv2, but the scorer 'clip'"):
        score_images(bench, rows, folder, {"clip": clip})
    clip.opened_with = {"preprocessing": "hpsv2"}
    assert score_images(bench, rows, folder, {"clip": clip}).rows[0]["v2.1"].value == 100


def test_objects_for_which_a_detector_has_no_class_are_counted(scorers, tmp_path):
    data = write(tmp_path / "data", "t2i_compbench")
    bench = open_benchmark("t2i_compbench:set=numeracy")
    rows = bench.read(data, excerpt=True)
    folder = fill(bench, rows, tmp_path / "images")
    scorers["detect"].classes = ("fox", "cart")  # a name in a longer one is known
    found = score_images(bench, rows, folder, {"detect": scorers["detect"]}).summary(bench, rows)
    assert found["failures/no_class"] == 0
    scorers["detect"].classes = ("fox",)
    found = score_images(bench, rows, folder, {"detect": scorers["detect"]}).summary(bench, rows)
    assert found["failures/no_class"] == 1


def write_parses(folder, prompt):
    file = folder / "parses.jsonl"
    file.write_text(json.dumps(dict(prompt=prompt, words=[["fox", "NOUN"]], phrases=[prompt])))
    return file


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
    other = open_benchmark(f"t2i_compbench:set=shape,parses={write_parses(data, 'a red fox')}")
    again = open_benchmark(f"t2i_compbench:set=shape,parses={write_parses(data, 'a blue fox')}")
    assert other.settings != again.settings  # results of one are not those of the other
