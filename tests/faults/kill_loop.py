"""Kills a real training at random moments, starts it again, and compares what it leaves.

    python -m tests.faults.kill_loop --kills=50 --processes=2 --seed=0

The run is `experiments/emoji.py` with the preset `smoke`: real data, two tasks with a validation,
checkpoints and samples every few steps. Each kill strikes all processes or one, by SIGKILL, SIGTERM
or SIGSTOP (a host that hangs; a second later the scheduler takes all), at a random time after the
start or while a checkpoint is being written. A run that has ended is compared with one that nothing
disturbed, and the next one begins, until there were so many kills. Compared are all that must be
the same: every array of the newest checkpoint bit for bit, the place in the data, the rows of
metrics and the events of TensorBoard but for what the clock says, the samples, and which steps are
kept.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from tests import processes
from tests.processes import Process
from tests.test_writers import shown_events
from univg_jax.stored import STATE, read_item, saved_shapes, stream
from univg_jax.workdir import CHECKPOINTS, list_steps
from univg_jax.writers import read_metrics

STEPS = 24
CONFIG = (
    "--config=experiments/emoji.py:stage=2,preset=smoke",
    f"--config.train.steps={STEPS}",
    "--config.train.log_every=5",
    "--config.train.save_every=4",
    "--config.train.keep=2",
    "--config.train.eval_every=9",
    "--config.train.sample_every=12",
    "--config.train.eval_examples=8",
    "--config.train.sample_examples=2",
)
DEVICES = 2  # in all
TIMES = ("seconds/", "time", "goodput", "steps_per_second", "images_per_second")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
ENDS = {0, 143, -9, -15}  # done; preempted; killed, before there was a handler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """Strikes after `seconds`, or that long after a save has begun where one does before."""

    signum: signal.Signals
    is_of_all: bool
    while_saving: bool
    seconds: float

    @classmethod
    def draw(cls, rng: random.Random, *, startup: float, processes: int) -> "Kill":
        """A kill at any moment of an attempt that takes `startup` seconds to its first step."""
        while_saving = rng.random() < 0.5
        return cls(
            signum=rng.choice(SIGNALS),
            is_of_all=processes == 1 or rng.random() < 0.5,
            while_saving=while_saving,
            seconds=rng.uniform(0, 0.3) if while_saving else rng.uniform(0, 1.5 * startup),
        )


def command(workdir: pathlib.Path, data: pathlib.Path) -> tuple[str, ...]:
    return ("train", *CONFIG, f"--workdir={workdir}", f"--config.data.dir={data}")


def devices(count: int) -> list[int]:
    """Of each process: the same number in all, so that the mesh is the same."""
    return [DEVICES // count] * count


def strike(running: Sequence[Process], kill: Kill, workdir: pathlib.Path) -> bool:
    """Kills when its moment has come; returns whether the run was still alive then."""
    begun = time.monotonic()
    unfinished = f"{CHECKPOINTS}/*.orbax-checkpoint-tmp*"
    while kill.while_saving and not list(workdir.glob(unfinished)):
        if is_over(running):
            return False
        time.sleep(0.005)
    while time.monotonic() < begun + kill.seconds and not kill.while_saving:
        if is_over(running):
            return False
        time.sleep(0.01)
    if kill.while_saving:
        time.sleep(kill.seconds)
    struck = running if kill.is_of_all else running[-1:]
    for process in struck:
        if process.popen.poll() is None:
            process.popen.send_signal(kill.signum)
    if kill.signum == signal.SIGSTOP:
        time.sleep(1)
        for process in running:
            process.popen.kill()
    return True


def is_over(running: Sequence[Process]) -> bool:
    return all(process.popen.poll() is not None for process in running)


def attempt(workdir: pathlib.Path, data: pathlib.Path, count: int, kill: Kill | None) -> bool:
    """Starts or continues a run; returns whether it was killed. Raises for any other bad end."""
    with processes.running(devices(count), *command(workdir, data)) as running:
        was_killed = kill is not None and strike(running, kill, workdir)
        codes = [process.wait() for process in running]
        logs = [process.log.read_text() for process in running]
    if not was_killed and any(codes):
        raise AssertionError(f"a run that nobody disturbed ended with {codes}:\n" + "\n".join(logs))
    # Who loses another process ends with a fault of its own, but never with a bug of ours.
    if was_killed and kill.is_of_all and not set(codes) <= ENDS:
        raise AssertionError(f"after {kill} the codes are {codes}:\n" + "\n".join(logs))
    return was_killed


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
    for item in ("data", "config", "history"):
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
    yield from (f"TensorBoard: {key}" for key in sorted(set(events[0] - events[1])))
    yield from (f"TensorBoard: {key}" for key in sorted(set(events[1] - events[0])))
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
    found = read_metrics(workdir / "metrics.jsonl")
    return [{k: x for k, x in row.items() if not k.startswith(TIMES)} for row in found]


def shown(workdir: pathlib.Path) -> collections.Counter:
    """How often TensorBoard shows each number of each step."""
    events = collections.Counter(shown_events(workdir / "tensorboard"))
    return collections.Counter(
        {key: n for key, n in events.items() if not key[1].startswith(TIMES)}
    )


def kill_loop(
    *, kills: int, processes: int, seed: int, folder: pathlib.Path, say=print
) -> list[str]:
    """All differences found; `say` tells of each kill."""
    rng, data = random.Random(seed), folder / "data"
    begun = time.monotonic()
    attempt(folder / "undisturbed", data, processes, None)
    startup = time.monotonic() - begun
    found, done, number = [], 0, 0
    while done < kills:
        workdir, number = folder / f"run{number}", number + 1
        is_killed = True
        while is_killed:
            kill = None
            if done < kills:
                kill = Kill.draw(rng, startup=startup, processes=processes)
            is_killed = attempt(workdir, data, processes, kill)
            if is_killed:
                done += 1
                steps = list_steps(workdir) if workdir.exists() else ()
                say(f"kill {done}: {kill}, steps {steps}")
        new = [f"{workdir.name}: {text}" for text in differences(folder / "undisturbed", workdir)]
        say(f"{workdir.name} after {done} kills: {len(new)} differences")
        found += new
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="default: a temporary one")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        found = kill_loop(
            kills=args.kills,
            processes=args.processes,
            seed=args.seed,
            folder=args.folder or pathlib.Path(temporary),
        )
    print(json.dumps({"kills": args.kills, "processes": args.processes, "differences": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
