"""ImgEdit-Bench: a judge scores edits of nine types from 1 to 5.

The rules are those of github.com/PKU-YuanGroup/ImgEdit, Benchmark. The judge is shown the source
and the result, and answers with a line of reasons and three lines "Label: score".

* Basic: 737 edits. An image scores the mean of its lines, rounded to two decimals, and a type the
  mean of its images, rounded again. No overall score is computed there: papers print the mean over
  the nine types or the mean over images, so both are here.
* UGE: 47 hard edits with one score each.
* Multi-turn: two or three edits in a row, each of the result of the one before. People judge them,
  so they are generated and laid out here, and not scored.

Replies that do not parse are left out by the official code. The rule that the second and the third
score should not be above the first one is in the prompt alone, and not enforced there or here.
"""

import dataclasses
import json
from collections.abc import Sequence

from etils import epath

from univg_jax.errors import NotFoundError, check_name
from univg_jax.evaluation import judging
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.judging import Prompts
from univg_jax.evaluation.metrics import Ratio
from univg_jax.evaluation.scorers.endpoint import Endpoint, Reply, Sampling
from univg_jax.evaluation.summaries import Scores, Summary, mean

_SOURCE = "Benchmark/ of github.com/PKU-YuanGroup/ImgEdit"
FILE = InputFile("basic_edit.json", f"the edits of ImgEdit-Bench: Basic in {_SOURCE}")
PROMPTS_FILE = InputFile(
    "prompts.json", f"the judge's prompts of ImgEdit-Bench: Basic in {_SOURCE}"
)
UGE_FILE = InputFile("UGE_edit.json", f"the hard edits of ImgEdit-Bench: UGE in {_SOURCE}")
UGE_PROMPTS_FILE = InputFile(
    "UGE_bench.py", f"the script of ImgEdit's hard edits: UGE in {_SOURCE}"
)
TURNS_FILE = InputFile("a list of turns", f"of ImgEdit-Bench: Multiturn in {_SOURCE}")

TYPES = {  # with the number of edits
    **{"extract": 117, "style": 100, "add": 95, "adjust": 94, "background": 94},
    **{"replace": 92, "remove": 86, "action": 36, "compose": 23},
}
EDITS, UGE_EDITS = sum(TYPES.values()), 47
UGE = "uge"  # the type of hard edits, which have none
LEAST = 1.0  # of the scale

# The official script sets neither temperature nor length; UniWorld-V2 advises temperature 0.
SAMPLING = Sampling(images_first=False)
JUDGE = "gpt-4.1"  # of published tables; the official script says gpt-4o

