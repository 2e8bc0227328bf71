"""A public benchmark from its files to its numbers: nothing twice, and alike on any devices."""

import collections
import dataclasses
import html
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests import processes
from tests.evaluation import evaluation_cases as data
from tests.evaluation.benchmarks.official import FILES, needs_files
from tests.evaluation.benchmarks.test_geneval import write
from tests.evaluation.test_score_files import SCORERS, picture
from tests.evaluation.tiny_pipeline import answering, make_pipeline
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import geneval
from univg_jax.evaluation.benchmarks.geneval import BENCHMARK, read
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.official import Request
from univg_jax.evaluation.public import PublicJob
from univg_jax.evaluation.report import write_page
from univg_jax.evaluation.scorecard import Scorecard
from univg_jax.images import write_png
from univg_jax.pipeline import Pipeline

TOKENS = {}


def tokenize(text, num_tokens):
    """As `data.tokenize`, but other texts have other tokens."""
    number = TOKENS.setdefault(text, len(TOKENS) + 1)
    tokenized = data.tokenize(text, num_tokens)
    return dataclasses.replace(tokenized, tokens=tokenized.tokens * 10 + number)


@pytest.fixture(scope="module")
def model(pipeline) -> Pipeline:
    collator = dataclasses.replace(pipeline.collator, tokenizer=tokenize)
    return answering(dataclasses.replace(pipeline, collator=collator))


def job(tmp_path, **options) -> PublicJob:
    rows = read(write(tmp_path), excerpt=True)
    options = dict(benchmark=BENCHMARK, scorers=SCORERS, batch_size=8) | options
    return PublicJob(rows=rows, out=tmp_path / "out", **options)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pixels(folder):
    return {
        str(p.relative_to(folder)): np.asarray(Image.open(p)).astype(int)
        for p in sorted(folder.rglob("*.png"))
    }


