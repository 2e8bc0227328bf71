"""Kills a real training at random moments, starts it again, and compares what it leaves.

    python -m tests.faults.kill_loop --kills=50 --processes=2 --seed=0

The runs are the three stages of `experiments/emoji.py`, each with a parent that nothing disturbed:
the second one in two buckets, with accumulated gradients and every sixth step kept, the third on
cached prompts and pictures. They validate, sample and save every few steps. Each kill strikes all
processes or one, by SIGKILL, SIGTERM or SIGSTOP (a host that hangs; a second later the scheduler
takes all), at a random time after the start or while a checkpoint is being written. A run that has
ended is compared with one that nothing disturbed, and the next one begins, until there were so many
kills. Compared are all that must be the same: every array of the newest checkpoint bit for bit, the
place in the data, the rows of metrics and the events of TensorBoard but for what the clock says,
the samples, and which steps are kept.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath

from experiments import emoji
from tests import processes
from tests.processes import Process
from tests.test_writers import shown_events
from univg_jax.stored import STATE, read_item, saved_shapes, stream
from univg_jax.workdir import CHECKPOINTS, list_steps
from univg_jax.writers import read_metrics

CONFIG = (
    "--config.model.overrides.depth=1",
    "--config.sampling.steps=2",
    "--config.optim.warmup=1",
    "--config.train.steps=12",
    "--config.train.log_every=5",
    "--config.train.save_every=3",
    "--config.train.keep=2",
    "--config.train.eval_every=5",
    "--config.train.sample_every=6",
    "--config.train.eval_examples=8",
    "--config.train.sample_examples=2",
)
TASKS = ({"t2i"}, {"t2i", "ie", "seg"}, {"t2i", "id"})  # of each stage; fewer compile sooner
OF_STAGE_2 = (
    "--config.data.buckets=((32, 32), (24, 40))",
    "--config.optim.accumulate=2",
    "--config.train.keep_every=6",
)
DEVICES = 2  # in all, so that the mesh is the same
SAVE_SECONDS = 0.3  # about what a save takes
TIMES = ("seconds/", "time", "goodput", "steps_per_second", "images_per_second")
PROGRAM = ("-m", "tests.faults.cached")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
ENDS = {0, 143, -9, -15}  # done; preempted; killed, before there was a handler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """Strikes `seconds` after the start, or after the beginning of the attempt's `save`-th save."""

    signum: signal.Signals
    is_of_all: bool
    save: int | None
    seconds: float

    @classmethod
    def draw(cls, rng: random.Random, *, seconds: float, processes: int) -> "Kill":
        """A kill at any moment of an attempt that would take `seconds`."""
        save = rng.choice([1, 2, 3]) if rng.random() < 0.5 else None
        return cls(
            signum=rng.choice(SIGNALS),
            is_of_all=processes == 1 or rng.random() < 0.5,
            save=save,
            seconds=rng.uniform(0, seconds if save is None else SAVE_SECONDS),
        )

    def __str__(self) -> str:
        when = "after the start" if self.save is None else f"after save {self.save} began"
        who = "all" if self.is_of_all else "one"
        return f"{self.signum.name} to {who}, {self.seconds:.2f} s {when}"