# What others print, and where. Not all say whether it is the mean over types or over images.
_README, _UNIWORLD = "README of Mage-Flow", "UniWorld-V1's paper, arXiv 2506.03147"
PUBLISHED = {
    "Qwen-Image-Edit-2511": (4.51, _README),
    "GPT-4o": (4.20, f"{_UNIWORLD}, mean of images"),
    "Step1X-Edit-1.2": (3.95, _README),
    "FLUX.2-klein-base-4B": (3.80, _README),
    "FLUX.1-Kontext-dev": (3.71, _README),
    "MagicBrush": (1.83, f"{_UNIWORLD}, mean of types"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """An edit, or two or three in a row. `source` is the name of its picture in the archive."""

    index: int
    key: str
    edit_type: str
    prompts: tuple[str, ...]
    source: str


def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The edits. `path` is basic_edit.json or its folder.

    Raises UserError if it is not that file, or, unless it is an `excerpt`, not all of it.
    """
    rows = _read(FILE, path, ("prompt",))
    FILE.check_count(path, found=len(rows), official=EDITS, what="edits", excerpt=excerpt)
    return rows


def read_uge(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The hard edits, of UGE_edit.json or its folder. Raises as `read`."""
    rows = _read(UGE_FILE, path, ("prompt",), edit_type=UGE)
    UGE_FILE.check_count(path, found=len(rows), official=UGE_EDITS, what="edits", excerpt=excerpt)
    return rows


def read_turns(path: epath.PathLike) -> tuple[Row, ...]:
    """The edits in a row of one of the three lists, a file. Raises UserError for another file."""
    return _read(TURNS_FILE, path, ("turn1", "turn2", "turn3"), edit_type="turns")


def _read(
    file: InputFile, path: epath.PathLike, prompts: Sequence[str], *, edit_type: str | None = None
) -> tuple[Row, ...]:
    value, at = file.json(path), file.at(path)
    if not isinstance(value, dict):
        raise file.error(at, "is no JSON object")
    rows = []
    for index, (key, entry) in enumerate(value.items()):
        try:
            texts = [entry[name] for name in prompts if name == prompts[0] or name in entry]
            kind, source = edit_type or entry["edit_type"], entry["id"]
        except (TypeError, KeyError) as error:
            raise file.error(at, f"has no edit in {key!r} ({error!r})") from None
        if not all(isinstance(text, str) for text in (*texts, kind, source)):
            raise file.error(at, f"has something else than text in {key!r}")
        # These become names of files, of which one is sent to the judge.
        if "/" in key or not judging.is_inside(key) or not judging.is_inside(source):
            raise file.error(at, f"has a key or a picture in another folder in {key!r}")
        row = Row(index, key, "adjust" if kind == "alter" else kind, tuple(texts), source)
        if edit_type is None:
            check_name(row.edit_type, TYPES, what=f"type of edit of {key!r} in {at}:")
        rows.append(row)
    return tuple(rows)


def image_files(row: Row) -> tuple[str, ...]:
    """Where the results lie: one, or one of each turn, for which there is no official name."""
    if len(row.prompts) == 1:
        return (f"{row.key}.png",)
    return tuple(f"{row.key}_turn{k}.png" for k in range(1, len(row.prompts) + 1))


def read_prompts(path: epath.PathLike) -> Prompts:
    """The judge's prompt of each type, of prompts.json or its folder. Raises UserError.

    The type that is called "alter" in one copy of the list, and "adjust" in the other, is "adjust".
    """
    prompts = judging.read_json_prompts(PROMPTS_FILE, path)
    texts = {"adjust" if name == "alter" else name: text for name, text in prompts.texts.items()}
    for name in TYPES:
        dataclasses.replace(prompts, texts=texts)[name]
    return dataclasses.replace(prompts, texts=texts)


def read_uge_prompts(path: epath.PathLike) -> Prompts:
    """The judge's prompt of hard edits, of the variable `prompt` of UGE_bench.py or its folder."""
    prompts = judging.read_python_prompts(UGE_PROMPTS_FILE, path)
    return dataclasses.replace(prompts, texts={UGE: prompts["prompt"]})


def judge(
    endpoint: Endpoint,
    rows: Sequence[Row],
    *,
    results: epath.PathLike,
    sources: epath.PathLike,
    prompts: Prompts,
    sampling: Sampling = SAMPLING,
    quiet: bool = False,
) -> list[Reply | None]:
    """What the judge says about each row; None where the folder `results` has no image of it.

    `sources` is the unpacked archive of pictures. Raises UserError where it lacks one, where
    `prompts` lack a type, and what `Endpoint.judge` raises.
    """

    def ask(row: Row) -> Reply | None:
        source = epath.Path(sources) / row.source
        if not source.exists():
            raise NotFoundError(
                f"{source} does not exist: expected the pictures of ImgEdit-Bench, Benchmark.tar "
                "of the data set ImgEdit, unpacked"
            )
        result = judging.picture_file(epath.Path(results) / image_files(row)[0])
        if result is None:
            return None
        prompt = prompts[row.edit_type].replace("<edit_prompt>", row.prompts[0])
        return endpoint.judge([source.read_bytes(), result], prompt, sampling=sampling)

    return endpoint.map(ask, rows, desc="judge ImgEdit", quiet=quiet)


def parse(text: str) -> float | None:
    """The score of a reply: the mean of its lines "Label: digits", rounded; None without any.

    Whatever the label and the number are, as in the official code. There a digit that is no number,
    such as "²", ends the program; here the reply does not parse.
    """
    scores = []
    for line in text.splitlines():
        _, *rest = line.strip().split(": ")
        if len(rest) == 1 and rest[0].isdigit():
            try:
                scores.append(int(rest[0]))
            except ValueError:
                return None
    return round(sum(scores) / len(scores), 2) if scores else None


def score(row: Row, reply: Reply | None) -> dict[str, Ratio]:
    """Sums and counts of an edit, from the judge's reply; None is an image that is not there.

    `official` leaves out what has no score; in `strict` it has the least one.
    """
    value = None
    if reply is None:
        outcome = "missing_image"
    elif reply.kind != "answered":
        outcome = reply.kind
    else:
        value = parse(reply.text)
        outcome = "unparsed" if value is None else "judged"
    return {
        "official": Ratio.of(0.0, 0.0) if value is None else Ratio.of(value),
        "strict": Ratio.of(LEAST if value is None else value),
        **judging.outcome_columns(outcome),
    }


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`official` and `strict`: each type, the mean of types and that of images; and outcomes.

    Of hard edits, which have no types, only the mean over images.
    """
    found: Summary = {}
    for kind in ("official", "strict"):
        values: dict[str, list[float]] = {}
        for row, entry in zip(rows, scores, strict=True):
            if entry[kind].count.sum():
                values.setdefault(row.edit_type, []).append(entry[kind].value)
        types = {name: _rounded_mean(values[name]) for name in TYPES if name in values}
        everything = [value for one in values.values() for value in one]
        if not all(row.edit_type == UGE for row in rows):
            found |= {f"{kind}/{name}": value for name, value in types.items()}
            found[f"{kind}/mean_of_types"] = mean(types.values())
            found[f"{kind}/mean_of_images"] = mean(everything)
        else:
            found[f"{kind}/mean"] = _rounded_mean(everything) if everything else float("nan")
    return found | judging.outcome_counts(scores, what="ImgEdit")


def _rounded_mean(values: Sequence[float]) -> float:
    # Added as the official code does: where the mean is just between two, the last bit decides.
    return round(sum(values) / len(values), 2)


def official_replies(rows: Sequence[Row], replies: Sequence[Reply | None]) -> str:
    """The content of result.json, which the official scripts for the averages read.

    They cannot read what has no reply: that is left out.
    """
    answered = {
        row.key: reply.text
        for row, reply in zip(rows, replies, strict=True)
        if reply is not None and reply.kind == "answered"
    }
    return json.dumps(answered, indent=4)
