"""Puts a workdir on storage that fails, and sees how a run that saves there ends.

    python -m tests.faults.storage

Each fault strikes a process that saves a small state at every step. It must end at the next step
with exit code 1 and one line that has the path and the cause, and what was saved before must be
sound. A disk that is full, or read-only, is a tmpfs of a few megabytes where this may mount one
(root on Linux); without that, these are left out, and the table says so. Root may write everywhere
but without the capability `dac_override`, which the process then lacks.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

from univg_jax import checkpoint
from univg_jax.errors import UserError
from univg_jax.workdir import CHECKPOINTS, list_steps

PROGRAM = """
import os, sys, time
import jax, jax.numpy as jnp
from univg_jax import checkpoint
from univg_jax.errors import UserError
from univg_jax.settings import Train
workdir, trigger, looks = sys.argv[1:4]
if looks == "no":
    checkpoint.check_space = lambda *_: None
sys.stdin.readline()
state = {"a": jax.random.normal(jax.random.key(0), (400_000,))}
try:
    with checkpoint.Checkpointer(workdir, Train(save_every=1, keep=None)) as checkpointer:
        for step in range(1, 100):
            checkpointer.check()
            checkpointer.save(step, state, {"n": step}, {"seed": 1})
            print(step, flush=True)
            if os.path.exists(trigger):
                time.sleep(0.2)
            elif step == 3:
                checkpointer.wait()
                open(trigger, "w").close()
                sys.stdin.readline()  # until the fault is there
except UserError as error:
    print(f"error: {error}", flush=True)
    os._exit(1)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to the folder of the run after its third step, and what the end must say."""

    name: str
    says: str
    strike: Callable[[pathlib.Path], None]
    needs_mount: bool = False
    size: str = "64m"
    looks: bool = True  # for free space, before a save
    is_sound_after: bool = True


def fill(folder: pathlib.Path) -> None:
    """Leaves nothing of a disk."""
    with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass


def nearly_fill(folder: pathlib.Path) -> None:
    """Leaves less than a checkpoint, and room for small files."""
    free = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - 2**20))


def make_read_only(folder: pathlib.Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def forbid(folder: pathlib.Path) -> None:
    """Its owner may make no file in the folder of checkpoints any more."""
    (folder / "run" / CHECKPOINTS).chmod(0o555)


def take_away(folder: pathlib.Path) -> None:
    (folder / "run").rename(folder / "gone")


FAULTS = (
    Fault(
        name="disk full in mid-save",
        says=os.strerror(errno.ENOSPC),
        strike=nearly_fill,
        needs_mount=True,
        looks=False,
    ),
    Fault(name="disk full", says="has 0.00 MiB left", strike=fill, needs_mount=True),
    Fault(name="too little space", says="needs", strike=nearly_fill, needs_mount=True),
    Fault(name="read-only", says=os.strerror(errno.EROFS), strike=make_read_only, needs_mount=True),
    Fault(name="permission denied", says=os.strerror(errno.EACCES), strike=forbid),
    Fault(
        name="vanished folder", says="is gone: who moved", strike=take_away, is_sound_after=False
    ),
)


@contextlib.contextmanager
def disk(fault: Fault, folder: pathlib.Path) -> Iterator[None]:
    """`folder` as a disk of its own, where the fault needs one."""
    if not fault.needs_mount:
        yield
        return
    options = f"size={fault.size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def may_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "tmpfs", folder]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            return False
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


def run(fault: Fault, folder: pathlib.Path) -> list[str]:
    """What is wrong with how a run ends that meets the fault."""
    folder.mkdir(parents=True, exist_ok=True)
    trigger = folder.parent / f"{folder.name}.struck"
    limit = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []
    with disk(fault, folder):
        command = [*limit, sys.executable, "-c", PROGRAM, str(folder / "run"), str(trigger)]
        command.append("yes" if fault.looks else "no")
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"},
        )
        with process:
            process.stdin.write("\n")
            process.stdin.flush()
            while not trigger.exists() and process.poll() is None:
                time.sleep(0.05)
            if process.poll() is None:
                fault.strike(folder)
                process.stdin.write("\n")
                process.stdin.flush()
            lines = process.communicate(timeout=300)[0].splitlines()
        wrong = []
        errors = [line for line in lines if line.startswith("error: ")]
        steps = [int(line) for line in lines if line.isdigit()]
        if process.returncode != 1 or len(errors) != 1:
            wrong.append(f"exit code {process.returncode}: {lines[-5:]}")
        elif str(folder / "run") not in errors[0] or fault.says not in errors[0]:
            wrong.append(f"it says {errors[0]!r}")
        if steps and steps[-1] > 5:
            wrong.append(f"it went on to step {steps[-1]}")
        wrong += unsound(folder / ("run" if fault.is_sound_after else "gone"))
    return wrong


def unsound(workdir: pathlib.Path) -> list[str]:
    """What is wrong with the steps that were saved before the fault."""
    try:
        reports = {report.step: report.problems for report in checkpoint.verify(workdir)}
    except UserError as error:
        return [str(error)]
    kept = [f"step {step} is gone" for step in (1, 2, 3) if step not in list_steps(workdir)]
    return kept + [f"step {step}: {found}" for step, found in reports.items() if found]


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    can_mount, found = may_mount(), {}
    for fault in FAULTS:
        if fault.needs_mount and not can_mount:
            found[fault.name] = "left out: no tmpfs can be mounted here"
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[fault.name] = run(fault, pathlib.Path(folder) / "disk") or "ends as it should"
    print(json.dumps(found, indent=1))
    return 1 if any(isinstance(wrong, list) for wrong in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
