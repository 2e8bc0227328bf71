"""Flickr30k Entities: five captions a picture, with a box for each thing that a phrase names."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import (
    TEST,
    TRAIN,
    VALIDATION,
    Dataset,
    Entry,
    Options,
    archives,
    grounding,
)
from univg_jax.errors import NotFoundError, UserError, needs_extra, quote
from univg_jax.fields import setting

LISTS = {TRAIN: "train.txt", VALIDATION: "val.txt", TEST: "test.txt"}
PART_ENTRIES = 500
_PICTURES = ("flickr30k-images", "flickr30k_images", "flickr30k", "images")
# [/EN#chain/type/type words]: a phrase may have several types.
_PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s/\]]+)+)\s+([^\]]*?)\s*\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flickr30kEntitiesOptions(Options):
    """Where the pictures are."""

    pictures: str = setting(
        "", "folder, zip or tar of the pictures; empty: looked for in source", is_path=True
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """Some pictures of a split, by their ids, and the sentences that do not describe them."""

    split: str
    ids: tuple[str, ...]
    unrelated: tuple[tuple[str, int], ...]  # id and number of the sentence, from 1

    def __str__(self) -> str:
        return f"{self.split} {self.ids[0]} to {self.ids[-1]}"


@dataclasses.dataclass(frozen=True)
class Flickr30kEntities:
    """A record of each picture."""

    options: Flickr30kEntitiesOptions
    annotations: str  # folder or archive
    inside: str  # where in it Annotations and Sentences are
    splits: tuple[str, ...]
    fields: tuple[str, ...] = grounding.FIELDS

    def parts(self, split: str) -> Sequence[Part]:
        from data_pipelines.native import coco

        ids = self._ids(split)
        names = [f"{name}.jpg" for name in ids]
        coco.Pictures.find(self._places(), names, where=self.annotations)
        unrelated = _unrelated(self.options.source)
        parts = []
        for first in range(0, len(ids), PART_ENTRIES):
            mine = ids[first : first + PART_ENTRIES]
            parts.append(Part(split, mine, tuple(u for u in unrelated if u[0] in mine)))
        return parts

    def entries(self, part: Part) -> Iterator[Entry]:
        for name in part.ids:
            unrelated = [number for of, number in part.unrelated if of == name]
            yield Entry(key=name, raw=(name, unrelated), ids=(f"{name}.jpg",))

    def make(self, raw: tuple[str, Sequence[int]]) -> Mapping[str, Any]:
        from data_pipelines.native import coco

        name, unrelated = raw
        store = coco.open_store(self.annotations)
        size, boxes = read_boxes(store.read(f"{self.inside}Annotations/{name}.xml"))
        captions, regions = [], []
        lines = _text(store.read(f"{self.inside}Sentences/{name}.txt"), name).splitlines()
        for number, line in enumerate(lines, 1):
            if number in unrelated or not line.strip():
                continue
            text, phrases = parse_sentence(line)
            for chain, start, end in phrases:
                for box in boxes.get(chain, ()):
                    regions.append(grounding.Region(len(captions), start, end, box))
            captions.append(("original", text))
        places = tuple(place for place in self._places() if os.path.exists(place))
        image = coco.Pictures(places).read(f"{name}.jpg")
        coco.check_size(image, *size)
        return grounding.record(image, captions, regions, size)

    def _ids(self, split: str) -> tuple[str, ...]:
        path = os.path.join(self.options.source, LISTS[split])
        if not os.path.isfile(path):  # no lists: all that there are
            found = archives.Store(self.annotations).names((".txt",))
            start = f"{self.inside}Sentences/"
            return tuple(sorted(n[len(start) : -4] for n in found if n.startswith(start)))
        ids = tuple(dict.fromkeys(_read_text(path).split()))
        if not ids or not all(re.fullmatch(r"[\w.-]+", name) for name in ids):
            bad = next((name for name in ids if not re.fullmatch(r"[\w.-]+", name)), "")
            raise UserError(f"{path} has {quote(bad)}: expected an id of Flickr30k in each line")
        return ids

    def _places(self) -> list[str]:
        if self.options.pictures:
            return [self.options.pictures]
        return [
            os.path.join(self.options.source, name + suffix)
            for name in _PICTURES
            for suffix in ("", *archives.ARCHIVE_SUFFIXES[:2])
        ]


def parse_sentence(line: str) -> tuple[str, list[tuple[int, int, int]]]:
    """A sentence without brackets, and its phrases: their chain, and [start, end) in the text.

    Raises UserError for brackets that are none of Flickr30k's.
    """
    text, phrases, last = "", [], 0
    for match in _PHRASE.finditer(line):
        text += line[last : match.start()]
        phrases.append((int(match[1][:18]), len(text), len(text) + len(match[3])))
        text += match[3]
        last = match.end()
    text += line[last:]
    if "[/EN#" in text:
        raise UserError(
            f"{quote(line, 200)} cannot be read: expected phrases as [/EN#1/people a man]"
        )
    return text, phrases


def read_boxes(xml: bytes) -> tuple[tuple[int, int], dict[int, list[grounding.Box]]]:
    """(height, width) and the boxes of each chain, in continuous pixels.

    Those of the file are from 1 and inclusive. Raises UserError for what is none of these files.
    """
    with needs_extra("data", "reading annotations of Flickr30k Entities"):
        from defusedxml import ElementTree

    from data_pipelines.native import coco

    try:
        root = ElementTree.fromstring(xml)
    except (SyntaxError, ValueError, LookupError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"its annotations are not XML that can be read: {reason}") from None
    size = root.find("size")
    if root.tag != "annotation" or size is None:
        raise UserError(f"its annotations are {quote(root.tag)}: expected annotation with size")
    boxes: dict[int, list[grounding.Box]] = {}
    for thing in root.iterfind("object"):
        # `scene` and `nobndbox` say that there is none.
        if (bndbox := thing.find("bndbox")) is None:
            continue
        x0, y0, x1, y1 = (_number(bndbox, side) for side in ("xmin", "ymin", "xmax", "ymax"))
        for chain in thing.iterfind("name"):  # a thing may be of several chains
            name = (chain.text or "").strip()
            if not re.fullmatch(r"[0-9]{1,18}", name):
                raise UserError(f"the name of an object is {quote(name)}: expected a number")
            boxes.setdefault(int(name), []).append((x0 - 1, y0 - 1, x1, y1))
    boxes.pop(0, None)  # what cannot be seen
    return coco.image_size({side: size.findtext(side) for side in ("height", "width")}), boxes


def _number(bndbox: Any, side: str) -> float:
    from data_pipelines.native import tables

    return tables.get({side: bndbox.findtext(side)}, side, float)


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name}.txt is not in UTF-8: expected sentences") from None


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return _text(file.read(archives.MAX_FILE_BYTES), path.removesuffix(".txt"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _unrelated(source: str) -> list[tuple[str, int]]:
    """Sentences that do not describe their picture: its id, and their number from 1."""
    path = os.path.join(source, "UNRELATED_CAPTIONS")
    if not os.path.isfile(path):
        return []
    rows = (re.fullmatch(r"\s*(\S+)\s+(\d{1,3})\s*", line) for line in _read_text(path).split("\n"))
    return [(row[1].removesuffix(".jpg"), int(row[2])) for row in rows if row]


def _open(options: Flickr30kEntitiesOptions) -> dict[str, Flickr30kEntities]:
    places = [os.path.join(options.source, name) for name in ("", "annotations", "annotations.zip")]
    for place in filter(os.path.exists, places):
        is_folder = os.path.isdir(place)
        tried = [""] if is_folder else ["", "annotations/"]
        names = () if is_folder else archives.Store(place).names((".xml", ".txt"))
        for inside in tried:
            if all(
                os.path.isdir(os.path.join(place, folder))
                if is_folder
                else any(name.startswith(f"{inside}{folder}/") for name in names)
                for folder in ("Annotations", "Sentences")
            ):
                there = [s for s in LISTS if os.path.isfile(os.path.join(options.source, LISTS[s]))]
                splits = tuple(there) or (TRAIN,)
                native = Flickr30kEntities(options, place, inside, splits)
                return {"flickr30k_entities": native}
    raise NotFoundError(
        f"{options.source or 'source'} has no Flickr30k Entities: expected Annotations/ID.xml and "
        "Sentences/ID.txt, or annotations.zip with these"
    )


DATASET = Dataset(
    name="flickr30k_entities",
    summary="Flickr30k Entities: five captions a picture, and boxes of what their phrases name",
    tasks=("lg", "t2i", "ip"),
    options=Flickr30kEntitiesOptions,
    open=_open,
    size="31,783 pictures with 158,915 captions and 276,000 boxes; 4.4 GB",
    license="no license is given; pictures under Flickr's terms, for non-commercial research",
    where="BryanPlummer/flickr30k_entities on GitHub; pictures by the form of Flickr30k (Illinois)",
    layout=(
        "annotations.zip (or Annotations/ID.xml and Sentences/ID.txt); train.txt, val.txt, "
        "test.txt, UNRELATED_CAPTIONS; flickr30k-images/ID.jpg (or .zip, .tar)"
    ),
    quirks=(
        "boxes of the files are from 1 and inclusive: [xmin-1, ymin-1, xmax, ymax] here",
        "phrases of several types are read; an object of several chains is in each of them",
        "a box for each object of a phrase; notvisual phrases (chain 0) and scenes have none",
        "sentences in UNRELATED_CAPTIONS are left out",
        "a phrase that would be found elsewhere in its caption than it stands is left out",
        "without lists of ids all pictures are train",
    ),
    example="--source=flickr30k_entities --pictures=flickr30k-images",
)
