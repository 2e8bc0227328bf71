"""What holds for the rows of scores of every benchmark: they can be gathered from processes."""

import importlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.evaluation.benchmarks.picture_scorers import SCORERS, plain
from univg_jax.evaluation import depth, score
from univg_jax.evaluation.benchmarks import (
    BENCHMARKS,
    coco30k,
    dpg,
    dsg,
    emu_edit,
    geneval,
    geneval2,
    hpsv2,
    identity_set,
    inpainting,
    layout_boxes,
    longtext,
    magicbrush,
    mlperf_loss,
    parti,
    phrasecut_seg,
    refcoco_seg,
    t2i_compbench,
)
from univg_jax.evaluation.benchmarks.dsg import Question
from univg_jax.evaluation.metrics import Ratio
from univg_jax.images import write_png

ROOT = pathlib.Path(__file__).parents[3]
ASKED = (Question(1, (), "?", "entity - whole (x)"), Question(2, (1,), "?", "global (x)"))
YES = geneval2.Answer("Yes", {"Yes": 0.75})


def of_dpg():
    rows = [dpg.Row(k, str(k), "", ASKED[: k + 1], (1, 2)[: k + 1]) for k in range(2)]
    names = dpg.categories(rows)
    answers = [[{1: "yes"}], None]
    return dpg, rows, [dpg.score(r, a, names=names) for r, a in zip(rows, answers, strict=True)]


def of_geneval2():
    asked = (geneval2.Question("Is it?", "Yes", "a"), geneval2.Question("Is it?", "Yes", "b"))
    rows = [geneval2.Row(k, "", 3 + k, asked[: k + 1]) for k in range(2)]
    scores = [
        geneval2.score(rows[0], [YES], str, ("a", "b")),
        geneval2.score(rows[1], None, str, ("a", "b")),
    ]
    return geneval2, rows, scores


def of_compbench():
    rows = [t2i_compbench.Row("3d_spatial", k, "") for k in range(2)]
    images = [[{"official": 0.25, "fixed": 0.5}, 0.5], [None, None]]
    return t2i_compbench, rows, [t2i_compbench.score(i) for i in images]


PICTURE = plain("red")
BOX = [[2, 2, 20, 2, 20, 20, 2, 20]]
# Of each benchmark that scores pictures by scorers: two rows, of which the second has no picture.
PICTURES = {
    "magicbrush": lambda file: [
        magicbrush.Row("7", k, 2, True, "", file, file, file, "a red pig", file, "a red pig")
        for k in (1, 2)
    ],
    "emu_edit": lambda file: [
        emu_edit.Row(k, "add", "", "a red pig", *[lambda: PICTURE] * 2) for k in range(2)
    ],
    "identity_set": lambda file: [identity_set.Row("ann", file, k, "red", 1) for k in range(2)],
    "refcoco_seg": lambda file: [
        refcoco_seg.Row("refcoco", "unc", "val", k, 0, "it", file, 32, 32, BOX) for k in range(2)
    ],
    "phrasecut_seg": lambda file: [
        phrasecut_seg.Row("test", k, 7, "it", file, 32, 32, [[[[2, 2], [20, 2], [20, 20]]]])
        for k in range(2)
    ],
    "layout_boxes": lambda file: [
        layout_boxes.Row(str(k), "a cat", ((0.0, 0.0, 0.5, 1.0),), ("a cat",), ("cat",), ("cat",))
        for k in range(2)
    ],
    "inpainting": lambda file: [
        inpainting.Row(str(k), file, "", inpainting.Settings(side=32)) for k in range(2)
    ],
}
ALL = SCORERS | {
    "identify": lambda image: image.mean(axis=(0, 1)),
    "detect": lambda image: {"cat": [(0, 0, 16, 16, 0.9, None)]},
    "inception": lambda images: np.array([image.mean(axis=(0, 1)) for image in images]),
    "lpips": lambda a, b: 0.25,
}


def of_pictures(name, file):
    benchmark = importlib.import_module(f"univg_jax.evaluation.benchmarks.{name}")
    write_png(file, PICTURE)
    rows = PICTURES[name](str(file))
    scores = [benchmark.score(r, [i], ALL) for r, i in zip(rows, (PICTURE, None), strict=True)]
    return benchmark, rows, [_ratios(columns) for columns in scores]


