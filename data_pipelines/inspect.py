"""A page of what a config trains on: rows of its stream beside the labels of their records.

It is the check before a run of weeks. `data_pipelines.survey` has the numbers and the warnings.
"""

import collections
import io
import itertools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from data_pipelines import drawings, renderings, tasks
from data_pipelines.collate import Collator, Row
from data_pipelines.dataset_files import BUILD, SKIPPED
from data_pipelines.mixture import Stream
from data_pipelines.sources import Source
from data_pipelines.survey import MIN_ROWS, Part, Skip, Skips, Survey, survey
from data_pipelines.tasks import TASKS
from data_pipelines.transforms import Record
from univg_jax.errors import UserError
from univg_jax.files import read_json, write_whole
from univg_jax.images import data_uri, png_bytes
from univg_jax.pages import load_templates
from univg_jax.settings import Config

__all__ = ["MIN_ROWS", "write_inspection"]

MAX_LISTED = 100  # skipped records of a source that the page names, of each kind
_BINS = 24  # of the histogram of prompts' lengths, at most
_PNG_BYTES = 24_000  # a picture whose PNG is larger is a photo, and goes into the page as JPEG
_TEXT = 400  # characters of a caption that are shown


def write_inspection(
    config: Config,
    out: epath.PathLike,
    *,
    collator: Collator,
    num_examples: int = 4,
    sources: Mapping[str, Source] | None = None,
) -> Survey:
    """Writes a self-contained page with `num_examples` rows of each task and source.

    Above them are the survey's warnings and histograms, and the records that cannot be used. Each
    row shows its id, its record's place, the prompt as the encoder gets it, the withheld
    conditions, and its pictures: source, mask, face, target with what does not count hatched, and
    the whole record with its labels drawn on. A source of which no record serves is shown with the
    reasons.

    Raises UserError as `mixture.Stream` does for what is wrong beside records.
    """
    skips = Skips(tolerance=config.data.max_bad_fraction)
    stream = Stream(config, collator=collator, sources=sources, quarantine=skips, probe=False)
    found = survey(stream, skips, config, num_examples=num_examples)
    by_task: dict[str, list[tuple[Part, list[dict[str, Any]]]]] = {}
    for part in found.parts:
        by_task.setdefault(part.task, []).append((part, [_card(row) for row in part.examples]))
    page = (
        load_templates("data_pipelines")
        .get_template("inspect.html")
        .render(
            survey=found,
            name=config.name,
            data=config.data,
            seed=config.seed,
            by_task=by_task,
            shares=found.shares(),
            lengths=_histogram(found),
            prompts=[(part, _quantiles(part.lengths)) for part in found.parts if part.rows],
            skipped=_skipped(found),
            left_out=_left_out(found.parts),
            largest=max(config.data.resolution, *itertools.chain(*stream.shapes)),
        )
    )
    write_whole(out, page)
    return found


