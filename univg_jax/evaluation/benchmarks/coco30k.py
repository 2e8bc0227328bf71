"""COCO-30k: the captions of 30,000 pictures of COCO 2014, for FID and the CLIP score.

Papers choose the captions, the size of real pictures and the extractor in different ways, and such
numbers do not compare. This is MLPerf's choice (mlcommons/training, stable_diffusion): captions of
captions_val2014.json are shuffled by pandas, `sample(frac=1, random_state=2023)`, the first of each
picture is kept, the first 30,000 of those are taken, and they are sorted by the caption's id. The
real pictures are resized to 512 x 512 by a bicubic filter, and their shape is not kept.

pandas draws the shuffle from numpy's old generator, whose numbers never change.
"""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from univg_jax.evaluation import fid
from univg_jax.evaluation.inputs import InputFile
from univg_jax.evaluation.metrics import Image, Ratio, merge
from univg_jax.evaluation.official import Columns, Official, Published, requests_of
from univg_jax.evaluation.similarity import (
    COSINE,
    check_file,
    clip_cosine,
    clip_weights,
    read_rgb,
    resized,
)
from univg_jax.evaluation.summaries import Features, Scores, Summary, column, failure_counts
from univg_jax.fields import setting

CAPTIONS = InputFile("captions_val2014.json", "COCO's captions: annotations_trainval2014.zip")
TABLE = InputFile("val2014_30k.tsv", "MLPerf's captions (image_id, id, caption)")
STATISTICS = InputFile("STATS.npz", "`mu` and `sigma` of Inception's features of real pictures")
COLUMNS = ("image_id", "id", "caption")
_MLPERF = "mlcommons/training, Stable Diffusion: where training ends"
SAMPLES = 30_000
SEED = 2023


@dataclasses.dataclass(frozen=True)
class Row:
    """A caption and the picture that it is of."""

    index: int
    image_id: int
    caption_id: int
    prompt: str  # the caption
    real: str = ""  # the file of the real picture


@dataclasses.dataclass(frozen=True)
class Settings:
    """The real pictures that FID compares with, how Inception is given pictures, and the CLIP.

    The pictures are a folder of COCO's val2014, or published statistics of another set. MLPerf's
    CLIP is ViT-H/14 of laion2b_s32b_b79k.
    """

    real: str = setting("", "the folder that has val2014/; by default that of the captions")
    stats: str = setting("", "an .npz of `mu` and `sigma` instead", is_path=True)
    convention: str = setting("pytorch-fid", "how FID resizes", names=tuple(fid.CONVENTIONS))
    clip: str = setting("ViT-H/14", "the CLIP that is given", least=1)


def read(path: epath.PathLike, *, samples: int = SAMPLES, excerpt: bool = False) -> tuple[Row, ...]:
    """The captions, of captions_val2014.json or of the table that MLPerf makes of it.

    `path` is one of the files, a table by its ending .tsv, or a folder of captions_val2014.json.
    Raises UserError if it is not that file, or, unless it is an `excerpt`, has not enough captions.
    """
    if os.fspath(path).endswith(".tsv"):
        rows, file = _read_table(path), TABLE
    else:
        file, value = CAPTIONS, CAPTIONS.json(path)
        annotations = value.get("annotations") if isinstance(value, dict) else None
        if not isinstance(annotations, list):
            raise file.error(file.at(path), "has no annotations")
        try:
            rows = select(annotations, samples=samples)
        except (TypeError, KeyError, AttributeError) as error:
            reason = f"has an annotation without caption ({error!r})"
            raise file.error(file.at(path), reason) from None
    file.check_count(path, found=len(rows), official=samples, what="captions", excerpt=excerpt)
    return rows


def select(
    annotations: Sequence[Mapping[str, Any]], *, samples: int = SAMPLES, seed: int = SEED
) -> tuple[Row, ...]:
    """MLPerf's captions among all of COCO's."""
    chosen: dict[int, Mapping[str, Any]] = {}
    for place in np.random.RandomState(seed).permutation(len(annotations)):
        chosen.setdefault(annotations[place]["image_id"], annotations[place])
        if len(chosen) == samples:
            break
    in_order = sorted(chosen.values(), key=lambda annotation: annotation["id"])
    return tuple(
        Row(index, a["image_id"], a["id"], a["caption"].replace("\n", "").strip())
        for index, a in enumerate(in_order)
    )


