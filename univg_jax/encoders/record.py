"""What a run has recorded of its frozen encoders, and checked whenever it is read.

encoders/encoders.json       role -> {"kind": ..., options, "sha256": of the weights}, or null;
                             and a checksum of itself
encoders/ROLE.safetensors    the parameters of a fitted encoder
"""

import hashlib
import json
from typing import Any

from etils import epath

from univg_jax import checksums
from univg_jax.encoders.kinds import KINDS, Fitted, Pretrained, find_kind
from univg_jax.errors import NotFoundError, UserError
from univg_jax.files import read_sealed, write_sealed, write_whole
from univg_jax.workdir import ENCODERS

RECORD = "encoders.json"

Record = dict[str, Any]  # the kind, its options, and once it is obtained the sha256 of its weights


def read_records(encoders: epath.Path) -> dict[str, Record | None] | None:
    """What a folder of encoders has recorded of each role; None if there is no record.

    Raises UserError if it is damaged.
    """
    file = encoders / RECORD
    if not file.exists():
        return None
    records = read_sealed(file)
    if any(role not in KINDS or not _is_record(record) for role, record in records.items()):
        raise UserError(f"{file} is no record of encoders")
    return records


def _is_record(value: object) -> bool:
    texts = ("kind", "sha256")
    return value is None or (
        isinstance(value, dict) and all(isinstance(value.get(name), str) for name in texts)
    )


def encoders_of(init_from: epath.Path) -> epath.Path:
    """The encoders of the run that a path (its folder, or a checkpoint inside it) belongs to."""
    for folder in (init_from, *list(init_from.parents)[:2]):
        if (folder / ENCODERS / RECORD).exists():
            return folder / ENCODERS
    raise NotFoundError(
        f"init_from={init_from}: no {ENCODERS}/{RECORD} there; expected the folder of a run"
    )


def inherited_record(parent: epath.Path | None, role: str, wanted: Record) -> Record | None:
    """The parent's record of an encoder, of the same kind and options; None if it has none."""
    record = (read_records(parent) or {}).get(role) if parent else None
    if record is not None:
        # The dtype in which pretrained networks compute is a run's own: a matter of rounding.
        dtype = {"dtype": wanted["dtype"]} if "dtype" in wanted and "dtype" in record else {}
        check_same(parent, role, record | dtype, wanted)
    return record


def check_same(
    encoders: epath.Path, role: str, recorded: Record | None, wanted: Record | None
) -> None:
    """Raises UserError if a recorded encoder has another kind or other options than wanted."""
    old, new = (
        {name: value for name, value in (record or {"kind": None}).items() if name != "sha256"}
        for record in (recorded, wanted)
    )
    different = [
        f"{name} is {old.get(name)!r}, asked for {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
    if different:
        raise UserError(
            f"{encoders} has another {role} encoder than conditioning.{role}: "
            + "; ".join(different)
        )


def check_hash(found: str, where: str, role: str, record: Record, *, of: str) -> None:
    """Raises UserError if the hash of weights at `where` is not what `of`, a run, has recorded."""
    if found != record["sha256"]:
        raise UserError(
            f"{where}: not the weights of the {role} encoder that {of} was trained with "
            f"(sha256 {found[:12]}, recorded {record['sha256'][:12]})"
        )


def read_fitted(encoders: epath.Path, role: str, record: Record) -> bytes:
    """The content of a fitted encoder's file. Raises UserError if it is not what was recorded."""
    file = encoders / file_of(role)
    if not file.exists():
        raise NotFoundError(f"{file}: the weights of the {role} encoder are missing")
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    check_hash(digest, str(file), role, record, of=f"the run {encoders.parent}")
    return content


def find_problems(workdir: epath.PathLike) -> tuple[str, ...]:
    """What is wrong with the files in a run's `encoders`; empty if nothing is.

    The weights of pretrained encoders lie elsewhere and are checked by `load`.
    """
    encoders, found = epath.Path(workdir) / ENCODERS, []
    try:
        records = read_records(encoders)
    except UserError as error:
        return (str(error),)
    if records is None:
        return (f"{encoders / RECORD} does not exist",)
    for role, record in records.items():
        try:
            if record is not None and isinstance(kind_of(role, record), Fitted):
                read_fitted(encoders, role, record)
        except UserError as error:
            found.append(str(error))
    return tuple(found)


def find_additional(workdir: epath.PathLike) -> tuple[str, ...]:
    """The files in a sound folder of `encoders` which no run wrote there, and nothing reads."""
    encoders = epath.Path(workdir) / ENCODERS
    records = read_records(encoders) or {}
    fitted = [
        role
        for role, record in records.items()
        if record is not None and isinstance(kind_of(role, record), Fitted)
    ]
    own = {RECORD, *map(file_of, fitted)}
    return tuple(name for name in checksums.list_files(encoders) if name not in own)


def digests(workdir: epath.PathLike) -> dict[str, str]:
    """16 hex digits for each encoder that a run has recorded: of its kind, options and weights.

    `load` checks that the weights are those that are recorded.
    """
    records = read_records(epath.Path(workdir) / ENCODERS) or {}
    return {
        role: hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
        for role, record in records.items()
        if record is not None
    }


def describe(workdir: epath.PathLike) -> dict[str, Record]:
    """What a run has recorded of each of its encoders, and whether it `is_fitted` by the run."""
    records = read_records(epath.Path(workdir) / ENCODERS) or {}
    return {
        role: {**record, "is_fitted": isinstance(kind_of(role, record), Fitted)}
        for role, record in records.items()
        if record is not None
    }


def copy_records(workdir: epath.PathLike, out: epath.PathLike) -> None:
    """Copies what a run has of its encoders to another folder: the record, and fitted weights.

    Raises UserError if they are damaged.
    """
    encoders = epath.Path(workdir) / ENCODERS
    records = read_records(encoders) or {}
    for role, record in records.items():
        if record is not None and isinstance(kind_of(role, record), Fitted):
            content = read_fitted(encoders, role, record)
            write_whole(epath.Path(out) / ENCODERS / file_of(role), content)
    write_sealed(epath.Path(out) / ENCODERS / RECORD, records)


def kind_of(role: str, record: Record) -> Fitted | Pretrained:
    """The kind that a record names."""
    return find_kind(role, record.get("kind"))


def options_of(record: Record) -> dict[str, Any]:
    """The options of a record's kind."""
    return {name: value for name, value in record.items() if name not in ("kind", "sha256")}


def file_of(role: str) -> str:
    """The file of a fitted encoder."""
    return f"{role}.safetensors"
