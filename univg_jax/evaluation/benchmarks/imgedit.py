"""ImgEdit-Bench: a judge scores edits of nine types from 1 to 5.

The rules are those of github.com/PKU-YuanGroup/ImgEdit, Benchmark. The judge is shown the source
and the result, and answers with a line of reasons and three lines "Label: score".

* Basic: 737 edits. An image scores the mean of its lines, rounded to two decimals, and a type the
  mean of its images, rounded again. No overall score is computed there: papers print the mean over
  the nine types or the mean over images, so both are here.
* UGE: 47 hard edits with one score each.
* Multi-turn: two or three edits in a row, each of the result of the one before. People judge them,
  so they are generated and laid out here, and only counted.

Replies that do not parse are left out by the official code. The rule that the second and the third
score should not be above the first one is in the prompt alone, and not enforced there or here. The
judge is sent the source's file as it is, and the result's pixels as PNG.
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from univg_jax.errors import NotFoundError, UserError, check_name
from univg_jax.evaluation import judging
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.judging import Prompts
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import (
    MAGE_FLOW,
    Official,
    Output,
    Published,
    Request,
    requests_of,
)
from univg_jax.evaluation.scorers.chat import Reply, Sampling
from univg_jax.evaluation.scorers.endpoint import Endpoint
from univg_jax.evaluation.summaries import Scores, Summary, column, mean
from univg_jax.fields import setting

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

# What others print, and where. Not all say which of the two means it is.
_README = f"{MAGE_FLOW}, which does not say which mean"
_UNIWORLD = "UniWorld-V1 (arXiv 2506.03147)"
_TYPES, _IMAGES = "official/mean_of_types", "official/mean_of_images"
PUBLISHED = (
    Published("FireRed-Image-Edit-1.0", _TYPES, 4.56, _README),
    Published("Qwen-Image-Edit-2511", _TYPES, 4.51, _README),
    Published("FLUX.2-dev", _TYPES, 4.35, _README),
    Published("GPT-4o", _TYPES, 4.24, _UNIWORLD),
    Published("GPT-4o", _IMAGES, 4.20, _UNIWORLD),
    Published("Step1X-Edit-1.2", _TYPES, 3.95, _README),
    Published("FLUX.2-klein-base-4B", _TYPES, 3.80, _README),
    Published("FLUX.1-Kontext-dev", _TYPES, 3.71, _README),
    Published("MagicBrush", _TYPES, 1.83, _UNIWORLD),
    Published("MagicBrush", _IMAGES, 1.90, "papers that quote the mean of images"),
)
SUITES = ("basic", "uge", "multiturn")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which edits, and how the judge is asked; a result stores the hash of its prompts."""

    suite: str = setting("basic", "which of the three lists", names=SUITES)
    pictures: str = setting(
        "", "the folder of sources, Benchmark.tar unpacked; by default the list's", is_path=True
    )
    prompts: str = setting(
        "", "the judge's prompts, to score: prompts.json, or UGE_bench.py of uge", is_path=True
    )
    temperature: float | None = setting(
        None, "of the judge", least=0, none="the server's own, as in the official script"
    )

    @property
    def sampling(self) -> Sampling:
        """How the judge is asked."""
        return dataclasses.replace(SAMPLING, temperature=self.temperature)


@dataclasses.dataclass(frozen=True)
class Row:
    """An edit of the file `source`; turn 2 or 3 of several edits the result of the turn before."""

    key: str
    edit_type: str
    prompt: str
    source: str
    turn: int = 0  # 0: the only one


def read(
    path: epath.PathLike, settings: Settings = Settings(), *, excerpt: bool = False
) -> tuple[Row, ...]:
    """The edits. `path` is the list of the suite or, unless it is that of turns, its folder.

    Raises UserError if it is not that file, or, unless it is an `excerpt`, not all of it.
    """
    if settings.suite == "multiturn":
        return _read(TURNS_FILE, path, settings, ("turn1", "turn2", "turn3"))
    file, official = (FILE, EDITS) if settings.suite == "basic" else (UGE_FILE, UGE_EDITS)
    rows = _read(file, path, settings, ("prompt",))
    file.check_count(path, found=len(rows), official=official, what="edits", excerpt=excerpt)
    return rows


