"""T2I-CompBench: eight sets of 300 prompts about attributes, places, numbers and actions.

The rules are those of github.com/Karine-Huang/T2I-CompBench. Ten images are made of each prompt,
each scores between 0 and 1, and a set's score is the mean over all of its images:

    color, shape, texture   the product over the prompt's noun phrases of p(yes), asked "PHRASE?"
    spatial                 two detected objects and how they lie, in the plane
    3d_spatial              two detected objects, and which of them is nearer by a depth map
    numeracy                for each object whether it is there, and there as often as it should
    non_spatial             the cosine of CLIP ViT-B/32
    complex                 the mean of those of the three that the prompt is about

Detections are of the image at `detector_size`: distances are in pixels of that image. Noun
phrases and parts of speech are spaCy's (`en_core_web_sm`), given as a `Parse`; the prompts of the
places and numbers have one form, of which no grammar is needed.

`failures/` counts images that have no score, since a reply cannot be used, and objects of prompts
for which a detector has no class.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image as Pillow

from univg_jax.errors import UserError, check_name, quote
from univg_jax.evaluation.detection import Detection, Detections, by_score
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.judging import ASKED, ask_all, outcome_columns, outcome_counts
from univg_jax.evaluation.metrics import Image, Number, Ratio, merge
from univg_jax.evaluation.official import Official, Published, requests_of
from univg_jax.evaluation.similarity import COSINE, clip_cosine, clip_weights
from univg_jax.evaluation.summaries import Scores, Summary, column
from univg_jax.fields import setting

SETS = (
    *("color", "shape", "texture", "spatial", "3d_spatial"),
    *("numeracy", "non_spatial", "complex"),
)
SOURCE = "examples/dataset/ of github.com/Karine-Huang/T2I-CompBench"
PARSES = InputFile("PARSES.jsonl", "what spaCy reads in each prompt")
PROMPTS = 300  # of each set
IMAGES = 10  # of each prompt

RELATIONS = (  # the first that a prompt contains is its relation
    *("on side of", "next to", "near", "on the left of", "on the right of"),
    *("on the bottom of", "on the top of", "on top of"),
)
NEAR = ("next to", "on side of", "near")
DEPTH_RELATIONS = ("in front of", "behind", "hidden")
PREPOSITIONS = (  # between the two objects of a complex prompt
    *("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near"),
)
DETECTION_THRESHOLD = 0.5  # of UniDet: detections count above it
NEAR_PIXELS = 150
LEAST_SPATIAL = 0.5  # what scores less in the plane scores 0
PEOPLE = ("boy", "girl", "man", "woman")
LABELS = {  # of the detector, for objects that it calls otherwise
    **dict.fromkeys(PEOPLE, "person"),
    **{"ship": "boat", "goldfish": "fish", "painting": "picture"},
}
UNIVG = "UniVG (arXiv 2503.12652)"
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
ARTICLES = ("a", "an")
SAME_OBJECT = 0.9  # boxes of one class that overlap more are one object
MAX_PHRASES = 8
CLIP = "ViT-B/32"
NO_PHRASES = ("top", "the side", "the left", "the right")


@dataclasses.dataclass(frozen=True)
class Parse:
    """A sentence as spaCy reads it: its words with their part of speech, and its noun phrases."""

    words: tuple[tuple[str, str], ...]  # such as ("red", "ADJ")
    phrases: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which set, and the parses of its prompts; a result stores the set."""

    set: str = setting("color", "of prompts", names=SETS)
    parses: str = setting(
        "",
        "a file with a line of JSON for each prompt, {prompt, words, phrases}, as spaCy's "
        "en_core_web_sm reads it: of color, shape, texture and complex",
        is_path=True,
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt of a set, and what it asks for where that can be read without a grammar.

    `objects` are the two of a place, or all that are counted, with their `counts`. `parts` are
    what a complex prompt is about.
    """

    set: str
    index: int
    prompt: str
    relation: str | None = None
    objects: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()  # of attribute, spatial, action


def read(path: epath.PathLike, set: str, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The prompts of a set. `path` is the official folder of SET_val.txt.

    Numeracy needs new_objects.txt there, and complex complex_val_spatial.txt and
    complex_val_action.txt. Raises UserError if one is missing or, unless it is an `excerpt`, has
    other than 300 prompts.
    """
    check_name(set, SETS, what="set of T2I-CompBench")
    file = _file(f"{set}_val.txt")
    prompts = file.lines(path)
    file.check_count(path, found=len(prompts), official=PROMPTS, what="prompts", excerpt=excerpt)
    rows = [Row(set, index, prompt) for index, prompt in enumerate(prompts)]
    if set in ("spatial", "3d_spatial"):
        relations = RELATIONS if set == "spatial" else DEPTH_RELATIONS
        return tuple(_with_place(row, relations, file, path) for row in rows)
    if set == "numeracy":
        names = _read_names(path)
        return tuple(_with_counts(row, names, file, path) for row in rows)
    if set == "complex":
        spatial, action = (_read_list(path, kind) for kind in ("spatial", "action"))
        return tuple(_with_parts(row, spatial, action) for row in rows)
    return tuple(rows)


def _file(name: str) -> InputFile:
    return InputFile(name, f"a list of T2I-CompBench: {SOURCE}")


def _with_place(row: Row, relations: Sequence[str], file: InputFile, path: epath.PathLike) -> Row:
    """A prompt is "a NOUN RELATION a NOUN": its objects are the first and the last noun."""
    words = row.prompt.split()
    relation = relation_of(row.prompt, relations)
    if relation is None or len(words) < 4 or words[0] not in ARTICLES:
        reason = f"has no place of two objects in line {row.index + 1}"
        raise file.error(file.at(path), reason)
    return dataclasses.replace(row, relation=relation, objects=(words[1], words[-1]))


def relation_of(prompt: str, relations: Sequence[str] = RELATIONS) -> str | None:
    """The first of the relations that is in the prompt."""
    return next((relation for relation in relations if relation in prompt), None)


def _read_names(path: epath.PathLike) -> dict[str, str]:
    """The singular of each noun of new_objects.txt, by its singular and its plural."""
    file, names = _file("new_objects.txt"), {}
    # The table is beside the prompts, also where `path` is the prompts' file.
    for number, line in enumerate(file.lines(_folder(path)), 1):
        one, separator, many = (part.strip().lower() for part in line.partition(" - "))
        if not separator:
            raise file.error(file.at(_folder(path)), f"has no 'ONE - MANY' in line {number}")
        names.setdefault(one, one)
        names.setdefault(many, one)
    return names


def _folder(path: epath.PathLike) -> epath.Path:
    path = epath.Path(path)
    return path if path.is_dir() else path.parent


def _with_counts(row: Row, names: dict[str, str], file: InputFile, path: epath.PathLike) -> Row:
    """Every number or article before a noun of the list counts that noun."""
    words = re.findall(r"\w+|[^\w\s]", row.prompt)
    found = [
        (names[noun], NUMBERS.index(number) + 1 if number in NUMBERS else 1)
        for number, noun in itertools.pairwise(words)
        if number in (*NUMBERS, *ARTICLES) and noun in names
    ]
    if not found:
        reason = f"counts nothing of new_objects.txt in line {row.index + 1}"
        raise file.error(file.at(path), reason)
    objects, counts = zip(*found, strict=True)
    return dataclasses.replace(row, objects=objects, counts=counts)


def _read_list(path: epath.PathLike, kind: str) -> frozenset[str]:
    lines = _file(f"complex_val_{kind}.txt").lines(_folder(path))
    return frozenset(_key(line) for line in lines)


def _key(prompt: str) -> str:
    return prompt.split(".")[0].lower()


def _with_parts(row: Row, spatial: frozenset[str], action: frozenset[str]) -> Row:
    """A prompt of neither list is about both; the list of places goes first."""
    parts = ("attribute", "spatial", "action")
    if _key(row.prompt) in spatial:
        parts = ("attribute", "spatial")
    elif _key(row.prompt) in action:
        parts = ("attribute", "action")
    return dataclasses.replace(row, relation=relation_of(row.prompt), parts=parts)


def read_parses(path: epath.PathLike) -> dict[str, Parse]:
    """The parse of each prompt, from lines of {"prompt", "words": [[word, POS]], "phrases"}.

    Raises UserError for a file that is none of these.
    """
    found = {}
    for number, line in enumerate(PARSES.objects(path, ("prompt", "words", "phrases")), 1):
        try:
            words = tuple((str(word), str(kind)) for word, kind in line["words"])
            found[line["prompt"]] = Parse(words, tuple(map(str, line["phrases"])))
        except (TypeError, ValueError):
            reason = f"has no words with parts of speech in line {number}"
            raise PARSES.error(path, reason) from None
    return found


def image_files(row: Row) -> tuple[str, ...]:
    """Where the images lie: their names begin with the prompt, and images are counted through."""
    first = row.index * IMAGES
    return tuple(f"samples/{row.prompt}_{first + k:06}.png" for k in range(IMAGES))


def found(rows: Sequence[Row], folder: epath.PathLike) -> list[list[str]]:
    """The images of each row that `folder` has, by their numbers, however many.

    As in the official code a name begins with the prompt. A row whose prompt another one has, too,
    has the numbers that are its own.
    """
    samples = epath.Path(folder) / "samples"
    by_prompt = collections.defaultdict(list)
    for path in samples.iterdir() if samples.is_dir() else ():
        if match := re.fullmatch(r"(.*)_(\d+)\.(?:png|jpg)", path.name):
            by_prompt[match[1]].append((int(match[2]), f"samples/{path.name}"))
    rows_of = collections.Counter(row.prompt for row in rows)
    return [
        [
            name
            for number, name in sorted(by_prompt[row.prompt])
            if rows_of[row.prompt] == 1 or number // IMAGES == row.index
        ]
        for row in rows
    ]


def detector_size(width: int, height: int) -> tuple[int, int]:
    """The size of the image that detector and depth are given: at most 479 by 480 pixels.

    The short side becomes 479; where the long one would be above 480, that becomes 480.
    """
    short, long = min(width, height), max(width, height)
    new_short, new_long = 479, int(479 * long / short)
    if new_long > 480:
        new_short, new_long = int(480 * new_short / new_long), 480
    return (new_short, new_long) if width <= height else (new_long, new_short)


def questions(parse: Parse) -> tuple[str, ...]:
    """What is asked about an image for the attributes: at most eight noun phrases."""
    phrases = [phrase for phrase in parse.phrases if phrase not in NO_PHRASES]
    return tuple(f"{phrase}?" for phrase in phrases[:MAX_PHRASES])


def yes_probability(p: Mapping[str, float]) -> float | None:
    """p(yes) / (p(yes) + p(no)) of the answer's first token; None if neither has a probability."""
    yes, no = p.get("yes", 0.0), p.get("no", 0.0)
    return yes / (yes + no) if yes + no > 0 else None


def attributes(probabilities: Sequence[float]) -> float:
    """The product of p(yes), each and the product rounded to four decimals; 1 of no phrase.

    The product is in float32, as in the official code: rounding may hang on it.
    """
    product = np.float32(1)
    for p in probabilities:
        product *= np.float32(f"{p:.4f}")
    return float(f"{product:.4f}")


def spatial(
    relation: str | None, objects: tuple[str | None, str | None], detections: Detections
) -> float:
    """A quarter of the confidence of each object that is there, and half of how well they lie.

    Of each label the best detection counts. A sum below 0.5 scores 0.
    """
    best: dict[str, Detection] = {}
    for label, box in by_score(detections, above=DETECTION_THRESHOLD):
        best.setdefault(label, box)
    a, b = (best.get(LABELS["man"] if name in PEOPLE else name) for name in objects)
    total = _confidence(a) + _confidence(b)
    if a is not None and b is not None:
        total += place(relation, a, b) / 2
    return total if total >= LEAST_SPATIAL else 0.0


def _confidence(box: Detection | None) -> float:
    return 0.0 if box is None else 0.25 * float(box[4])


def place(relation: str | None, a: Detection, b: Detection) -> float:
    """How well `a` lies in its relation to `b`, of 0 to 1.

    Beside is 1 within 150 pixels in x or in y, and 150 / distance beyond. A direction holds if it
    is the larger part of the offset; from an IoU of 0.1 on it is worth 0.1 / IoU. "on top of",
    unlike "on the top of", has no rule and is worth nothing.
    """
    dx, dy, iou = _offset_and_iou(a, b)
    if relation in NEAR:
        if min(abs(dx), abs(dy)) < NEAR_PIXELS:
            return 1.0
        return NEAR_PIXELS / max(abs(dx), abs(dy))
    holds = {
        "on the left of": dx > abs(dy),
        "on the right of": -dx > abs(dy),
        "on the top of": dy > abs(dx),
        "on the bottom of": -dy > abs(dx),
    }
    if not holds.get(relation, False):
        return 0.0
    return 1.0 if iou < 0.1 else 0.1 / iou


def _offset_and_iou(a: Detection, b: Detection) -> tuple[float, float, float]:
    """From the center of `a` to that of `b`, and their intersection over union."""
    ax0, ay0, ax1, ay1 = (float(side) for side in a[:4])
    bx0, by0, bx1, by1 = (float(side) for side in b[:4])
    width, height = min(ax1, bx1) - max(ax0, bx0), min(ay1, by1) - max(ay0, by0)
    both = max(width, 0.0) * max(height, 0.0)
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - both
    dx, dy = (bx0 + bx1) / 2 - (ax0 + ax1) / 2, (by0 + by1) / 2 - (ay0 + ay1) / 2
    return dx, dy, both / union if union > 0 else 0.0


def depth(
    relation: str | None,
    objects: tuple[str, ...],
    detections: Detections,
    nearness: Float[np.ndarray, "h w"],
) -> dict[str, float]:
    """As `spatial` with which object is nearer, and without the cut at 0.5.

    A label counts if it contains the object's name. `nearness` is larger where things are nearer.
    The order of the two mean depths is worth min(1, 2 IoU) of the boxes.

    `official` has three faults of the official code: the depth of a box is cut out with x and y
    exchanged; of several boxes of one object the last one counts that is better than the best of
    the other; an IoU of exactly 0.5 is worth nothing. `fixed` has none of them.
    """
    found = by_score(detections, above=DETECTION_THRESHOLD)
    names = [LABELS["man"] if name in PEOPLE else name for name in objects]
    matches = [[i for i, (label, _) in enumerate(found) if name in label] for name in names]
    best = [found[places[0]][1] if places else None for places in matches]
    chosen = best
    if all(matches):
        # The official loop ends once it has seen both, and takes the last of each until then.
        end = max(places[0] for places in matches)
        chosen = [found[max(i for i in places if i <= end)][1] for places in matches]
    scores = {}
    for kind, boxes in (("official", chosen), ("fixed", best)):
        scores[kind] = sum(map(_confidence, boxes))
        if None not in boxes:
            scores[kind] += _order(relation, *boxes, nearness, kind=kind) / 2
    return scores


def _order(
    relation: str | None,
    a: Detection,
    b: Detection,
    nearness: Float[np.ndarray, "h w"],
    *,
    kind: str,
) -> float:
    depths = []
    for box in (a, b):
        x0, y0, x1, y1 = (int(side) for side in box[:4])
        part = nearness[x0:x1, y0:y1] if kind == "official" else nearness[y0:y1, x0:x1]
        depths.append(float(part.mean()) if part.size else math.nan)
    difference = depths[0] - depths[1]  # NaN, of a box beyond the map, is neither
    holds = {"in front of": difference > 0, "behind": difference < 0, "hidden": difference < 0}
    iou = _offset_and_iou(a, b)[2]
    if not holds.get(relation, False) or (kind == "official" and iou == 0.5):
        return 0.0
    return min(1.0, iou / 0.5)


def numeracy(row: Row, detections: Detections) -> float:
    """For each object half a point if it is there, and half if it is there as often as it should.

    A name that no detection has takes those whose label contains it.
    """
    labels: list[str] = []
    boxes: list[Detection] = []
    for label, box in by_score(detections, above=DETECTION_THRESHOLD):
        same = (b for name, b in zip(labels, boxes, strict=True) if name == label)
        if not any(_is_same(box, other) for other in same):
            labels.append(label)
            boxes.append(box)
    total, weight = 0.0, 1.0 / len(row.objects)
    for name, count in zip(row.objects, row.counts, strict=True):
        name = LABELS.get(name, name)
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        if name in labels:
            total += 0.5 * weight
            total += 0.5 * weight if labels.count(name) == count else 0.0
    return total


def _is_same(a: Detection, b: Detection) -> bool:
    """Whether two boxes overlap by more than 0.9 of their union or of one of them.

    A box has the pixels on both of its borders, so its sides are one longer than they look.
    """
    sides = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1)]
    both = max(0, sides[0]) * max(0, sides[1])
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    wholes: list[Number] = [areas[0] + areas[1] - both, *areas]
    return any(both / whole > SAME_OBJECT for whole in wholes)


