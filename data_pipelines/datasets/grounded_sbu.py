"""SBU captions with boxes of their phrases, as published for GLIGEN: tables with megabytes a line.

A line is a key, a tab and JSON that holds the picture and four embeddings for each box. A part is a
range of bytes of a file: the lines that begin in it. So no index of lines is needed, and one line
is in memory at a time.
"""

import base64
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import SPLITS, Dataset, Entry, Options, archives, grounding, layouts
from data_pipelines.native.tables import get, text_of
from univg_jax.errors import NotFoundError, UserError, quote

PART_BYTES = 2**28
_EXPECTED = "lines of a key, a tab and JSON with image, caption and annos, of GLIGEN's grounded SBU"
_HEAD_BYTES = 4096  # a key, a tab and a brace are in them


@dataclasses.dataclass(frozen=True)
class Part:
    """The lines of a file that begin at bytes `start` to before `end`."""

    file: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.file} from byte {self.start}"


@dataclasses.dataclass(frozen=True)
class GroundedSbu:
    """A record of each line."""

    files: Mapping[str, tuple[str, ...]]  # by split
    part_bytes: int = PART_BYTES
    fields: tuple[str, ...] = grounding.FIELDS

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def parts(self, split: str) -> Sequence[Part]:
        parts = []
        for file in self.files[split]:
            size = _check(file)
            starts = range(0, size, self.part_bytes)
            parts += [Part(file, start, min(start + self.part_bytes, size)) for start in starts]
        return parts

    def entries(self, part: Part) -> Iterator[Entry]:
        for start, line in _lines(part):
            key, tab, row = line.rstrip(b"\r\n").partition(b"\t")
            if not line.strip():
                continue
            try:
                name = text_of(key) if tab and len(key) < _HEAD_BYTES else ""
            except UserError:
                name = ""
            if name:
                yield Entry(key=name, raw=row)
                continue
            where = f"{os.path.basename(part.file)}:{start}"
            yield Entry(key=where, raw=UserError("its line is no key, tab and JSON"))

    def make(self, raw: bytes) -> Mapping[str, Any]:
        from data_pipelines.native import coco

        row = _parsed(raw)
        caption = get(row, "caption", str)
        image = _picture(get(row, "image", str))
        regions = []
        for anno in get(row, "annos", list):
            if not isinstance(anno, dict):
                raise UserError(f"one of its annos is {quote(anno)}: expected an object")
            box = grounding.box_of(anno.get("bbox"))
            for start, end in grounding.spans_of(anno.get("tokens_positive"), caption):
                regions.append(grounding.Region(0, start, end, box))
        return grounding.record(image, [("original", caption)], regions, coco.size_of(image))


def _check(file: str) -> int:
    """The size of a file in bytes. Raises UserError for one of another dataset."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD_BYTES)
        size = os.path.getsize(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    if not head.split(b"\n")[0].partition(b"\t")[2].lstrip().startswith(b"{"):
        raise UserError(f"{file} begins with {quote(head[:40])}: expected {_EXPECTED}")
    return size


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines of a part, and where they begin."""
    most = archives.MAX_FILE_BYTES * 2  # base64 takes 4 bytes for 3
    try:
        with open(part.file, "rb") as stream:
            if part.start:
                stream.seek(part.start - 1)
                stream.readline()  # the rest of the line before
            while (start := stream.tell()) < part.end:
                line = stream.readline(most + 1)
                if len(line) > most:
                    raise UserError(f"{part.file} has a line of more than {most} bytes at {start}")
                if not line:
                    raise UserError(f"{part.file} is shorter than it was")
                yield start, line
    except OSError as error:
        raise UserError(f"{part.file} cannot be read: {error.strerror or error}") from None


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        row = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"its line is not JSON: {' '.join(str(error)[:100].split())}") from None
    if not isinstance(row, dict):
        raise UserError(f"its line is {quote(row)}: expected an object")
    return row


def _picture(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise UserError(f"its picture is not in base64: {error}") from None


def _open(options: Options) -> dict[str, GroundedSbu]:
    source = options.source
    if os.path.isdir(source):
        names = [name for name, _ in archives.walk(source, (".tsv",))]
        root = source
    else:
        root, name = os.path.split(source)
        names = [name] if os.path.isfile(source) else []
    if not names:
        raise NotFoundError(f"{source or 'source'} has no .tsv: expected {_EXPECTED}")
    files = layouts.by_split(names)
    return {
        "grounded_sbu": GroundedSbu(
            {
                split: tuple(os.path.join(root, name) for name in files[split])
                for split in SPLITS
                if split in files
            }
        )
    }


DATASET = Dataset(
    name="grounded_sbu",
    summary="Grounded SBU: pictures of SBU with their captions and boxes of the phrases",
    tasks=("lg", "t2i", "ip"),
    open=_open,
    size="about 800,000 pictures",
    license="none stated; boxes are of GLIP, pictures and captions under Flickr's terms",
    where="Hugging Face: gligen/sbu_tsv (the data of GLIGEN)",
    layout="train-00.tsv, or the train-NNNN.tsv that it is cut into; .lineidx is not needed",
    quirks=(
        "a line has megabytes: files are read by ranges of bytes, one line at a time",
        "boxes are x, y, width, height (GLIGEN's readme has another order than its code)",
        "a box with several spans has each as a phrase; spans side by side are one",
        "the embeddings are not kept",
        "a phrase that would be found elsewhere in its caption than it stands is left out",
    ),
    example="--source=sbu_tsv --hold_out=0.01",
)