def _read(
    file: InputFile, path: epath.PathLike, settings: Settings, names: Sequence[str]
) -> tuple[Row, ...]:
    value, at = file.json(path), file.at(path)
    pictures = settings.pictures or at.parent
    if not isinstance(value, dict):
        raise file.error(at, "is no JSON object")
    rows: list[Row] = []
    for key, entry in value.items():
        try:
            texts = [entry[name] for name in names if name == names[0] or name in entry]
            kind = entry["edit_type"] if settings.suite == "basic" else settings.suite
            source = entry["id"]
        except (TypeError, KeyError) as error:
            raise file.error(at, f"has no edit in {key!r} ({error!r})") from None
        if not all(isinstance(text, str) for text in (*texts, kind, source)):
            raise file.error(at, f"has something else than text in {key!r}")
        # These become names of files, of which one is sent to the judge.
        if "/" in key or not judging.is_inside(key) or not judging.is_inside(source):
            raise file.error(at, f"has a key or a picture in another folder in {key!r}")
        kind = "adjust" if kind == "alter" else kind
        if settings.suite == "basic":
            check_name(kind, TYPES, what=f"type of edit of {key!r} in {at}:")
        for turn, text in enumerate(texts, 1):
            number = turn if settings.suite == "multiturn" else 0
            rows.append(Row(key, kind, text, os.path.join(pictures, source), number))
    return tuple(rows)


def image_files(row: Row) -> tuple[str, ...]:
    """Where the result lies; of a turn there is no official name."""
    return (_file(row.key, row.turn),)


def _file(key: str, turn: int) -> str:
    return f"{key}_turn{turn}.png" if turn else f"{key}.png"


def requests(rows: Sequence[Row]) -> list[Request]:
    """An edit of the source, or of the result of the turn before."""
    return requests_of(
        rows,
        image_files,
        task="ie",
        inputs=lambda row: {
            "prompt": row.prompt,
            "image": Output(_file(row.key, row.turn - 1)) if row.turn > 1 else row.source,
        },
        whole=True,
    )


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


def ask(
    row: Row, image: Image | None, endpoint: Endpoint, *, prompts: Prompts, sampling: Sampling
) -> Reply | None:
    """What the judge says about a result; None without one.

    Raises UserError where the source is not there, and what `Endpoint.judge` raises.
    """
    if image is None:
        return None
    source = epath.Path(row.source)
    if not source.exists():
        raise NotFoundError(
            f"{source} does not exist: expected the pictures of ImgEdit-Bench, Benchmark.tar of "
            "the data set ImgEdit, unpacked (pictures=DIR)"
        )
    prompt = prompts[row.edit_type].replace("<edit_prompt>", row.prompt)
    return endpoint.judge([source.read_bytes(), image], prompt, sampling=sampling)


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
        outcome = "missing"
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
            found[f"{kind}/mean"] = _rounded_mean(everything) if everything else math.nan
    return found | judging.outcome_counts(scores, what="ImgEdit")


def _rounded_mean(values: Sequence[float]) -> float:
    # Added as the official code does: where the mean is just between two, the last bit decides.
    return round(sum(values) / len(values), 2)


def score_turn(
    row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
) -> dict[str, Ratio]:
    """Whether the result of a turn is there: people are to judge it."""
    (image,) = images
    return {"made": Ratio.of(float(image is not None))}


def summarize_turns(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`made`, the share of results that are there, and how many are missing."""
    made = merge(column(scores, "made"))
    return {"made": made.value, "failures/missing": float(made.count[0] - made.total[0])}


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings. Raises UserError for a file of prompts that is none."""
    prompts: Prompts | None = None
    if settings.prompts:
        read_them = {"basic": read_prompts, "uge": read_uge_prompts}.get(settings.suite)
        if read_them is None:
            raise UserError("imgedit:suite=multiturn has no judge's prompts: people judge it")
        prompts = read_them(settings.prompts)

    def read_rows(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
        return read(path, settings, excerpt=excerpt)

    def check_scoring(rows: Sequence[Row], scorers: Mapping[str, Any]) -> None:
        if prompts is None:
            raise UserError("imgedit needs its judge's prompts: --benchmark=imgedit:prompts=FILE")

    def score_image(
        row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
    ) -> dict[str, Ratio]:
        (image,) = images
        if image is None:
            return score(row, None)
        endpoint, how = scorers["judge"], settings.sampling
        return score(row, ask(row, image, endpoint, prompts=prompts, sampling=how))

    stored: dict[str, Any] = {"suite": settings.suite}
    if settings.suite == "multiturn":
        return Official(
            name="imgedit",
            version=1,
            read=read_rows,
            requests=requests,
            score=score_turn,
            summary=summarize_turns,
            primary="made",
            settings=stored,
        )
    is_basic = settings.suite == "basic"
    sampling = dataclasses.asdict(settings.sampling)
    return Official(
        name="imgedit",
        version=1,
        read=read_rows,
        requests=requests,
        needs={"judge": ()},
        check_scoring=check_scoring,
        score=score_image,
        summary=summary,
        quality=lambda scores: scores["official"].value,
        primary=_TYPES if is_basic else "official/mean",
        published=PUBLISHED if is_basic else (),
        settings=stored | {"prompts": prompts.sha256 if prompts else "", "sampling": sampling},
        scoring=("prompts", "sampling"),
    )


BENCHMARK = benchmark()
