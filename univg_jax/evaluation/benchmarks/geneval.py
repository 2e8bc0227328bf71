"""GenEval: a detector looks for the objects, counts, colors and positions that a prompt names.

The rules are those of github.com/djghosh13/geneval, evaluate_images.py and summary_scores.py. A
row is a prompt; four images are made of each. An image is right if every clause of `include`
holds and none of `exclude` does. The overall score is the mean over the six tags of the share of
right images, so a tag with few prompts weighs as much as the others.
"""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from univg_jax.errors import UserError, check_name, quote
from univg_jax.evaluation.detection import Detection, Detections
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import MAGE_FLOW, Official, of_systems, requests_of
from univg_jax.evaluation.summaries import (
    Scores,
    Summary,
    by_group,
    column,
    failure_counts,
    mean,
    mean_of,
    values,
)

FILE = InputFile(
    "evaluation_metadata.jsonl", "GenEval's prompts: prompts/ of github.com/djghosh13/geneval"
)
PROMPTS = 553
IMAGES = 4  # of each prompt

THRESHOLD = 0.3  # a detection counts if its score is above this one,
COUNTING_THRESHOLD = 0.9  # or above this one where the prompt is about a number
MAX_OBJECTS = 16  # of a class, the best first
POSITION_MARGIN = 0.1  # of the sum of both sizes, within which an offset is none
COLORS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
RELATIONS = ("left of", "right of", "above", "below")
# Overall; FLUX.1-dev's is the same in both.
PUBLISHED = (
    *of_systems(
        "overall",
        "UniVG (arXiv 2503.12652)",
        {"UniVG 3.7B": 0.70, "SD3": 0.71, "OmniGen": 0.70, "FLUX": 0.66},
    ),
    *of_systems(
        "overall",
        MAGE_FLOW,
        {"Mage-Flow": 0.90, "Qwen-Image": 0.87, "FLUX.2-dev": 0.87, "Z-Image-Base": 0.84},
    ),
)
# Of images that are there: of their objects, and of the target of a relation.
FAILURES = ("missing_object", "excess", "color", "position", "target")
JUDGED = ("tag", "include", "exclude")  # what decides in a prompt's metadata
BACKGROUND = 0x99  # gray, of the crops whose color is asked for

# Colors of some detections of a class.
ColorFn = Callable[[Sequence[Detection], str], list[str]]


@dataclasses.dataclass(frozen=True)
class Clause:
    """So many objects of a class, their color, and their relation to those of an earlier clause."""

    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int | None = None  # which clause of `include`


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt. `metadata` is its line in the official file."""

    index: int
    tag: str
    prompt: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]
    metadata: str


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether an image is right, and the kinds of what is wrong with it."""

    is_correct: bool
    failures: tuple[str, ...] = ()  # of FAILURES


