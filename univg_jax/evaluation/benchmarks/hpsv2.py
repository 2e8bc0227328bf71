"""HPSv2: what people are predicted to prefer, of 800 prompts in each of four styles.

The rules are those of github.com/tgxs002/HPSv2, evaluation.py. An image scores 100 x the cosine of
a CLIP ViT-H/14 with HPSv2's weights. The score of a style is the mean over chunks of 80 images of
the means of the chunks, and its deviation that of these means. The average is over all images, not
over styles. A missing image is left out, so that the images after it move into other chunks.

There are two versions of the weights, v2.0 and v2.1, whose numbers do not compare. Published
numbers often do not say which they are, so both may be scored. The official code on a GPU rounds
each score to float16, which is 1/64 there; ours does not.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Official, Published, requests_of
from univg_jax.evaluation.similarity import clip_cosine
from univg_jax.evaluation.summaries import Scores, Summary, column, failure_counts
from univg_jax.fields import setting

VERSIONS = ("v2.0", "v2.1")
RESIZING = ("hpsv2", "hpsv2_not_antialiased")
STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPTS = 800  # of each style
CHUNK = 80  # images
SOURCE = "benchmark/ of huggingface.co/datasets/zhwang/HPDv2"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which weights the CLIP has that is given, and how it is given pictures; numbers of others do
    not compare.
    """

    weights: str = setting("v2.1", "of HPSv2", names=VERSIONS)
    preprocessing: str = setting(
        "hpsv2", "of the scorer `clip`; torchvision before 0.17 was not antialiased", names=RESIZING
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt and its place in the list of its style."""

    style: str
    index: int
    prompt: str


def read(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
    """The prompts of all styles. `path` is the official folder of STYLE.json.

    Raises UserError if a list is missing, is none of texts, or, unless it is an `excerpt`, has
    other than 800.
    """
    rows = []
    for style in STYLES:
        file = InputFile(f"{style}.json", f"a list of HPSv2's prompts: {SOURCE}")
        where = epath.Path(path) / file.name  # a file cannot stand for all four
        prompts = file.json(where)
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise file.error(where, "is not a list of texts")
        file.check_count(
            where, found=len(prompts), official=PROMPTS, what="prompts", excerpt=excerpt
        )
        rows += [Row(style, index, text) for index, text in enumerate(prompts)]
    return tuple(rows)


def image_files(row: Row) -> tuple[str, ...]:
    """Where the image lies."""
    return (f"{row.style}/{row.index:05}.jpg",)


def score(cosines: Mapping[str, float] | None, versions: Sequence[str]) -> dict[str, Ratio]:
    """100 x the cosine by each version of the weights; None is an image that is not there."""
    is_there = float(cosines is not None)
    found = {v: Ratio.of(100 * cosines[v] if cosines else 0.0, is_there) for v in versions}
    return {**found, "failures/missing": Ratio.of(1 - is_there)}


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """For each version: `average`, and each style with its `deviation`; `strict/` has missing
    images as 0.
    """
    found: Summary = {}
    for version in [version for version in VERSIONS if version in scores[0]]:
        ratios = column(scores, version)
        total = merge(ratios)
        found[f"{version}/average"] = total.value
        found[f"{version}/strict/average"] = float(total.total.sum() / len(rows))
        for style in dict.fromkeys(row.style for row in rows):
            # In the order of the list, whatever the order of the rows.
            of_style = sorted(
                (row.index, float(ratio.total[0]))
                for row, ratio in zip(rows, ratios, strict=True)
                if row.style == style and ratio.count[0]
            )
            numbers = [number for _, number in of_style]
            chunks = [np.mean(numbers[i : i + CHUNK]) for i in range(0, len(numbers), CHUNK)]
            found[f"{version}/{style}"] = float(np.mean(chunks)) if chunks else float("nan")
            deviation = float(np.std(chunks)) if chunks else float("nan")
            found[f"{version}/{style}/deviation"] = deviation
    return found | failure_counts(scores)


# UniVG's number does not say which weights: it stands beside both.
UNIVG = 28.2
PUBLISHED = {
    "v2.0": {"SDXL-base-0.9": 27.73, "SD1.4": 26.95},
    "v2.1": {"SDXL-base-0.9": 30.63, "SD1.4": 25.35},
}


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with one version of the weights."""
    version = settings.weights

    def score_image(
        row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
    ) -> dict[str, Ratio]:
        (image,) = images
        if image is None:
            return score(None, [version])
        return score({version: clip_cosine(scorers["clip"], image, row.prompt)}, [version])

    primary = f"{version}/average"
    return Official(
        name="hpsv2",
        version=1,
        read=read,
        requests=lambda rows: requests_of(rows, image_files),
        needs={"clip": ()},
        weights={
            "clip": f"--scorer=clip=DIR,preprocessing={settings.preprocessing}, CLIP ViT-H/14 with "
            f"HPS_{version}_compressed.pt of huggingface.co/xswu/HPSv2 (docs/evaluation.md has how)"
        },
        score=score_image,
        summary=summary,
        primary=primary,
        published=(
            Published("UniVG 3.7B (v2.0 or v2.1)", primary, UNIVG, "UniVG (arXiv 2503.12652)"),
            *(Published(s, primary, v, "README of HPSv2") for s, v in PUBLISHED[version].items()),
        ),
        settings={
            **dataclasses.asdict(settings),
            "clip": "ViT-H/14",
            "clip_score": "100 x cosine",
        },
        scoring=("weights", "preprocessing", "clip", "clip_score"),
    )


BENCHMARK = benchmark()