def _histogram(found: Survey) -> dict[str, Any]:
    """How many prompts are of each length, in bins; of these, how many are cut."""
    lengths = [n for part in found.parts for n in part.lengths] or [0]
    limit = found.config.data.num_tokens
    end = max(max(lengths), limit) + 1
    width = -(-end // _BINS)
    counts = np.bincount(np.array(lengths) // width, minlength=-(-end // width)).tolist()
    return dict(
        bins=[(k * width, k * width + width - 1, count) for k, count in enumerate(counts)],
        most=max(counts),
        limit=limit,
        place=limit / (len(counts) * width),
        total=sum(counts),
        middle=int(np.median(lengths)),
        longest=max(lengths),
    )


def _quantiles(lengths: list[int]) -> tuple[int, int, int]:
    """The middle, the 95th hundredth and the longest."""
    return tuple(round(float(q)) for q in np.percentile(lengths, [50, 95, 100]))


def _skipped(found: Survey) -> list[dict[str, Any]]:
    """Of each source with unusable records, the reasons and the first records; damaged first."""
    grouped: dict[tuple[bool, str], list[Skip]] = collections.defaultdict(list)
    for skip in found.skips:
        grouped[not skip.is_damaged, skip.place.dataset].append(skip)
    return [
        dict(
            source=source,
            is_damaged=not is_sound,
            count=len({skip.place.index for skip in some}),
            tried=len(_tried(found, source)),
            reasons=collections.Counter(skip.reason for skip in some).most_common(8),
            records=sorted(some, key=lambda skip: skip.place.index)[:MAX_LISTED],
        )
        for (is_sound, source), some in sorted(grouped.items())
    ]


def _tried(found: Survey, source: str) -> set[int]:
    """The records of a source that were read."""
    parts = [part for part in found.parts if part.source.name == source]
    return set().union(*(p.served | {skip.place.index for skip in p.skips} for p in parts))


def _left_out(parts: list[Part]) -> list[dict[str, Any]]:
    """What the builds of the sources left out, and the first records of it with their reasons."""
    found = []
    for source in {part.source.name: part.source for part in parts}.values():
        folder = getattr(source, "folder", None)  # of what was built
        if folder is None or not (folder / SKIPPED).exists():
            continue
        try:
            about = read_json(folder / BUILD)
            with (folder / SKIPPED).open() as lines:
                rows = [json.loads(line) for line in itertools.islice(lines, MAX_LISTED)]
            rows = [[str(row[key]) for key in ("split", "key", "reason")] for row in rows]
            found.append(dict(source=source.name, count=int(about["skipped"]), rows=rows))
        except (OSError, UserError, ValueError, KeyError, TypeError):
            continue  # it is of the builder, and no run reads it
    return found


def _card(row: Row) -> dict[str, Any]:
    """What the template shows of a row."""
    source, index = row.origin
    try:
        record = source.read(index)
        labels = _labels(record)
    except Exception:  # of a field that the task does not need: nobody checked it
        record = source.read(index, TASKS[row.task].fields(source.fields))
        labels = _labels(record)
    no_text, no_image = row.drop in ("text", "both"), row.drop in ("image", "both")
    return dict(
        row=row,
        origin=f"{source.name}[{index}]",
        prompt=tasks.prompt(row.task, "" if no_text else row.example.text),
        withheld=row.example.text if no_text else "",
        num_tokens=int(row.prompt.text_mask.sum()),
        pictures=[*_model_pictures(row, no_text=no_text, no_image=no_image), *labels],
        **_lists(row, record),
    )


def _model_pictures(row: Row, *, no_text: bool, no_image: bool) -> list[dict[str, Any]]:
    """The pictures that the model gets, and the one that it is to make."""
    example = row.example
    pictures = []
    if example.source is not None:
        pictures.append(_figure("source", example.source, withheld=no_image))
    if example.mask is not None:
        mask = renderings.render_mask(example.mask[..., 0])
        pictures.append(_figure("mask", mask, note="white: to make", withheld=no_image))
    if example.face is not None:
        pictures.append(_figure("face", example.face, withheld=no_text))
    note = ""
    if example.loss_mask is not None:
        note = f"{example.loss_mask.mean():.0%} counts"
    target = drawings.draw_target(example.target, example.loss_mask)
    return [*pictures, _figure("target", target, note=note)]


def _labels(record: Record) -> list[dict[str, Any]]:
    """The whole record with its labels, and its depth."""
    notes = []
    if "edit_mask" in record:
        notes.append("edit outlined")
    if len(joints := np.reshape(record.get("joints", ()), (-1, 17, 3))):
        notes.append(f"{len(joints)} {'people' if len(joints) > 1 else 'person'}")
        if hidden := int((joints[..., 2] == 1).sum()):
            notes.append(f"{hidden} hidden joints hollow")
    if np.any(record.get("ignore_mask", 0)):
        notes.append("ignored hatched")
    height, width = record["image"].shape[:2]
    size = f"{width}\u00d7{height}"
    drawn = [_figure("record", drawings.draw_record(record), note=", ".join([size, *notes]))]
    if "depth" in record:
        depth, note = drawings.draw_depth(record["depth"])
        drawn.append(_figure("depth", depth, note=note))
    return drawn


def _figure(
    name: str, image: drawings.Picture, *, note: str = "", withheld: bool = False
) -> dict[str, Any]:
    is_small = max(image.shape[:2]) <= 128
    url = _uri(drawings.shrink(image) if name != "record" else image)
    return dict(name=name, url=url, note=note, withheld=withheld, is_small=is_small)


def _uri(image: drawings.Picture) -> str:
    """The picture for the page; of a photo a JPEG, since a page has hundreds."""
    png = png_bytes(image, optimize=image.size < 2**16)
    if len(png) <= _PNG_BYTES:
        return data_uri(png)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=88, subsampling=0)
    return data_uri(buffer.getvalue(), kind="jpeg")


def _lists(row: Row, record: Record) -> dict[str, list[dict[str, Any]]]:
    """The record's texts, each with its color or kind, and whether the row has it."""
    phrases, of = record.get("phrases", ()), record.get("phrase_captions", ())
    expressions, masks = record.get("expressions", ()), record.get("expression_masks", ())
    captions, kinds = record.get("captions", ()), record.get("caption_kinds", ())
    drawn = row.example.caption
    return dict(
        boxes=[
            _entry(phrase, color=k, number=k + 1, drawn=not len(of) or of[k] == drawn)
            for k, phrase in enumerate(phrases)
        ],
        expressions=[
            _entry(
                text or "(none: ambiguous)",
                color=masks[k] if len(masks) else k,
                drawn=row.task == "seg" and text == row.example.text,
            )
            for k, text in enumerate(expressions)
        ],
        captions=[
            _entry(text, kind=kinds[k] if len(kinds) else "", drawn=k == drawn)
            for k, text in enumerate(captions)
        ],
    )


def _entry(
    text: str, *, drawn: bool, color: int = 0, number: int | str = " ", kind: str = ""
) -> dict[str, Any]:
    text = text if len(text) <= _TEXT else text[:_TEXT] + "\u2026"
    rgb = "rgb({}, {}, {})".format(*drawings.color(color))
    return dict(text=text, drawn=drawn, color=rgb, number=number, kind=kind)