def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The prompts. `path` is evaluation_metadata.jsonl or its folder.

    Raises UserError if it is not that file, or, unless it is an `excerpt`, not all of it.
    """
    rows = []
    for index, value in enumerate(FILE.objects(path, ("tag", "include", "prompt"))):
        try:
            rows.append(
                Row(
                    index=index,
                    tag=value["tag"],
                    prompt=value["prompt"],
                    include=tuple(_clause(c, at=i) for i, c in enumerate(value["include"])),
                    exclude=tuple(_clause(c, at=0) for c in value.get("exclude", ())),
                    metadata=json.dumps(value),
                )
            )
        except (TypeError, KeyError, ValueError) as error:
            reason = f"has no clause of GenEval in line {index + 1} ({error!r})"
            raise FILE.error(FILE.at(path), reason) from None
    FILE.check_count(path, found=len(rows), official=PROMPTS, what="prompts", excerpt=excerpt)
    return tuple(rows)


def _clause(value: Mapping, *, at: int) -> Clause:
    relation, target = value.get("position", (None, None))
    if target is not None and not (relation in RELATIONS and 0 <= target < at):
        raise ValueError(f"no relation to an earlier clause: {relation!r} {target!r}")
    return Clause(value["class"], int(value["count"]), value.get("color"), relation, target)


def image_files(row: Row) -> tuple[str, ...]:
    """Where the images lie: see `found` for what else the official scorer takes."""
    return tuple(f"{row.index:05}/samples/{k:04}.png" for k in range(IMAGES))


def side_files(row: Row) -> dict[str, str]:
    """What the official scorer reads beside the images, with its content."""
    return {f"{row.index:05}/metadata.jsonl": row.metadata}


def found(rows: Sequence[Row], folder: epath.PathLike) -> list[list[str]]:
    """The images of each row that `folder` has, by their numbers: all names of digits, any number
    of images, as the official scorer takes them. The official generator writes five digits.

    Raises UserError where metadata.jsonl, by which the official scorer judges a folder's images,
    is of another prompt.
    """
    return [_found(row, epath.Path(folder)) for row in rows]


def _found(row: Row, folder: epath.Path) -> list[str]:
    for name, text in side_files(row).items():
        file, expected = folder / name, json.loads(text)
        if not file.exists():
            continue
        (written,) = InputFile(file.name, FILE.source).objects(file, ("prompt",))[:1]
        if any(written.get(key) != expected.get(key) for key in (*JUDGED, "prompt")):
            raise UserError(
                f"{file} is about {quote(written['prompt'])}: expected {quote(row.prompt)}, which "
                f"line {row.index + 1} of {FILE.name} has"
            )
    samples = folder / f"{row.index:05}" / "samples"
    names = [path.name for path in samples.iterdir()] if samples.is_dir() else []
    numbered = sorted((int(name[:-4]), name) for name in names if re.fullmatch(r"\d+\.png", name))
    return [f"{row.index:05}/samples/{name}" for _, name in numbered]


def kept(detections: Detections, tag: str) -> dict[str, list[Detection]]:
    """The detections that count, the best of a class first. None suppresses another."""
    above = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found = {}
    for name, boxes in detections.items():
        # Arrays keep the detector's float32, in which the official code compares, too.
        scores = np.array([box[4] for box in boxes])
        order = np.argsort(scores)[::-1]
        found[name] = [boxes[i] for i in order if scores[i] > above][:MAX_OBJECTS]
    return found


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` is, seen from `b`; at most one of left and right, and one of above and below.

        (dx, dy) = sign(o) max(|o| - 0.1 (s_a + s_b), 0) / |o|,   o = c_a - c_b

    with centers c and sizes s. A direction holds if its component is beyond 0.5. The norm is that
    of the whole offset, so boxes that nearly touch may hold no relation.
    """
    corners = np.array([a[:4], b[:4]]).reshape(2, 2, 2)
    offset = np.subtract(*corners.mean(axis=1))
    margin = POSITION_MARGIN * np.abs(corners[:, 1] - corners[:, 0]).sum(axis=0)
    beyond = np.maximum(np.abs(offset) - margin, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    dx, dy = beyond / np.linalg.norm(offset)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {name for name, does in zip(RELATIONS, holds, strict=True) if does}


def judge(row: Row, detections: Detections, color: ColorFn) -> Verdict:
    """Whether the image with these detections is right.

    Only the best `count` objects of a clause are asked for color and position. Every pair of them
    and the target's objects must hold the relation.
    """
    found = kept(detections, row.tag)
    failures: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in row.include:
        objects = found.get(clause.name, [])[: clause.count]
        failure = _failure(clause, objects, matched, color)
        matched.append(None if failure else objects)
        failures += [failure] if failure else []
    failures += [
        "excess" for clause in row.exclude if len(found.get(clause.name, [])) >= clause.count
    ]
    return Verdict(not failures, tuple(failures))


def _failure(
    clause: Clause,
    objects: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    color: ColorFn,
) -> str | None:
    """The kind of the first thing that is wrong with a clause's objects."""
    if len(objects) < clause.count:
        return "missing_object"
    if clause.color and color(objects, clause.name).count(clause.color) < clause.count:
        return "color"
    if clause.relation:
        targets = matched[clause.target]
        if targets is None:
            return "target"
        pairs = ((a, b) for a in objects for b in targets)
        if not all(clause.relation in relations(a, b) for a, b in pairs):
            return "position"
    return None


def color_texts(name: str) -> dict[str, tuple[str, ...]]:
    """What is embedded for each color of a class: unit vectors, averaged, and scaled again."""
    return {
        color: (
            f"a photo of a {color} {name}",
            f"a photo of a {color}-colored {name}",
            f"a photo of a {color} object",
        )
        for color in COLORS
    }


def color_crop(image: Image, detection: Detection) -> UInt8[np.ndarray, "y x 3"]:
    """The box of an object, gray beyond its mask if it has one, black beyond the image."""
    *box, _, mask = detection
    if mask is not None:
        image = np.where(mask[..., None], image, np.uint8(BACKGROUND))
    x0, y0, x1, y1 = (round(float(side)) for side in box)
    x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
    height, width = image.shape[:2]
    crop = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
    top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1, height), min(x1, width)
    if top < bottom and left < right:
        crop[top - y0 : bottom - y0, left - x0 : right - x0] = image[top:bottom, left:right]
    return crop


