"""SEED-Data-Edit: edits by programs, by hand and in several turns, as JSON lines and pictures."""

import collections
import dataclasses
import glob
import io
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from data_pipelines.native import TRAIN, Dataset, Entry, Native, archives, layouts, tables, tars
from data_pipelines.native import Options as BaseOptions
from data_pipelines.native.edits import FIELDS, record
from univg_jax.errors import NotFoundError, UserError
from univg_jax.fields import setting

MAX_TURNS = 32
MAX_PENDING_BYTES = 2**31  # of pictures of a compressed archive whose pair is not complete
Pair = tuple[str, str, Any]  # before, after, instruction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(BaseOptions):
    """Which pairs several turns give."""

    backward: bool = setting(True, "turns back, by inverse_instruction, are edits, too")
    combined: bool = setting(
        False, "several turns at once are edits, too, their instructions joined"
    )


@dataclasses.dataclass(frozen=True)
class Folder:
    """A part: rows of an annotation whose pictures lie side by side."""

    rows: tables.Part

    def __str__(self) -> str:
        return str(self.rows)


@dataclasses.dataclass(frozen=True)
class Packed:
    """A part: compressed archives of pictures, each in pieces, and the annotations of them."""

    archives: tuple[tuple[str, ...], ...]
    annotations: tuple[str, ...]

    def __str__(self) -> str:
        return self.archives[0][0]


@dataclasses.dataclass(frozen=True)
class SeedDataEdit:
    """The annotations below `source`, with the pictures in the `images` beside their folder."""

    source: str
    backward: bool
    combined: bool
    fields: tuple[str, ...] = FIELDS
    splits: tuple[str, ...] = (TRAIN,)

    def parts(self, split: str) -> Sequence[Folder | Packed]:
        """Slices of annotations, and archives that are not unpacked."""
        found = [path for _, path in archives.walk(self.source, (".jsonl",))]
        by_folder = collections.defaultdict(list)
        for path in found:
            by_folder[os.path.dirname(path)].append(path)
        parts: list[Folder | Packed] = []
        for folder, annotations in by_folder.items():
            if packed := _packed(folder):
                parts.append(Packed(packed, tuple(annotations)))
            else:
                table = tables.open_table(annotations, what="rows of SEED-Data-Edit")
                parts += [Folder(part) for part in table.parts()]
        if not parts:
            raise NotFoundError(
                f"{self.source} has no annotations/*.jsonl: expected SEED-Data-Edit's "
                "auto_editing, real_editing or multi_turn_editing"
            )
        return parts

    def entries(self, part: Folder | Packed) -> Iterator[Entry]:
        """The pairs with their pictures."""
        if isinstance(part, Folder):
            roots = _roots(os.path.dirname(part.rows.file), self.source)
            for key, pair in self._pairs(part.rows):
                if isinstance(pair, UserError):
                    yield Entry(key=key, raw=pair)
                    continue
                before, after = (_read(roots, name) for name in pair[:2])
                yield Entry(key=key, raw=(before, after, pair[2]))
            return
        yield from self._streamed(part)

    def make(self, raw: tuple[Any, Any, Any]) -> dict[str, Any]:
        """The edit of a pair."""
        return record(*raw)

    def _pairs(self, rows: tables.Part) -> Iterator[tuple[str, Pair | UserError]]:
        base = layouts.stem(os.path.relpath(rows.file, self.source))
        for number, row in tables.open_table(rows.file, what="rows").rows(rows):
            key = f"{base}/{number:07d}"
            try:
                if isinstance(row, UserError):
                    raise row
                yield from ((f"{key}{name}", pair) for name, pair in self._of_row(row))
            except UserError as error:
                yield key, error

    def _of_row(self, row: dict[str, Any]) -> Iterator[tuple[str, Pair]]:
        first = tables.get(row, "source_image", str)
        if "target_image" in row:
            # `instruction_new` is the instruction as rewritten (annotations_GPT4V).
            instruction = row.get("instruction_new") or tables.get(row, "instruction", str)
            yield "", (first, tables.get(row, "target_image", str), instruction)
            return
        turns = []
        while row.get(f"edit_image_{len(turns) + 1}") is not None and len(turns) < MAX_TURNS:
            k = len(turns) + 1
            picture = tables.get(row, f"edit_image_{k}", str)
            texts = [row.get(f"{name}_{k}") for name in ("instruction", "inverse_instruction")]
            turns.append((picture, *texts))
        if not turns:
            raise UserError(f"it has no target_image, but {tables.listed(row)}")
        pictures = [first, *(picture for picture, _, _ in turns)]
        for k, (_, forward, back) in enumerate(turns):
            yield f"/{k}-{k + 1}", (pictures[k], pictures[k + 1], forward)
            if self.backward:
                yield f"/{k + 1}-{k}", (pictures[k + 1], pictures[k], back)
        if self.combined:
            for i in range(len(turns)):
                for j in range(i + 2, len(turns) + 1):
                    texts = [tables.text_of(forward) for _, forward, _ in turns[i:j]]
                    if all(texts):
                        joined = ", then ".join(text.rstrip(".") for text in texts)
                        yield f"/{i}-{j}", (pictures[i], pictures[j], joined)

    def _streamed(self, part: Packed) -> Iterator[Entry]:
        """Pairs as soon as archives that can only be streamed have given both pictures.

        The same picture may be in several pairs; it is kept until the last of them.
        """
        pairs: dict[str, Pair] = {}
        waiting: dict[str, list[str]] = collections.defaultdict(list)
        for file in part.annotations:
            for rows in tables.open_table(file, what="rows").parts():
                for key, pair in self._pairs(rows):
                    if isinstance(pair, UserError):
                        yield Entry(key=key, raw=pair)
                        continue
                    pairs[key] = pair
                    for name in pair[:2]:
                        waiting[_short(name)].append(key)
        kept: dict[str, bytes | UserError] = {}
        for name, data in _in_turn([_members(pieces) for pieces in part.archives]):
            if (name := _match(name, waiting)) is None:
                continue
            kept[name] = data
            for key in list(waiting[name]):
                before, after, instruction = pairs[key]
                names = [_short(before), _short(after)]
                if all(n in kept for n in names):
                    yield Entry(key=key, raw=(kept[names[0]], kept[names[1]], instruction))
                    del pairs[key]
                    for n in set(names):
                        waiting[n].remove(key)
                        if not waiting[n]:
                            del kept[n]
            if sum(len(d) for d in kept.values() if isinstance(d, bytes)) > MAX_PENDING_BYTES:
                raise UserError(f"{part}: its pairs lie too far apart to be streamed: unpack it")
        for key in pairs:
            yield Entry(key=key, raw=UserError(f"its pictures are not both in {part}"))


