"""SEED-Data-Edit: edits by programs, by hand and in several turns, as JSON lines and pictures."""

import collections
import dataclasses
import glob
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from data_pipelines import archives, layouts, tables, tars
from data_pipelines.edits import FIELDS, record
from data_pipelines.native import TRAIN, Dataset, Entry, Native
from data_pipelines.native import Options as BaseOptions
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
    """A part: a compressed archive of pictures, in pieces, and the annotations of them."""

    pieces: tuple[str, ...]
    annotations: tuple[str, ...]

    def __str__(self) -> str:
        return self.pieces[0]


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
            if pieces := _pieces(folder):
                parts.append(Packed(tuple(pieces), tuple(annotations)))
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
            instruction = tables.get(row, "instruction", str)
            yield "", (first, tables.get(row, "target_image", str), instruction)
            return
        turns = []
        while f"edit_image_{len(turns) + 1}" in row and len(turns) < MAX_TURNS:
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
        """Pairs as soon as an archive that can only be streamed has given both pictures.

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
        for name, data in _members(part.pieces):
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


def _pieces(annotations: str) -> list[str]:
    """The compressed archive beside a folder of annotations, if there is one."""
    folder = os.path.join(os.path.dirname(annotations), "images")
    packed = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar.gz*")))
    unpacked = os.path.isdir(folder) and next(archives.walk(folder), None)
    return [] if unpacked else packed


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
        "an archive that was cut in pieces is read as one, as a stream; a pair is made as soon as "
        "both of its pictures have come",
        "T turns are T edits forwards and T backwards (backward=False: only forwards); "
        "combined=True adds those over several turns",
        "rows without an instruction or a picture are left out by name",
        "no validation split: use hold_out",
    ),
    example="--source=SEED-Data-Edit --hold_out=0.001 --out=data",
)
