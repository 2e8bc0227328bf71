"""PartiPrompts: 1,632 prompts in twelve categories and eleven challenges.

Published as a table in github.com/google-research/parti, where people judge the images: there is
no scorer and no layout of files. What we compute is the cosine of CLIP between image and prompt,
by category and by challenge. There is no official CLIP either: which one is given is a setting, and
numbers of different ones do not compare.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, requests_of
from univg_jax.evaluation.similarity import COSINE, clip_cosine, clip_weights
from univg_jax.evaluation.summaries import Scores, Summary, by_group, column, failure_counts, values
from univg_jax.fields import setting

FILE = InputFile("PartiPrompts.tsv", "the prompts of github.com/google-research/parti")
COLUMNS = ("Prompt", "Category", "Challenge", "Note")
PROMPTS = 1632


@dataclasses.dataclass(frozen=True)
class Settings:
    """The CLIP; a result stores it."""

    clip: str = setting("ViT-B/32", "the CLIP that is given", least=1)


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt, its category, and what is hard about it."""

    index: int
    prompt: str
    category: str
    challenge: str


def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The prompts. `path` is PartiPrompts.tsv or its folder.

    Raises UserError if it is not that file, or, unless it is an `excerpt`, not all of it.
    """
    table = FILE.table(path, COLUMNS, separator="\t")
    FILE.check_count(path, found=len(table), official=PROMPTS, what="prompts", excerpt=excerpt)
    return tuple(
        Row(index, line["Prompt"], line["Category"], line["Challenge"])
        for index, line in enumerate(table)
    )


def image_files(row: Row) -> tuple[str, ...]:
    """Where the image lies: there is no official layout, so its name is the prompt's number."""
    return (f"{row.index:05}.png",)


def score(cosine: float | None) -> dict[str, Ratio]:
    """Sums and counts of an image; None is one that is not there, which counts nowhere."""
    is_there = float(cosine is not None)
    return {
        "clip": Ratio.of(cosine or 0.0, is_there),
        "failures/missing": Ratio.of(1 - is_there),
    }


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """The mean cosine: `overall`, by category and by challenge."""
    ratios = column(scores, "clip")
    return {
        "overall": merge(ratios).value,
        **values("category/", by_group([row.category for row in rows], ratios)),
        **values("challenge/", by_group([row.challenge for row in rows], ratios)),
        **failure_counts(scores),
    }


def _score(
    row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
) -> dict[str, Ratio]:
    (image,) = images
    return score(None if image is None else clip_cosine(scorers["clip"], image, row.prompt))


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with this CLIP."""
    return Official(
        name="parti",
        version=1,
        read=read,
        requests=lambda rows: requests_of(rows, image_files),
        needs={"clip": ()},
        weights=clip_weights(settings.clip),
        score=_score,
        summary=summary,
        primary="overall",
        settings=dataclasses.asdict(settings) | COSINE,
        scoring=("clip", "clip_score"),
    )


BENCHMARK = benchmark()
