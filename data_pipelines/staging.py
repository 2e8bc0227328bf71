"""The two phases of a build: a part -> staged records, and staged records -> the cuts of shards.

Both are functions of the native files and of the `Plan` alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath
from jaxtyping import Int64

from data_pipelines.dataset_files import Contents, Piece, Serializer
from data_pipelines.native import TRAIN, VALIDATION, Dataset, Entry, Native, Part
from univg_jax.errors import UserError
from univg_jax.files import write_streamed

SHARD_BYTES = 256 * 2**20
NOTE = ".npz"  # beside a staged file: it is whole, and what is in it
_NOT_RECORDS = ("source", "exclude_ids", "exclude")  # options of which only the contents count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the records of a family and their places depend on. Picklable."""

    dataset: str
    family: str
    native: Native
    arguments: Mapping[str, Any]
    version: str
    description: str
    license: str
    splits: tuple[str, ...]
    limit: int | None = None
    hold_out: float = 0.0  # share of the training split that becomes the validation split
    exclude: frozenset[str] = frozenset()
    is_strict: bool = False  # whether an entry that cannot be used is an error
    shard_bytes: int = SHARD_BYTES

    @classmethod
    def of(
        cls, dataset: Dataset, family: str, native: Native, options: Any, *, shard_bytes: int
    ) -> "Plan":
        """What `options` say. Raises UserError for splits that the files do not have."""
        options = getattr(native, "options", options)  # completed by the dataset
        arguments = {k: v for k, v in dataclasses.asdict(options).items() if k not in _NOT_RECORDS}
        if exclude := dataset.excluded(options):
            arguments["excluded"] = _digest("\n".join(sorted(exclude)))
        hold_out = getattr(options, "hold_out", 0.0)
        if hold_out and VALIDATION in native.splits:
            raise UserError(
                f"hold_out={hold_out:g}: {family} has a validation split of its own; leave it out"
            )
        has = (*native.splits, *((VALIDATION,) if hold_out else ()))
        wanted = tuple(getattr(options, "split", ())) or has
        for split in wanted:
            if split not in has:
                raise UserError(f"{family} has no split {split!r} (it has {', '.join(has)})")
        return cls(
            dataset=dataset.name,
            family=family,
            native=native,
            arguments={**json.loads(json.dumps(arguments)), "version": dataset.version},
            version=dataset.version,
            description=dataset.summary,
            license=dataset.license,
            splits=wanted,
            limit=getattr(options, "limit", None),
            hold_out=hold_out,
            exclude=exclude,
            shard_bytes=shard_bytes,
        )

    @property
    def native_splits(self) -> tuple[str, ...]:
        """The splits of the files that are read."""
        read = {TRAIN if self.hold_out and split == VALIDATION else split for split in self.splits}
        return tuple(split for split in self.native.splits if split in read)

    def outputs(self, split: str) -> tuple[str, ...]:
        """The splits that the records of one of the files go to."""
        both = self.hold_out and split == TRAIN
        return (TRAIN, VALIDATION) if both else (split,)

    def is_held_out(self, key: str) -> bool:
        """Whether an entry of the training split is of the held-out share, by its key alone."""
        return int(_digest(key), 16) < self.hold_out * 2**64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged:
    """What a part gave: of each record its length, its picture's size, and its output split."""

    lengths: Int64[np.ndarray, " n"]
    sizes: Int64[np.ndarray, "n 2"]  # height, width
    outputs: Int64[np.ndarray, " n"]  # index into `Plan.outputs`
    skipped: list[tuple[str, str]]  # key, reason

    def save(self, file: str) -> None:
        """Writes all into one file, whole or not at all."""
        skipped = np.frombuffer(json.dumps(self.skipped).encode(), np.uint8)
        arrays = dict(lengths=self.lengths, sizes=self.sizes, outputs=self.outputs, skipped=skipped)

        write_streamed(file, lambda partial: np.savez(partial, **arrays))

    @classmethod
    def load(cls, file: str) -> "Staged":
        """Reads what `save` wrote."""
        with epath.Path(file).open("rb") as stored, np.load(stored) as arrays:
            found = {name: arrays[name] for name in ("lengths", "sizes", "outputs")}
            return cls(
                **found, skipped=[tuple(row) for row in json.loads(arrays["skipped"].tobytes())]
            )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).hexdigest()