def test_images_numbers_and_all_that_is_needed_to_repeat_them(model, tmp_path):
    done = job(tmp_path, settings={"parameters": "ema"})(model)
    card = Scorecard.read(done.folder)
    assert card.numbers == done.numbers
    assert card.numbers["failures/missing"] == 0
    assert done.text.startswith("overall")
    settings = card.settings
    assert (settings["step"], settings["parameters"], settings["weights"]) == (7, "ema", "abc")
    assert (settings["seed"], settings["rows"], settings["without"]) == (0, 4, [])
    assert set(settings["guidance"]) == {"t2i"}
    assert {"solver", "steps", "items", "scorers", "version"} <= set(settings)
    assert {"checkpoint", "date", "revision", "machine"} <= set(card.provenance)
    images = card.images_at(done.folder)
    assert len(pixels(pathlib.Path(images))) == 4 * geneval.IMAGES
    assert (images / "00001" / "metadata.jsonl").is_file()
    assert [case["prompt"] for case in card.cases["first"]][1] == "two cups"
    assert all((images / name).is_file() for c in card.cases["first"] for name in c["files"])
    lines = [json.loads(line) for line in (done.folder / "scores.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    assert lines[0]["file"] == "00000/samples/0000.png"


def test_what_is_finished_is_not_made_again(model, tmp_path, monkeypatch):
    part = job(tmp_path, limit=2)(model)
    whole = job(tmp_path)(model)
    assert part.folder != whole.folder
    assert len(list((tmp_path / "out").glob("geneval-images-*"))) == 1
    (images,) = (tmp_path / "out").glob("geneval-images-*")
    before = files(images)
    monkeypatch.setattr(Pipeline, "generate_batch", None)
    assert job(tmp_path)(model).numbers == whole.numbers
    assert files(images) == before


@pytest.mark.parametrize("change", [dict(seed=1), dict(settings={"parameters": "params"})])
def test_images_of_other_settings_lie_beside(model, tmp_path, change):
    job(tmp_path, only="generate")(model)
    done = job(tmp_path, only="generate", **change)(model)
    assert len(list((tmp_path / "out").glob("geneval-images-*"))) == 2
    assert done.numbers == {}


def test_scores_of_a_folder_that_somebody_made(tmp_path):
    folder = tmp_path / "theirs"
    for request in BENCHMARK.requests(job(tmp_path).rows):
        for name in request.files:
            write_png(folder / name, picture("cup", "cow"))
    done = job(tmp_path, images=folder)(None)
    assert done.numbers["overall"] == 0.75
    (folder / "00000" / "samples" / "0000.png").unlink()
    again = job(tmp_path, images=folder)(None)
    # A folder of others may change: it is scored each time.
    assert again.numbers["failures/missing"] == 1
    assert Scorecard.read(again.folder).images_at(again.folder) == folder


def test_a_folder_of_the_official_generator_is_scored(tmp_path):
    """Its names have five digits; any number of images counts, each as much as the others."""
    folder = tmp_path / "theirs"
    rows = job(tmp_path).rows
    for row in rows:
        place = folder / f"{row.index:05}"
        for k in range(8):  # the last six are gray, which is nothing
            what = picture("cup", "cow") if k < 2 else np.full((16, 16, 3), 128, np.uint8)
            write_png(place / "samples" / f"{k:05}.png", what)
        (place / "grid.png").touch()
        (place / "metadata.jsonl").write_text(row.metadata)
    done = job(tmp_path, images=folder)(None)
    assert done.numbers["overall"] == pytest.approx(0.75 * 2 / 8)
    assert done.numbers["failures/missing"] == 0
    (folder / "00000" / "metadata.jsonl").write_text(rows[1].metadata)
    with pytest.raises(UserError, match=r"metadata.jsonl is about 'two cups': expected 'a cow'"):
        job(tmp_path, images=folder)(None)


def test_results_of_others_say_what_was_judged_and_by_which_code(tmp_path):
    folder = tmp_path / "theirs"
    rows = job(tmp_path).rows
    for request in BENCHMARK.requests(rows):
        for name in request.files:
            write_png(folder / name, picture("cup", "cow"))
    done = job(tmp_path, images=folder)(None)
    other = dataclasses.replace(rows[0], include=rows[3].include)
    changed = dataclasses.replace(job(tmp_path, images=folder), rows=(other, *rows[1:]))(None)
    assert changed.folder != done.folder
    assert {"date", "revision", "version"} <= set(Scorecard.read(done.folder).provenance)


def test_no_items_are_one_line(tmp_path):
    with pytest.raises(UserError, match="geneval has no item left with these settings"):
        dataclasses.replace(job(tmp_path), rows=())


def test_pictures_that_cannot_be_read_are_counted_and_named(tmp_path):
    folder = tmp_path / "theirs"
    for k in range(4):
        write_png(folder / "00001" / "samples" / f"{k:04}.png", picture("cup", "cow"))
    (folder / "00001" / "samples" / "0002.png").write_bytes(b"no picture")
    card = Scorecard.read(job(tmp_path, images=folder)(None).folder)
    assert card.numbers["failures/unreadable"] == 1
    assert card.numbers["failures/missing"] == 3 * 4 + 1
    (case,) = card.cases["unreadable"]
    assert case["prompt"] == "two cups"
    ((file, why),) = case["reasons"].items()
    assert file == "00001/samples/0002.png"
    assert why.startswith("is not a readable image")
    write_page(tmp_path / "page.html", [tmp_path / "out"])
    assert f"<li>{file} {why}" in html.unescape((tmp_path / "page.html").read_text())


def test_images_of_other_pictures_lie_beside(model, tmp_path):
    """Also if they have the names of the first ones."""
    file = tmp_path / "pictures" / "0.png"
    inputs = dict(image=file, prompt="make it snow")
    edit = Request(index=0, task="ie", files=("0.png",), inputs=inputs)
    edits = dataclasses.replace(BENCHMARK, requests=lambda rows: [edit], side_files=lambda rows: {})
    made = []
    for value in (50, 200):
        write_png(file, np.full((16, 16, 3), value, np.uint8))
        asked = job(tmp_path, benchmark=edits, only="generate")
        made.append(asked(model).folder)
        assert asked(model).folder == made[-1]
    assert made[0] != made[1]
    first, second = (pixels(pathlib.Path(folder))["0.png"] for folder in made)
    assert np.any(first != second)


def test_each_prompt_is_encoded_once(model, tmp_path, monkeypatch):
    counts = collections.Counter()
    embed = Pipeline.embed_prompts

    def counting(self, prompts):
        counts.update({str(prompt.tokens) for prompt in prompts})  # padding repeats one
        return embed(self, prompts)

    monkeypatch.setattr(Pipeline, "embed_prompts", counting)
    job(tmp_path, only="generate")(model)
    assert len(counts) == 4 + 1  # and the one without a text, for guidance
    assert set(counts.values()) == {1}
    (encoded,) = (tmp_path / "out").iterdir()
    generate(
        BENCHMARK.requests(job(tmp_path).rows),
        tmp_path / "plain",
        answer=lambda batch, task: model.generate_batch(batch, task),
        collator=model.collator,
        batch_size=8,
    )
    ours, plain = pixels(encoded), pixels(tmp_path / "plain")
    assert len(set(map(bytes, (x.tobytes() for x in plain.values())))) == 16
    for name, image in plain.items():
        np.testing.assert_allclose(ours[name], image, atol=1)  # two programs round otherwise


def test_what_the_run_was_not_trained_on_is_refused(model, tmp_path):
    rows = [dataclasses.replace(row) for row in job(tmp_path).rows]
    asked = dataclasses.replace(
        BENCHMARK,
        requests=lambda rows: [
            dataclasses.replace(r, task="seg") for r in BENCHMARK.requests(rows)
        ],
    )
    seg = PublicJob(benchmark=asked, rows=rows, out=tmp_path / "out", scorers=SCORERS)
    with pytest.raises(UserError, match="geneval needs the task 'seg': this run was trained on t2"):
        seg(model)
    with pytest.raises(UserError, match="batch size 12: expected a multiple of 8 devices"):
        job(tmp_path, batch_size=12)(model)
    assert not list(tmp_path.glob("out/*"))


PROGRAM = """
import pathlib, sys
from tests import processes
processes.join()
from tests.evaluation.test_public import job
from tests.evaluation.tiny_pipeline import answering, make_pipeline
folder = pathlib.Path(sys.argv[1])
job(folder)(answering(make_pipeline()))
"""


@pytest.mark.parametrize("devices", [[1], [4, 4]], ids=["1", "2x4"])
def test_any_devices_and_processes_make_the_same(tmp_path, devices):
    folders = [tmp_path / name for name in ("eight", "others")]
    for folder in folders:
        folder.mkdir()
    mine = job(folders[0])(answering(make_pipeline()))
    processes.run(devices, str(folders[1]), program=("-c", PROGRAM))
    (theirs,) = folders[1].glob("out/*/results.json")
    assert theirs.parent.name == mine.folder.name
    assert Scorecard.read(theirs.parent).numbers == mine.numbers
    found = [pixels(folder / "out") for folder in folders]
    assert list(found[0]) == list(found[1])
    for name, image in found[0].items():
        np.testing.assert_allclose(found[1][name], image, atol=1)  # of 255, by rounding


TORN = """
import dataclasses, pathlib, sys
from tests import processes
processes.join()
from tests.evaluation.test_public import job, tokenize
from tests.evaluation.tiny_pipeline import make_pipeline
from univg_jax.errors import UserError
def fail(text, num_tokens):
    if "two cups" in text:
        raise UserError("two cups are too many")
    return tokenize(text, num_tokens)
model = make_pipeline()
model = dataclasses.replace(model, collator=dataclasses.replace(model.collator, tokenizer=fail))
try:
    job(pathlib.Path(sys.argv[1]))(model)
except UserError as error:
    print("refused:", error)
"""


def test_a_prompt_that_one_process_cannot_read_stops_all(tmp_path):
    told = processes.run([4, 4], str(tmp_path), program=("-c", TORN))
    assert all(any(line.startswith("refused:") for line in lines) for lines in told)
    assert any("two cups are too many" in line for line in told[0] + told[1])
    assert not list(tmp_path.glob("out/*/results.json"))


# --- GenEval's own 553 prompts ---

REAL = """
import pathlib, sys
from tests.evaluation import tiny_pipeline
from tests.evaluation.test_public import geneval_job
pipeline = tiny_pipeline.answering(tiny_pipeline.make_pipeline())
print(geneval_job(pathlib.Path(sys.argv[1]))(pipeline).text)
"""


def detect_colors(image):
    """A person around the brightest half of an image, and a dog where its red is."""
    found = {}
    for name, plane in {"person": image.mean(-1), "dog": image[..., 0].astype(float)}.items():
        ys, xs = np.nonzero(plane > np.median(plane))
        score = float(plane.mean() / 255)
        found[name] = [(xs.min(), ys.min(), xs.max() + 1, ys.max() + 1, score, None)]
    return found


def geneval_job(folder) -> PublicJob:
    return PublicJob(
        benchmark=BENCHMARK,
        rows=read(FILES / "geneval"),
        out=folder,
        scorers=dict(detect=detect_colors, color=lambda image, boxes, name: ["red"] * len(boxes)),
    )


@needs_files
def test_the_real_prompts_killed_and_continued(tmp_path):
    program = ("-c", REAL)
    with processes.running([1], str(tmp_path), program=program) as (first,):
        processes.wait_for([first], lambda: len(list(tmp_path.rglob("*.png"))) > 300)
        first.popen.kill()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert not list(tmp_path.glob("*/results.json"))
    processes.run([1], str(tmp_path), program=program)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (results,) = tmp_path.glob("*/results.json")
    card = Scorecard.read(results.parent)
    assert len(list(tmp_path.rglob("*.png"))) == 4 * 553
    assert card.numbers["failures/missing"] == 0
    assert card.rows == 553
    assert 0 < card.numbers["single_object"] < 0.1  # of 80 prompts, those of a person or a dog
