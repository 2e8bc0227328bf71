"""DSG-1k: a model answers yes-or-no questions about an image, and some hang on others.

The rules are those of github.com/j-min/DSG, vqa_utils.py and t2i_eval_dsg1k.py. A question scores
1 if its answer is exactly "yes", and 0 if the answer to one of its parents is not. That rule goes
one step: it looks at the parent's own answer, not at what is left of it. The score of an image is
the mean over its questions, the benchmark's the mean over images, in percent.

Two things in the official code move numbers, so there are two scores:

* `official`. Eight items name a parent that is no number ("5, right"). Their questions then have
  no parents at all. One item (tifa160_134) has no question 1, on which all the others hang: it
  scores 0 whatever the image shows.
* `fixed`. A parent that does not exist hangs nothing; all others count.

The official models answer in lower case; of one that is served, case and spaces are left out (our
choice). A reply that cannot be used is wrong and is counted, as are wrong answers by the group of
their questions, all under `failures/`.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from univg_jax.errors import UserError
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.judging import ASKED, ask_all, outcome_columns, outcome_counts
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Published, requests_of
from univg_jax.evaluation.scorers.chat import Reply
from univg_jax.evaluation.summaries import Scores, Summary, by_group, column, values

FILE = InputFile("dsg-1k-anns.csv", "the questions of DSG-1k: github.com/j-min/DSG")
COLUMNS = (
    *("item_id", "text", "proposition_id", "dependency"),
    *("category_broad", "category_detailed", "tuple", "question_natural_language"),
)
PROMPTS = 1060
QUESTIONS = 8182

GROUPS = ("entity", "attribute", "relation", "global", "other")  # of questions

# What an item's id contains, and the category that the official summary puts it in.
CATEGORIES = {
    "tifa": "tifa",
    "stanford": "paragraph",
    "localized": "paragraph",
    "countbench": "count",
    "vrd": "relation",
    "diffusion": "real_user",
    "midjourney": "real_user",
    "posescript": "pose",
    "whoops": "defying",
    "drawtext": "text",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question, and which others it hangs on.

    `proposition` is what it asks for, such as "attribute - color (cube, purple)".
    """

    number: int
    parents: tuple[int, ...]  # without 0, which is none
    text: str
    proposition: str
    names_no_number: bool = False  # as a parent, beside those that it names by number

    @classmethod
    def of(cls, row: dict[str, str]) -> "Question":
        """The question of a row of the table. Raises ValueError where the number is none."""
        words = [word.strip() for word in row["dependency"].split(",")]
        numbers = [int(word) for word in words if word.isdecimal()]
        return cls(
            number=int(row["proposition_id"]),
            parents=tuple(number for number in numbers if number),
            text=row["question_natural_language"],
            proposition=row["tuple"],
            names_no_number=len(numbers) < len(words),
        )

    @property
    def category(self) -> str:
        """Such as "attribute - color"."""
        return self.proposition.split("(")[0].strip()

    @property
    def group(self) -> str:
        """The category before its "-"."""
        return self.category.split("-")[0].strip()


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt and its questions."""

    index: int
    item_id: str
    prompt: str
    questions: tuple[Question, ...]

    @property
    def category(self) -> str:
        """The official category, or the id's own prefix where there is none."""
        found = [name for part, name in CATEGORIES.items() if part in self.item_id]
        return found[0] if found else self.item_id.rsplit("_", 1)[0]


def read_questions(file: InputFile, path: epath.PathLike) -> Iterator[tuple[str, str, Question]]:
    """Of each row of a table with COLUMNS the item, its prompt, and the question.

    Raises UserError for another table, and where a question has no number.
    """
    for number, row in enumerate(file.table(path, COLUMNS), 1):
        try:
            yield row["item_id"], row["text"], Question.of(row)
        except ValueError:
            raise file.error(file.at(path), f"has no question's number in row {number}") from None


