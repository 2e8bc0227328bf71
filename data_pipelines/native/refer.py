"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions of COCO's train2014 pictures.

Two releases: `refs(unc|google|umd).p` beside an `instances.json`, and Google's own RefCOCOg in
JSON. A ref is one object of one picture, with one to a few sentences.
"""

import dataclasses
import io
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipelines.native import TEST, TRAIN, VALIDATION, coco, tables
from univg_jax.errors import NotFoundError, UserError, quote

PARTITIONS = {
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
}
_MAX_BYTES = 2**28  # of a pickle; the largest of the release has 14 MB


@dataclasses.dataclass(frozen=True)
class Ref:
    """An object that is referred to. `split` is as the release names it, such as testA."""

    image_id: int
    ann_id: int
    split: str
    sentences: tuple[str, ...]  # lower case, without punctuation
    raw: tuple[str, ...]  # as they were typed


def split_of(name: str) -> str:
    """The split of `native.SPLITS` that a release's own belongs to. Raises UserError."""
    # The official code tells testA and testB by a part of the name, too.
    if "test" in name:
        return TEST
    if name not in ("train", "val"):
        raise UserError(f"a ref is of split {quote(name)}: expected train, val, testA, testB, test")
    return TRAIN if name == "train" else VALIDATION


def read_refs(path: str | os.PathLike) -> list[Ref]:
    """The refs of a `refs(...).p`, which may be anybody's: a pickle of plain values only.

    Raises NotFoundError if there is no such file, and UserError with its name if it is damaged,
    wants anything imported, or holds something else.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise NotFoundError(f"{path} does not exist: expected a pickle of refs")
    refs = _load(path)
    if not isinstance(refs, list):
        raise UserError(f"{path} holds a {type(refs).__name__}: expected a list of refs")
    made = []
    for number, ref in enumerate(refs):
        try:
            made.append(_ref(ref))
        except UserError as error:
            raise UserError(f"{path}: ref {number}: {error}") from None
    return made


def _ref(ref: Any) -> Ref:
    if not isinstance(ref, dict):
        raise UserError(f"it is {quote(ref)}: expected a dict")
    sentences = [s for s in tables.get(ref, "sentences", list) if isinstance(s, dict)]
    split = tables.get(ref, "split", str)
    split_of(split)
    return Ref(
        image_id=tables.get(ref, "image_id", int),
        ann_id=tables.get(ref, "ann_id", int),
        split=split,
        sentences=tuple(tables.text_of(s.get("sent", s.get("raw"))) for s in sentences),
        raw=tuple(tables.text_of(s.get("raw", s.get("sent"))) for s in sentences),
    )


def _load(path: str) -> Any:
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise UserError(f"{path} has more than {_MAX_BYTES} bytes: expected a pickle of refs")
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES)
        return _PlainUnpickler(io.BytesIO(content), encoding="utf-8", errors="replace").load()
    except UserError as error:
        raise UserError(f"{path}: {error}" if path not in str(error) else str(error)) from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is not a pickle that can be read: {reason}") from None


# In Python, not in C: that one believes a number of memo slots, and takes gigabytes for them.
class _PlainUnpickler(pickle._Unpickler):
    """Reads lists, dicts, texts and numbers, and nothing that would import or call anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(
            f"it wants {quote(f'{module}.{name}')} imported, and is refused: refs are plain lists"
        )

    def get_extension(self, code: int) -> Any:
        raise UserError("it wants an extension imported, and is refused: refs are plain lists")

    def persistent_load(self, pid: Any) -> Any:
        raise UserError("it refers to something outside, and is refused: refs are plain lists")


@dataclasses.dataclass(frozen=True)
class Subset:
    """The refs of one of PARTITIONS, and the file of its pictures' sizes and segmentations."""

    name: str
    partition: str
    refs: tuple[Ref, ...]
    instances: str

    def read_instances(self) -> tuple[dict[int, dict], dict[int, Any]]:
        """The pictures by id, and the segmentations by annotation, of these refs alone.

        Raises UserError for a file that cannot be read.
        """
        image_ids = {ref.image_id for ref in self.refs}
        ann_ids = {ref.ann_id for ref in self.refs}
        if self.partition == "google_refexp":
            return _google_instances(self.instances.split("\n"), image_ids, ann_ids)
        found, segmentations = {}, {}
        for image in coco.read_list(self.instances, "images", what="pictures and segmentations"):
            if _id(image, self.instances) in image_ids:
                found[image["id"]] = _image(image)
        for ann in coco.read_list(self.instances, "annotations", what="segmentations"):
            if _id(ann, self.instances) in ann_ids:
                segmentations[ann["id"]] = ann.get("segmentation")
        return found, segmentations


