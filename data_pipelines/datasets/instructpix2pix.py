"""InstructPix2Pix: generated edits, as folders of prompts and pictures, zips, or parquet."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.native import SPLITS, TRAIN, Dataset, Entry, Native, Options, archives
from data_pipelines.native.edits import FIELDS, Columns, PairTable, record, tables_of
from data_pipelines.native.table_files import parse
from univg_jax.errors import NotFoundError, UserError
from univg_jax.files import parse_json

WHAT = "InstructPix2Pix's rows (original_image, edit_prompt, edited_image)"
ENDS = (90, 95, 100)  # percent of seeds.json where train, validation and test end
PART_NAMES = 500
_PROMPT, _BEFORE, _AFTER = "prompt.json", "_0.jpg", "_1.jpg"


@dataclasses.dataclass(frozen=True)
class Slice:
    """Prompts in a folder or zip, with the seeds of each; None: those whose pictures are there."""

    store: str
    prompts: tuple[tuple[str, tuple[str, ...] | None], ...]

    def __str__(self) -> str:
        return f"{self.store}: {self.prompts[0][0]} to {self.prompts[-1][0]}"


@dataclasses.dataclass(frozen=True)
class InstructPix2Pix:
    """The release of folders: `NAME/prompt.json`, `NAME/SEED_0.jpg` and `NAME/SEED_1.jpg`."""

    source: str
    fields: tuple[str, ...] = FIELDS

    @property
    def splits(self) -> tuple[str, ...]:
        """All of them where there is a seeds.json, whose order they follow."""
        return SPLITS if os.path.isfile(self._seeds_file) else (TRAIN,)

    @property
    def _seeds_file(self) -> str:
        return os.path.join(self.source, "seeds.json")

    def parts(self, split: str) -> Sequence[Slice]:
        """Slices of the list of prompts, or of what each zip has of it."""
        wanted = self._wanted(split)
        zips = [path for _, path in archives.walk(self.source, (".zip",))]
        found = []
        for store in zips or [self.source]:
            names = archives.Store(store).names((_PROMPT,))
            folders = [os.path.dirname(name) for name in names]
            if wanted is None:
                listed = [(name, None) for name in sorted(folders)]
            else:
                # A zip may have a folder around all.
                listed = []
                for name in folders:
                    inner = name if name in wanted else name.partition("/")[2]
                    if inner in wanted:
                        listed.append((name, wanted[inner]))
                order = {name: k for k, name in enumerate(wanted)}
                listed.sort(key=lambda item: order.get(item[0], len(order)))
            found += [
                Slice(store, tuple(listed[k : k + PART_NAMES]))
                for k in range(0, len(listed), PART_NAMES)
            ]
        if not found:
            raise NotFoundError(
                f"{self.source} has no NAME/{_PROMPT} of split {split!r}: expected the folders or "
                "zips of InstructPix2Pix, or its parquet files"
            )
        return found

    def entries(self, part: Slice) -> Iterator[Entry]:
        """Every pair of pictures, with the prompt's file."""
        store = archives.Store(part.store)
        inside: dict[str, list[str]] | None = None
        for name, seeds in part.prompts:
            if seeds is None:
                if inside is None:
                    inside = _seeds_by_folder(store)
                seeds = tuple(inside.get(name, ()))
            prompt = _read(store, f"{name}/{_PROMPT}")
            for seed in dict.fromkeys(seeds):
                before, after = (_read(store, f"{name}/{seed}{end}") for end in (_BEFORE, _AFTER))
                yield Entry(key=f"{name}/{seed}", raw=(prompt, before, after), ids=(name,))

    def make(self, raw: tuple[Any, Any, Any]) -> dict[str, Any]:
        """The edit, with what the result shows as caption."""
        prompt, before, after = raw
        if isinstance(prompt, UserError):
            raise prompt
        about = parse_json(prompt, where=_PROMPT)
        return record(before, after, about.get("edit"), caption=about.get("output"))

    def _wanted(self, split: str) -> dict[str, tuple[str, ...]] | None:
        """The seeds of the prompts of a split, in the order of seeds.json; None without one."""
        if not os.path.isfile(self._seeds_file):
            return None
        content = b"".join(archives.lines(self._seeds_file, ".json"))
        try:
            listed = [
                (str(name), tuple(str(seed) for seed in seeds))
                for name, seeds in parse(content.decode())
            ]
        except (TypeError, ValueError) as error:  # a UserError and UnicodeDecodeError, too
            raise UserError(
                f"{self._seeds_file} is not InstructPix2Pix's: expected [[name, [seed, ...]], ...] "
                f"({' '.join(str(error).split())[:100]})"
            ) from None
        ends = [percent * len(listed) // 100 for percent in (0, *ENDS)]
        number = SPLITS.index(split)
        return dict(listed[ends[number] : ends[number + 1]])


def _seeds_by_folder(store: archives.Store) -> dict[str, list[str]]:
    """The seeds whose pictures are there, before and after."""
    names = set(store.names((".jpg",)))
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(_BEFORE) and name.removesuffix(_BEFORE) + _AFTER in names:
            folder, base = os.path.split(name.removesuffix(_BEFORE))
            found.setdefault(folder, []).append(base)
    return found


def _read(store: archives.Store, name: str) -> bytes | UserError:
    try:
        return store.read(name)
    except UserError as error:
        return error


def open_dataset(options: Options) -> dict[str, Native]:
    """The form that the source has."""
    source = options.source
    if not os.path.exists(source) and "*" not in source:
        raise NotFoundError(
            f"{source or 'source'} does not exist: expected InstructPix2Pix's folder, zips or "
            "parquet files"
        )
    is_folder = os.path.isdir(source)
    if not is_folder or next(archives.walk(source, (".parquet",)), None):
        columns = Columns(
            source=("original_image", "input_image"),
            target=("edited_image",),
            instruction=("edit_prompt",),
            caption=("edited_prompt",),
        )
        files = tables_of(source, what=WHAT)
        return {"instructpix2pix": PairTable(what=WHAT, files=files, columns=columns)}
    return {"instructpix2pix": InstructPix2Pix(source)}


DATASET = Dataset(
    name="instructpix2pix",
    summary="InstructPix2Pix: generated edits with instructions",
    tasks=("ie",),
    open=open_dataset,
    size="313,010 prompts of up to 4 pairs, 436 GB (CLIP-filtered); 451,990, 727 GB (random)",
    license="MIT; pictures under Stable Diffusion's terms",
    where="timothybrooks/instruct-pix2pix; Hugging Face: timbrooks/instructpix2pix-clip-filtered",
    layout="NAME/prompt.json, NAME/SEED_0.jpg, NAME/SEED_1.jpg and seeds.json; the zips of them; "
    "or parquet",
    quirks=(
        "the splits are the first 90, 5 and 5% of seeds.json; without it all is train, of the "
        "pictures that are there before and after",
        "NAME may hold a folder; seeds that a file has twice are one",
        "both namings of parquet columns (original_image or input_image)",
        "the result's caption (output, edited_prompt) is kept",
    ),
    example="--source=clip-filtered-dataset --out=data",
)
