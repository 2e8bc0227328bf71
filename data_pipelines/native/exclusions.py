"""Known leaks by name: the pictures of evaluation splits, to keep them out of training.

RefCOCO, MagicBrush and COCO's own captions are of the same pictures as COCO's training split, in
part. `ids` reads which pictures a benchmark evaluates on, as ids of COCO.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator

from data_pipelines.native import TRAIN, coco, refer, tables
from univg_jax import files
from univg_jax.errors import NotFoundError, UserError, check_name, quote

_NAMED = re.compile(r"(?:^|,)\s*([^,:/\\]*):")


def ids(spec: str) -> frozenset[str]:
    """The ids of COCO pictures that a text such as `refcoco:DIR,coco_val:FILE` names; "" is none.

    | name | after the colon | pictures |
    |---|---|---|
    | refcoco | folder with refcoco, refcoco+, refcocog | in a val or test split of any of them |
    | coco_val | COCO json, such as captions_val2014.json | all in its `images` |
    | karpathy | dataset_coco.json | of its splits val and test |
    | magicbrush | its folder, or its parquet files' | of dev and test |

    Raises UserError for an unknown name, with the nearest one, and for files that are missing or
    damaged.
    """
    if not spec.strip():
        return frozenset()
    found: set[int] = set()
    for name, path in _parse(spec):
        read = _READERS[check_name(name, _READERS, what="exclusion")]
        if not path:
            raise UserError(f"exclusion {name}: has no path: expected {name}:PATH")
        path = os.path.expanduser(path)
        if not os.path.exists(path):
            raise NotFoundError(f"exclusion {name}: {path} does not exist")
        some = set(read(path))
        if not some:
            raise UserError(f"exclusion {name}: {path} names no picture of an evaluation split")
        found |= some
    return frozenset(map(str, found))


def _parse(spec: str) -> list[tuple[str, str]]:
    """Names and paths; a path may have commas and colons, but no comma before a name."""
    matches = list(_NAMED.finditer(spec))
    if not matches or matches[0].start():
        raise UserError(
            f"exclude={quote(spec)}: expected NAME:PATH, with commas between several; the names "
            f"are {', '.join(_READERS)}"
        )
    ends = [match.start() for match in matches[1:]] + [len(spec)]
    return [
        (match[1].strip(), spec[match.end() : end].strip())
        for match, end in zip(matches, ends, strict=True)
    ]


def _refcoco(folder: str) -> Iterator[int]:
    subsets = list(refer.open_all(folder))
    if not subsets:
        expected = os.path.join(folder, "refcoco", "refs(unc).p")
        raise NotFoundError(f"exclusion refcoco: {folder} has no refs: expected {expected}")
    for subset in subsets:
        yield from (r.image_id for r in subset.refs if refer.split_of(r.split) != TRAIN)


def _coco_val(file: str) -> Iterator[int]:
    for image in coco.read_list(file, "images", what="pictures of COCO"):
        yield _number(image, "id", file)


def _karpathy(file: str) -> Iterator[int]:
    for image in coco.read_list(file, "images", what="Karpathy's splits"):
        if image.get("split") in ("val", "test"):
            # The id is in the name, too: COCO_val2014_000000522418.jpg.
            yield _number(image, "cocoid" if "cocoid" in image else "filename", file)


def _magicbrush(folder: str) -> Iterator[int]:
    """Of the parquet release, whose test split is not in it, and of the folders."""
    there = False
    for split in ("dev", "test"):
        pattern = os.path.join(glob.escape(folder), "**", f"{split}-*.parquet")
        for file in sorted(glob.glob(pattern, recursive=True)):
            there = True
            table = tables.open_table(file, what="MagicBrush")
            table.require("img_id")
            for part in table.parts():
                for _, row in table.rows(part, ("img_id",)):
                    if not isinstance(row, UserError):
                        yield _number(row, "img_id", file)
        file = os.path.join(folder, split, "edit_sessions.json")
        if os.path.isfile(file):
            there = True
            for name in files.read_json(file):
                yield _number({"img_id": name}, "img_id", file)
    if not there:
        raise NotFoundError(
            f"exclusion magicbrush: {folder} has no dev-*.parquet, nor dev/edit_sessions.json or "
            "test/edit_sessions.json"
        )


def _number(item, key: str, file: str) -> int:
    try:
        value = item.get(key)
        # Some name a picture by its file, or by its number and a turn.
        if isinstance(value, str) and (match := re.match(r"^(?:COCO_\w+_)?0*(\d+)", value)):
            return int(match[1])
        return tables.get(item, key, int)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


_READERS: dict[str, Callable[[str], Iterator[int]]] = {
    "refcoco": _refcoco,
    "coco_val": _coco_val,
    "karpathy": _karpathy,
    "magicbrush": _magicbrush,
}
NAMES = tuple(_READERS)