def stage(plan: Plan, split: str, part: Part, target: str) -> None:
    """Reads a part into the file `target`, and a note beside it that says that it is whole.

    Raises UserError, with the name of the part, for a file that cannot be read.
    """
    serialize = Serializer(plan.native.fields)
    lengths, sizes, outputs, skipped, seen = [], [], [], [], set()
    left = [plan.limit if plan.limit is not None else 2**62] * len(plan.outputs(split))

    def write(file: BinaryIO) -> None:
        for entry in plan.native.entries(part):
            output = int(len(left) > 1 and plan.is_held_out(entry.key))
            if not any(left):
                break
            if not left[output] or plan.exclude.intersection((entry.key, *entry.ids)):
                continue
            try:
                if entry.key in seen:
                    raise UserError("is there twice")
                content, size = serialize(_make(plan.native, entry))
            except UserError as error:
                if plan.is_strict:
                    raise UserError(f"{entry.key}: {error}") from None
                skipped.append((_text(entry.key), _text(str(error))))
                continue
            seen.add(entry.key)
            left[output] -= 1
            file.write(content)
            lengths.append(len(content))
            sizes.append(size)
            outputs.append(output)

    write_streamed(target, write)
    Staged(
        lengths=np.array(lengths, np.int64),
        sizes=np.array(sizes, np.int64).reshape(-1, 2),
        outputs=np.array(outputs, np.int64),
        skipped=skipped,
    ).save(target + NOTE)


def _text(text: str) -> str:
    """One line of valid Unicode."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def _make(native: Native, entry: Entry) -> Mapping[str, Any]:
    if isinstance(entry.raw, UserError):
        raise entry.raw
    return native.make(entry.raw)


class Packing:
    """The shards of one output split, as the parts before come in.

    `add` gives the shards that are then complete, and `finish` the last one.
    """

    def __init__(self, plan: Plan):
        self._limit, self._most = plan.limit, plan.shard_bytes
        self.shards: list[int] = []
        self.num_bytes = self.num_records = 0
        self._sizes: list[np.ndarray] = []
        self._pieces: list[Piece] = []
        self._bytes = self._records = 0

    @property
    def is_full(self) -> bool:
        """Whether the limit is reached."""
        return self._limit is not None and self.num_records >= self._limit

    def add(self, file: str, staged: Staged, output: int) -> Iterator[list[Piece]]:
        """Takes the records of a part that are of this output."""
        offsets = np.cumsum(staged.lengths) - staged.lengths
        rows = np.flatnonzero(staged.outputs == output)
        if self._limit is not None:
            rows = rows[: max(0, self._limit - self.num_records)]
        self.num_records += len(rows)
        self._sizes.append(staged.sizes[rows])
        for row in rows.tolist():
            length = int(staged.lengths[row])
            if self._records and self._bytes + length > self._most:
                yield self.finish()
            self._pieces.append(Piece(file, int(offsets[row]), (length,)))
            self._bytes += length
            self._records += 1

    def finish(self) -> list[Piece]:
        """The records that are not in a shard yet, as one."""
        pieces, self._pieces = self._pieces, []
        self.shards.append(self._records)
        self.num_bytes += self._bytes
        self._bytes = self._records = 0
        return _joined(pieces)

    @property
    def has_rest(self) -> bool:
        """Whether there are records that are not in a shard yet."""
        return bool(self._records)

    @property
    def files(self) -> set[str]:
        """The staged files with these."""
        return {piece.file for piece in self._pieces}

    def contents(self) -> Contents:
        """What was packed."""
        sizes = np.concatenate(self._sizes) if self._sizes else np.zeros((0, 2))
        return Contents(
            shards=tuple(self.shards), num_bytes=self.num_bytes, sizes=sizes.astype(np.uint32)
        )


def _joined(pieces: list[Piece]) -> list[Piece]:
    """The same records: those that follow one another in a file as one piece."""
    groups: list[tuple[Piece, list[int]]] = []
    end = 0
    for piece in pieces:
        if groups and groups[-1][0].file == piece.file and end == piece.offset:
            groups[-1][1].extend(piece.lengths)
        else:
            groups.append((piece, list(piece.lengths)))
        end = piece.offset + sum(piece.lengths)
    return [dataclasses.replace(first, lengths=tuple(lengths)) for first, lengths in groups]
