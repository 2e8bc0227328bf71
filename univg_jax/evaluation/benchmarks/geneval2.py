"""GenEval 2: how probable a model finds the right answer to each of a prompt's questions.

The rules are those of github.com/facebookresearch/GenEval2, whose data the user supplies. One image
is made of each prompt. The model is asked "QUESTION Answer in one word." and gives one token. A
question scores the sum of the probabilities of the first tokens of all spellings of its answer.
Nothing is cut at 1, and a token that begins two spellings counts twice. Then

    Soft-TIFA AM   the mean over a prompt's questions, and over prompts
    Soft-TIFA GM   the geometric mean over a prompt's questions, 0 if any is 0; mean over prompts
    TIFA           the share of questions whose most probable token is one of the spellings

all in percent. A reply that cannot be used counts 0; `failures/` counts these, and by skill the
questions whose most probable token is wrong.
"""

import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from univg_jax.errors import UserError
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.judging import ASKED, ask_all, outcome_columns, outcome_counts
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Published, of_systems, requests_of
from univg_jax.evaluation.summaries import Scores, Summary, by_group, column, values

FILE = InputFile(
    "geneval2_data.jsonl", "the prompts of GenEval 2: github.com/facebookresearch/GenEval2"
)
INDEX = InputFile("images.json", "the file of each prompt's image, as the official scorer reads it")
PROMPTS = 800
INSTRUCTION = "Answer in one word."
YES = ("Yes", "yes", " Yes", " yes")
DIGITS = dict(
    zip(
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
        map(str, range(1, 11)),
        strict=True,
    )
)
NO_DIGIT = "other"
_UNIEVO = "UniEvo-VL (arXiv 2609.38721), which does not say which mean"

# The text of the first token of a spelling, by the tokenizer of the model that answers.
FirstToken = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its answer, and the skill that it is about."""

    text: str
    answer: str
    skill: str

    @property
    def prompt(self) -> str:
        """What the model is sent, after the image."""
        return f"{self.text} {INSTRUCTION}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """The answers that are right. Of a question that counts nothing the answer is yes."""
        if not self.text.startswith("How many"):
            return YES
        word, digit = self.answer, DIGITS.get(self.answer, NO_DIGIT)
        capital = word.capitalize()
        return (word, capital, f" {word}", f" {capital}", digit, f" {digit}")


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt, how many atoms it is made of, and its questions, of which there may be more."""

    index: int
    prompt: str
    atom_count: int
    questions: tuple[Question, ...]
    skills: tuple[str, ...] = ()  # of all rows


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said: its most probable token, and the probabilities of tokens by text.

    An endpoint gives only the most probable tokens; what is not among them counts 0.
    """

    token: str
    p: Mapping[str, float]


def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The prompts with their questions. `path` is geneval2_data.jsonl or its folder.

    Raises UserError if it is not that file, or, unless it is an `excerpt`, not all of it.
    """
    rows = []
    fields = ("prompt", "atom_count", "vqa_list", "skills")
    for index, value in enumerate(FILE.objects(path, fields)):
        try:
            questions = tuple(
                Question(str(text), str(answer), str(skill))
                for (text, answer), skill in zip(value["vqa_list"], value["skills"], strict=True)
            )
            rows.append(Row(index, value["prompt"], int(value["atom_count"]), questions))
        except (TypeError, ValueError) as error:
            reason = f"has no questions with skills in line {index + 1} ({error})"
            raise FILE.error(FILE.at(path), reason) from None
        if not questions:
            raise FILE.error(FILE.at(path), f"has no questions in line {index + 1}")
    FILE.check_count(path, found=len(rows), official=PROMPTS, what="prompts", excerpt=excerpt)
    names = skills(rows)
    return tuple(dataclasses.replace(row, skills=names) for row in rows)


def image_files(row: Row) -> tuple[str, ...]:
    """Where the image lies. The official scorer reads places from `index_file` instead."""
    return (f"{row.index:05}.png",)


def found(rows: Sequence[Row], folder: epath.PathLike) -> list[list[str]]:
    """The image of each row: where images.json of the folder says, or by its number. A path in it
    may be absolute.

    Raises UserError for an images.json that is no object of paths.
    """
    places: dict[str, str] = {}
    if (epath.Path(folder) / INDEX.name).exists():
        places = INDEX.json(folder)
        if not isinstance(places, dict) or not all(isinstance(p, str) for p in places.values()):
            raise INDEX.error(INDEX.at(folder), "is no JSON object of paths")
    return [[places.get(row.prompt, image_files(row)[0])] for row in rows]


def index_file(rows: Sequence[Row]) -> dict[str, str]:
    """The JSON that the official scorer reads: the image's file of each prompt."""
    return {row.prompt: image_files(row)[0] for row in rows}


def soft_score(question: Question, p: Mapping[str, float], first_token: FirstToken) -> float:
    """The sum of the probabilities of the first tokens of all spellings, each as often as it comes.

    A tokenizer that splits off spaces before digits has the bare space as the first token of " 4",
    and that is then a right answer: a fault of the official code, which is kept.
    """
    return math.fsum(p.get(first_token(spelling), 0.0) for spelling in question.spellings)