def _ratios(columns):
    return {name: column for name, column in columns.items() if isinstance(column, Ratio)}


def of_depth():
    gray = np.full((4, 6, 3), 100, np.uint8)
    gray[1] = 50
    known = depth.make_case(
        ("a.png",), gray, np.arange(1, 25).reshape(4, 6), np.ones((4, 6), bool), (0.1, 30.0)
    )
    rows = [depth.Asked(depth.DepthCases([("a.png",)] * 2, lambda row: known), k) for k in range(2)]
    return depth, rows, [depth.score(r, [i], {}) for r, i in zip(rows, (gray, None), strict=True)]


CASES = {
    "depth": of_depth,
    "geneval": lambda: (
        geneval,
        [geneval.Row(k, "colors", "", (), (), str(k)) for k in range(2)],
        [geneval.score([geneval.Verdict(True), None]), geneval.score([None])],
    ),
    "geneval2": of_geneval2,
    "t2i_compbench": of_compbench,
    "dsg": lambda: (
        dsg,
        [dsg.Row(0, "vrd_0", "", ASKED), dsg.Row(1, "whoops_1", "", ASKED[:1])],
        [
            dsg.score(dsg.Row(0, "vrd_0", "", ASKED), ["yes", "no"]),
            dsg.score(dsg.Row(1, "whoops_1", "", ASKED[:1]), None),
        ],
    ),
    "dpg": of_dpg,
    "parti": lambda: (
        parti,
        [parti.Row(k, "", "Arts", "Basic") for k in range(2)],
        [parti.score(0.25), parti.score(None)],
    ),
    "hpsv2": lambda: (
        hpsv2,
        [hpsv2.Row("photo", k, "") for k in range(2)],
        [hpsv2.score({"v2.1": 0.25}, ["v2.1"]), hpsv2.score(None, ["v2.1"])],
    ),
    "longtext": lambda: (
        longtext,
        [longtext.Row(k, k, "", ("a",), "sign", "short", "en") for k in range(2)],
        [
            longtext.score(longtext.Row(0, 0, "", ("a",), "sign", "short", "en"), texts)
            for texts in (["a b"], [None])
        ],
    ),
    "coco30k": lambda: (
        coco30k,
        [coco30k.Row(k, k, k, "") for k in range(2)],
        [coco30k.score(0.25), coco30k.score(None)],
    ),
    "mlperf_loss": lambda: (
        mlperf_loss,
        [mlperf_loss.Row(k, "", "") for k in range(2)],
        [mlperf_loss.score(mlperf_loss.Row(k, "", ""), 0.5 if k == 0 else None) for k in range(2)],
    ),
}


NAMES = [*CASES, *PICTURES]


@pytest.fixture
def case(request, tmp_path):
    """A benchmark, two rows, and the scores of one that is there and of one that is not."""
    name = request.param
    return CASES[name]() if name in CASES else of_pictures(name, tmp_path / "picture.png")


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_rows_of_what_is_there_and_of_what_is_missing_have_one_form(case):
    _, _, scores = case
    forms = [{metric: r.total.shape for metric, r in entry.items()} for entry in scores]
    assert forms[0] == forms[1]
    assert list(scores[0]) == list(scores[1])
    assert all(r.total.dtype == r.count.dtype == np.float64 for e in scores for r in e.values())


@pytest.mark.parametrize("case", NAMES, indirect=True)
def test_a_summary_is_that_of_the_gathered_rows(case):
    """Whoever has which row, and in whatever order they come."""
    benchmark, rows, scores = case
    whole = benchmark.summary(rows, scores)
    by_case = dict(reversed(list(enumerate(scores))))
    table = score.gather(by_case, count=2, template=scores[-1])
    gathered = [{metric: ratios[k] for metric, ratios in table.items()} for k in range(2)]
    assert repr(benchmark.summary(rows, gathered)) == repr(whole)
    assert all(isinstance(value, float) for value in whole.values())


def test_readers_and_rules_need_no_jax():
    official = {*BENCHMARKS, *NAMES} - {"depth", "emoji_scenes"}  # the latter is made with JAX
    names = [f"univg_jax.evaluation.benchmarks.{name}" for name in sorted(official)]
    code = f"import sys, {', '.join(names)}; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False"
