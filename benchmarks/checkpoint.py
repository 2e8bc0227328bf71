"""What checksums add to a save and a restore, and how long a save holds the training loop up.

The state is parameters, their average and two moments: 4 trees of stacked and plain matrices. Saves
with checksums, without, and with those of before (BLAKE2b) alternate, and so do restores. The time
of a disk that others use, too, changes more than checksums take. So `share` is measured within one
save: the time in which checksums are made, to the rest of it, which waits for them. It is a median
over the rounds; seconds are those of the fastest round. `blocked` is the share of a save in which
`Checkpointer.save` does not return. `bytes read` are those that a restore fetches from the disk,
over the size of the step: its files are dropped from the page cache before.

    python benchmarks/checkpoint.py --megabytes=384
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from etils import epath

from univg_jax import checkpoint, checksums, runtime
from univg_jax.settings import Train

WIDTH, LAYERS = 1024, 6  # a stacked kernel of 24 MiB
PARTS = ("write_own", "combine", "find_problems")  # of `checksums`: what saves and restores call


def make_state(megabytes: int) -> dict:
    """Random numbers, which no compression makes smaller."""
    kernels = max(1, megabytes * 2**20 // (4 * LAYERS * WIDTH * WIDTH * 4))

    @jax.jit
    def tree(key: jax.Array) -> dict:
        keys = jax.random.split(key, kernels)
        shape = (LAYERS, WIDTH, WIDTH)
        return {f"block{i}": {"kernel": jax.random.normal(k, shape)} for i, k in enumerate(keys)}

    names = ("params", "ema", "mu", "nu")
    return {name: tree(jax.random.key(i)) for i, name in enumerate(names)}


class Spent:
    """Wall and CPU seconds of a block."""

    def __enter__(self) -> "Spent":
        self._begin = time.monotonic(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall = time.monotonic() - self._begin[0]
        self.cpu = time.process_time() - self._begin[1]


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """Orbax alone."""
    with contextlib.ExitStack() as stack:
        for name in PARTS:
            stack.enter_context(mock.patch.object(checksums, name, return_value=()))
        yield


@contextlib.contextmanager
def with_blake2b() -> Iterator[None]:
    """The sums of before."""
    make = checksums.checksum

    def as_before(file: epath.Path, algorithm: str = "blake2b_128") -> str:
        return make(file, algorithm)

    with mock.patch.object(checksums, "checksum", as_before):
        yield


WAYS = {"xxh3": contextlib.nullcontext, "blake2b": with_blake2b, "none": without_checksums}


@contextlib.contextmanager
def time_in_checksums() -> Iterator[list[float]]:
    """The seconds of each call that makes or verifies checksums, which nothing else runs beside."""
    seconds: list[float] = []

    def timed(function: Callable) -> Callable:
        def call(*args: Any, **options: Any) -> Any:
            begin = time.monotonic()
            try:
                return function(*args, **options)
            finally:
                seconds.append(time.monotonic() - begin)

        return call

    with contextlib.ExitStack() as stack:
        for name in PARTS:
            function = timed(getattr(checksums, name))
            stack.enter_context(mock.patch.object(checksums, name, function))
        yield seconds


def drop_from_cache(folder: pathlib.Path) -> int:
    """Has the files of a folder read from the disk again; returns their bytes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return sum(file.stat().st_size for file in files)


def bytes_fetched() -> int:
    """What this process has had read from disks so far."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def save(checkpointer: checkpoint.Checkpointer, step: int, state: dict) -> float:
    """Saves, and returns for how many seconds a training loop would have stood still."""
    begin = time.monotonic()
    checkpointer.save(step, state, {"n": 1}, {"seed": 1}, {})
    blocked = time.monotonic() - begin
    checkpointer.wait()
    return blocked


def restore(step: pathlib.Path, abstract: dict) -> float:
    """Restores, and returns the bytes that this fetched from the disk, over those of the step."""
    size, before = drop_from_cache(step), bytes_fetched()
    jax.block_until_ready(checkpoint.restore(step, abstract).state)
    return (bytes_fetched() - before) / size


def main() -> None:
    """Runs, and prints ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", help="where to write; default: the temporary folder")
    args = parser.parse_args()
    runtime.configure_jax()
    state = make_state(args.megabytes)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}

    def add(way: str, **values: float) -> None:
        for name, value in values.items():
            found[way].setdefault(name, []).append(value)

    def run(way: str, name: str, action: Callable[[], float]) -> float:
        with WAYS[way](), time_in_checksums() as inside, Spent() as spent:
            returned = action()
        seconds = {name: spent.wall, f"{name}_cpu": spent.cpu}
        add(way, **seconds, **{f"{name}_share": sum(inside) / (spent.wall - sum(inside))})
        return returned

    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        workdir = epath.Path(folder)
        steps: dict[str, int] = {}
        with checkpoint.Checkpointer(workdir, Train(save_every=1, keep=len(WAYS))) as checkpointer:
            for round_ in range(args.rounds + 1):
                order = list(WAYS)[round_ % len(WAYS) :] + list(WAYS)[: round_ % len(WAYS)]
                for way in order:
                    step = steps[way] = max(steps.values(), default=0) + 1
                    state = jax.block_until_ready(jax.tree.map(lambda x: x + jnp.float32(1), state))
                    os.sync()

                    blocked = run(way, "save", lambda s=step, x=state: save(checkpointer, s, x))
                    add(way, blocked=blocked)
                for way in order:
                    path = pathlib.Path(folder, "checkpoints", str(steps[way]))
                    add(way, fetched=run(way, "restore", lambda p=path: restore(p, abstract)))
                if not round_:  # it compiles and warms up
                    found = {way: {} for way in WAYS}
            size = drop_from_cache(path)
    print(f"a step of {size / 2**20:.0f} MiB, {args.rounds} rounds")
    for name in ("save", "restore"):
        for way in WAYS:
            seconds, cpu = min(found[way][name]), min(found[way][f"{name}_cpu"])
            base, base_cpu = min(found["none"][name]), min(found["none"][f"{name}_cpu"])
            share = statistics.median(found[way][f"{name}_share"])
            print(
                f"{name:8s} {way:8s} {seconds:6.2f} s, {seconds / base:.2f} x without; "
                f"of CPU {cpu:6.2f} s, {cpu / base_cpu:.2f} x; share {share:.1%}"
            )
    ours = found["xxh3"]
    blocked = [a / b for a, b in zip(ours["blocked"], ours["save"], strict=True)]
    print(f"blocked    {statistics.median(blocked):.1%} of a save")
    print(f"bytes read {statistics.median(ours['fetched']):.2f} x the size of the step")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
