"""Pictures of persons, in pairs: a face of one picture, and another picture of the same person."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.native import SPLITS, TRAIN, VALIDATION, Dataset, Entry, Options
from univg_jax.errors import NotFoundError, UserError
from univg_jax.fields import setting

_LIST_SUFFIXES = (".txt", ".lst")
_PART_PHOTOS = 500


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdentityOptions(Options):
    """What the layout does not say by itself."""

    layout: str = setting(
        "",
        "folders, celeba or table; empty: what source looks like",
        names=("", "folders", "celeba", "table"),
    )
    pictures: str = setting(
        "", "folder or zip of the pictures; empty: where source or its list is", is_path=True
    )
    template: str = setting(
        "a photo of <p>", "caption of a picture that has none; with <p>", least=1
    )
    faces: str = setting(
        "", "csv or list of `name x y width height`, or of a name and 5 landmarks", is_path=True
    )
    detector: str = setting(
        "", "YuNet's ONNX file, which finds the face where nothing says it", is_path=True
    )
    margin: float = setting(
        0.25, "what of the sides of a face is cropped around it", least=0, most=4, unit="face sides"
    )
    val_persons: float = setting(
        0.02,
        "share of the persons that is the split validation, without another",
        least=0,
        below=1,
        unit="fraction",
    )
    image_column: str = setting("", "column of a table with the picture; empty: a usual name")
    person_column: str = setting("", "column of a table with the person; empty: a usual name")
    caption_column: str = setting("", "column of a table with the caption; empty: a usual name")
    face_column: str = setting("", "column of a table with the face's box; empty: a usual name")

    def check(self, where: str) -> None:
        """Raises UserError for a template without the person, and for persons held out in part."""
        if self.hold_out:
            raise UserError(
                f"{where}.hold_out={self.hold_out:g} would hold out single pictures of persons: "
                "val_persons holds out persons"
            )
        if "<p>" not in self.template:
            raise UserError(f"{where}.template={self.template!r} has no <p>, the person's place")


@dataclasses.dataclass(frozen=True)
class Identity:
    """A record of each picture of a person of whom there is another one."""

    options: IdentityOptions
    layout: str
    places: Mapping[str, str]  # of the pictures, by native split; "" is all
    splits: tuple[str, ...]
    fields: tuple[str, ...] = ("image", "caption", "face", "person")

    def parts(self, split: str) -> Sequence[Any]:
        from data_pipelines.native import coco

        parts, rows, photos = [], [], 0
        place = self.places.get(split) or self.places[""]
        name = f"{self.options.source} {split}"
        for person, some in self._persons(split):
            rows.append([person, place, [dataclasses.astuple(photo) for photo in some]])
            photos += len(some)
            if photos >= _PART_PHOTOS:
                parts += coco.slices(f"{name} from {person!r}", rows)
                rows, photos = [], 0
        return parts + coco.slices(f"{name}, the last", rows)

    def entries(self, part: Any) -> Iterator[Entry]:
        from data_pipelines.native import people

        persons = [
            (person, place, [people.Photo.of(*photo) for photo in photos])
            for person, place, photos in part.rows()
        ]
        contents = self._contents({p.row for *_, photos in persons for p in photos if p.row >= 0})
        for person, place, photos in persons:
            for k, photo in enumerate(photos):
                key = photo.name if photo.row < 0 else f"{photo.row:09d}"
                raw: Any = UserError(photo.broken or "it is the only picture of its person")
                if len(photos) > 1 and not photo.broken:
                    # Another one, evenly spread over the person's others.
                    step = 1 + int(people.share_of(key) * (len(photos) - 1))
                    face = photos[(k + step) % len(photos)]
                    raw = dict(
                        person=person,
                        place=place,
                        image=contents.get(photo.row, photo.name),
                        caption=photo.caption,
                        face=contents.get(face.row, face.name),
                        region=face.face,
                    )
                    broken = [v for v in (raw["image"], raw["face"]) if isinstance(v, UserError)]
                    raw = broken[0] if broken else raw
                yield Entry(key=key, raw=raw, ids=(person,))

    def make(self, raw: Mapping[str, Any]) -> Mapping[str, Any]:
        from data_pipelines.native import faces, people, person_captions
        from univg_jax import images

        image, face = (self._read(raw, name) for name in ("image", "face"))
        caption = raw["caption"]
        if self.layout == "folders" and caption:
            caption = self._read({**raw, "caption": caption}, "caption").decode("utf-8", "replace")
        caption = person_captions.rewrite(caption, name=raw["person"]) or self.options.template
        pixels = images.to_rgb(images.open_picture(face))
        box = None
        if raw["region"]:
            box = faces.box_of(raw["region"])
        elif self.options.detector:
            box = faces.Detector(self.options.detector).largest(pixels)
        square = faces.crop(pixels, box, margin=self.options.margin)
        return dict(
            image=image,
            caption=caption,
            face=face if square.shape == pixels.shape else faces.jpeg_bytes(square),
            person=people.number_of(raw["person"]),
        )

    def _persons(self, split: str) -> Iterator[Any]:
        from data_pipelines.native import people

        if self.layout == "celeba":
            celeba = people.Celeba.find(self.options.source, self.options.pictures)
            if celeba.partition:
                return celeba.persons(split)
            return self._of_share(celeba.persons(TRAIN), split)
        if split in self.places:
            return people.of_folders(self.places[split], self._regions(self.places[split]))
        if self.layout == "folders":
            place = self.places[""]
            found = people.of_folders(place, self._regions(place))
        elif self.options.source.lower().endswith(_LIST_SUFFIXES):
            found = people.of_list(self.options.source)
        else:
            table, columns = self._table()
            found = people.of_table(table, columns)
        if self.layout != "folders" and self.options.faces:
            found = _with_faces(found, people.Regions([self.options.faces]))
        return self._of_share(found, split)

    def _of_share(self, persons: Iterator[Any], split: str) -> Iterator[Any]:
        """Persons, never single pictures of them, are held out."""
        from data_pipelines.native import people

        for person, photos in persons:
            held_out = people.share_of(person) < self.options.val_persons
            if split == (VALIDATION if held_out else TRAIN):
                yield person, photos

    def _regions(self, place: str) -> Any:
        from data_pipelines.native import people

        files = people.folder_regions(self.options.source, place)
        files = [self.options.faces] if self.options.faces else files
        return people.Regions(files) if files else None

    def _table(self) -> tuple[Any, Any]:
        from data_pipelines.native import people, tables

        table = tables.open_table(self.options.source, what="pictures of persons")
        names = ("image", "person", "caption", "face")
        given = {name: getattr(self.options, f"{name}_column") for name in names}
        return table, people.find_columns(table, given)

    def _contents(self, wanted: set[int]) -> dict[int, Any]:
        """The pictures of rows of a table: their bytes, or their names in a folder."""
        if not wanted:
            return {}
        from data_pipelines.native import coco, tables

        table, columns = self._table()
        store = coco.open_store(self.places[""])
        found: dict[int, Any] = {}
        for part in table.parts():
            if wanted.isdisjoint(range(part.first, part.first + part.count)):
                continue
            for number, row in table.rows(part, [columns.image]):
                if number in wanted:
                    try:
                        if isinstance(row, UserError):
                            raise row
                        found[number] = tables.picture_bytes(row.get(columns.image), store)
                    except UserError as error:
                        found[number] = error
        return found

    def _read(self, raw: Mapping[str, Any], name: str) -> bytes:
        from data_pipelines.native import coco

        if isinstance(raw[name], bytes):
            return raw[name]
        return coco.Pictures((raw["place"],)).read(raw[name])


def _with_faces(persons: Iterator[Any], regions: Any) -> Iterator[Any]:
    for person, photos in persons:
        yield person, [dataclasses.replace(p, face=p.face or regions.of(p.name)) for p in photos]


def _open(options: IdentityOptions) -> dict[str, Identity]:
    from data_pipelines.native import people

    source = options.source
    if not source or not os.path.exists(source):
        raise NotFoundError(
            f"source={source!r} does not exist: expected a folder with one folder for each person, "
            "CelebA, or a table with a picture and a person in each row"
        )
    if options.detector and not os.path.isfile(options.detector):
        raise NotFoundError(f"detector={options.detector} does not exist: expected YuNet's file")
    shared = (TRAIN, VALIDATION) if options.val_persons else (TRAIN,)
    celeba = people.Celeba.find(source, options.pictures)
    if options.layout == "celeba" or (celeba and not options.layout):
        if celeba is None:
            expected = os.path.join(source, "identity_CelebA.txt")
            raise NotFoundError(f"there is no {expected}: expected CelebA")
        splits = SPLITS if celeba.partition else shared
        return {"identity": Identity(options, "celeba", {"": celeba.pictures}, splits)}
    if options.layout == "table" or (not options.layout and _is_table(source)):
        folder = source if os.path.isdir(source) else os.path.dirname(source) or "."
        native = Identity(options, "table", {"": options.pictures or folder}, shared)
        if not source.lower().endswith(_LIST_SUFFIXES):
            native._table()  # its columns are known now, or missing
        return {"identity": native}
    places = people.folder_splits(options.pictures or source)
    for place in places.values():
        if next(people.of_folders(place, None), None) is None:
            raise NotFoundError(
                f"{place} has no pictures in folders: expected one folder for each person"
            )
    splits = shared if "" in places else tuple(s for s in SPLITS if s in places)
    return {"identity": Identity(options, "folders", places, splits)}


def _is_table(source: str) -> bool:
    from data_pipelines.native import table_files, tables

    if os.path.isdir(source):
        # Folders of persons may have lists beside them; a folder of tables has no other folders.
        inside = [name for name in os.listdir(source) if not name.startswith(".")]
        return any(name.endswith(".parquet") for name in inside)
    suffix = table_files.suffix_of(source)
    return suffix in tables.SUFFIXES or suffix in _LIST_SUFFIXES


DATASET = Dataset(
    name="identity",
    summary="pictures of persons: a face, a caption with <p>, and another picture of the person",
    tasks=("id",),
    options=IdentityOptions,
    open=_open,
    size="any; CelebA 202,599 pictures, LFW 13,233, VGGFace2 3.3M",
    license="of the pictures; CelebA, LFW and VGGFace2 are for research alone",
    where="your own pictures, or the three from their publishers",
    layout=(
        "a folder (or zip) for each person; CelebA's lists beside img_align_celeba[.zip]; "
        "VGGFace2's train, test and bb_landmark; or csv, tsv, jsonl, parquet with picture, person, "
        "caption and box, or a text file of `picture person`"
    ),
    quirks=(
        "the face is of another picture of the person than the one to make, always the same one",
        "persons of one picture are left out",
        "the face is cropped by its box, its landmarks, or YuNet (option detector); without any "
        "of these its picture's centered square is taken",
        'the person in a caption becomes <p>: "a young man smiles" is "<p> smiles"',
        "persons are held out as a whole: a person is in one split alone",
    ),
    example="--source=lfw --detector=face_detection_yunet_2023mar.onnx",
)
