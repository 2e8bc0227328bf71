"""What a config trains on, as one HTML page: rows of its stream beside the labels of the records
they came from.
"""

import base64
import collections
import dataclasses
import io
from typing import Any

import cv2
import jinja2
import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from data_pipelines import mixture, renderings, tasks, transforms
from data_pipelines.tasks import TASKS
from data_pipelines.transforms import Record

_LEAST_ROWS = 512  # that the histogram counts
_MOST_ROWS = 20_000  # looked through for the examples of rare tasks
_LABEL_PIXELS = 384


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Picture:
    name: str
    url: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Card:
    sample_id: int
    origin: str
    prompt: str
    num_tokens: int
    truncated: bool
    drop: str
    pictures: list[_Picture]
    boxes: list[tuple[str, str]]  # phrase and its CSS color


def write_inspection(
    config: Any,
    out: epath.PathLike,
    *,
    tokenizer: Any,
    num_examples: int = 8,
    split: str = "train",
    sources: Any = None,
) -> None:
    """Writes a self-contained page with `num_examples` rows of each task, in the order of the
    stream.

    Each shows its id, where it came from, the prompt as the encoder gets it, withheld conditions,
    and the pictures: source, mask, face, target, and the whole record with its boxes, masks and
    joints drawn on.

    Raises:
      ValueError, FileNotFoundError: as `mixture.make_stream`.
    """
    stream = mixture.make_stream(config, tokenizer=tokenizer, split=split, sources=sources)
    cards: dict[str, list[_Card]] = {name: [] for name in TASKS if name in stream.shares}
    counts: collections.Counter[str] = collections.Counter()
    for position in range(_MOST_ROWS):
        if position >= _LEAST_ROWS and all(len(found) >= num_examples for found in cards.values()):
            break
        row = stream.row(position)
        counts[row.task] += 1
        if len(cards[row.task]) < num_examples:
            cards[row.task].append(_card(row, config.data.num_tokens, tokenizer))
    total = counts.total()
    shares = [(name, counts[name], counts[name] / total, stream.shares[name]) for name in cards]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("data_pipelines", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("inspect.html").render(
        name=config.get("name", "config"),
        data=config.data,
        seed=config.seed,
        cards=cards,
        shares=shares,
        largest=max(max(realised, wanted) for _, _, realised, wanted in shares),
        total=total,
        quarantined=stream.quarantined,
    )
    out = epath.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)


def _card(row: mixture.Row, num_tokens: int, tokenizer: Any) -> _Card:
    source, index = row.origin
    text = tasks.prompt(row.task, "" if row.drop in ("text", "both") else row.example.text)
    tokens = tokenizer(text, num_tokens)
    pictures = [
        ("source", row.example.source),
        ("target", row.example.target),
        ("face", row.example.face),
    ]
    if row.example.mask is not None:
        pictures.insert(1, ("mask", renderings.render_mask(row.example.mask[..., 0])))
    record = source.read(index)
    pictures.append(("record", _labels(record)))
    return _Card(
        sample_id=row.sample_id,
        origin=f"{source.name}[{index}]",
        prompt=text,
        num_tokens=int(tokens.text_mask.sum()),
        truncated=bool(getattr(tokens, "num_truncated", 0)),
        drop=row.drop,
        pictures=[
            _Picture(name=name, url=_url(image)) for name, image in pictures if image is not None
        ],
        boxes=[
            (phrase, "rgb({}, {}, {})".format(*_color(k)))
            for k, phrase in enumerate(record.get("phrases", ()))
        ],
    )


def _labels(record: Record) -> UInt8[np.ndarray, "h w 3"]:
    """The record's image, enlarged, with the outlines of its masks, its boxes and its joints."""
    scale = _LABEL_PIXELS / max(record["image"].shape[:2])
    height, width = (max(1, round(side * scale)) for side in record["image"].shape[:2])
    image = np.ascontiguousarray(
        transforms.resize_image(record["image"], height=height, width=width)
    )
    for k, mask in enumerate(record.get("masks", ())):
        large = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(image, contours, -1, _color(k), 2)
    for k, box in enumerate(record.get("boxes", ())):
        x0, y0, x1, y1 = (int(v) for v in np.round(box * [width, height, width, height]))
        cv2.rectangle(image, (x0, y0), (x1 - 1, y1 - 1), _color(k), 2)
    for x, y, visible in record.get("joints", ()):
        center = (round(float(x) * width), round(float(y) * height))
        cv2.circle(image, center, 5, (0, 0, 0), -1, cv2.LINE_AA)
        cv2.circle(
            image, center, 3, (255, 255, 255) if visible else (130, 130, 130), -1, cv2.LINE_AA
        )
    return image


def _color(k: int) -> tuple[int, int, int]:
    return list(renderings.PALETTE.values())[k % len(renderings.PALETTE)]


def _url(image: UInt8[np.ndarray, "h w 3"]) -> str:
    stored = io.BytesIO()
    Image.fromarray(image).save(stored, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stored.getvalue()).decode()
