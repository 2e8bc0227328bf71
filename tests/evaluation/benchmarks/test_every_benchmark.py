"""What holds for every public benchmark, from its official files to its numbers."""

import importlib
import json
import math
import pathlib

import numpy as np
import pytest

from tests.evaluation.benchmarks import (
    test_diode,
    test_emu_edit,
    test_gedit,
    test_imgedit,
    test_kitti_depth,
    test_magicbrush,
    test_nyuv2,
    test_phrasecut_seg,
)
from tests.evaluation.benchmarks import test_text_benchmarks as text
from tests.evaluation.benchmarks.picture_scorers import dino, plain
from tests.native import boxes, phrasecut, refcoco
from univg_jax.errors import UserError
from univg_jax.evaluation.benchmark import open_benchmark
from univg_jax.evaluation.benchmarks import BENCHMARKS
from univg_jax.evaluation.benchmarks.t2i_compbench import SETS
from univg_jax.evaluation.job import write_side_files
from univg_jax.evaluation.official import Official
from univg_jax.evaluation.public import PublicJob
from univg_jax.evaluation.score_files import check_scorers, score_images, unreadable
from univg_jax.evaluation.scorers import PROTOCOLS
from univg_jax.evaluation.scorers.chat import Reply
from univg_jax.evaluation.scorers.endpoint import Endpoint
from univg_jax.images import jpeg_bytes, png_bytes, write_png

PICTURE = plain("red", 40, 40)


class SaysYes(Endpoint):
    """A model that says yes to everything, without a server."""

    def judge(self, images, prompt, *, sampling, again=0):
        return Reply(kind="answered", text="yes", p={"yes": 1.0})


YES = SaysYes(url="http://127.0.0.1:9/v1", model="yes", cache="answers")
ALL = {
    "clip": text.Clip(),
    "dino": dino,
    "vqa": YES,
    "judge": YES,
    "detect": lambda image: {"dog": [(0, 0, 16, 16, 0.9, None)]},
    "color": lambda image, objects, name: ["red"] * len(objects),
    "depth": lambda image: image[..., 0].astype(float),
    "identify": lambda image: image.mean(axis=(0, 1)),
    "inception": lambda images: np.array([image.mean(axis=(0, 1)) for image in images]),
    "lpips": lambda a, b: 0.25,
}


# Each writes the files of a benchmark, and says how it is opened.


def of_text(name):
    def write(root):
        text.write(root, name)
        for number in range(2):
            text.write_real(root, number)
        return f"{name}:set=color,parses={root / 'parses.jsonl'}" if "t2i" in name else name

    return write


