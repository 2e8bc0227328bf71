"""GEdit-Bench: a judge scores edits of eleven tasks, in English and Chinese, from 0 to 10.

The rules are those of github.com/stepfun-ai/Step1X-Edit, GEdit-Bench, with VIEScore's prompts. The
judge is asked twice about a result: with the source how well the instruction was followed and how
little else was changed, and without it how natural the result looks. Each time it answers with a
list of scores in JSON, of which the least one counts:

    SC = min(scores of the first)     PQ = min(scores of the second)     O = sqrt(SC PQ)

Each of the three is averaged over the images of a task, and then over the eleven tasks: so the
mean O is not the root of the other means. `intersection` is the same over those rows that all
compared models could answer, as the data says.

Where a reply does not parse, the official code asks both questions once more and takes a random
score if it still does not. Here the item is then without a score: `official` leaves it out, as the
official code does where an image is missing, and in `strict` it has 0.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from data_pipelines.native.table_files import object_of
from data_pipelines.native.tables import get, open_table
from univg_jax.errors import UserError, check_name
from univg_jax.evaluation import judging, similarity
from univg_jax.evaluation.inputs import InputFile, TablePictures, check_count
from univg_jax.evaluation.judging import Prompts
from univg_jax.evaluation.metrics import Image, Ratio
from univg_jax.evaluation.official import (
    MAGE_FLOW,
    Official,
    Published,
    Request,
    of_systems,
    requests_of,
)
from univg_jax.evaluation.scorers.chat import Reply, Sampling
from univg_jax.evaluation.scorers.endpoint import Endpoint
from univg_jax.evaluation.summaries import Scores, Summary, by_group, column, values
from univg_jax.fields import setting
from univg_jax.images import png_bytes

_WHAT = "the parquet files of huggingface.co/datasets/stepfun-ai/GEdit-Bench"
LIST_FILE = InputFile("gedit_edit.json", f"UniWorld's list of GEdit-Bench; or {_WHAT}")
PROMPTS_FILE = InputFile(
    "vie_prompts.py",
    "VIEScore's prompts: GEdit-Bench/viescore of github.com/stepfun-ai/Step1X-Edit",
)
TASKS = (
    *("background_change", "color_alter", "material_alter", "motion_change", "ps_human"),
    *("style_change", "subject-add", "subject-remove", "subject-replace", "text_change"),
    "tone_transfer",
)
LANGUAGES = ("en", "cn")
ROWS = 606  # a language
LIST_ROWS = 604  # UniWorld's list is keyed by what is not unique: two rows of subject-remove lack

_CONTEXT = "_context_no_delimit"
_PARTS = {
    "SC": (_CONTEXT, "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC"),
    "PQ": (_CONTEXT, "_prompts_0shot_rule_PQ"),
}
_DELIMITER = "||V^=^V||"
Pixels = UInt8[np.ndarray, "_ _ 3"]  # of any size beside another one
METRICS = ("SC", "PQ", "O")
ATTEMPTS = 2  # to get a pair of replies that parse

# The two official judges: GPT-4.1 (2025-04-14) and Qwen2.5-VL-72B-Instruct-AWQ.
GPT = Sampling(images_first=False, encoding="jpeg", quality=75, max_tokens=1400)
QWEN = Sampling(images_first=True, encoding="png", temperature=0.0, max_tokens=512)
JUDGES = {"gpt-4.1": GPT, "qwen2.5-vl-72b": QWEN}

# The full set by GPT-4.1, which drifts: two runs differ by 0.1.
_README = f"{MAGE_FLOW}, which does not say which score"
_NEWEST = {
    "en": {
        **{"JoyAI-Image-Edit": 8.276, "Mage-Flow-Edit-Turbo": 8.271, "FLUX.2-klein-9B": 8.040},
        **{"Qwen-Image-Edit-2511": 7.877, "FLUX.1-Kontext-dev": 6.462},
    },
    "cn": {
        **{"Mage-Flow-Edit-Turbo": 8.264, "JoyAI-Image-Edit": 8.125, "FLUX.2-klein-9B": 8.055},
        **{"Qwen-Image-Edit-2511": 7.819, "FLUX.1-Kontext-dev": 1.857},
    },
}
_ENGLISH = tuple(
    Published(system, f"official/en/full/{metric}", value, "README of BAGEL")
    for system, numbers in {
        "GPT-4o": (7.85, 7.62, 7.53),
        "Step1X-Edit": (7.09, 6.76, 6.70),
        "BAGEL": (7.36, 6.83, 6.52),
    }.items()
    for metric, value in zip(METRICS, numbers, strict=True)
)
PUBLISHED = {
    language: (
        *(_ENGLISH if language == "en" else ()),
        *of_systems(f"official/{language}/full/O", _README, systems),
    )
    for language, systems in _NEWEST.items()
}
PICTURES = ("input_image", "input_image_raw")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which edits, of which pictures, and how a judge is asked; a result stores its prompts' hash.

    The judge is always shown `input_image`, as in the official code.
    """

    language: str = setting("en", "of the instructions", names=LANGUAGES)
    picture: str = setting("input_image", "which of the two is edited", names=PICTURES)
    prompts: str = setting("", "the judge's prompts, vie_prompts.py, to score", is_path=True)
    judge: str = setting(
        "gpt-4.1", "in which of the official ways it is asked", names=tuple(JUDGES)
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """An edit. `index` is its place in the data, `copy` counts rows with one name before it.

    `in_intersection` is None where the data does not say. `source` reads the picture that the judge
    is shown, and `given` that which is edited.
    """

    index: int
    key: str
    task: str
    language: str
    instruction: str
    in_intersection: bool | None = None
    source: Callable[[], Image] | None = dataclasses.field(default=None, repr=False, compare=False)
    given: Callable[[], Image] | None = dataclasses.field(default=None, repr=False, compare=False)
    copy: int = 0


def read(
    path: epath.PathLike, settings: Settings = Settings(), *, excerpt: bool = False
) -> tuple[Row, ...]:
    """The edits in a language, of the data set's folder or files, or of UniWorld's list, a JSON
    file with the pictures beside it.

    Raises UserError if it is neither, or, unless it is an `excerpt`, not all of it: 606 rows of
    the language, or 604 of the list.
    """
    is_list = os.fspath(path).endswith(".json")
    everything = _of_list(path, settings) if is_list else _of_table(path, settings)
    rows = [row for row in everything if row.language == settings.language]
    official = LIST_ROWS if is_list else ROWS
    if not rows:
        raise UserError(f"{path} has no rows in {settings.language}: expected {_WHAT}")
    what = f"rows of language {settings.language!r}"
    check_count(
        str(path), found=len(rows), official=official, what=what, excerpt=excerpt, expected=_WHAT
    )
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    numbered = []
    for row in rows:
        numbered.append(dataclasses.replace(row, copy=seen[row.task, row.key]))
        seen[row.task, row.key] += 1
    return tuple(numbered)


def _of_table(path: epath.PathLike, settings: Settings) -> list[Row]:
    table = open_table(os.fspath(path), what=_WHAT)
    names = ("key", "task_type", "instruction", "instruction_language", "Intersection_exist")
    table.require(*names, "input_image", settings.picture)
    shown, given = (TablePictures(table, name) for name in ("input_image", settings.picture))
    rows = []
    for part in table.parts():
        for number, row in table.rows(part, columns=names):
            try:
                if isinstance(row, UserError):
                    raise row
                found = Row(
                    index=number,
                    key=get(row, "key", str),
                    task=get(row, "task_type", str),
                    language=get(row, "instruction_language", str),
                    instruction=get(row, "instruction", str),
                    in_intersection=get(row, "Intersection_exist", bool),
                    source=functools.partial(shown, number),
                    given=functools.partial(given, number),
                )
                _check(found)
            except UserError as error:
                raise UserError(f"{part.file} row {number}: {error}") from None
            rows.append(found)
    return rows


def _of_list(path: epath.PathLike, settings: Settings) -> list[Row]:
    value, at = LIST_FILE.json(path), LIST_FILE.at(path)
    if settings.picture != "input_image":
        raise LIST_FILE.error(at, f"has no {settings.picture}, only the pictures beside it")
    if not isinstance(value, dict):
        raise LIST_FILE.error(at, "is no JSON object")
    rows = []
    for index, (key, entry) in enumerate(value.items()):
        try:
            row = object_of(entry)
            task, file, instruction = (
                get(row, name, str) for name in ("edit_type", "id", "prompt")
            )
            if not judging.is_inside(file):
                raise UserError(f"the picture {file!r} is in another folder")
            language = "cn" if f"/{task}/cn/" in file else "en"
            what = "a source of GEdit-Bench"
            source = functools.partial(similarity.read_rgb, at.parent / file, what=what)
            rows.append(Row(index, key, task, language, instruction, None, source, source))
            _check(rows[-1])
        except UserError as error:
            raise LIST_FILE.error(at, f"has no edit in {key!r} ({error})") from None
    return rows


def _check(row: Row) -> None:
    check_name(row.task, TASKS, what="task")
    check_name(row.language, LANGUAGES, what="language")
    if not re.fullmatch(r"[\w-]+", row.key, re.ASCII):  # it becomes the name of a file
        raise UserError(f"the key {row.key!r} is no plain name")


def image_files(row: Row) -> tuple[str, ...]:
    """Where the result lies. Of rows with one name, the later ones have a number beside it: the
    official code knows one picture of them all.
    """
    return (f"{_stem(row)}.png",)


def source_file(row: Row) -> str:
    """Where the source lies, which the official code shows the judge."""
    return f"{_stem(row)}_SRCIMG.png"


def _stem(row: Row) -> str:
    number = f"_{row.copy + 1}" if row.copy else ""
    return f"fullset/{row.task}/{row.language}/{row.key}{number}"


def requests(rows: Sequence[Row]) -> list[Request]:
    """An edit of each picture."""
    return requests_of(
        rows,
        image_files,
        task="ie",
        inputs=lambda row: {"prompt": row.instruction, "image": row.given},
        whole=True,
    )


def side_files(rows: Sequence[Row]) -> dict[str, Callable[[], bytes]]:
    """The sources, which the official code reads beside the results."""
    return {source_file(row): functools.partial(_source_png, row) for row in rows}


def _source_png(row: Row) -> bytes:
    return png_bytes(row.source())


def read_prompts(path: epath.PathLike) -> Prompts:
    """The judge's two prompts, SC and PQ, of vie_prompts.py or its folder. Raises UserError."""
    parts = judging.read_python_prompts(PROMPTS_FILE, path)
    texts = {name: "\n".join(parts[part] for part in named) for name, named in _PARTS.items()}
    return dataclasses.replace(parts, texts=texts)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How an item ended (`judging.outcome_columns`), its scores if it has them, and the replies."""

    outcome: str
    sc: float = math.nan
    pq: float = math.nan
    replies: tuple[Reply, ...] = ()


def judge(
    row: Row,
    image: Pixels,
    endpoint: Endpoint,
    *,
    prompts: Prompts,
    sampling: Sampling = GPT,
) -> Verdict:
    """Asks both questions about a result, and both once more where a reply does not parse.

    The result is shown at the source's size. Raises UserError where the source cannot be read, and
    what `Endpoint.judge` raises.
    """
    source = row.source()
    result = similarity.resized(image, like=source)
    prompt = prompts["SC"].replace("<instruction>", row.instruction)
    questions = (((source, result), prompt), ((result,), prompts["PQ"]))
    for again in range(ATTEMPTS):
        replies = tuple(
            endpoint.judge(shown, text, sampling=sampling, again=again) for shown, text in questions
        )
        verdict = verdict_of(replies)
        if verdict.outcome != "unparsed":
            break
    return verdict


def verdict_of(replies: Sequence[Reply]) -> Verdict:
    """The verdict of a pair of replies, to the questions SC and PQ."""
    for kind in ("failed", "refused"):
        if any(reply.kind == kind for reply in replies):
            return Verdict(kind, replies=tuple(replies))
    sc, pq = (parse(reply.text) for reply in replies)
    # There may be no root of numbers that are off the scale.
    if sc is None or pq is None or not 0 <= sc * pq < math.inf:
        return Verdict("unparsed", replies=tuple(replies))
    return Verdict("judged", sc, pq, tuple(replies))


def parse(text: str) -> float | None:
    """The least score of a reply; None if it does not parse.

    The JSON is what two delimiters enclose, or what lies between the first "{" and the last "}".
    Without braces the reply may be, or have in it, "[a, b]", or be an integer from 0 to 10.
    """
    if text.count(_DELIMITER) == 2:
        found = text.split(_DELIMITER)[1]
    elif "{" in text and "}" in text:
        found = text[text.index("{") : text.rindex("}") + 1]
    else:
        listed = text[text.find("[") : text.rfind("]") + 1]
        if re.match(r"^\[\d+, ?\d+\]$", listed):
            found = f'{{"score": {listed}}}'
        else:
            return _integer(text)
    try:
        scores = json.loads(found.strip().replace("\n", ""))["score"]
        scores = scores if isinstance(scores, list) else [scores]
        numbers = [float(s) for s in scores if type(s) in (int, float)]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None
    is_whole = numbers and len(numbers) == len(scores) and all(map(math.isfinite, numbers))
    return min(numbers) if is_whole else None


def _integer(text: str) -> float | None:
    try:
        number = int(text)
    except ValueError:
        return None
    return float(number) if 0 <= number <= 10 else None


def score(row: Row, verdict: Verdict) -> dict[str, Ratio]:
    """Sums and counts of an edit: three metrics, `official` and `strict`, and its outcome."""
    is_judged = verdict.outcome == "judged"
    numbers = (verdict.sc, verdict.pq, math.sqrt(verdict.sc * verdict.pq)) if is_judged else ()
    scores = dict(zip(METRICS, numbers))
    return {
        **{
            f"official/{name}": Ratio.of(scores.get(name, 0.0), float(is_judged))
            for name in METRICS
        },
        **{f"strict/{name}": Ratio.of(scores.get(name, 0.0)) for name in METRICS},
        **judging.outcome_columns(verdict.outcome),
    }


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """For each language, `full` and `intersection`: SC, PQ and O, their mean and that of each task.

    A name is such as `official/en/full/O` and `official/en/full/O/text_change`. A mean over tasks
    is NaN where one of the eleven has no item with a score, as in the official code.
    """
    found: Summary = {}
    for language in LANGUAGES:
        full = [i for i, row in enumerate(rows) if row.language == language]
        shared = [i for i in full if rows[i].in_intersection]
        for name, chosen in {"full": full, "intersection": shared}.items():
            if chosen:
                tasks = [rows[i].task for i in chosen]
                found |= _means(f"{language}/{name}", tasks, [scores[i] for i in chosen])
    return found | judging.outcome_counts(scores, what="GEdit-Bench")


def _means(where: str, tasks: Sequence[str], scores: Sequence[Scores]) -> Summary:
    found: Summary = {}
    for kind in ("official", "strict"):
        for name in METRICS:
            by_task: Mapping[str, Ratio] = by_group(tasks, column(scores, f"{kind}/{name}"))
            means = [by_task[task].value if task in by_task else math.nan for task in TASKS]
            found[f"{kind}/{where}/{name}"] = math.fsum(means) / len(TASKS)
            found |= values(f"{kind}/{where}/{name}/", by_task)
    return found


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings. Raises UserError for a file of prompts that is none."""
    prompts = read_prompts(settings.prompts) if settings.prompts else None
    sampling = JUDGES[settings.judge]

    def read_rows(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
        return read(path, settings, excerpt=excerpt)

    def check_scoring(rows: Sequence[Row], scorers: Mapping[str, Any]) -> None:
        if prompts is None:
            raise UserError("gedit needs its judge's prompts: --benchmark=gedit:prompts=FILE")

    def score_image(
        row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
    ) -> dict[str, Ratio]:
        (image,) = images
        if image is None:
            return score(row, Verdict("missing"))
        found = judge(row, image, scorers["judge"], prompts=prompts, sampling=sampling)
        return score(row, found)

    return Official(
        name="gedit",
        version=1,
        read=read_rows,
        requests=requests,
        side_files=side_files,
        needs={"judge": ()},
        check_scoring=check_scoring,
        score=score_image,
        summary=summary,
        quality=lambda scores: scores["official/O"].value,
        primary=f"official/{settings.language}/full/O",
        published=PUBLISHED[settings.language],
        settings={
            "language": settings.language,
            "picture": settings.picture,
            "prompts": prompts.sha256 if prompts else "",
            "sampling": dataclasses.asdict(sampling),
        },
        scoring=("picture", "prompts", "sampling"),
    )


BENCHMARK = benchmark()