def nearest_colors(
    crops: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "10 3 d"]
) -> list[str]:
    """The color of each crop by CLIP embeddings of the crops, and of `color_texts` in its order."""
    units = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
    # The mean's length matters: colors are compared by cosine.
    means = units.mean(axis=1)
    means /= np.linalg.norm(means, axis=-1, keepdims=True)
    return [COLORS[i] for i in np.argmax(crops @ means.T, axis=-1)]


def score(verdicts: Sequence[Verdict | None]) -> dict[str, Ratio]:
    """Sums and counts of a prompt's images; None is an image that is not there.

    `correct` is over the images that are there, as in the official code, and `strict` over all
    that were asked for.
    """
    there = [verdict for verdict in verdicts if verdict is not None]
    right = sum(verdict.is_correct for verdict in there)
    kinds = collections.Counter(kind for verdict in there for kind in verdict.failures)
    return {
        "correct": Ratio.of(right, len(there)),
        "strict": Ratio.of(right, len(verdicts)),
        "failures/missing": Ratio.of(len(verdicts) - len(there), len(verdicts)),
        **{f"failures/{kind}": Ratio.of(kinds[kind], len(there)) for kind in FAILURES},
    }


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`overall`, each tag, the share of right images, and of prompts with at least one.

    A missing image counts nowhere, and is wrong in what is `strict/`. `failures/` counts images
    that are missing, and what is wrong with the others, by its kind.
    """
    correct, strict = column(scores, "correct"), column(scores, "strict")
    tags = [row.tag for row in rows]
    official, all_asked = by_group(tags, correct), by_group(tags, strict)
    # The official code knows a prompt by its line: one that is there twice is one.
    prompts = by_group([row.metadata for row in rows], correct).values()
    return {
        "overall": mean_of(official.values()),
        **values("", official),
        "images": merge(correct).value,
        "prompts": mean(float(p.total.sum() > 0) for p in prompts if p.count.sum()),
        "strict/overall": mean_of(all_asked.values()),
        **values("strict/", all_asked),
        **failure_counts(scores),
    }


def check_scoring(rows: Sequence[Row], scorers: Mapping[str, Any]) -> None:
    """Raises UserError for a detector that lacks a class: one by another name, such as "mouse" for
    "computer mouse", would just never be found.
    """
    if (classes := getattr(scorers.get("detect"), "classes", None)) is not None:
        for name in dict.fromkeys(c.name for row in rows for c in (*row.include, *row.exclude)):
            check_name(name, sorted(classes), what="class of the detector")


def _score(row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]) -> Scores:
    def verdict(image: Image) -> Verdict:
        color = functools.partial(scorers.get("color", _no_color), image)
        return judge(row, scorers["detect"](image), color)

    return score([None if image is None else verdict(image) for image in images])


def _no_color(image: Image, objects: Sequence[Detection], name: str) -> list[str]:
    return []


def _side_files(rows: Sequence[Row]) -> dict[str, str]:
    return {name: text for row in rows for name, text in side_files(row).items()}


BENCHMARK = Official(
    name="geneval",
    version=1,
    read=read,
    requests=lambda rows: requests_of(rows, image_files),
    side_files=_side_files,
    found=found,
    needs={
        "detect": (),
        "color": ("overall", "colors", "color_attr", "images", "prompts", "color"),
    },
    check_scoring=check_scoring,
    score=_score,
    summary=summary,
    primary="overall",
    settings={"color": "ViT-L/14"},
    scoring=("color",),
    published=PUBLISHED,
)
