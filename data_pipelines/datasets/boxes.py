"""Any boxes in COCO's form with captions: COCO's own, and the captioned files of MDETR and GLIP.

Where an annotation has `tokens_positive`, these characters of the caption are its phrase. Elsewhere
its category's name is: where a caption has it (also in the plural) it stands there, and what a
caption does not name is added to its end: "A park, with dog and kite."
"""

import dataclasses
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import (
    SPLITS,
    TEST,
    TRAIN,
    VALIDATION,
    CocoOptions,
    Dataset,
    Entry,
    grounding,
)
from data_pipelines.native.grounding import Region
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.fields import setting

_SPLIT = re.compile(r"(?:^|[_\-.])(train|val|valid|validation|dev|test)(?:\d{4})?(?=[_\-.])")
_NATIVE_SPLITS = {"train": TRAIN, "test": TEST}  # the others are validation
# What COCO has beside instances and captions.
_OTHERS = ("captions_", "person_keypoints_", "image_info_", "stuff_", "panoptic_")
_FOLDERS = [
    *(f"{split}{year}" for year in ("2017", "2014", "") for split in ("train", "val", "test")),
    *("flickr30k-images", "VG_100K", "VG_100K_2"),
]
_ORIGINAL = ("original_img_id", "original_id")  # the ids of MDETR's pictures are its own


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoxesOptions(CocoOptions):
    """Where the files are, and what becomes of boxes that a caption does not name."""

    annotations: str = setting(
        "",
        "JSON file with the boxes, or a pattern of one for each split; empty: looked for in source",
        is_path=True,
    )
    captions: str = setting(
        "",
        "JSON file with the captions, or a pattern; empty: captions_ beside instances_, or the "
        "file of the boxes",
        is_path=True,
    )
    pictures: str = setting(
        "", "folder, zip or tar of the pictures; empty: looked for in source", is_path=True
    )
    append: bool = setting(True, "add the categories that a caption does not name to its end")