def qwen_first_token(spelling: str) -> str:
    """The first token by Qwen's rule of splitting, for an endpoint whose tokenizer is not at hand.

    Digits are tokens one by one, and so is the space before one. Each spelled word is taken to be
    one token with the space before it.
    """
    space, rest = (" ", spelling[1:]) if spelling.startswith(" ") else ("", spelling)
    return (space or rest[0]) if rest[:1].isdecimal() else spelling


def hard_score(question: Question, token: str) -> float:
    """1 if the most probable token, in lower case, is one of the spellings."""
    return float(token.lower() in question.spellings)


def skills(rows: Sequence[Row]) -> tuple[str, ...]:
    """All skills of these rows, sorted."""
    return tuple(sorted({question.skill for row in rows for question in row.questions}))


def score(
    row: Row, answers: Sequence[Answer | None] | None, first_token: FirstToken, names: Sequence[str]
) -> dict[str, Ratio]:
    """Sums and counts of a prompt, from the answers to its questions in their order.

    None instead of an answer could not be had, and counts 0, as does every question of an image
    that is not there. `names` are the `skills` of all rows: `skills` has an entry for each.
    """
    if answers is None:
        answers = [None] * len(row.questions)
    if len(answers) != len(row.questions):
        raise UserError(
            f"prompt {row.index} of GenEval 2 has {len(row.questions)} questions, "
            f"not {len(answers)} answers"
        )
    pairs = list(zip(row.questions, answers, strict=True))
    soft = [0.0 if a is None else soft_score(q, a.p, first_token) for q, a in pairs]
    hard = [0.0 if a is None else hard_score(q, a.token) for q, a in pairs]
    sums: dict[str, list[float]] = collections.defaultdict(list)
    wrong: dict[str, list[bool]] = collections.defaultdict(list)
    for (question, answer), value, is_right in zip(pairs, soft, hard, strict=True):
        sums[question.skill].append(value)
        if answer is not None:
            wrong[question.skill].append(not is_right)
    return {
        "am": Ratio.of(math.fsum(soft) / len(soft)),
        "gm": Ratio.of(geometric_mean(soft)),
        "tifa": Ratio.of(sum(hard) / len(hard)),
        "skills": Ratio.of(
            np.array([math.fsum(sums[name]) for name in names]),
            np.array([len(sums[name]) for name in names]),
        ),
        **{f"failures/{name}": Ratio.of(sum(wrong[name]), len(wrong[name])) for name in names},
    }


def geometric_mean(numbers: Sequence[float]) -> float:
    """0 if any number is."""
    if min(numbers) <= 0:
        return 0.0
    return math.exp(math.fsum(map(math.log, numbers)) / len(numbers))


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """In percent: `am`, `gm` and `tifa`; GM by the number of atoms; and each skill.

    A skill is the mean over all of its questions, not over prompts.
    """
    totals = {name: merge(column(scores, name)) for name in ("am", "gm", "tifa")}
    sums = merge(column(scores, "skills"))
    by_skill = {
        name: Ratio.of(total, count)
        for name, total, count in zip(skills(rows), sums.total, sums.count, strict=True)
    }
    by_atoms = by_group([row.atom_count for row in rows], column(scores, "gm"))
    return {
        **{name: 100 * totals[name].value for name in ("am", "gm", "tifa")},
        **values("gm/atoms_", dict(sorted(by_atoms.items())), scale=100.0),
        **values("skill/", by_skill, scale=100.0),
    }


def count_by_skill(rows: Sequence[Row]) -> dict[str, int]:
    """How many questions of each skill there are."""
    asked = itertools.chain.from_iterable(row.questions for row in rows)
    return dict(collections.Counter(question.skill for question in asked))


def _score(
    row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
) -> dict[str, Ratio]:
    (image,) = images
    replies, ends = ask_all(scorers["vqa"], image, [question.prompt for question in row.questions])
    answers = [None if reply is None else Answer(reply.text, reply.p) for reply in replies]
    return score(row, answers, qwen_first_token, row.skills) | outcome_columns(*ends)


BENCHMARK = Official(
    name="geneval2",
    version=1,
    read=read,
    requests=lambda rows: requests_of(rows, image_files),
    side_files=lambda rows: {INDEX.name: json.dumps(index_file(rows), indent=1)},
    found=found,
    needs={"vqa": ()},
    score=_score,
    summary=lambda rows, scores: summary(rows, scores) | outcome_counts(scores, what="GenEval 2"),
    quality=lambda scores: scores["am"].value,
    primary="gm",
    settings={"sampling": ASKED},
    scoring=("sampling",),
    published=(
        Published("SDXL", "am", 50.1, "BiDPO, second hand"),
        Published("SDXL", "gm", 9.1, "BiDPO, second hand"),
        *of_systems("gm", _UNIEVO, {"Qwen-Image-2512": 32.97, "UniEvo-VL": 35.53}),
    ),
)