def _id(item: Mapping, where: str) -> int:
    try:
        return tables.get(item, "id", int)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _image(image: Mapping) -> dict[str, Any]:
    return {key: image.get(key) for key in ("file_name", "height", "width")}


def open_subset(folder: str, name: str, partition: str = "") -> Subset | None:
    """A subset of a release below `folder`, of `partition` or the first there is; None without."""
    for one in (partition,) if partition else PARTITIONS[name]:
        for root in (os.path.join(folder, name), folder):
            refs = os.path.join(root, f"refs({one}).p")
            is_its_own = root != folder or os.path.basename(folder.rstrip("/")) == name
            if os.path.isfile(refs) and is_its_own:
                instances = os.path.join(root, "instances.json")
                return Subset(name, one, tuple(read_refs(refs)), instances)
    if name == "refcocog" and partition in ("", "google"):
        for root in (os.path.join(folder, name), os.path.join(folder, "google_refexp"), folder):
            files = _google_files(root)
            if files:
                refs = tuple(ref for file, split in files for ref in _google_refs(file, split))
                return Subset(name, "google_refexp", refs, "\n".join(file for file, _ in files))
    return None


def open_all(folder: str) -> Iterator[Subset]:
    """Every partition of every subset that is below `folder`."""
    for name, partitions in PARTITIONS.items():
        for partition in partitions:
            subset = open_subset(folder, name, partition)
            if subset is not None:
                yield subset


# Google's own release: objects by their ids as texts.


def _google_files(root: str) -> list[tuple[str, str]]:
    if not os.path.isdir(root):
        return []
    files = sorted(
        file
        for file in os.listdir(root)
        if file.startswith("google_refexp_") and file.endswith(".json") and "coco_aligned" in file
    )
    found = []
    for split in ("train", "val"):
        # With or without categories: the same refs.
        if chosen := [file for file in files if file.startswith(f"google_refexp_{split}_")]:
            found.append((os.path.join(root, chosen[0]), split))
    return found


def _google_tables(file: str) -> dict[str, dict[str, dict]]:
    import json

    try:
        with open(file, "rb") as opened:
            value = json.load(opened)
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file} is not JSON that can be read: {error}") from None
    for name in ("images", "annotations", "refexps"):
        table = value.get(name) if isinstance(value, dict) else None
        if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
            raise UserError(f"{file} has no table {name!r} of objects by id: expected Google's")
    return value


def _google_refs(file: str, split: str) -> list[Ref]:
    value, refs = _google_tables(file), []
    try:
        for ann in value["annotations"].values():
            expressions = [
                value["refexps"].get(str(number), {})
                for number in tables.get(ann, "refexp_ids", list)
            ]
            raw = tuple(tables.text_of(e.get("raw")) for e in expressions)
            refs.append(
                Ref(
                    image_id=tables.get(ann, "image_id", int),
                    ann_id=tables.get(ann, "annotation_id", int),
                    split=split,
                    sentences=tuple(_spoken(e) for e in expressions),
                    raw=raw,
                )
            )
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return refs


def _spoken(expression: Mapping) -> str:
    tokens = expression.get("tokens")
    if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens):
        return tables.text_of(" ".join(tokens))
    return tables.text_of(expression.get("raw")).lower()


def _google_instances(files, image_ids, ann_ids):
    found, segmentations = {}, {}
    for file in files:
        value = _google_tables(file)
        for image in value["images"].values():
            image_id = tables.get(image, "image_id", int)
            if image_id in image_ids:
                found[image_id] = _image(image)
        for ann in value["annotations"].values():
            ann_id = tables.get(ann, "annotation_id", int)
            if ann_id in ann_ids:
                segmentations[ann_id] = ann.get("segmentation")
    return found, segmentations
