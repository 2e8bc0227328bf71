"""DPG-Bench: a model answers yes-or-no questions about four images of a long prompt.

The rules are those of github.com/TencentQQGYLab/ELLA, dpg_bench/compute_dpg_bench.py. The four
images of a prompt are the cells of one file, 2 x 2. A question scores 1 if its answer is exactly
"yes". Then questions are walked in the file's order: one with a parent whose score is 0 by now
becomes 0 itself, so a failure runs down a chain. (DSG's rule goes one step.) A cell scores the
mean over its questions, an item the mean over cells, and DPG-Bench is the mean over items, in
percent. Categories count the answers themselves, without the rule of parents.

Some of the official code are faults that move numbers, so there are two scores:

* `official`. The first row of the table is not read, so one item lacks a question. An item that
  comes twice in the table has only the questions of its last part. An item with a question whose
  parent does not exist is dropped, as is one whose image is not there or cannot be read. Categories
  are of the last cell alone.
* `fixed`. All rows and all cells; a parent that does not exist hangs nothing.

A reply that cannot be used is wrong, as in DSG; `failures/` counts these, and wrong answers by the
group of their questions.

With several processes the official code also mixes up its categories, each process in its own
order. Such numbers cannot be had again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from univg_jax.errors import UserError
from univg_jax.evaluation.benchmarks import dsg
from univg_jax.evaluation.benchmarks.dsg import Question
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.judging import ASKED, ask_all, outcome_columns, outcome_counts
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import MAGE_FLOW, Official, of_systems, requests_of
from univg_jax.evaluation.summaries import Scores, Summary, by_group, column, values

FILE = InputFile(
    "dpg_bench.csv", "the questions of DPG-Bench: dpg_bench/ of github.com/TencentQQGYLab/ELLA"
)
PROMPTS_FOLDER = "prompts"  # of ID.txt, beside the table
PROMPTS = 1065
CELLS = 4
PUBLISHED = {
    **{"Qwen-Image": 88.32, "Z-Image-Base": 88.14, "FLUX.2-dev": 87.57},
    **{"Mage-Flow": 86.49, "FLUX.1-dev": 83.84},
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Answers = Mapping[int, str | None]  # by the number of the question; None could not be used


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt and its questions; `known` are the numbers of those that the official code reads."""

    index: int
    item_id: str
    prompt: str
    questions: tuple[Question, ...]
    known: tuple[int, ...]
    categories: tuple[str, ...] = ()  # of all rows


def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The prompts with their questions, sorted by id. `path` is dpg_bench.csv or its folder.

    The text of a prompt is that of prompts/ID.txt beside the table, from which the official
    generation reads, and that of the table where there is no such folder. Raises UserError if the
    table or a text is missing or torn, or, unless it is an `excerpt`, if items are missing.
    """
    questions: dict[str, dict[int, Question]] = {}
    known: dict[str, dict[int, None]] = {}
    prompts: dict[str, str] = {}
    previous = None
    for place, (item, prompt, question) in enumerate(dsg.read_questions(FILE, path)):
        if question.names_no_number:
            reason = f"has a dependency that is no number in row {place + 1}"
            raise FILE.error(FILE.at(path), reason)
        prompts.setdefault(item, prompt)
        questions.setdefault(item, {})[question.number] = question
        if place > 0:  # the official code leaves out the first row of all
            if item != previous:
                known[item] = {}
            known[item][question.number] = None
            previous = item
    FILE.check_count(path, found=len(prompts), official=PROMPTS, what="items", excerpt=excerpt)
    texts = FILE.at(path).parent / PROMPTS_FOLDER
    if texts.exists():
        prompts = {item: _prompt(texts, item) for item in prompts}
    rows = [
        Row(index, item, prompts[item], tuple(questions[item].values()), tuple(known.get(item, ())))
        for index, item in enumerate(sorted(prompts))
    ]
    names = categories(rows)
    return tuple(dataclasses.replace(row, categories=names) for row in rows)


def read_prompts(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """As `read`, from a folder of ID.txt alone: enough to generate, not to score."""
    items = sorted(file.stem for file in epath.Path(path).glob("*.txt"))
    if not 0 < len(items) <= PROMPTS or (len(items) < PROMPTS and not excerpt):
        raise UserError(
            f"{path} has {len(items)} texts instead of {PROMPTS}: expected the folder prompts/ of "
            "DPG-Bench, dpg_bench/ of github.com/TencentQQGYLab/ELLA"
        )
    return tuple(
        Row(index, item, _prompt(epath.Path(path), item), (), ())
        for index, item in enumerate(items)
    )


def _prompt(folder: epath.Path, item: str) -> str:
    return InputFile(f"{item}.txt", f"the prompt of DPG-Bench's item {item}").text(folder).strip()


def image_files(row: Row) -> tuple[str, ...]:
    """Where the grid of a prompt's images lies."""
    return (f"{row.item_id}.png",)


def found(rows: Sequence[Row], folder: epath.PathLike) -> list[list[str]]:
    """The grid of each row, in whichever format `folder` has it: the official code takes all files,
    and knows a prompt by what stands before the first dot. Of several it is the first by name, PNG
    before others.
    """
    there: dict[str, list[str]] = {}
    place = epath.Path(folder)
    for name in sorted(path.name for path in place.iterdir()) if place.is_dir() else ():
        if name.lower().endswith(SUFFIXES):
            there.setdefault(name.split(".")[0], []).append(name)
    grids = [there.get(row.item_id, []) for row in rows]
    return [sorted(names, key=lambda name: not name.endswith(".png"))[:1] for names in grids]