@dataclasses.dataclass(frozen=True)
class Boxes:
    """A record of each picture with boxes."""

    options: BoxesOptions
    files: Mapping[str, tuple[str, str]]  # by split: of boxes, and of captions ("": the same)
    fields: tuple[str, ...] = grounding.FIELDS

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.files)

    def parts(self, split: str) -> Sequence[Any]:
        from data_pipelines.native import coco

        file, captions_file = self.files[split]
        things: dict[str, list[dict[str, Any]]] = {}
        captions: dict[str, list[Any]] = {}
        for ann in coco.read_list(file, "annotations"):
            if "caption" in ann and "bbox" not in ann:
                captions.setdefault(_id(ann, "image_id", file), []).append(ann["caption"])
            elif not ann.get("iscrowd"):
                things.setdefault(_id(ann, "image_id", file), []).append(_thing(ann))
        if captions_file:
            for ann in coco.read_list(captions_file, "annotations"):
                image_id = _id(ann, "image_id", captions_file)
                captions.setdefault(image_id, []).append(ann.get("caption"))
        names = _names(file, things)
        rows = []
        for image in coco.read_list(file, "images"):
            if (image_id := _id(image, "id", file)) in things:
                said = captions.get(image_id, []) + _captions(image)
                found = [_named(thing, names) for thing in things[image_id]]
                row = {key: image.get(key) for key in ("height", "width", *_ORIGINAL)}
                # LVIS names COCO's pictures by their addresses alone.
                address = str(image.get("coco_url") or "").rpartition("/")[2]
                row["file_name"] = image.get("file_name") or address or None
                rows.append({"id": image_id, **row, "captions": said, "things": found})
        if not rows:
            raise UserError(f"{file} has no boxes of its images: expected annotations with bbox")
        if not any(row["captions"] for row in rows):
            raise UserError(
                f"{captions_file or file} has no captions of the pictures in {file}: expected "
                "captions_*.json beside instances_*.json, or images with caption"
            )
        pictures = [str(row["file_name"]) for row in rows]
        coco.Pictures.find(self._places(), pictures, where=file)
        return coco.slices(os.path.basename(file), rows)

    def entries(self, part: Any) -> Iterator[Entry]:
        for row in part.rows():
            others = [str(row[key]) for key in _ORIGINAL if isinstance(row[key], int | str)]
            yield Entry(key=row["id"], raw=row, ids=tuple(dict.fromkeys([row["id"], *others])))

    def make(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        from data_pipelines.native import coco, tables

        places = tuple(place for place in self._places() if os.path.exists(place))
        image = coco.Pictures(places).read(tables.get(raw, "file_name", str))
        if raw["height"] is None and raw["width"] is None:
            size = coco.size_of(image)
        else:
            size = coco.image_size(raw)
            coco.check_size(image, *size)
        things = [(grounding.box_of(thing["bbox"]), thing) for thing in raw["things"]]
        captions, regions = [], []
        for k, caption in enumerate(raw["captions"]):
            text = tables.text_of(caption)
            if any("spans" in thing for _, thing in things):
                # Spans are of the first caption, as it was written.
                text = caption
                regions += _spanned(caption, things) if k == 0 else []
            elif text:
                text, found = _mentioned(text, k, things, append=self.options.append)
                regions += found
            captions.append(("original", text))
        return grounding.record(image, captions, regions, size)

    def _places(self) -> list[str]:
        if self.options.pictures:
            return [self.options.pictures]
        source = self.options.source
        root = os.path.dirname(source) if os.path.isfile(source) else source
        return [
            os.path.join(root, folder, name + suffix)
            for folder in ("", "images")
            for name in _FOLDERS
            for suffix in ("", ".zip", ".tar")
        ] + [os.path.join(root, name) for name in ("images", "images.zip", "images.tar", "")]


def _id(item: Mapping, key: str, file: str) -> str:
    from data_pipelines.native import tables

    try:
        return str(tables.get(item, key, (int, str)))
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _thing(ann: Mapping) -> dict[str, Any]:
    """What of an annotation is needed: segmentations are not."""
    thing = {"bbox": ann.get("bbox")}
    if "tokens_positive" in ann:
        return thing | {"spans": ann["tokens_positive"]}
    return thing | {"category": ann.get("category_id")}


def _names(file: str, things: Mapping[str, list[dict[str, Any]]]) -> dict[Any, str]:
    """The names of categories by id, where an annotation needs one."""
    from data_pipelines.native import coco, tables

    if all("spans" in thing for found in things.values() for thing in found):
        return {}
    names = {}
    for category in coco.read_list(file, "categories"):
        try:
            name = tables.text_of(tables.get(category, "name", str).replace("_", " "))
            names[tables.get(category, "id", int)] = name
        except UserError as error:
            raise UserError(f"{file}: a category: {error}") from None
    return names


def _named(thing: Mapping, names: Mapping[Any, str]) -> Mapping[str, Any]:
    """A thing with its category's name, and the longer names that have this one in them."""
    if "spans" in thing:
        return thing
    category = thing["category"]
    name = names.get(category) if isinstance(category, int) else None
    longer = [other for other in names.values() if name and name in other and other != name]
    return thing | {"name": name, "longer": longer}


def _captions(image: Mapping) -> list[Any]:
    many = image.get("captions")
    many = list(many) if isinstance(many, list) else []
    return many + ([image["caption"]] if "caption" in image else [])


def _spanned(caption: Any, things: Sequence[tuple[grounding.Box, Mapping]]) -> list[Region]:
    if not isinstance(caption, str):
        raise UserError(f"its caption is {quote(caption)}: expected a text")
    return [
        Region(0, start, end, box)
        for box, thing in things
        if "spans" in thing
        for start, end in grounding.spans_of(thing["spans"], caption)
    ]


def _mentioned(
    text: str, k: int, things: Sequence[tuple[grounding.Box, Mapping]], *, append: bool
) -> tuple[str, list[Region]]:
    """Caption k with every category named, and the regions of these names."""
    for _, thing in things:
        if not thing["name"]:
            raise UserError(f"there is no name for its category {quote(thing['category'])}")
    wanted = list(dict.fromkeys(thing["name"] for _, thing in things))
    # "hot dog" is no dog: longer names take their words first.
    names = dict.fromkeys([*wanted, *(n for _, thing in things for n in thing["longer"])])
    spans: dict[str, tuple[int, int]] = {}
    taken: set[int] = set()
    for name in sorted(names, key=len, reverse=True):
        for match in re.finditer(rf"(?<!\w){re.escape(name)}(?:s|es)?(?!\w)", text, re.IGNORECASE):
            if not taken & set(range(*match.span())):
                spans.setdefault(name, match.span())
                taken |= set(range(*match.span()))
    missing = [name for name in wanted if name not in spans]
    if missing and append:
        stop = "." if text.endswith(".") else ""
        text = text.rstrip(" .") + ", with"
        for number, name in enumerate(missing):
            text += ("" if not number else " and" if number == len(missing) - 1 else ",") + " "
            spans[name] = (len(text), len(text) + len(name))
            text += name
        text += stop
    return text, [Region(k, *spans[t["name"]], box) for box, t in things if t["name"] in spans]


def _open(options: BoxesOptions) -> dict[str, Boxes]:
    files = _found(options)
    captions = _by_split(glob.glob(options.captions)) if options.captions else {}
    if options.captions and not captions:
        raise NotFoundError(f"captions={options.captions} does not exist: expected COCO's captions")
    if len(captions) == 1 == len(files):
        captions = dict(zip(files, captions.values(), strict=True))
    pairs = {}
    for split in (split for split in SPLITS if split in files):
        file = files[split]
        folder, base = os.path.split(file)
        beside = os.path.join(folder, base.replace("instances", "captions", 1))
        is_pair = beside != file and not options.captions
        if is_pair and not os.path.isfile(beside):
            raise NotFoundError(f"{beside} does not exist: expected the captions of {file}")
        pairs[split] = (file, beside if is_pair else captions.get(split, ""))
    return {"boxes": Boxes(options, pairs)}


def _found(options: BoxesOptions) -> dict[str, str]:
    """The file of boxes of each split."""
    source = options.source
    if options.annotations or os.path.isfile(source):
        pattern = options.annotations or source
        if files := [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern)):
            return _by_split(files)
        raise NotFoundError(f"annotations={pattern} does not exist: expected COCO's JSON")
    for pattern in ("instances_*.json", "*.json"):
        for folder in ("annotations", ""):
            found = sorted(glob.glob(os.path.join(glob.escape(source), folder, pattern)))
            if pattern[0] == "i":  # of several years the last
                found = list({_split_of(file): file for file in found}.values())
            if files := [f for f in found if not os.path.basename(f).startswith(_OTHERS)]:
                return _by_split(files)
    raise NotFoundError(
        f"{source or 'source'} has no boxes: expected annotations/instances_train2017.json with "
        "captions_train2017.json, or another JSON of COCO's form with captions"
    )