def complex_objects(parse: Parse) -> tuple[str | None, str | None]:
    """The nouns around the preposition of a complex prompt; None for both unless there are two."""
    words = [word for word, _ in parse.words]
    kinds = [kind for _, kind in parse.words]
    found: list[str] = []
    for i in range(len(words)):
        length = next((k for k in (3, 2, 1) if " ".join(words[i : i + k]) in PREPOSITIONS), None)
        if length is None:
            continue
        before = [j for j in range(i - 1, -1, -1) if kinds[j] in ("NOUN", "PROPN")]
        after = [j for j in range(i + length, len(words)) if kinds[j] == "NOUN"]
        if not after:  # then the last word of the first proper name
            after = [
                j
                for j in range(i + length, len(words) - 1)
                if kinds[j] == "PROPN" and kinds[j + 1] != "PROPN"
            ]
        found += [words[j] for j in (*before[:1], *after[:1])]
    return (found[0], found[1]) if len(found) == 2 else (None, None)


def without_adjectives(parse: Parse) -> str:
    """The text of a complex prompt for CLIP: words are joined by spaces, also the full stop."""
    return " ".join(word for word, kind in parse.words if kind != "ADJ")


def complex_score(row: Row, parts: Mapping[str, float]) -> float:
    """The mean of what the prompt is about, of the scores of attribute, spatial and action."""
    return sum(parts[name] for name in row.parts) / len(row.parts)


