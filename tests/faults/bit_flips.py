"""Damages the files of checkpoints, one fault at a time, and sees whether each is found and named.

    python -m tests.faults.bit_flips --flips=500 --processes=2 --seed=0

A fault is a flipped bit, a cut, two files that have changed places, one that is gone, or one that
is too many, in any file of two steps that one process or several have written, checksums and
orbax's own notes included. Files change places also between the two steps. `univg checkpoint
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
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.processes import run
from univg_jax import checkpoint, checksums
from univg_jax.errors import UserError
from univg_jax.workdir import CHECKPOINTS

KINDS = {"flip": 6, "cut": 1, "swap": 1, "missing": 1, "additional": 1}  # how often
STEPS = (3, 4)
WRITE = """
import sys
from tests import processes
from tests.faults import bit_flips
processes.join()
bit_flips.write_checkpoints(sys.argv[1])
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is done, and to which files: step and name."""

    kind: str
    files: tuple[tuple[int, str], ...]


def make_state(seed: int) -> dict[str, Any]:
    """A state with large and small leaves."""
    rng = np.random.default_rng(seed)
    kernel, ema = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 96, 128), (300, 7)))
    params = {"kernel": kernel, "bias": np.zeros(128, np.float32)}
    return {"step": np.array(seed, np.int32), "params": params, "ema": ema}


def write_checkpoints(workdir: str) -> None:
    """Two steps of a workdir; of several processes each writes its share of the kernel."""
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, P()), make_state(0))
    shardings["params"]["kernel"] = NamedSharding(mesh, P("fsdp"))
    with checkpoint.Checkpointer(workdir) as checkpointer:
        for step in STEPS:
            state = jax.device_put(make_state(step), shardings)
            checkpointer.save(step, state, {"next": step}, {"seed": 1}, {"rows": [1.5]})


@contextlib.contextmanager
def damaged(
    steps: pathlib.Path, contents: Mapping[tuple[int, str], bytes], rng: random.Random
) -> Iterator[Fault]:
    """A fault while it lasts. `contents` is what the steps have, by step and name."""

    def path(file: tuple[int, str]) -> pathlib.Path:
        return steps / str(file[0]) / file[1]

    (kind,) = rng.choices(list(KINDS), KINDS.values())
    files = [rng.choice(list(contents))]
    content = contents[files[0]]
    if kind in ("flip", "cut") and not content:
        kind = "missing"
    if kind == "flip":
        changed = bytearray(content)
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        path(files[0]).write_bytes(changed)
    elif kind == "cut":
        path(files[0]).write_bytes(content[: rng.randrange(len(content))])
    elif kind == "swap":
        files.append(rng.choice([file for file in contents if contents[file] != content]))
        for file, other in zip(files, reversed(files), strict=True):
            path(file).write_bytes(contents[other])
    elif kind == "missing":
        path(files[0]).unlink()
    else:
        files = [(files[0][0], f"{files[0][1]}.{rng.randrange(1000)}")]
        path(files[0]).write_bytes(content)
    try:
        yield Fault(kind, tuple(files))
    finally:
        for file in files:
            path(file).unlink(missing_ok=True)
            if file in contents:
                path(file).write_bytes(contents[file])


def missed(workdir: pathlib.Path, fault: Fault, warnings: list[str]) -> list[str]:
    """Who does not name the fault, restores what is damaged, or doubts what is sound."""
    found = []
    for report in checkpoint.verify(workdir):
        names = [name for step, name in fault.files if step == report.step]
        # A damaged list of checksums names no other file.
        wanted = [checksums.FILE] if checksums.FILE in names else names
        told = (*report.problems, *report.additional)
        line, is_right = restored(workdir, report, warnings)
        found += [f"verify: {name}" for name in wanted if not any(name in text for text in told)]
        found += [f"restore: {name}" for name in wanted if name not in line]
        found += [] if names or not told else [f"verify: step {report.step} is sound"]
        found += [] if is_right else [f"restore: ended with {line or 'no error'}"]
    return found


def restored(
    workdir: pathlib.Path, report: checkpoint.StepReport, warnings: list[str]
) -> tuple[str, bool]:
    """What a restore says of a step, and whether it ended as that step must."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0))
    warnings.clear()
    try:
        state = checkpoint.restore(workdir / CHECKPOINTS / str(report.step), abstract).state
    except UserError as error:
        return str(error), bool(report.problems)
    is_same = jax.tree.all(jax.tree.map(np.array_equal, make_state(report.step), state))
    return "; ".join(warnings), is_same and not report.problems


def bit_flips(
    *, flips: int, seed: int, folder: pathlib.Path, processes: int = 1
) -> tuple[dict[str, int], list[str]]:
    """How many faults there were of each kind, and those that were missed."""
    rng, found, counts = random.Random(seed), [], collections.Counter()
    run([1] * processes, str(folder), program=("-c", WRITE))
    steps = folder / CHECKPOINTS
    contents = {
        (step, name): (steps / str(step) / name).read_bytes()
        for step in STEPS
        for name in checksums.list_files(epath.Path(steps / str(step)))
    }
    warnings: list[str] = []

    def warn(text: str, *values: object) -> None:
        warnings.append(text % values)

    with mock.patch.object(checkpoint.logging, "warning", warn):
        for _ in range(flips):
            with damaged(steps, contents, rng) as fault:
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
    parser.add_argument("--processes", type=int, default=1, help="that write; default: 1")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        counts, found = bit_flips(
            flips=args.flips,
            seed=args.seed,
            folder=pathlib.Path(folder) / "run",
            processes=args.processes,
        )
    print(json.dumps({"flips": args.flips, "kinds": counts, "missed": found}, indent=1))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