def _read_table(path: epath.PathLike) -> tuple[Row, ...]:
    rows = []
    # Captions with quotes are quoted, as in a table with commas.
    reader = csv.DictReader(io.StringIO(TABLE.text(path), newline=""), delimiter="\t", strict=True)
    try:
        for index, line in enumerate(reader):
            values = (int(line["image_id"]), int(line["id"]), str(line["caption"]))
            if line["caption"] is None:
                raise ValueError(f"no caption in row {index + 1}")
            rows.append(Row(index, *values))
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise TABLE.error(TABLE.at(path), f"is torn or another table ({error!r})") from None
    return tuple(rows)


def table(rows: Sequence[Row]) -> str:
    """MLPerf's table of these captions."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows((row.image_id, row.caption_id, row.prompt) for row in rows)
    return text.getvalue()


def image_files(row: Row) -> tuple[str, ...]:
    """Where the image lies, as MLPerf saves it: by the picture's id."""
    return (f"{row.image_id}.png",)


def real_file(row: Row) -> str:
    """The file of the real picture in val2014.zip."""
    return f"val2014/COCO_val2014_{row.image_id:012}.jpg"


def score(cosine: float | None, *, is_missing: bool = False) -> dict[str, Ratio]:
    """Sums and counts of an image's CLIP score, the raw cosine; None where there is none.

    Every row counts once: MLPerf's code says of itself that the rows that pad its last batch count
    twice.
    """
    clip = Ratio.of(0.0, 0.0) if cosine is None else Ratio.of(cosine)
    return {"clip": clip, "failures/missing": Ratio.of(float(is_missing))}


def summary(rows: Sequence[Row], scores: Sequence[Scores]) -> Summary:
    """The mean CLIP score. FID is no mean over images: its state merges on its own."""
    return {"clip": merge(column(scores, "clip")).value, **failure_counts(scores)}


REAL = "a picture of COCO's val2014.zip, unpacked (real=DIR)"
REAL_SIDE = 512  # pixels a side of the real pictures, whose shape is not kept


def benchmark(settings: Settings = Settings()) -> Official:
    """The benchmark with these settings. Raises UserError for a file of statistics that is none."""
    statistics, digest = None, ""
    if settings.stats:
        file = STATISTICS.at(settings.stats)
        statistics = fid.read_reference(file, convention=settings.convention)
        digest = STATISTICS.sha256(file)

    def read_rows(path: epath.PathLike, *, excerpt: bool = False) -> tuple[Row, ...]:
        place = epath.Path(path)
        folder = settings.real or (place if place.is_dir() else place.parent)
        return tuple(
            dataclasses.replace(row, real=os.path.join(folder, real_file(row)))
            for row in read(path, excerpt=excerpt)
        )

    def score_image(
        row: Row, images: Sequence[Image | None], scorers: Mapping[str, Any]
    ) -> Columns:
        (image,) = images
        clip, inception = scorers.get("clip"), scorers.get("inception")
        cosine = clip_cosine(clip, image, row.prompt) if clip and image is not None else None
        columns: dict[str, Ratio | Features] = {**score(cosine, is_missing=image is None)}
        if inception is None:
            return columns
        pictures: dict[str, Image | None] = {"generated": image}
        if statistics is None:
            real = read_rgb(row.real, what=REAL)
            pictures["real"] = resized(real, like=np.zeros((REAL_SIDE, REAL_SIDE, 3), np.uint8))
        for name, picture in pictures.items():
            vector = None if picture is None else np.asarray(inception([picture]), float)[0]
            columns[name] = Features(vector, settings.convention)
        return columns

    def distances(sums: Mapping[str, fid.FeatureSums]) -> Summary:
        generated = sums.get("generated")
        if statistics is None:
            return {"fid": fid.distance(generated, sums.get("real"))}
        if generated is None or generated.count < 2:
            return {"fid": math.nan}
        return {"fid": fid.frechet_distance(generated.gaussian(), statistics)}

    def check_scoring(rows: Sequence[Row], scorers: Mapping[str, Any]) -> None:
        if "inception" in scorers and not settings.stats:
            for row in rows:
                check_file(row.real, what=REAL)

    return Official(
        name="coco30k",
        version=1,
        read=read_rows,
        requests=lambda rows: requests_of(rows, image_files),
        needs={"inception": ("fid",), "clip": ("clip",)},
        weights=clip_weights(settings.clip),
        check_scoring=check_scoring,
        score=score_image,
        summary=summary,
        distances=distances,
        primary="fid",
        published=(
            Published("MLPerf's target", "fid", 90.0, _MLPERF),
            Published("MLPerf's target, by ViT-H/14", "clip", 0.15, _MLPERF),
        ),
        settings={
            "convention": settings.convention,
            "reference": digest or "val2014",
            "clip": settings.clip,
            **COSINE,
        },
        scoring=("convention", "reference", "clip", "clip_score"),
    )


BENCHMARK = benchmark()
