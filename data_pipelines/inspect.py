"""A page of what a config trains on: rows of its stream beside the labels of their records."""

import collections
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from etils import epath
from jaxtyping import UInt8

from data_pipelines import renderings, tasks, transforms
from data_pipelines.collate import Collator, Row
from data_pipelines.mixture import Stream
from data_pipelines.sources import Source
from data_pipelines.tasks import TASKS
from data_pipelines.transforms import Record
from univg_jax.files import write_whole
from univg_jax.images import data_uri, png_bytes
from univg_jax.pages import load_templates
from univg_jax.progress import Bar
from univg_jax.settings import Config

MIN_ROWS = 512  # that the histogram of tasks counts
MAX_ROWS = 20_000  # searched for examples of rare tasks
_RECORD_PIXELS = 384  # the longer side of a record's picture, on which labels are drawn


def write_inspection(
    config: Config,
    out: epath.PathLike,
    *,
    collator: Collator,
    num_examples: int = 8,
    sources: Mapping[str, Source] | None = None,
) -> None:
    """Writes a self-contained page with `num_examples` rows of each task, in the stream's order.

    Each row shows its id, its record's place, the prompt as the encoder gets it, the withheld
    conditions, and its pictures: source, mask, face, target, and the whole record with its boxes,
    masks and joints drawn on.

    Raises UserError as `mixture.Stream` does.
    """
    stream = Stream(config, collator=collator, sources=sources)
    cards: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS if name in stream.shares}
    counts: collections.Counter[str] = collections.Counter()
    events: collections.Counter[str] = collections.Counter()
    with Bar(total=MIN_ROWS, desc="read rows", unit="row") as bar:
        for position in range(MAX_ROWS):
            if position >= MIN_ROWS and all(len(found) >= num_examples for found in cards.values()):
                break
            row = stream.row(position)
            counts[row.task] += 1
            events.update(row.events)
            if len(cards[row.task]) < num_examples:
                cards[row.task].append(_card(row))
            bar.total = max(MIN_ROWS, position + 1)
            bar.update()
    total = counts.total()
    shares = [(name, counts[name], counts[name] / total, stream.shares[name]) for name in cards]
    page = (
        load_templates("data_pipelines")
        .get_template("inspect.html")
        .render(
            name=config.name,
            data=config.data,
            seed=config.seed,
            cards=cards,
            shares=shares,
            largest=max(max(realized, expected) for _, _, realized, expected in shares),
            total=total,
            events=events,
        )
    )
    write_whole(out, page)


def _card(row: Row) -> dict[str, Any]:
    """What the template shows of a row."""
    source, index = row.origin
    try:
        record = source.read(index)
        labels = _labels(record)
    except Exception:  # of a field that the task does not need: nobody checked it
        record = source.read(index, TASKS[row.task].fields(source.fields))
        labels = _labels(record)
    text = tasks.prompt(row.task, "" if row.drop in ("text", "both") else row.example.text)
    mask = row.example.mask
    pictures = dict(
        source=row.example.source,
        mask=None if mask is None else renderings.render_mask(mask[..., 0]),
        target=row.example.target,
        face=row.example.face,
        record=labels,
    )
    return dict(
        sample_id=row.sample_id,
        origin=f"{source.name}[{index}]",
        prompt=text,
        num_tokens=int(row.prompt.text_mask.sum()),
        truncated=row.prompt.num_truncated > 0,
        drop=row.drop,
        pictures={
            name: data_uri(png_bytes(image, optimize=True))
            for name, image in pictures.items()
            if image is not None
        },
        # Each phrase and the color of its box.
        boxes=[
            (phrase, "rgb({}, {}, {})".format(*_color(k)))
            for k, phrase in enumerate(record.get("phrases", ()))
        ],
    )


def _labels(record: Record) -> UInt8[np.ndarray, "h w 3"]:
    """The record's image, enlarged, with the outlines of its masks, its boxes and its joints."""
    scale = _RECORD_PIXELS / max(record["image"].shape[:2])
    height, width = (max(1, round(side * scale)) for side in record["image"].shape[:2])
    image = np.array(transforms.resize_image(record["image"], height=height, width=width))
    for k, mask in enumerate(record.get("masks", ())):
        large = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, contours, -1, _color(k), 2)
    for k, box in enumerate(record.get("boxes", ())):
        x0, y0, x1, y1 = (int(v) for v in np.round(box * [width, height, width, height]))
        cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), _color(k), 2)
    for x, y, visible in np.reshape(record.get("joints", ()), (-1, 3)):
        center = (round(float(x) * width), round(float(y) * height))
        for radius, gray in ((5, 0), (3, 255 if visible else 130)):
            cv2.circle(image, center, radius, (gray, gray, gray), -1, cv2.LINE_AA)
    return image


def _color(k: int) -> tuple[int, int, int]:
    return list(renderings.PALETTE.values())[k % len(renderings.PALETTE)]
