"""KITTI depth: sparse depth of a laser scanner, joined with the pictures of the raw release."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.native import TEST, TRAIN, VALIDATION, Dataset, Entry, Options
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.fields import setting

LEVELS_PER_METER = 256
_PART_ROWS = 500
_DEPTH = re.compile(
    r"^(?P<split>train|val)/(?P<drive>\d{4}_\d\d_\d\d_drive_\d{4}_sync)/proj_depth/groundtruth/"
    r"(?P<camera>image_0[23])/(?P<frame>\d+)\.png$"
)
_FOLDERS = {TRAIN: "train", VALIDATION: "val"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KittiOptions(Options):
    """Where depth and pictures are, and lists of them, if not all is taken."""

    depth: str = setting(
        "", "folder or zip of the annotated depth; empty: looked for in source", is_path=True
    )
    raw: str = setting(
        "", "folder of the raw release, or its zips; empty: looked for in source", is_path=True
    )
    train_list: str = setting("", "file of `rgb depth focal`, the split train", is_path=True)
    val_list: str = setting("", "the same, for the split validation", is_path=True)
    test_list: str = setting("", "the same, for the split test", is_path=True)


@dataclasses.dataclass(frozen=True)
class Rows:
    """A part: pairs of a picture's and a depth's name."""

    name: str
    pairs: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Kitti:
    """A record of each depth image, with its picture of the same camera and time."""

    options: KittiOptions
    splits: tuple[str, ...]
    depth: str  # the folder or zip
    raw: tuple[str, ...]  # folders, each searched for a picture
    fields: tuple[str, ...] = ("image", "depth", "depth_scale")

    def parts(self, split: str) -> Sequence[Rows]:
        lists = _lists(self.options)
        if lists:
            name = lists[split]
            pairs = _read_list(name)
        else:
            name, pairs = f"{self.depth} {_FOLDERS[split]}", self._find(_FOLDERS[split])
        if pairs:
            self._expect_pictures(pairs)
        return [
            Rows(f"{name} {first}", tuple(pairs[first : first + _PART_ROWS]))
            for first in range(0, len(pairs), _PART_ROWS)
        ]

    def entries(self, part: Rows) -> Iterator[Entry]:
        for rgb, depth in part.pairs:
            match = re.search(r"([^/]+)/(?:proj_depth/groundtruth/)?([^/]+)/([^/]+)\.png$", depth)
            yield Entry(key="/".join(match.groups()) if match else depth, raw=(rgb, depth))

    def make(self, raw: tuple[str, str]) -> Mapping[str, Any]:
        from data_pipelines import records
        from data_pipelines.native import coco
        from univg_jax import images

        rgb, depth = raw
        levels = images.to_integers(images.open_picture(self._read_depth(depth)))
        if levels is None or not 0 <= levels.min() <= levels.max() < 2**16:
            raise UserError(f"{depth} is not a 16-bit gray PNG: expected 1/256 m a level")
        if not levels.any():
            raise UserError(f"{depth} has no depth at all")
        image = self._read_picture(rgb)
        coco.check_size(image, *levels.shape)
        return {
            "image": image,
            **records.encode_levels(levels.astype(np.uint16), 1 / LEVELS_PER_METER),
        }

    def _find(self, folder: str) -> list[tuple[str, str]]:
        pairs = []
        for name in _depth_names(self.depth, folder):
            if (match := _DEPTH.match(name)) and match["split"] == folder:
                drive, camera, frame = match["drive"], match["camera"], match["frame"]
                pairs.append((f"{drive[:10]}/{drive}/{camera}/data/{frame}.png", name))
        return sorted(pairs, key=lambda pair: pair[1])

    def _read_depth(self, name: str) -> bytes:
        from data_pipelines.native import coco

        store = coco.open_store(self.depth)
        for candidate in (name, *(f"{folder}/{name}" for folder in _FOLDERS.values())):
            if candidate in store:
                return store.read(candidate)
        raise NotFoundError(f"there is no {quote(name, 200)} in {self.depth}, nor in train or val")

    def _read_picture(self, name: str) -> bytes:
        if (found := self._locate(name)) is None:
            raise NotFoundError(f"there is no picture {quote(name, 200)} in {', '.join(self.raw)}")
        store, local = found
        return store.read(local)

    def _locate(self, name: str) -> tuple[Any, str] | None:
        """The store and name of a picture, which may have become a JPEG, or be in a drive's zip."""
        from data_pipelines.native import coco

        stem = name.rsplit(".", 1)[0]
        drive = next((p for p in stem.split("/") if p.endswith("_sync")), "")
        for root in self.raw:
            zips = [f"{drive}.zip", f"{drive[:10]}/{drive}.zip"] if drive else []
            there = [p for z in zips if os.path.isfile(p := os.path.join(root, z))]
            for place in (root, *there):
                store = coco.open_store(place)
                for suffix in (".png", ".jpg", ".jpeg"):
                    if stem + suffix in store:
                        return store, stem + suffix
        return None

    def _expect_pictures(self, pairs: Sequence[tuple[str, str]]) -> None:
        # Of each drive one: drives that were not downloaded are left out one by one.
        first = {rgb.rsplit("/", 1)[0]: rgb for rgb, _ in reversed(pairs)}
        if not any(self._locate(rgb) for rgb in first.values()):
            looked = " or ".join(os.path.join(root, pairs[0][0]) for root in self.raw)
            raise NotFoundError(
                f"there are no pictures of KITTI's raw release for {self.depth}: expected {looked}"
            )


