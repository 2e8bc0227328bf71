"""Results on disk: a folder for each evaluation, so that none overwrites another.

    OUT/emoji_scenes-3f2a9c81d0aa/results.json     what was evaluated, and its numbers
    OUT/emoji_scenes-3f2a9c81d0aa/TASK/NNN.png     the pictures

The folder's name is a hash of `settings`, on which the numbers depend: the checkpoint's weights and
not its path, how images were sampled, the data. `provenance` says where and when they were made.
The file has a checksum of itself.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from absl import logging
from etils import epath

from univg_jax.errors import NotFoundError, UserError
from univg_jax.files import read_sealed, write_sealed

VERSION = 4  # of the arithmetic and of the file: results of another one are not reused
FILE = "results.json"
KEYS = ("version", "benchmark", "settings", "provenance", "tasks")

Json = Mapping[str, Any]  # an object of a JSON file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """What a finished job says: its folder, the numbers by name, and all in a few lines."""

    folder: epath.PathLike
    text: str
    numbers: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    primary: str = ""


class OtherKindError(UserError):
    """The results are of a public benchmark (`evaluation.scorecard`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What one evaluation found, as its file has it."""

    benchmark: str
    settings: Json
    provenance: Json = dataclasses.field(default_factory=dict)
    tasks: Json = dataclasses.field(default_factory=dict)

    def folder(self, out: epath.PathLike) -> epath.Path:
        """Where results of these settings lie below `out`."""
        name = digest([VERSION, self.benchmark, self.settings])[:12]
        return epath.Path(out) / f"{self.benchmark}-{name}"

    def write(self, folder: epath.PathLike) -> None:
        """Writes the file, whole or not at all."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
        write_sealed(epath.Path(folder) / FILE, content)

    @classmethod
    def read(cls, folder: epath.PathLike) -> "Results":
        """The results in a folder.

        Raises NotFoundError if there are none, UserError naming the file if it is torn, changed
        since it was written, or of another version; OtherKindError for a public benchmark's.
        """
        path = epath.Path(folder) / FILE
        if not path.exists():
            raise NotFoundError(f"{path} is missing: `univg evaluate` writes it")
        content = read_sealed(path)
        if content.get("kind") == "public":
            raise OtherKindError(
                f"{path} is of a public benchmark: `univg report` without --stages shows it"
            )
        if not {"settings", "tasks"} <= set(content):
            raise UserError(f"{path} is not the results of an evaluation: move it away")
        if content.get("version") != VERSION:
            raise UserError(f"{path} is of another version of univg_jax: evaluate again")
        if set(content) != set(KEYS):
            raise UserError(f"{path} is not what was written: move it away and evaluate again")
        return cls(**{key: content[key] for key in KEYS if key != "version"})


def find(
    out: epath.PathLike, *, weights: Collection[str] = ()
) -> tuple[epath.Path, Results, list[str]]:
    """The evaluation to show, folder and content, and the names of the others below `out`.

    `out` is what `univg evaluate` was given, or the folder of one evaluation in it. Of several it
    is the newest one of a checkpoint in `weights`, the digests of its files; without any, the
    newest of all. A damaged one is passed over with a warning, and one of a public benchmark
    without.

    Raises UserError if there is none, or none of these checkpoints.
    """
    out = epath.Path(out)
    folders = sorted(path.parent for path in out.glob(f"*/{FILE}"))
    if not folders:
        return out, Results.read(out), []
    found: dict[epath.Path, Results] = {}
    public = []
    for folder in folders:
        try:
            found[folder] = Results.read(folder)
        except OtherKindError as error:
            damage = error
            public.append(folder)
        except UserError as error:
            logging.warning("%s", error)
            damage = error
    if not found:
        raise damage
    suitable = {
        folder: results
        for folder, results in found.items()
        if not weights or results.settings.get("weights") in weights
    }
    if not suitable:
        there = ", ".join(
            f"{folder.name} of step {results.settings.get('step')}"
            for folder, results in found.items()
        )
        raise UserError(
            f"{out} has no evaluation of a checkpoint of the last stage: run `univg evaluate`, or "
            f"name one of: {there}"
        )
    chosen = max(suitable, key=lambda folder: (suitable[folder].provenance.get("date", ""), folder))
    others = [folder.name for folder in folders if folder not in (chosen, *public)]
    return chosen, found[chosen], others


def digest(content: Any) -> str:
    """16 hex digits of the SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
