"""Damages the files of a checkpoint, one fault at a time, and sees whether each is found and named.

    python -m tests.faults.bit_flips --flips=500 --seed=0

A fault is a flipped bit, a cut, two files that have changed places, one that is gone, or one that
is too many, in any file of a step, checksums and orbax's own notes included. `univg checkpoint
verify` and a restore must both name each file, and a restore must refuse what is damaged. A file
that is too many is no damage where nothing reads it: it is named, and the arrays that are read are
those that were saved.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import pathlib
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from univg_jax import checkpoint, checksums
from univg_jax.errors import UserError
from univg_jax.workdir import CHECKPOINTS

KINDS = {"flip": 6, "cut": 1, "swap": 1, "missing": 1, "additional": 1}  # how often
STEP = 3


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done, and to which files of the step."""

    kind: str
    names: tuple[str, ...]


def make_state(seed: int) -> dict[str, Any]:
    """A state with large and small leaves."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {"kernel": jax.random.normal(keys[0], (4, 96, 128)), "bias": jnp.zeros(128)}
    return {"step": jnp.int32(seed), "params": params, "ema": jax.random.normal(keys[1], (300, 7))}


def write_checkpoint(workdir: pathlib.Path) -> None:
    """A workdir with one step."""
    with checkpoint.Checkpointer(workdir) as checkpointer:
        checkpointer.save(STEP, make_state(STEP), {"next": 5}, {"seed": 1}, {"rows": [1.5]})


@contextlib.contextmanager
def damaged(step: pathlib.Path, files: Mapping[str, bytes], rng: random.Random) -> Iterator[Fault]:
    """A fault while it lasts. `files` is what the step has."""
    (kind,) = rng.choices(list(KINDS), KINDS.values())
    names = [rng.choice(list(files))]
    content = files[names[0]]
    if kind in ("flip", "cut") and not content:
        kind = "missing"
    if kind == "flip":
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        (step / names[0]).write_bytes(changed)
    elif kind == "cut":
        (step / names[0]).write_bytes(content[: rng.randrange(len(content))])
    elif kind == "swap":
        names.append(rng.choice([name for name in files if files[name] != content]))
        for name, other in zip(names, reversed(names), strict=True):
            (step / name).write_bytes(files[other])
    elif kind == "missing":
        (step / names[0]).unlink()
    else:
        names = [f"{names[0]}.{rng.randrange(1000)}"]
        (step / names[0]).write_bytes(content)
    try:
        yield Fault(kind, tuple(names))
    finally:
        for name in names:
            (step / name).unlink(missing_ok=True)
            if name in files:
                (step / name).write_bytes(files[name])


def missed(workdir: pathlib.Path, fault: Fault, warnings: list[str]) -> list[str]:
    """Who does not name the fault, or restores what is damaged."""
    (report,) = checkpoint.verify(workdir)
    named = (*report.problems, *report.additional)
    saved = make_state(STEP)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
    warnings.clear()
    try:
        restored = checkpoint.restore(workdir, abstract).state
        line = "; ".join(warnings)
        is_same = jax.tree.all(jax.tree.map(np.array_equal, saved, restored))
        is_right = is_same and fault.kind == "additional"
    except UserError as error:
        line, is_right = str(error), bool(report.problems)
    # A damaged list of checksums names no other file.
    wanted = [checksums.FILE] if checksums.FILE in fault.names else fault.names
    return [
        *(f"verify: {name}" for name in wanted if not any(name in text for text in named)),
        *(f"restore: {name}" for name in wanted if name not in line),
        *([] if is_right else [f"restore: ended with {line or 'no error'}"]),
    ]


def bit_flips(*, flips: int, seed: int, folder: pathlib.Path) -> tuple[dict[str, int], list[str]]:
    """How many faults there were of each kind, and those that were missed."""
    rng, found, counts = random.Random(seed), [], collections.Counter()
    write_checkpoint(folder)
    step = folder / CHECKPOINTS / str(STEP)
    files = {name: (step / name).read_bytes() for name in checksums.list_files(epath.Path(step))}
    warnings: list[str] = []

    def warn(text: str, *values: object) -> None:
        warnings.append(text % values)

    with mock.patch.object(checkpoint.logging, "warning", warn):
        for _ in range(flips):
            with damaged(step, files, rng) as fault:
                counts[fault.kind] += 1
                found += [f"{fault}: {text}" for text in missed(folder, fault, warnings)]
    assert not any(report.problems or report.additional for report in checkpoint.verify(folder))
    return dict(counts), found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=500, help="and other faults; default: 500")
    parser.add_argument(
        "--seed", type=int, default=0, help="of which bit of which file; default: 0"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        counts, found = bit_flips(flips=args.flips, seed=args.seed, folder=pathlib.Path(folder))
    print(json.dumps({"flips": args.flips, "kinds": counts, "missed": found}, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