def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The prompts with their questions. `path` is dsg-1k-anns.csv or its folder.

    Raises UserError if it is not that file, or, unless it is an `excerpt`, not all of it.
    """
    questions: dict[str, list[Question]] = collections.defaultdict(list)
    prompts: dict[str, str] = {}
    for item, prompt, question in read_questions(FILE, path):
        questions[item].append(question)
        prompts.setdefault(item, prompt)
    for item, asked in questions.items():
        if len({question.number for question in asked}) < len(asked):
            raise FILE.error(FILE.at(path), f"has a question of {item} twice")
    asked = sum(map(len, questions.values()))
    FILE.check_count(path, found=len(prompts), official=PROMPTS, what="prompts", excerpt=excerpt)
    FILE.check_count(path, found=asked, official=QUESTIONS, what="questions", excerpt=excerpt)
    return tuple(
        Row(index, item, prompts[item], tuple(questions[item]))
        for index, item in enumerate(prompts)
    )


def image_files(row: Row) -> tuple[str, ...]:
    """Where the image lies: see `found` for the official name."""
    return (f"{row.item_id}.png",)


def found(rows: Sequence[Row], folder: epath.PathLike) -> list[list[str]]:
    """The image of each row that `folder` has: ID.png or, as the official code loads it,
    ID_MODEL.jpg.

    Raises UserError for two images of one item.
    """
    place, there = epath.Path(folder), collections.defaultdict(list)
    for name in sorted(path.name for path in place.iterdir()) if place.is_dir() else ():
        if match := re.fullmatch(r"(.+)\.(?:png|jpg)", name):
            for item in {match[1], match[1].rsplit("_", 1)[0]}:
                there[item].append(name)
    images = [there[row.item_id] for row in rows]
    for row, names in zip(rows, images, strict=True):
        if len(names) > 1:
            raise UserError(
                f"{place} has two images of {row.item_id}, {names[0]} and {names[1]}: expected "
                "those of one model"
            )
    return images


def score(row: Row, answers: Sequence[str | None] | None) -> dict[str, Ratio]:
    """Sums and counts of an image, from the answers to its questions in their order.

    None instead of an answer is a reply that could not be used, and is wrong. None instead of all
    answers is an image that is not there: it scores 0, as in the official code.
    """
    if answers is None:
        answers = [None] * len(row.questions)
    if len(answers) != len(row.questions):
        raise UserError(f"{row.item_id} has {len(row.questions)} questions, not {len(answers)}")
    right = {q.number: a == "yes" for q, a in zip(row.questions, answers, strict=True)}
    parents = {question.number: question.parents for question in row.questions}
    official = parents
    if any(question.names_no_number for question in row.questions):
        official = dict.fromkeys(parents, ())
    is_cut = any(parent not in right for named in official.values() for parent in named)
    return {
        "official": Ratio.of(0.0 if is_cut else _mean_after_parents(right, official)),
        "fixed": Ratio.of(_mean_after_parents(right, parents)),
        "without_parents": Ratio.of(sum(right.values()) / len(right)),
        **wrong_columns(zip(row.questions, answers, strict=True)),
    }


def wrong_columns(asked: Iterable[tuple[Question, str | None]]) -> dict[str, Ratio]:
    """How many of the answers that can be used are wrong, by the group of their question."""
    wrong: dict[str, list[bool]] = {group: [] for group in GROUPS}
    for question, answer in asked:
        if answer is not None:
            wrong.get(question.group, wrong["other"]).append(answer != "yes")
    return {f"failures/{group}": Ratio.of(sum(w), len(w)) for group, w in wrong.items()}


def _mean_after_parents(right: dict[int, bool], parents: dict[int, tuple[int, ...]]) -> float:
    held = [
        right[number] and all(right.get(parent, True) for parent in parents[number])
        for number in right
    ]
    return sum(held) / len(held)


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """In percent, for `official` and `fixed`: the overall score and that of each category.

    `without_parents` is the score of the answers alone.
    """
    found: Summary = {}
    for name in ("official", "fixed"):
        ratios = column(scores, name)
        found[f"{name}/overall"] = 100 * merge(ratios).value
        by_category = by_group([row.category for row in rows], ratios)
        found |= values(f"{name}/", by_category, scale=100.0)
    found["without_parents"] = 100 * merge(column(scores, "without_parents")).value
    return found


def _score(
    row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
) -> dict[str, Ratio]:
    (image,) = images
    replies, ends = ask_all(scorers["vqa"], image, [question.text for question in row.questions])
    return score(row, list(map(word_of, replies))) | outcome_columns(*ends)


def word_of(reply: Reply | None) -> str | None:
    """The answer of a model that is served; None if it cannot be used."""
    return None if reply is None else reply.text.strip().lower()


BENCHMARK = Official(
    name="dsg",
    version=1,
    read=read,
    requests=lambda rows: requests_of(rows, image_files),
    needs={"vqa": ()},
    score=_score,
    found=found,
    summary=lambda rows, scores: summary(rows, scores) | outcome_counts(scores, what="DSG-1k"),
    quality=lambda scores: scores["fixed"].value,
    primary="official/overall",
    settings={"sampling": ASKED},
    scoring=("sampling",),
    published=(Published("UniVG 3.7B", "official/overall", 75.0, "UniVG (arXiv 2503.12652)"),),
)
