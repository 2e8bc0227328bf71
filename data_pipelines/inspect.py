"""A page of what a config trains on: the check before a run of weeks.

It has the numbers and warnings of `data_pipelines.survey`, the records that cannot be used, and of
every task and source some rows as the model gets them, beside the labels of their records.
"""

import collections
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from data_pipelines import drawings, renderings, tasks
from data_pipelines.collate import Collator, Row
from data_pipelines.dataset_files import SKIPPED
from data_pipelines.sources import Source
from data_pipelines.survey import MIN_ROWS, Skip, Survey, drawn_caption, survey
from data_pipelines.tasks import TASKS
from data_pipelines.transforms import Record
from univg_jax.files import write_whole
from univg_jax.images import data_uri, jpeg_bytes, png_bytes
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

    Each row shows its id, its record's place, the prompt as the encoder gets it, the withheld
    conditions, and its pictures: source, mask, face, target with what does not count in the loss
    hatched, and the whole record with its labels drawn on. A source of which no record serves is
    shown with the reasons.

    Raises UserError as `mixture.Stream` does for what is wrong beside records.
    """
    found = survey(config, collator=collator, num_examples=num_examples, sources=sources)
    by_task: dict[str, list[tuple[Any, list[dict[str, Any]]]]] = collections.defaultdict(list)
    for part in found.parts:
        by_task[part.task].append((part, [_card(row) for row in part.examples]))
    template = load_templates("data_pipelines").get_template("inspect.html")
    page = template.render(
        survey=found,
        config=config,
        warnings=found.warnings(),
        by_task=by_task,
        lengths=_histogram(found),
        skipped=list(_skipped(found)),
        left_out=list(_left_out({part.source.name: part.source for part in found.parts})),
    )
    write_whole(out, page)
    return found


def _histogram(found: Survey) -> dict[str, Any]:
    """How many prompts have how many tokens, in bins that end at the limit or do not cross it."""
    lengths = np.array([n for part in found.parts for n in part.lengths] or [0])
    limit = found.config.data.num_tokens
    width = -(-max(int(lengths.max()), limit) // _BINS)
    kept = limit // width + 1  # bins, of which the last ends at the limit
    counts = np.bincount(kept - 1 - (limit - lengths) // width, minlength=kept).tolist()
    ends = [limit + (k + 1 - kept) * width for k in range(len(counts))]
    return dict(
        bins=[(max(0, end - width + 1), end, count) for end, count in zip(ends, counts)],
        most=max(counts),
        limit_at=kept / len(counts),
        median=int(np.median(lengths)),
        longest=int(lengths.max()),
    )


def _skipped(found: Survey) -> Iterator[dict[str, Any]]:
    """Of each source with unusable records, the reasons and the first records; damaged first."""
    grouped: dict[tuple[bool, str], list[Skip]] = collections.defaultdict(list)
    for skip in found.skips:
        grouped[not skip.is_damaged, skip.place.dataset].append(skip)
    for (is_sound, source), some in sorted(grouped.items()):
        yield dict(
            source=source,
            is_damaged=not is_sound,
            count=len({skip.place.index for skip in some}),
            reasons=collections.Counter(skip.reason for skip in some).most_common(8),
            records=sorted(some, key=lambda skip: skip.place.index)[:MAX_LISTED],
        )


def _left_out(sources: Mapping[str, Source]) -> Iterator[dict[str, Any]]:
    """What the builds of the sources left out: how many entries, and the first with reasons."""
    for name, source in sources.items():
        folder = getattr(source, "folder", None)  # what is in memory has none
        if folder is not None and (file := folder / SKIPPED).exists():
            with file.open() as lines:
                rows = [json.loads(line) for line in itertools.islice(lines, MAX_LISTED)]
                yield dict(source=name, rows=rows, count=len(rows) + sum(1 for _ in lines))


def _card(row: Row) -> dict[str, Any]:
    """What the template shows of a row."""
    source, index = row.origin
    try:
        record = source.read(index)
        labels = _labels(record)
    except Exception:  # of a field that the task does not need: nobody checked it
        record = source.read(index, TASKS[row.task].fields(source.fields))
        labels = _labels(record)
    no_text = row.drop in ("text", "both")
    return dict(
        row=row,
        origin=f"{source.name}[{index}]",
        prompt=tasks.prompt(row.task, "" if no_text else row.example.text),
        withheld=row.example.text if no_text else "",
        num_tokens=int(row.prompt.text_mask.sum()),
        pictures=[*_model_pictures(row), labels],
        **_lists(row, record),
    )


def _model_pictures(row: Row) -> Iterator[dict[str, Any]]:
    """The pictures that the model gets, and the one that it is to make."""
    example, no_image = row.example, row.drop in ("image", "both")
    if example.source is not None:
        yield _figure("source", example.source, withheld=no_image)
    if example.mask is not None:
        mask = renderings.render_mask(example.mask[..., 0])
        yield _figure("mask", mask, note="white: generate", withheld=no_image)
    if example.face is not None:
        yield _figure("face", example.face, withheld=row.drop in ("text", "both"))
    counts = example.loss_mask
    note = "" if counts is None else f"{counts.mean():.0%} counts in the loss"
    yield _figure("target", drawings.draw_target(example.target, counts), note=note)


def _labels(record: Record) -> dict[str, Any]:
    """The whole record with its labels."""
    height, width = record["image"].shape[:2]
    notes = [f"{width}\u00d7{height}"]
    if "edit_mask" in record:
        notes.append("edit outlined")
    if len(joints := np.reshape(record.get("joints", ()), (-1, 17, 3))):
        notes.append(f"{len(joints)} {'people' if len(joints) > 1 else 'person'}")
        if hidden := int((joints[..., 2] == 1).sum()):
            notes.append(f"{hidden} hidden joints hollow")
    if np.any(record.get("ignore_mask", 0)):
        notes.append("ignored hatched")
    if "depth" in record and (known := renderings.is_known_depth(record["depth"])).any():
        meters = record["depth"][known]
        notes.append(f"{meters.min():.3g} to {meters.max():.3g} m")
    return _figure("record", drawings.draw_record(record), note=", ".join(notes))


def _figure(
    name: str, image: drawings.Drawing, *, note: str = "", withheld: bool = False
) -> dict[str, Any]:
    image = image if name == "record" else drawings.shrink(image)
    file = png_bytes(image, optimize=image.size < 2**16)
    if len(file) > _PNG_BYTES:  # a page has hundreds of photos
        file = jpeg_bytes(image, quality=90)
    is_small = max(image.shape[:2]) <= 128
    return dict(name=name, url=data_uri(file), note=note, withheld=withheld, is_small=is_small)


def _lists(row: Row, record: Record) -> dict[str, list[dict[str, Any]]]:
    """The record's texts, each with its color or kind, and whether the row has it."""
    phrases, of = record.get("phrases", ()), record.get("phrase_captions", ())
    expressions, masks = record.get("expressions", ()), record.get("expression_masks", ())
    captions, kinds = record.get("captions", ()), record.get("caption_kinds", ())
    drawn = drawn_caption(row, captions)
    return dict(
        boxes=[
            _entry(phrase, color=k, number=k + 1, drawn=not len(of) or int(of[k]) == drawn)
            for k, phrase in enumerate(phrases)
        ],
        expressions=[
            _entry(
                text or "(none: ambiguous)",
                color=int(masks[k]) if len(masks) else k,
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