def score(images: Sequence[Mapping[str, float] | float | None]) -> dict[str, Ratio]:
    """Sums and counts of a prompt's images, of what one of the rules gave for each.

    None is an image that is not there, or whose questions got no answer: it counts nowhere, and as
    0 in what is strict. One number is both `official` and `fixed`.
    """
    there = [image for image in images if image is not None]
    found = {}
    for kind in ("official", "fixed"):
        total = math.fsum(v[kind] if isinstance(v, Mapping) else v for v in there)
        found[kind] = Ratio.of(total, len(there))
        found[f"{kind}_strict"] = Ratio.of(total, len(images))
    return found


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """For each set the mean over its images, `official` and `fixed`, and with `strict/` before it
    the same with 0 for what is missing.
    """
    found: Summary = {}
    for name in dict.fromkeys(row.set for row in rows):
        of_set = [entry for row, entry in zip(rows, scores, strict=True) if row.set == name]
        totals = {kind: merge(column(of_set, kind)) for kind in of_set[0]}
        for kind in ("official", "fixed"):
            found[f"{kind}/{name}"] = totals[kind].value
            found[f"strict/{kind}/{name}"] = totals[f"{kind}_strict"].value
    return found


PARSED = ("color", "shape", "texture", "complex")  # sets whose prompts a grammar has to read
# What each set asks of scorers.
NEEDS = {
    **dict.fromkeys(("color", "shape", "texture"), ("vqa",)),
    **dict.fromkeys(("spatial", "numeracy"), ("detect",)),
    "3d_spatial": ("detect", "depth"),
    "non_spatial": ("clip",),
    "complex": ("vqa", "detect", "clip"),
}
# What an image scores; a text says why it has no score (`judging.outcome_columns`).
_Rule = Callable[[Row, Image, Mapping[str, Any]], Mapping[str, float] | float | str]


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark of one set."""
    parses = read_parses(settings.parses) if settings.parses else {}
    digest = PARSES.sha256(settings.parses) if settings.parses else ""

    def parse(row: Row) -> Parse:
        if row.prompt not in parses:
            where = settings.parses or "t2i_compbench"
            raise UserError(f"{where} has no parse of {quote(row.prompt)}: give parses=FILE")
        return parses[row.prompt]

    def check_scoring(rows: Sequence[Row], scorers: Mapping[str, Any]) -> None:
        if settings.set in PARSED:
            for row in rows:
                parse(row)

    def attribute_score(row: Row, image: Image, scorers: Mapping[str, Any]) -> float | str:
        replies, ends = ask_all(scorers["vqa"], image, questions(parse(row)))
        if unusable := [end for end in ends if end != "judged"]:
            return unusable[0]
        answers = [yes_probability(_by_word(reply.p)) for reply in replies]
        return "unparsed" if None in answers else attributes(answers)

    def spatial_score(row: Row, image: Image, scorers: Mapping[str, Any]) -> float:
        return spatial(row.relation, row.objects, scorers["detect"](_small(image)))

    def depth_score(row: Row, image: Image, scorers: Mapping[str, Any]) -> dict[str, float]:
        small = _small(image)
        return depth(row.relation, row.objects, scorers["detect"](small), scorers["depth"](small))

    def complex_parts(row: Row, image: Image, scorers: Mapping[str, Any]) -> float | str:
        parts = {}
        if "attribute" in row.parts:
            value = attribute_score(row, image, scorers)
            if isinstance(value, str):
                return value
            parts["attribute"] = value
        if "spatial" in row.parts:
            objects = complex_objects(parse(row))
            parts["spatial"] = spatial(row.relation, objects, scorers["detect"](_small(image)))
        if "action" in row.parts:
            text = without_adjectives(parse(row))
            parts["action"] = clip_cosine(scorers["clip"], image, text)
        return complex_score(row, parts)

    rules: dict[str, _Rule] = {
        **dict.fromkeys(("color", "shape", "texture"), attribute_score),
        "spatial": spatial_score,
        "3d_spatial": depth_score,
        "numeracy": lambda row, image, scorers: numeracy(row, scorers["detect"](_small(image))),
        "non_spatial": lambda row, image, scorers: clip_cosine(scorers["clip"], image, row.prompt),
        "complex": complex_parts,
    }

    def score_images(
        row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
    ) -> dict[str, Ratio]:
        rule = rules[row.set]
        found = ["missing" if image is None else rule(row, image, scorers) for image in images]
        ends = [value if isinstance(value, str) else "judged" for value in found]
        return {
            **score([None if isinstance(value, str) else value for value in found]),
            **outcome_columns(*ends),
            "failures/no_class": _objects_without_class(row, scorers.get("detect")),
        }

    scoring: dict[str, Any] = {"parses": digest}
    if "vqa" in NEEDS[settings.set]:
        scoring["sampling"] = ASKED
    if "clip" in NEEDS[settings.set]:
        scoring |= {"clip": CLIP, **COSINE}
    return Official(
        name="t2i_compbench",
        version=2,
        read=lambda path, *, excerpt=False: read(path, settings.set, excerpt=excerpt),
        requests=lambda rows: requests_of(rows, image_files),
        found=found,
        needs=dict.fromkeys(NEEDS[settings.set], ()),
        weights=clip_weights(CLIP),
        check_scoring=check_scoring,
        score=score_images,
        summary=lambda rows, scores: (
            summary(rows, scores) | outcome_counts(scores, what="T2I-CompBench")
        ),
        quality=lambda scores: scores["official"].value,
        primary=f"official/{settings.set}",
        published=(Published("UniVG, of all sets", f"official/{settings.set}", 0.48, UNIVG),),
        settings={"set": settings.set, **scoring},
        scoring=tuple(scoring),
    )


def _by_word(p: Mapping[str, float]) -> dict[str, float]:
    """Probabilities of tokens, added up where they differ by case and spaces alone: our choice, for
    a model that is served. The official model has one token for each word.
    """
    found = collections.Counter()
    for token, probability in p.items():
        found[token.strip().lower()] += probability
    return found


def _objects_without_class(row: Row, detect: Any) -> Ratio:
    """How many objects of a prompt a detector can never find, if it says what it can."""
    classes = getattr(detect, "classes", None)
    known = [
        classes is None or any(LABELS.get(name, name) in label for label in classes)
        for name in row.objects
    ]
    return Ratio.of(known.count(False), len(known))


def _small(image: Image) -> UInt8[np.ndarray, "_ _ 3"]:
    """The picture at the size at which the detector is given it, by torchvision's filter for
    pictures of Pillow: bilinear, over all pixels that fall into one.
    """
    height, width = image.shape[:2]
    size = detector_size(width, height)
    return np.asarray(Pillow.fromarray(image).resize(size, Pillow.Resampling.BILINEAR))


BENCHMARK = benchmark()
