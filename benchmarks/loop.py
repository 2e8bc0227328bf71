"""What a training run spends outside its compiled step: data, metrics, checkpoints.

A real run on the embedded dataset (the quickstart's second stage: all tasks, its model, a row of
metrics every 10 steps, a checkpoint every 380), in a steady state. In one process three things
alternate:

    alone   the compiled step by itself, on one batch that is on the device
    batch   the loop, given one batch again and again
    data    the loop on its stream; `save` where a checkpoint falls into it

so that two costs come apart: that of the loop (batch against alone), and that of making the data
(data against batch: on a CPU the threads that read compete with the step for the cores). The loop's
own clock, `seconds/*` in metrics.jsonl, is printed beside them. Ratios are medians over the rounds,
of wall time and of the process's CPU time: the latter changes less with other load on the machine,
though still by some percent.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/loop.py
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.mixture import Stream
from univg_jax import assembly, configs, runtime, sharding
from univg_jax.assembly import Run
from univg_jax.batch import Batch
from univg_jax.writers import read_metrics

WINDOW = 100  # steps of one kind before the next
# Steps at the start of a window that do not count: in them the loop uses up the batches that were
# read ahead during the window before (data.prefetch is 8).
SKIP = 10
# Its multiples fall into every other window of the stream: one save in 180 counted steps there.
SAVE_EVERY = 380
ACTIVITIES = ("step", "data", "log", "save")


def now() -> np.ndarray:
    """Wall and CPU seconds."""
    return np.array([time.monotonic(), time.process_time()])


class Alternating:
    """A stream that alternates with one of its batches, and the clock of the windows between calls.

    Window 0 warms up, then `data` and `batch` alternate. A window ends where the loop has waited
    for all of its steps, to write a row. The device is idle then, and free for the step alone.
    """

    def __init__(self, stream: Stream, alone: Callable[[int], np.ndarray]) -> None:
        self._stream, self._alone = stream, alone
        self.shares = stream.shares
        self._step, self._batch, self._begin = 0, None, now()
        names = ("alone", "batch", "data", "save")
        # Seconds a step of each window, and their ratio to the last time of the step alone.
        self.seconds: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self.ratios: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def __next__(self) -> Batch:
        window, place = divmod(self._step, WINDOW)
        if place == 0:
            self._end_window()
            if window % 2:
                self._add("alone", self._alone(WINDOW - SKIP))
        elif place == SKIP:
            self._begin = now()
        self._step += 1
        if self._batch is None or window % 2:
            self._batch = next(self._stream)
        return self._batch

    def _end_window(self) -> None:
        window = self._step // WINDOW - 1
        if window > 0:
            has_save = (self._step - 1) % SAVE_EVERY < WINDOW
            name = ("save" if has_save else "data") if window % 2 else "batch"
            self._add(name, (now() - self._begin) / (WINDOW - SKIP))

    def _add(self, name: str, seconds: np.ndarray) -> None:
        self.seconds[name].append(seconds)
        self.ratios[name].append(seconds / self.seconds["alone"][-1])

    def specs(self) -> Sequence[Batch]:
        return self._stream.specs()

    def counters(self) -> Mapping[str, int]:
        return self._stream.counters()

    def get_state(self) -> dict[str, Any]:
        return self._stream.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state)

    def continue_from(self, state: dict[str, Any]) -> None:
        self._stream.continue_from(state)

    def close(self) -> None:
        self._stream.close()


def make_step_alone(run: Run) -> Callable[[int], np.ndarray]:
    """A function that makes so many updates on one batch, and gives the seconds of each."""
    size = run.config.data.batch_size
    held_out = next(iter(run.validation(num=size, batch_size=size).values()))
    frozen = jax.device_put(run.frozen, sharding.tree_shardings(run.frozen, run.mesh))
    batch = sharding.shard_batch(next(iter(held_out)), run.mesh)
    init = lambda key: run.step_fns.init(key, frozen, batch)  # noqa: E731
    key = jax.random.key(0)
    shardings = sharding.tree_shardings(jax.eval_shape(init, key), run.mesh)
    update = run.step_fns.compiled_update(shardings)
    state = jax.jit(init, out_shardings=shardings)(key)

    def update_once() -> dict[str, jax.Array]:
        nonlocal state
        state, metrics = update(state, frozen, batch)
        return metrics

    def alone(count: int) -> np.ndarray:
        time.sleep(0.5)  # lets what the loop left running, such as reading ahead, come to its end
        jax.block_until_ready(update_once())
        begin = now()
        for _ in range(count):
            metrics = update_once()
        jax.block_until_ready(metrics)
        return (now() - begin) / count

    return alone


def outside_the_step(rows: Sequence[dict[str, float]], *, steps: int) -> dict[str, dict]:
    """By the loop's clock, the share of each activity but the step, on the stream and one batch."""
    shares = {}
    # A row is of the SKIP steps before it.
    begins = {row["step"] - SKIP: row for row in rows if WINDOW < row["step"] < steps}
    for kind, is_odd in (("data", 1), ("batch", 0)):
        steady = [
            row
            for begin, row in begins.items()
            if begin // WINDOW % 2 == is_odd and begin % WINDOW >= SKIP
        ]
        spent = {
            name: sum(row.get(f"seconds/{name}", 0.0) for row in steady) for name in ACTIVITIES
        }
        total = sum(spent.values())
        shares[kind] = {name: spent[name] / total for name in ACTIVITIES if name != "step"}
    return shares


def main() -> None:
    """Runs, and prints shares, times and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="experiments/emoji.py:preset=quickstart,stage=2")
    parser.add_argument("--rounds", type=int, default=6, help="at least 2")
    args = parser.parse_args()
    runtime.configure_jax()
    steps = (2 * args.rounds + 1) * WINDOW + 1  # one more, in which the last window ends
    config = configs.load(
        args.config,
        [f"train.steps={steps}", f"train.save_every={SAVE_EVERY}", f"train.log_every={SKIP}"],
    )
    with tempfile.TemporaryDirectory() as workdir:
        run = assembly.make_run(config, workdir)
        with jax.set_mesh(run.mesh):
            stream = Alternating(run.stream, make_step_alone(run))
        dataclasses.replace(run, stream=stream).train()
        rows = read_metrics(f"{workdir}/metrics.jsonl")

    outside = outside_the_step(rows, steps=steps)
    for kind, shares in outside.items():
        parts = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
        total = sum(shares.values())
        print(f"{kind}: by the loop's clock {total:.2%} is outside the step ({parts})")
    for name, windows in stream.seconds.items():
        wall, cpu = 1e3 * np.median(windows, axis=0)
        wall_ratio, cpu_ratio = np.median(stream.ratios[name], axis=0)
        print(
            f"{name:6s} {wall:8.1f} ms a step, {wall_ratio:.3f} x alone; "
            f"of CPU {cpu:8.1f} ms, {cpu_ratio:.3f} x"
        )
    seconds = {name: np.array(windows).tolist() for name, windows in stream.seconds.items()}
    print(json.dumps(dict(outside=outside, seconds=seconds)))


if __name__ == "__main__":
    main()