def cells(image: Image, *, resolution: int | None = None) -> UInt8[np.ndarray, "4 r r 3"]:
    """The images of a grid, each of `resolution` pixels a side (None: half of the grid's).

    Raises UserError for a grid of another size, of which the official code would cut black or
    partial images without a word.
    """
    height, width = image.shape[:2]
    side = resolution or max(width // 2, 1)
    if (height, width) != (2 * side, 2 * side):
        raise UserError(
            f"is no grid of DPG-Bench: {width} x {height} pixels, expected 2 x 2 images of "
            f"{side} x {side}"
        )
    return np.stack(
        [image[y : y + side, x : x + side] for y in (0, side) for x in (0, side)],
    )


def categories(rows: Sequence[Row]) -> tuple[str, ...]:
    """All categories of these rows, sorted."""
    return tuple(sorted({question.category for row in rows for question in row.questions}))


def score(row: Row, answers: Sequence[Answers] | None, *, names: Sequence[str]) -> dict[str, Ratio]:
    """Sums and counts of an item, from the answers about each of its images.

    None instead of answers is a grid that is not there: the official code drops the item, and in
    `strict` it scores 0. `names` are the `categories` of all rows: what ends in `_categories` has
    an entry for each.
    """
    none = Ratio.of(np.zeros(len(names)), 0.0)
    scores = {
        **{name: Ratio.of(0.0, 0.0) for name in ("official", "fixed")},
        "strict": Ratio.of(0.0),
        **dsg.wrong_columns(()),
        **{f"{name}_categories": none for name in ("official", "fixed")},
    }
    if answers is None:
        return scores
    right = [{q.number: a.get(q.number) == "yes" for q in row.questions} for a in answers]
    fixed = [_after_parents(row.questions, cell, strict=False) for cell in right]
    scores["fixed"] = scores["strict"] = Ratio.of(sum(map(_mean, fixed)) / len(fixed))
    scores |= dsg.wrong_columns((q, cell.get(q.number)) for cell in answers for q in row.questions)
    scores["fixed_categories"] = merge(_by_category(row.questions, cell, names) for cell in right)
    by_number = {question.number: question for question in row.questions}
    known = [by_number[number] for number in row.known]
    official = [_after_parents(known, cell, strict=True) for cell in right]
    if known and None not in official:
        scores["official"] = Ratio.of(sum(map(_mean, official)) / len(official))
        scores["official_categories"] = _by_category(known, right[-1], names)
    return scores


def _after_parents(
    questions: Sequence[Question], right: Mapping[int, bool], *, strict: bool
) -> dict[int, bool] | None:
    """Which questions still score 1 once failures have run down; None where a parent does not exist
    and the official code (`strict`) comes to look at it.
    """
    held = {question.number: right[question.number] for question in questions}
    for question in questions:
        for parent in question.parents:
            if parent not in held:
                if strict:
                    return None
            elif not held[parent]:
                held[question.number] = False
                break
    return held


def _mean(held: Mapping[int, bool]) -> float:
    return sum(held.values()) / len(held)


def _by_category(
    questions: Sequence[Question], right: Mapping[int, bool], names: Sequence[str]
) -> Ratio:
    total, count = np.zeros(len(names)), np.zeros(len(names))
    for question in questions:
        place = names.index(question.category)
        total[place] += right[question.number]
        count[place] += 1
    return Ratio.of(total, count)


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """In percent, for `official` and `fixed`: the overall score, and that of categories.

    Categories are under `L2/`, and their groups, such as "attribute", under `L1/`. In
    `strict/overall` a missing grid scores 0.
    """
    names = categories(rows)
    groups = [name.split("-")[0].strip() for name in names]
    found: Summary = {}
    for kind in ("official", "fixed"):
        found[f"{kind}/overall"] = 100 * merge(column(scores, kind)).value
        sums = merge(column(scores, f"{kind}_categories"))
        each = [Ratio.of(*pair) for pair in zip(sums.total, sums.count, strict=True)]
        found |= values(f"{kind}/L1/", by_group(groups, each), scale=100.0)
        found |= values(f"{kind}/L2/", dict(zip(names, each, strict=True)), scale=100.0)
    found["strict/overall"] = 100 * merge(column(scores, "strict")).value
    found["dropped"] = float(len(rows) - merge(column(scores, "official")).count.sum())
    return found


def _score(
    row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
) -> dict[str, Ratio]:
    (grid,) = images
    numbers = [question.number for question in row.questions]
    answers, ends = [], []
    for cell in [None] * CELLS if grid is None else cells(grid):
        asked = ask_all(scorers["vqa"], cell, [question.text for question in row.questions])
        answers.append(dict(zip(numbers, map(dsg.word_of, asked[0]), strict=True)))
        ends += asked[1]
    found = score(row, None if grid is None else answers, names=row.categories)
    return found | outcome_columns(*ends)


BENCHMARK = Official(
    name="dpg",
    version=1,
    read=read,
    requests=lambda rows: requests_of(rows, image_files, cells=CELLS),
    needs={"vqa": ()},
    score=_score,
    check_image=cells,
    found=found,
    summary=lambda rows, scores: summary(rows, scores) | outcome_counts(scores, what="DPG-Bench"),
    quality=lambda scores: scores["fixed"].value,
    primary="official/overall",
    settings={"sampling": ASKED},
    scoring=("sampling",),
    published=of_systems("official/overall", f"{MAGE_FLOW}, by mPLUG-large", PUBLISHED),
)
