"""RefCOCO, RefCOCO+ and RefCOCOg: what people say to point at an object in a picture."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import SPLITS, TEST, TRAIN, CocoOptions, Dataset, Entry
from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.fields import setting

_SUBSETS = ("refcoco", "refcoco+", "refcocog")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefCocoOptions(CocoOptions):
    """What is built of the three."""

    subsets: tuple[str, ...] = setting(
        (), "which of them; none: all that source has", names=_SUBSETS
    )
    partition: str = setting(
        "", "who split them; empty: unc or umd, else google", names=("", "unc", "umd", "google")
    )
    test: tuple[str, ...] = setting(
        ("testA", "testB", "test"),
        "which of their splits are the split test",
        names=("testA", "testB", "test"),
    )
    expressions: str = setting(
        "sent", "sent: lower case, as it is evaluated; raw: as typed", names=("sent", "raw")
    )
    keep_leaks: bool = setting(
        False, "keep pictures in train that are also in a validation or test split"
    )
    pictures: str = setting(
        "", "folder or zip of COCO's train2014; empty: looked for in source", is_path=True
    )


@dataclasses.dataclass(frozen=True)
class RefCoco:
    """A record of each picture, with all its objects and expressions."""

    options: RefCocoOptions
    fields: tuple[str, ...] = ("image", "masks", "expressions", "expression_masks")
    splits: tuple[str, ...] = SPLITS

    def parts(self, split: str) -> Sequence[Any]:
        from data_pipelines.native import coco

        rows = self._rows(split)
        coco.Pictures.find(
            self._places(), [row["file_name"] for row in rows], where=self.options.source
        )
        return coco.slices(f"RefCOCO {split}", rows)

    def entries(self, part: Any) -> Iterator[Entry]:
        for row in part.rows():
            raw = row if "leak" not in row else UserError(row["leak"])
            yield Entry(key=str(row["id"]), raw=raw, ids=(str(row["id"]),))

    def make(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        from data_pipelines.native import coco

        height, width = coco.image_size(raw)
        image = coco.Pictures(tuple(self._there())).read(raw["file_name"])
        coco.check_size(image, height, width)
        masks, expressions, expression_masks = [], [], []
        for texts, segmentation in raw["objects"]:
            mask = coco.segment(segmentation, height, width)
            if not mask.any():
                continue
            for text in texts:
                expressions.append(text)
                expression_masks.append(len(masks))
            masks.append(coco.png_mask(mask))
        if not masks:
            raise UserError("no object of the picture has a pixel")
        return dict(
            image=image, masks=masks, expressions=expressions, expression_masks=expression_masks
        )

    def _places(self) -> list[str]:
        if self.options.pictures:
            return [self.options.pictures]
        root = self.options.source
        names = ("train2014", "coco_train2014", "mscoco/images/train2014", "train2017", "val2017")
        return [
            os.path.join(root, folder, name + suffix)
            for folder in ("", "images")
            for name in names
            for suffix in ("", ".zip")
        ] + [os.path.join(root, "images")]

    def _there(self) -> list[str]:
        return [place for place in self._places() if os.path.exists(place)]

    def _rows(self, split: str) -> list[dict[str, Any]]:
        """A picture each: its id, name and size, and its objects as (texts, segmentation)."""
        from data_pipelines.native import refer

        rows: dict[int, dict[str, Any]] = {}
        objects: dict[int, dict[int, tuple[list[str], Any]]] = {}
        held_out: dict[int, str] = {}
        for subset in _subsets(self.options):
            images, segmentations = subset.read_instances()
            for ref in subset.refs:
                where = refer.split_of(ref.split)
                if where != TRAIN:
                    held_out.setdefault(ref.image_id, f"{subset.name} {ref.split}")
                if where != split or (where == TEST and ref.split not in self.options.test):
                    continue
                if ref.image_id not in images or ref.ann_id not in segmentations:
                    files = " and ".join(subset.instances.split("\n"))
                    raise UserError(
                        f"{files} has not picture {quote(ref.image_id)} with annotation "
                        f"{quote(ref.ann_id)}, of {subset.name} ({subset.partition}): it is "
                        "of other refs"
                    )
                rows.setdefault(ref.image_id, {"id": ref.image_id, **images[ref.image_id]})
                # Two refs, also of two subsets, may be of one object.
                texts, _ = objects.setdefault(ref.image_id, {}).setdefault(
                    ref.ann_id, ([], segmentations[ref.ann_id])
                )
                said = ref.sentences if self.options.expressions == "sent" else ref.raw
                texts += [text for text in said if text and text not in texts]
        for image_id, row in rows.items():
            row["file_name"] = str(row["file_name"])
            row["objects"] = [o for o in objects[image_id].values() if o[0]]
            if split == TRAIN and image_id in held_out and not self.options.keep_leaks:
                row["leak"] = f"the picture is also in {held_out[image_id]}"
        return [rows[image_id] for image_id in sorted(rows)]


def _subsets(options: RefCocoOptions) -> list[Any]:
    """The `refer.Subset`s to build, with their refs. Raises UserError for one that is missing."""
    from data_pipelines.native import refer

    found = []
    for name in options.subsets or _SUBSETS:
        known = refer.PARTITIONS[name]
        subset = None
        if options.partition in ("", *known):
            subset = refer.open_subset(options.source, name, options.partition)
        if subset is not None:
            found.append(subset)
        elif options.subsets:
            partition = options.partition or known[0]
            if partition not in known:
                raise UserError(f"partition={partition!r}: {name} has {' and '.join(known)}")
            expected = os.path.join(options.source, name, f"refs({partition}).p")
            raise NotFoundError(f"{options.source} has no {name}: expected {expected}")
    if not found:
        expected = os.path.join(options.source, "refcoco", "refs(unc).p")
        raise NotFoundError(
            f"{options.source} has no refs: expected {expected} beside instances.json, the same of "
            "refcoco+ or refcocog, or google_refexp_train_201511_coco_aligned.json"
        )
    return found


def _open(options: RefCocoOptions) -> dict[str, RefCoco]:
    from data_pipelines.native import refer

    there = {refer.split_of(ref.split) for subset in _subsets(options) for ref in subset.refs}
    return {"refcoco": RefCoco(options, splits=tuple(s for s in SPLITS if s in there))}


DATASET = Dataset(
    name="refcoco",
    summary="RefCOCO, RefCOCO+ and RefCOCOg: referring expressions of objects in COCO pictures",
    tasks=("seg", "ip"),
    options=RefCocoOptions,
    open=_open,
    size="50,000 objects with 142,000 expressions in 20,000 pictures (each of the first two)",
    license="Apache-2.0 (refer); annotations CC BY 4.0; pictures under Flickr's terms",
    where="lichengunc/refer on GitHub; COCO train2014; Google_Refexp_toolbox for its own form",
    layout=(
        "{refcoco,refcoco+,refcocog}/instances.json and refs(unc|google|umd).p; or "
        "google_refexp_{train,val}_201511_coco_aligned[_catg].json; train2014/ or train2014.zip"
    ),
    quirks=(
        "the pickle may hold plain values only; anything that would be imported is refused",
        "file_name of a ref names no file: that of instances.json is taken",
        "overlapping polygons count once; polygons, RLE and compressed RLE are read",
        "one record a picture: its objects once, with the expressions of all subsets",
        "a picture of a validation or test split is left out of train (keep_leaks)",
        "testA, testB and test are the split test (option test)",
    ),
    example="--source=refer/data --subsets=refcoco,refcoco+ --pictures=coco/train2014",
)
