"""LongText-Bench: how much of the text that a prompt asks for can be read in its image.

The rules are those of textbench/ in github.com/X-Omni-Team/X-Omni. A model reads the image. Its
text and the asked text, lines joined by spaces, are reduced to letters, digits, Chinese
characters and French accents. In English they are compared word by word in lower case, in Chinese
character by character as they are. The score is the number of words that are in both, as often as
in both, over the number of asked words, summed over all images before the division.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from etils import epath

from univg_jax.errors import check_name
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.judging import outcome_columns, outcome_counts
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import MAGE_FLOW, Official, of_systems, requests_of
from univg_jax.evaluation.scorers.chat import Sampling
from univg_jax.evaluation.summaries import Scores, Summary, by_group, column, values
from univg_jax.fields import setting

SOURCE = "the prompts of LongText-Bench: textbench/ of github.com/X-Omni-Team/X-Omni"
FILES = {
    "en": InputFile("text_prompts.jsonl", SOURCE),
    "zh": InputFile("text_prompts_zh.jsonl", SOURCE),
}
PROMPTS = 160
NOTHING_READ = "No text recognized."  # what a reader says of an image without text; with its dot
KEPT = "一-龥a-zA-Z0-9àâäéèêëîïôöùûüçÀÂÄÉÈÊËÎÏÔÖÙÛÜÇ"

Language = Literal["en", "zh"]

# By Qwen2.5-VL-7B, asked the official question.
PUBLISHED = {
    "en": {
        **{"JoyAI-Image": 0.963, "FLUX.2-dev": 0.963, "Mage-Flow": 0.944},
        **{"Qwen-Image": 0.943, "FLUX.1-dev": 0.607},
    },
    "zh": {
        **{"JoyAI-Image": 0.963, "LongCat-Image": 0.956, "Qwen-Image": 0.946},
        **{"Mage-Flow": 0.823, "FLUX.2-dev": 0.757},
    },
}


# Ours: the official script's question is its own. The model says all that it reads.
QUESTION = (
    "Write down all text in this image, in reading order, and nothing else. If there is none, "
    f"write: {NOTHING_READ}"
)
SAMPLING = Sampling(images_first=True, temperature=0.0, max_tokens=1024)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The language, how many images are made of a prompt, and what the reader is asked."""

    language: str = setting("en", "of the prompts", names=tuple(FILES))
    images: int = setting(4, "of each prompt", least=1, most=16)
    question: str = setting(QUESTION, "what the model that reads is asked", least=1)


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt and the lines of text that it asks for. Ids have gaps."""

    index: int
    prompt_id: int
    prompt: str
    lines: tuple[str, ...]
    category: str
    length: str  # short or long
    language: Language


def read(path: epath.PathLike, language: str = "en", *, excerpt: bool = False) -> tuple[Row, ...]:
    """The prompts of a language, en or zh. `path` is the official file or its folder.

    Raises UserError if it is not that file, or, unless it is an `excerpt`, not all of it.
    """
    file = FILES[check_name(language, FILES, what="language of LongText-Bench")]
    rows = []
    fields = ("prompt_id", "prompt", "text", "category", "length")
    for index, value in enumerate(file.objects(path, fields)):
        lines = value["text"]
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise file.error(file.at(path), f"has no list of texts in line {index + 1}")
        rows.append(
            Row(
                index=index,
                prompt_id=int(value["prompt_id"]),
                prompt=value["prompt"],
                lines=tuple(lines),
                category=value["category"],
                length=value["length"],
                language=language,
            )
        )
    file.check_count(path, found=len(rows), official=PROMPTS, what="prompts", excerpt=excerpt)
    return tuple(rows)


def image_files(row: Row, *, images: int = 1) -> tuple[str, ...]:
    """Where the images lie: ID.png, or ID_k.png where there are several of a prompt."""
    if images == 1:
        return (f"{row.prompt_id}.png",)
    return tuple(f"{row.prompt_id}_{k}.png" for k in range(images))


def words(text: str, language: Language) -> list[str]:
    """The words of a text, or in Chinese its characters, as they are compared."""
    if language == "zh":
        return re.findall(f"[{KEPT}]", text)
    return re.sub(rf"[^{KEPT}\s]", "", text).lower().split()


def score(row: Row, texts: Sequence[str | None]) -> dict[str, Ratio]:
    """Matched and asked words of a prompt, from what was read in each of its images.

    None is an image that is not there or a reply that could not be had: it counts nowhere, and in
    `strict` nothing of it matches.
    """
    asked = collections.Counter(words(" ".join(row.lines), row.language))
    there = [text.replace(NOTHING_READ, "") for text in texts if text is not None]
    read = [collections.Counter(words(text, row.language)) for text in there]
    matched = sum((asked & found).total() for found in read)
    return {
        "text": Ratio.of(matched, asked.total() * len(there)),
        "strict": Ratio.of(matched, asked.total() * len(texts)),
    }


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """`overall`, and by category and length, which the official code does not have."""
    ratios = column(scores, "text")
    return {
        "overall": merge(ratios).value,
        "strict/overall": merge(column(scores, "strict")).value,
        **values("category/", by_group([row.category for row in rows], ratios)),
        **values("length/", by_group([row.length for row in rows], ratios)),
    }


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings."""

    def score_images(
        row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
    ) -> dict[str, Ratio]:
        texts, ends = [], []
        for image in images:
            text, end = None, "missing"
            if image is not None:
                reply = scorers["judge"].judge([image], settings.question, sampling=SAMPLING)
                is_read = reply.kind == "answered"
                text, end = (reply.text, "judged") if is_read else (None, reply.kind)
            texts.append(text)
            ends.append(end)
        return score(row, texts) | outcome_columns(*ends)

    return Official(
        name="longtext",
        version=1,
        read=lambda path, *, excerpt=False: read(path, settings.language, excerpt=excerpt),
        requests=lambda rows: requests_of(
            rows, lambda row: image_files(row, images=settings.images)
        ),
        needs={"judge": ()},
        score=score_images,
        summary=lambda rows, scores: (
            summary(rows, scores) | outcome_counts(scores, what="LongText-Bench")
        ),
        primary="overall",
        settings={
            **dataclasses.asdict(settings),
            "sampling": dataclasses.asdict(SAMPLING),
        },
        scoring=("question", "sampling"),
        published=of_systems("overall", MAGE_FLOW, PUBLISHED[settings.language]),
    )


BENCHMARK = benchmark()