def _by_split(files: Sequence[str]) -> dict[str, str]:
    splits: dict[str, str] = {}
    for file in files:
        other = splits.setdefault(_split_of(file), file)
        if other != file:
            raise UserError(f"{other} and {file} are of one split: give one, as annotations=")
    return splits


def _split_of(file: str) -> str:
    match = _SPLIT.search(os.path.basename(file).lower())
    return _NATIVE_SPLITS.get(match[1], VALIDATION) if match else TRAIN


DATASET = Dataset(
    name="boxes",
    summary="Any boxes in COCO's form with captions: COCO, Visual Genome and others as of MDETR",
    tasks=("lg", "t2i", "ip"),
    options=BoxesOptions,
    open=_open,
    size="any; of COCO 2017 118,000 pictures with 860,000 boxes and 590,000 captions",
    license="that of the files; COCO's annotations are CC BY 4.0, pictures under Flickr's terms",
    where="COCO's download page: instances and captions; MDETR's annotations (GoldG), GLIP's",
    layout=(
        "annotations/instances_{train,val}2017.json with captions_{train,val}2017.json; or a JSON "
        "of COCO's form whose images have caption and whose annotations have tokens_positive; "
        "{train,val}2017/ or images/ (or .zip, .tar)"
    ),
    quirks=(
        "without tokens_positive the phrase is the category's name where the caption has it, also "
        "in the plural; categories that a caption does not name are added to it: 'A park, with dog "
        "and kite.' (append=false leaves them out)",
        "a box with several spans has each as a phrase; spans side by side are one",
        "crowds are left out, and boxes that leave the picture by more than a pixel",
        "a phrase that would be found elsewhere in its caption than it stands is left out",
        "an underline in a category's name is a space",
        "a picture has the ids image id and original_img_id, for exclusions",
    ),
    example="--source=coco --exclude=refcoco:refer/data",
)