@dataclasses.dataclass(kw_only=True)
class Runs:
    """Runs of the three stages in `folder`, as one process or several."""

    folder: pathlib.Path
    processes: int
    seconds: float = 0.0  # of the last attempt that nothing disturbed

    def undisturbed(self, stage: int) -> pathlib.Path:
        """The workdir of a stage that nothing disturbed, trained when it is first asked for."""
        workdir = self.folder / f"undisturbed{stage}"
        if not workdir.exists():
            self.attempt(workdir, stage)
        return workdir

    def attempt(self, workdir: pathlib.Path, stage: int, kill: Kill | None = None) -> bool:
        """Starts or continues a run; returns whether it was killed.

        Raises AssertionError for an end that the kill does not explain.
        """
        command = self.command(workdir, stage)
        begun = time.monotonic()
        devices = [DEVICES // self.processes] * self.processes
        with processes.running(devices, *command, program=PROGRAM) as running:
            was_killed = kill is not None and strike(running, kill, workdir)
            codes = [process.wait() for process in running]
            logs = [process.log.read_text() for process in running]
        told = f"{kill}: the exit codes are {codes}\n" + "\n".join(logs)
        assert was_killed or not any(codes), told
        # Who loses another process ends with an error, but all that are struck as they should.
        assert not (was_killed and kill.is_of_all) or set(codes) <= ENDS, told
        if kill is None:
            self.seconds = time.monotonic() - begun
        return was_killed

    def command(self, workdir: pathlib.Path, stage: int) -> tuple[str, ...]:
        """What starts a run of a stage, or continues it."""
        more = OF_STAGE_2 if stage == 2 else self._caches() if stage == 3 else ()
        return ("train", *self._config(stage), *more, f"--workdir={workdir}")

    def _config(self, stage: int) -> list[str]:
        parent = f",init_from={self.undisturbed(stage - 1)}" if stage > 1 else ""
        unused = set(emoji.get_config(stage=stage).tasks) - TASKS[stage - 1]
        return [
            f"--config=experiments/emoji.py:stage={stage},preset=smoke{parent}",
            *CONFIG,
            *(f"--config.tasks.{name}.weight=0" for name in sorted(unused)),
            f"--config.data.dir={self.folder / 'data'}",
        ]

    def _caches(self) -> list[str]:
        """What makes the third stage use its caches, made when they are first asked for."""
        folder = self.folder / "cache"
        if not folder.exists():
            command = ("data", "cache", *self._config(3), "--what=text,latents", f"--out={folder}")
            processes.run([DEVICES], *command, program=PROGRAM)
        return [f"--config.data.{name}_cache={folder}" for name in ("text", "latent")]


def strike(running: Sequence[Process], kill: Kill, workdir: pathlib.Path) -> bool:
    """Kills when its moment has come; returns whether the run was still alive then."""
    begun, saves = time.monotonic(), set()
    while True:
        if all(process.popen.poll() is not None for process in running):
            return False
        if kill.save is None or len(saves) >= kill.save:
            if time.monotonic() >= begun + kill.seconds:
                break
        else:
            saves.update(workdir.glob(f"{CHECKPOINTS}/*.orbax-checkpoint-tmp*"))
            begun = time.monotonic()
        time.sleep(0.005)
    for process in running if kill.is_of_all else running[-1:]:
        process.popen.send_signal(kill.signum)
    if kill.signum == signal.SIGSTOP:
        time.sleep(1)
        for process in running:
            process.popen.kill()
    return True


def differences(a: pathlib.Path, b: pathlib.Path) -> Iterator[str]:
    """What two workdirs of one config differ in."""
    steps = list_steps(a), list_steps(b)
    if steps[0] != steps[1]:
        yield f"kept steps: {steps[0]} and {steps[1]}"
        return
    folders = [epath.Path(run) / CHECKPOINTS / str(steps[0][-1]) for run in (a, b)]
    for name in saved_shapes(folders[0], ""):
        arrays = [read_array(folder, name) for folder in folders]
        if arrays[0].tobytes() != arrays[1].tobytes():
            yield f"{name} of step {steps[0][-1]}"
    # Where a signal came between a step and its row, `history` still has what is a row by now.
    for item in ("data", "config"):
        values = [read_item(folder, item) for folder in folders]
        if values[0] != values[1]:
            yield f"{item} of step {steps[0][-1]}"
    found = [rows(run) for run in (a, b)]
    for ours, theirs in zip(*found, strict=False):
        yield from (
            f"row {ours.get('step')}: {key}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        )
    if len(found[0]) != len(found[1]):
        yield f"{len(found[0])} rows and {len(found[1])}"
    events = [shown(run) for run in (a, b)]
    different = {event[:2] for a, b in (events, events[::-1]) for event in a - b}
    yield from (f"TensorBoard: step {step}, {tag}" for step, tag in sorted(different))
    pictures = [
        {p.relative_to(run): p.read_bytes() for p in (run / "samples").rglob("*.png")}
        for run in (a, b)
    ]
    if pictures[0] != pictures[1]:
        yield "samples"


def read_array(folder: epath.Path, name: str) -> np.ndarray:
    tensor = stream(folder / STATE, name)
    array = np.empty(tensor.shape, tensor.dtype)
    for box, values in tensor.blocks():
        array[box] = values
    return array


def rows(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Those of metrics.jsonl, all of whose lines must be whole and of different steps."""
    file = workdir / "metrics.jsonl"
    found = read_metrics(file)
    assert len(found) == len(file.read_text().splitlines()), f"{file} has torn lines, or doubles"
    return [{k: x for k, x in row.items() if not k.startswith(TIMES)} for row in found]


def shown(workdir: pathlib.Path) -> collections.Counter:
    """How often TensorBoard shows each number and picture of each step."""
    events = shown_events(workdir / "tensorboard")
    return collections.Counter(event for event in events if not event[1].startswith(TIMES))


def kill_loop(
    *,
    kills: int,
    processes: int,
    seed: int,
    folder: pathlib.Path,
    say: Callable[[str], object] = print,
) -> list[str]:
    """All differences found; `say` tells of each kill."""
    rng, runs = random.Random(seed), Runs(folder=folder, processes=processes)
    found, done = [], 0
    for number in itertools.count():
        stage = number % len(TASKS) + 1
        expected, workdir = runs.undisturbed(stage), folder / f"run{number}"
        while True:
            kill = None
            if done < kills:
                kill = Kill.draw(rng, seconds=runs.seconds, processes=processes)
            if not runs.attempt(workdir, stage, kill):
                break
            done += 1
            steps = list_steps(workdir) if workdir.exists() else ()
            say(f"kill {done}, stage {stage}: {kill}; steps {steps}")
        new = [f"{workdir.name}: {text}" for text in differences(expected, workdir)]
        say(f"{workdir.name} after {done} kills: {len(new)} differences")
        found += new
        if done == kills:
            return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kills", type=int, default=50, help="in all, over the three stages; default: 50"
    )
    parser.add_argument(
        "--processes", type=int, default=1, choices=[1, 2], help="of each run; default: 1"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is done when, and to whom; default: 0"
    )
    parser.add_argument("--folder", type=pathlib.Path, help="default: a temporary one")
    args = parser.parse_args(argv)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    with tempfile.TemporaryDirectory() as temporary:
        found = kill_loop(
            kills=args.kills,
            processes=args.processes,
            seed=args.seed,
            folder=args.folder or pathlib.Path(temporary),
            say=functools.partial(print, flush=True),
        )
    print(json.dumps({"kills": args.kills, "processes": args.processes, "differences": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