def _depth_names(place: str, folder: str) -> list[str]:
    """The names of depth images; of a folder without looking into the pictures beside them."""
    from data_pipelines.native import coco

    if not os.path.isdir(place):
        return coco.open_store(place).names()
    names = []
    for drive in _listed(os.path.join(place, folder)):
        for camera in ("image_02", "image_03"):
            inside = f"{folder}/{drive}/proj_depth/groundtruth/{camera}"
            names += [f"{inside}/{file}" for file in _listed(os.path.join(place, inside))]
    return names


def _listed(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _lists(options: KittiOptions) -> dict[str, str]:
    lists = {TRAIN: options.train_list, VALIDATION: options.val_list, TEST: options.test_list}
    return {split: file for split, file in lists.items() if file}


def _read_list(file: str) -> list[tuple[str, str]]:
    """The pairs of a list; rows without depth (45 of Eigen's test split) are left out."""
    if not os.path.isfile(file):
        raise NotFoundError(f"{file} does not exist: expected a list of `rgb depth focal`")
    try:
        with open(file, encoding="utf-8-sig") as opened:
            lines = opened.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    pairs: dict[tuple[str, str], None] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) not in (2, 3):
            raise UserError(f"{file} line {number} is {quote(line)}: expected `rgb depth focal`")
        if words[1] != "None":
            pairs[words[0].lstrip("/"), words[1].lstrip("/")] = None
    return list(pairs)


def _open(options: KittiOptions) -> dict[str, Kitti]:
    source = options.source
    candidates = [options.depth] if options.depth else [
        os.path.join(source, name)
        for name in ("", "depth", "data_depth_annotated", "data_depth_annotated.zip")
    ]  # fmt: skip
    lists = _lists(options)
    there = [place for place in candidates if _holds_depth(place, any_drive=bool(lists))]
    if not there:
        expected = "train/2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02"
        raise NotFoundError(
            f"there is no depth of KITTI: expected {expected} in {' or '.join(candidates)}"
        )
    raw = [options.raw] if options.raw else [
        *(os.path.join(source, name) for name in ("", "raw", "kitti_raw", "raw_data", "rgb")),
        *(os.path.join(source, name) for name in ("train", "val")),
    ]  # fmt: skip
    roots = tuple(root for root in raw if os.path.isdir(root))
    if not roots:
        raise NotFoundError(f"{raw[0]} is not a folder: expected KITTI's raw release")
    splits = tuple(lists) or tuple(
        split for split, folder in _FOLDERS.items() if _has_split(there[0], folder)
    )
    return {"kitti": Kitti(options, splits, there[0], roots)}


def _holds_depth(place: str, *, any_drive: bool) -> bool:
    if os.path.isdir(place):
        if any(_has_split(place, folder) for folder in _FOLDERS.values()):
            return True
        # The drives alone, as lists may name them.
        drives = [d for d in _listed(place) if d.endswith("_sync")] if any_drive else []
        return any(os.path.isdir(os.path.join(place, d, "proj_depth")) for d in drives)
    return os.path.isfile(place) and any(_has_split(place, f) for f in _FOLDERS.values())


def _has_split(place: str, folder: str) -> bool:
    if os.path.isdir(place):
        drives = _listed(os.path.join(place, folder))
        return any(os.path.isdir(os.path.join(place, folder, d, "proj_depth")) for d in drives)
    return any(
        (m := _DEPTH.match(name)) and m["split"] == folder for name in _depth_names(place, "")
    )


DATASET = Dataset(
    name="kitti",
    summary="KITTI depth: street scenes with the sparse depth of a laser scanner, up to 80 m",
    tasks=("depth",),
    options=KittiOptions,
    open=_open,
    size="93,000 pictures, 175 GB raw and 14 GB depth",
    license="CC BY-NC-SA 3.0",
    where="KITTI's site: depth prediction (annotated depth maps) and the synced raw drives",
    layout=(
        "{train,val}/<drive>_sync/proj_depth/groundtruth/image_0{2,3}/*.png (or "
        "data_depth_annotated.zip), and <date>/<drive>_sync/image_0{2,3}/data/*.png (or .jpg, or "
        "the zips of drives)"
    ),
    quirks=(
        "levels of 1/256 m are stored exactly; 0 is no value and does not count in the loss",
        "lists of `rgb depth focal`, such as Eigen's, where a depth of None is left out",
        "the first and last 5 frames of a drive have no depth, and are left out",
        "a picture may have been converted to JPEG",
    ),
    example="--source=kitti --raw=kitti_raw --test_list=eigen_test_files_with_gt.txt",
)