def _packed(annotations: str) -> tuple[tuple[str, ...], ...]:
    """The compressed archives beside a folder of annotations, if they are not unpacked.

    Each is a file or the pieces of one, such as source_images.tar.gz.part-aa.
    """
    folder = os.path.join(os.path.dirname(annotations), "images")
    if os.path.isdir(folder) and next(archives.walk(folder), None):
        return ()
    found: dict[str, list[str]] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar.gz*"))):
        if whole := re.fullmatch(r"(.*\.tar\.gz)(\.part-?\w+)?", path, re.DOTALL):
            found.setdefault(whole[1], []).append(path)
    # A file that was put together of its pieces may lie beside them.
    return tuple((path,) if path in pieces else tuple(pieces) for path, pieces in found.items())


def _in_turn(streams: Sequence[Iterator[Any]]) -> Iterator[Any]:
    """One of each, again and again: pictures before and after may be in archives of their own."""
    rest = list(streams)
    while rest:
        for stream in list(rest):
            try:
                yield next(stream)
            except StopIteration:
                rest.remove(stream)


def _roots(annotations: str, source: str) -> list[archives.Store]:
    """Where the names of pictures may begin."""
    above = os.path.dirname(annotations)
    tried = (os.path.join(above, "images"), above, os.path.dirname(above), source)
    return [archives.Store(path) for path in dict.fromkeys(tried) if os.path.isdir(path)]


def _read(roots: Sequence[archives.Store], name: str) -> bytes | UserError:
    try:
        return next((s for s in roots if name in s), roots[0]).read(name)
    except UserError as error:
        return error


def _short(name: str) -> str:
    return archives.clean_name(name)


def _match(name: str, waiting: dict[str, list[str]]) -> str | None:
    """The name by which annotations call a file of the archive, which may have folders around."""
    while name not in waiting:
        _, slash, name = name.partition("/")
        if not slash:
            return None
    return name


class _Joined(io.RawIOBase):
    """Pieces of a file that was cut, as one."""

    def __init__(self, paths: Sequence[str]):
        self._rest, self._file = list(paths), None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._file is None:
                if not self._rest:
                    return 0
                self._file: BinaryIO | None = open(self._rest.pop(0), "rb")  # noqa: SIM115
            if count := self._file.readinto(buffer):
                return count
            self._file.close()
            self._file = None


def _members(pieces: Sequence[str]) -> Iterator[tuple[str, bytes | UserError]]:
    with archives.readable(pieces[0]):
        stream = io.BufferedReader(_Joined(pieces), 2**20)
        with tars.opened(stream, seekable=False) as (archive, infos):
            for info in infos:
                if info.size > archives.MAX_FILE_BYTES:
                    raise UserError(f"{pieces[0]}: a file of {info.size} bytes")
                yield archives.clean_name(info.name), tars.read(archive, info)


def open_dataset(options: Options) -> dict[str, Native]:
    """The one family."""
    if not os.path.isdir(options.source):
        raise NotFoundError(
            f"{options.source or 'source'} is no folder: expected SEED-Data-Edit's, with "
            "auto_editing, real_editing or multi_turn_editing"
        )
    native = SeedDataEdit(options.source, options.backward, options.combined)
    return {"seed_data_edit": native}


DATASET = Dataset(
    name="seed_data_edit",
    summary="SEED-Data-Edit: edits by programs, by hand, and in several turns",
    tasks=("ie",),
    options=Options,
    open=open_dataset,
    size="3.7M edits; multi-turn pictures 46.5 GB, real ones 2.5 GB",
    license="parts 2 and 3 CC BY-NC 4.0; part 1 that of its pictures",
    where="Hugging Face: AILab-CVC/SEED-Data-Edit",
    layout="{auto_editing/*,real_editing,multi_turn_editing}/annotations/*.jsonl, and images "
    "beside them: unpacked, or images.tar.gz, or multi_turn.tar.gz.part-*",
    quirks=(
        "an archive that was cut in pieces is read as one, as a stream; source_images and "
        "target_images side by side; a pair is made as soon as both of its pictures have come",
        "T turns are T edits forwards and T backwards (backward=False: only forwards); "
        "combined=True adds those over several turns",
        "an instruction that was rewritten (instruction_new) is taken in place of the first one",
        "rows without an instruction or a picture are left out by name; turns end at a null",
        "no validation split: use hold_out",
    ),
    example="--source=SEED-Data-Edit --hold_out=0.001 --out=data",
)