def of_geneval(root):
    lines = [
        dict(tag="colors", prompt="a red dog", include=[{"class": "dog", "count": 1, "color": k}])
        for k in ("red", "blue")
    ]
    (root / "evaluation_metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "geneval"


def of_pose(root):
    pytest.importorskip("pycocotools")
    importlib.import_module("tests.evaluation.benchmarks.test_coco_pose").write(root)
    return "coco_pose"


def of_depth(name, module):
    def write(root):
        module.write(root)
        return f"{name}:list_file={root / 'list.txt'}"

    return write


def of_gedit(root):
    test_gedit.write_table(root)
    (root / "vie_prompts.py").write_text(test_gedit.PROMPTS)
    return f"gedit:prompts={root / 'vie_prompts.py'}"


def of_imgedit(root):
    test_imgedit.write(root, test_imgedit.EDITS)
    test_imgedit.write(root, test_imgedit.PROMPTS, "prompts.json")
    for edit in test_imgedit.EDITS.values():
        write_png(root / edit["id"], PICTURE)
    return f"imgedit:prompts={root / 'prompts.json'}"


def of_pictures(spec):
    def write(root):
        for name in ("ann", "bob"):
            write_png(root / f"{name}.png", PICTURE)
        return spec

    return write


def of_phrasecut(root):
    phrasecut.write(root)
    test_phrasecut_seg.change(root)
    return "phrasecut_seg"


def of_native(spec, write):
    return lambda root: write(root) and spec


FILES = {
    **{name: of_text(name) for name in text.FILES},
    "mlperf_loss": lambda root: of_text("coco30k")(root) and "mlperf_loss",
    "geneval": of_geneval,
    "coco_pose": of_pose,
    "nyuv2": of_depth("nyuv2", test_nyuv2),
    "diode": of_depth("diode", test_diode),
    "kitti_depth": of_depth("kitti_depth", test_kitti_depth),
    "gedit": of_gedit,
    "imgedit": of_imgedit,
    "emu_edit": of_native("emu_edit", test_emu_edit.write),
    "magicbrush": of_native("magicbrush", test_magicbrush.write),
    "refcoco_seg": of_native("refcoco_seg", refcoco.write),
    "phrasecut_seg": of_phrasecut,
    "layout_boxes": of_native("layout_boxes:split=train", boxes.write),
    "identity_set": of_pictures("identity_set:people=None,images=2,prompts=['<p>, in red']"),
    "inpainting": of_pictures("inpainting:side=48"),
}
OFFICIAL = [name for name in BENCHMARKS if isinstance(open_benchmark(name), Official)]
WITH_IMAGES = [name for name in OFFICIAL if open_benchmark(name).measure is None]


@pytest.fixture
def opened(request, tmp_path):
    """A benchmark and its rows, read from files in its official format."""
    root = tmp_path / "data"
    root.mkdir()
    bench = open_benchmark(FILES[request.param](root))
    return bench, bench.read(root, excerpt=True)


def scored(bench, rows, folder, scorers=ALL):
    """The numbers where only the first file of all is there."""
    file = folder / bench.requests(rows)[0].files[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    is_jpeg = file.suffix == ".jpg"
    file.write_bytes(jpeg_bytes(PICTURE, quality=90) if is_jpeg else png_bytes(PICTURE))
    return score_images(bench, rows, folder, {n: scorers[n] for n in bench.needs if n in scorers})


def is_inside(name):
    path = pathlib.PurePosixPath(name)
    return name == str(path) and not path.is_absolute() and ".." not in path.parts


@pytest.mark.parametrize("name", OFFICIAL)
def test_a_benchmark_says_what_it_needs_in_known_names(name):
    bench = open_benchmark(name)
    assert bench.name == name
    assert set(bench.needs) <= set(PROTOCOLS)
    assert set(bench.scoring) <= set(bench.settings)
    assert json.loads(json.dumps(bench.settings)) is not None


CLIPS = {
    **{"parti": "ViT-B/32", "coco30k": "ViT-H/14", "hpsv2": "ViT-H/14"},
    **{"t2i_compbench:set=non_spatial": "ViT-B/32", "t2i_compbench:set=complex": "ViT-B/32"},
    **dict.fromkeys(("magicbrush", "emu_edit", "identity_set"), "ViT-B/32"),
    "parti:clip=ViT-L/14": "ViT-L/14",
}


@pytest.mark.parametrize("spec", CLIPS)
def test_which_clip_scores_is_stored_and_named_where_it_is_missing(spec):
    bench = open_benchmark(spec)
    assert bench.settings["clip"] == CLIPS[spec]
    assert bench.settings["clip_score"] == ("100 x cosine" if spec == "hpsv2" else "cosine")
    given = {name for name in bench.needs if name != "clip"}
    with pytest.raises(UserError, match=f"needs the scorer 'clip': .*CLIP {CLIPS[spec]}"):
        check_scorers(bench, given)


def test_all_that_need_a_clip_say_which():
    specs = [*OFFICIAL, *(f"t2i_compbench:set={name}" for name in SETS)]
    needing = {open_benchmark(spec).name for spec in specs if "clip" in open_benchmark(spec).needs}
    assert needing == {spec.split(":")[0] for spec in CLIPS}


@pytest.mark.parametrize("opened", WITH_IMAGES, indirect=True)
def test_files_are_unique_and_stay_in_the_folder(opened, tmp_path):
    bench, rows = opened
    requests = bench.requests(rows)
    assert [request.index for request in requests] == list(range(len(rows)))
    files = [name for request in requests for name in request.files]
    beside = list(bench.side_files(rows))
    assert len({name.lower() for name in (*files, *beside)}) == len(files) + len(beside)
    assert all(map(is_inside, (*files, *beside)))
    write_side_files(bench, rows, tmp_path / "images")
    written = [p for p in (tmp_path / "images").rglob("*") if p.is_file()]
    assert {str(p.relative_to(tmp_path / "images")) for p in written} == set(beside)


@pytest.mark.parametrize("opened", WITH_IMAGES, indirect=True)
def test_files_become_numbers_and_what_is_missing_is_counted(opened, tmp_path):
    bench, rows = opened
    found = scored(bench, rows, tmp_path / "images")
    numbers = found.summary(bench, rows)
    assert bench.primary in numbers
    assert {entry.metric for entry in bench.published} <= set(numbers)
    assert all(isinstance(value, float) for value in numbers.values())
    missing = [value for name, value in numbers.items() if "missing" in name.split("/")[-1]]
    assert "failures/missing" in numbers or bench.name == "magicbrush"  # whose are of two kinds
    assert sum(missing) > 0 or len(rows) == 1
    assert all(math.isnan(bench.quality(row)) or bench.quality(row) < 1e4 for row in found.rows)


@pytest.mark.parametrize("opened", WITH_IMAGES, indirect=True)
def test_a_file_that_is_no_picture_scores_as_a_missing_one_and_is_named(opened, tmp_path):
    bench, rows = opened
    folder, torn = tmp_path / "images", png_bytes(PICTURE)[:-30]
    expected = scored(bench, rows, folder).summary(bench, rows)
    requests = bench.requests(rows)
    files = [name for request in requests for name in request.files][1:]
    for name, content in zip(files, (b"", b"no picture", torn, b"GIF89a"), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    found = scored(bench, rows, folder)
    numbers = found.summary(bench, rows)
    assert numbers["failures/unreadable"] == min(len(files), 4)
    assert expected["failures/unreadable"] == 0
    assert repr(numbers | {"failures/unreadable": 0.0}) == repr(expected)
    reasons = unreadable(bench, requests, found.rows, folder)
    assert [file for named in reasons.values() for file in named] == files[:4]
    assert all("is not a readable image" in why for r in reasons.values() for why in r.values())


@pytest.mark.parametrize("opened", WITH_IMAGES, indirect=True)
def test_a_job_takes_what_has_all_that_scoring_needs(opened, tmp_path):
    bench, rows = opened
    scorers = {name: ALL[name] for name in bench.needs}
    assert PublicJob(benchmark=bench, rows=rows, out=tmp_path, scorers=scorers, batch_size=8)


def of_foxes(image):
    """A detector that knows foxes alone."""
    return {}


of_foxes.classes = ("fox",)


@pytest.mark.parametrize(
    ("opened", "scorer", "reason"),
    [
        ("geneval", {"detect": of_foxes}, "unknown class of the detector 'dog'"),
        ("layout_boxes", {"detect": of_foxes}, "unknown class of the detector"),
        ("identity_set", {"identify": lambda image: None}, "ann.png: no face was found"),
    ],
    indirect=["opened"],
)
def test_what_cannot_be_scored_is_refused_before_images_are_made(opened, scorer, reason, tmp_path):
    bench, rows = opened
    scorers = {name: ALL[name] for name in bench.needs} | scorer
    with pytest.raises(UserError, match=reason):
        PublicJob(benchmark=bench, rows=rows, out=tmp_path, scorers=scorers, batch_size=8)


@pytest.mark.parametrize("name", ["gedit", "imgedit"])
def test_a_judge_without_prompts_is_refused_before_images_are_made(name, tmp_path):
    FILES[name](tmp_path)
    bench = open_benchmark(name)
    given = dict(benchmark=bench, rows=bench.read(tmp_path, excerpt=True), out=tmp_path)
    message = f"{name} needs its judge's prompts: --benchmark={name}:prompts=FILE"
    with pytest.raises(UserError, match=message):
        PublicJob(**given, scorers={"judge": YES}, batch_size=8)
    assert PublicJob(**given, scorers={}, only="generate", batch_size=8)


@pytest.mark.parametrize("opened", WITH_IMAGES, indirect=True)
def test_without_a_scorer_its_numbers_and_no_others_are_left_out(opened, tmp_path):
    bench, rows = opened
    whole = scored(bench, rows, tmp_path / "images").summary(bench, rows)
    for without, parts in bench.needs.items():
        if not parts:
            with pytest.raises(UserError, match="has no number without the scorer"):
                check_scorers(bench, {}, without=[without])
            continue
        rest = {name: scorer for name, scorer in ALL.items() if name != without}
        check_scorers(bench, rest, without=[without])
        found = scored(bench, rows, tmp_path / "images", rest)
        numbers = found.summary(bench, rows, without=[without])
        assert 0 < len(numbers) < len(whole)
        assert repr(numbers) == repr({name: whole[name] for name in numbers})


@pytest.mark.parametrize("opened", [*{*OFFICIAL} - {*WITH_IMAGES}], indirect=True)
def test_one_of_the_model_itself_asks_for_no_images(opened):
    bench, rows = opened
    assert bench.requests(rows) == []
    scores = [bench.score(row, [], {}) for row in rows]
    assert bench.primary in bench.summary(rows, scores)
