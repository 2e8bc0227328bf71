"""Pictures of people: both policies for faces that are not found, and what is compared."""

import dataclasses
import json
import math
import os
import pathlib

import numpy as np
import pytest

from tests.evaluation import evaluation_cases as data
from tests.evaluation.benchmarks.picture_scorers import SCORERS, plain
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation import score
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import identity_set
from univg_jax.evaluation.benchmarks.identity_set import Row, Settings, benchmark
from univg_jax.evaluation.job import generate
from univg_jax.evaluation.score_files import score_images
from univg_jax.images import write_png

PEOPLE = {"ann": "red", "bob": "green"}
SETTINGS = Settings(
    prompts=("<p> as a red pirate",), clip_prompts=("in green",), images=2, people=None
)
FACES_ONLY = dataclasses.replace(SETTINGS, clip_prompts=())


def identify(image):
    """A face is what is not black; it is known by its color."""
    return image.mean(axis=(0, 1)) if image.any() else None


ALL = SCORERS | {"identify": identify}


@pytest.fixture
def faces(tmp_path):
    for name, color in PEOPLE.items():
        write_png(tmp_path / "faces" / f"{name}.png", plain(color))
    (tmp_path / "faces" / "notes.txt").write_text("")
    return tmp_path / "faces"


def scored(rows, *images):
    return identity_set.summary(
        rows, [identity_set.score(r, i, ALL) for r, i in zip(rows, images, strict=True)]
    )


def test_each_person_has_all_prompts(faces):
    rows = identity_set.read(faces, SETTINGS)
    assert [(r.person, r.number, r.compares) for r in rows] == [
        ("ann", 0, True),
        ("ann", 1, False),
        ("bob", 0, True),
        ("bob", 1, False),
    ]
    assert identity_set.image_files(rows[2]) == ("bob/000_0.png", "bob/000_1.png")
    asked = benchmark(SETTINGS).requests(rows)
    assert [r.inputs["prompt"] for r in asked[:2]] == ["<p> as a red pirate", "<p>, in green"]
    assert asked[2].inputs["face"] == str(faces / "bob.png")
    assert rows[0].text == "person as a red pirate"


def test_people_may_have_prompts_of_their_own(faces):
    file = faces / "people.jsonl"
    lines = [dict(face="ann.png", prompts=["a", "b"]), dict(face="bob.png", prompts=["c"])]
    file.write_text("\n".join(map(json.dumps, lines)))
    rows = identity_set.read(file, SETTINGS)
    assert [(r.person, r.prompt, r.compares) for r in rows] == [
        *(("ann", "a", True), ("ann", "b", True), ("ann", "in green", False)),
        *(("bob", "c", True), ("bob", "in green", False)),
    ]
    for line in (dict(face="../ann.png", prompts=["a"]), dict(face="ann.png", prompts=[])):
        file.write_text(json.dumps(line))
        with pytest.raises(UserError, match="has no portrait with prompts in line 1"):
            identity_set.read(file, SETTINGS)


def test_both_policies_for_faces_that_are_not_found(faces):
    rows = identity_set.read(faces, FACES_ONLY)[:1]
    found = scored(rows, [plain("red"), plain((0, 0, 0))])
    assert found["skip/similarity"] == pytest.approx(1)
    assert found["zero/similarity"] == pytest.approx(1 / 2)
    assert found["detection_rate"] == 1 / 2
    assert (found["failures/no_face"], found["failures/missing"]) == (1, 0)
    assert found["clip_t"] == pytest.approx(1 / 2)
    nobody = scored(rows, [plain((0, 0, 0))] * 2)
    assert math.isnan(nobody["skip/similarity"])
    assert nobody["zero/similarity"] == nobody["detection_rate"] == 0


def test_a_missing_picture_is_no_undetected_face(faces):
    rows = identity_set.read(faces, FACES_ONLY)[:1]
    found = scored(rows, [plain("red"), None])
    assert found["skip/similarity"] == found["zero/similarity"] == pytest.approx(1)
    assert found["strict/similarity"] == found["strict/clip_t"] == pytest.approx(1 / 2)
    assert (found["detection_rate"], found["failures/missing"]) == (1, 1)


def test_faces_are_compared_in_pictures_of_some_prompts_and_texts_in_those_of_the_others(faces):
    rows = identity_set.read(faces, SETTINGS)[:2]
    # Neither another person's face under the second prompt counts, nor the text of the first.
    found = scored(rows, [plain("red")] * 2, [plain("green")] * 2)
    assert found["zero/similarity"] == found["clip_t"] == pytest.approx(1)
    found = scored(rows, [plain("green")] * 2, [plain("green")] * 2)
    assert found["zero/similarity"] == pytest.approx(0)
    assert found["clip_t"] == found["strict/clip_t"] == pytest.approx(1)
    assert found["detection_rate"] == 1


def test_without_further_prompts_texts_are_compared_in_all_pictures(faces):
    rows = identity_set.read(faces, FACES_ONLY)
    found = scored(rows, [plain("red"), plain("green")], [plain("red")] * 2)
    assert found["clip_t"] == pytest.approx(3 / 4)


def test_a_mean_is_over_pictures_and_not_over_rows(faces):
    rows = [r for r in identity_set.read(faces, SETTINGS) if r.compares]
    found = scored(rows, [plain("red")] * 2, [plain("red"), plain((0, 0, 0))])
    assert found["skip/similarity"] == pytest.approx(2 / 3)
    assert found["zero/similarity"] == pytest.approx(2 / 4)


def test_what_is_generated_is_scored(faces, tmp_path):
    """An answer that gives every person's own face."""

    def answer(batch, task):
        assert task == "id"
        return np.broadcast_to(batch.face.max(axis=(1, 2), keepdims=True), batch.target.shape)

    bench, folder = benchmark(SETTINGS), tmp_path / "out"
    rows = bench.read(faces)
    generate(bench.requests(rows), folder, answer=answer, collator=data.COLLATOR, batch_size=4)
    scores = score_images(bench, rows, folder, ALL).rows
    found = bench.summary(rows, scores)
    assert found["zero/similarity"] == pytest.approx(1)
    assert found["clip_t"] == pytest.approx(1 / 2)
    assert found["failures/missing"] == 0
    # Whoever has which row.
    table = score.gather(dict(reversed(list(enumerate(scores)))), count=4, template=scores[1])
    again = [{name: ratios[k] for name, ratios in table.items()} for k in range(4)]
    assert bench.summary(rows, again) == found


def test_settings_are_read_and_stored(faces):
    bench = open_benchmark("identity_set:people=None,images=2,prompts=['<p>, at sea','a <p>']")
    rows = bench.read(faces)
    assert [row.prompt for row in rows[:2]] == ["<p>, at sea", "a <p>"]
    assert len(bench.requests(rows)[0].files) == 2
    stored = benchmark(SETTINGS).settings
    assert stored["encoder"] == "CurricularFace"
    assert stored["prompts"] == ("<p> as a red pirate",)
    assert json.loads(json.dumps(stored))["clip_prompts"] == ["in green"]
    assert benchmark(SETTINGS).published == ()
    systems = {p.system for p in identity_set.BENCHMARK.published}
    assert systems > {"PhotoMaker", "InstantID", "PuLID"}


def test_unsplash_has_50_portraits_one_prompt_and_4_pictures(tmp_path):
    for k in range(50):
        write_png(tmp_path / f"{k}.png", plain("red", 2, 2))
    rows = identity_set.BENCHMARK.read(tmp_path)
    assert len(rows) == 50
    assert {(r.images, r.prompt) for r in rows} == {(4, identity_set.UNSPLASH_PROMPT)}
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match="has 49 portraits instead of 50"):
        identity_set.BENCHMARK.read(tmp_path)


def test_another_folder_is_one_line(faces, tmp_path):
    with pytest.raises(NotFoundError, match="nothing does not exist: expected a folder of portr"):
        identity_set.read(tmp_path / "nothing", SETTINGS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no portraits: expected \.jpg"):
        identity_set.read(tmp_path / "empty", SETTINGS)
    write_png(faces / "ann.webp", plain("red"))
    with pytest.raises(UserError, match="'ann' are two portraits"):
        identity_set.read(faces, SETTINGS)


def test_a_portrait_without_a_face_is_refused(tmp_path):
    write_png(tmp_path / "a.png", plain((0, 0, 0)))
    row = Row("a", str(tmp_path / "a.png"), 0, "red", 1)
    with pytest.raises(UserError, match=r"a\.png: no face was found in the portrait"):
        identity_set.score(row, [plain("red")], ALL)
    text_only = dataclasses.replace(row, compares=False)
    assert identity_set.score(text_only, [plain("red")], ALL)["clip_t"].value == 1


@pytest.mark.skipif(
    not os.environ.get("UNIVG_SAMPLES"), reason="real files are not part of the project"
)
def test_real_portraits():
    """A person of LFW, whose pictures are taken for people here."""
    folder = pathlib.Path(os.environ["UNIVG_SAMPLES"]) / "lfw" / "lfw" / "dir3"
    rows = identity_set.read(folder, FACES_ONLY)
    assert [row.person for row in rows] == ["img10", "img11", "img12"]
    found = identity_set.score(rows[0], [plain("red"), None], ALL)
    assert -1 <= found["skip/similarity"].value <= 1
