"""What a training run spends outside its compiled step: waiting for data, writing metrics, saving
checkpoints.

A real run of `univg_jax.train` on the embedded dataset (the quickstart's second stage: all tasks,
its model, a row of metrics every 10 steps, a checkpoint every 380), in a steady state. In one
process three things alternate:

    alone   the compiled step by itself, on one batch that is on the device
    batch   the loop, given one batch again and again
    data    the loop on its stream; `save` where a checkpoint falls into it

so that the cost of the loop (batch against alone) and that of making the data (data against batch:
on a CPU the threads that read compete with the step for the cores) come apart. The loop's own
clock, `seconds/*` in metrics.jsonl, is printed beside them. Ratios are medians over the rounds, of
wall time and of the process's CPU time: the latter changes less with other load on the machine,
though still by some percent.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/loop.py
"""

import argparse
import json
import tempfile
import time
from typing import Any

import jax
import numpy as np

from data_pipelines import mixture
from data_pipelines.tasks import TASKS
from univg_jax import assembly, sharding
from univg_jax.batch import Batch
from univg_jax.cli.config import load_config
from univg_jax.cli.main import configure_jax
from univg_jax.writers import read_metrics

WINDOW = 100  # steps of one kind before the next
SKIP = 10  # of them not counted: what was read ahead meanwhile is used up (data.prefetch is 8)
# its multiples fall into every other window of the stream: one save in 180 counted steps there
SAVE_EVERY = 380


def now() -> np.ndarray:
    """Wall and CPU seconds."""
    return np.array([time.monotonic(), time.process_time()])


class Alternating:
    """A stream that is another by turns, and the clock of the windows between its calls.

    Window 0 warms up, then `data` and `batch` alternate. Windows end where the loop has waited for
    all of its steps, to write a row: the device is idle then, and free for the step alone.
    """

    def __init__(self, stream: Any, alone: Any) -> None:
        self._stream, self._alone = stream, alone
        self._step, self._batch, self._begin = 0, None, now()
        # a step
        self.seconds: dict[str, list[np.ndarray]] = {
            "alone": [],
            "batch": [],
            "data": [],
            "save": [],
        }
        # to the last time alone
        self.ratios: dict[str, list[np.ndarray]] = {name: [] for name in self.seconds}

    def __next__(self) -> Batch:
        window, place = divmod(self._step, WINDOW)
        if place == 0:
            self.end()
            if window % 2:
                self._add("alone", self._alone(WINDOW - SKIP))
        elif place == SKIP:
            self._begin = now()
        self._step += 1
        if self._batch is None or window % 2:
            self._batch = next(self._stream)
        return self._batch

    def end(self) -> None:
        """Closes the window before this step."""
        window = self._step // WINDOW - 1
        if window > 0:
            saves = (self._step - 1) % SAVE_EVERY < WINDOW
            self._add(
                ("save" if saves else "data") if window % 2 else "batch",
                (now() - self._begin) / (WINDOW - SKIP),
            )

    def _add(self, name: str, seconds: np.ndarray) -> None:
        self.seconds[name].append(seconds)
        self.ratios[name].append(seconds / self.seconds["alone"][-1])

    def get_state(self) -> dict[str, Any]:
        return self._stream.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._stream.set_state(state)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="experiments/emoji.py:preset=quickstart,stage=2")
    parser.add_argument("--rounds", type=int, default=6, help="at least 2")
    args = parser.parse_args()
    configure_jax()
    steps = (2 * args.rounds + 1) * WINDOW + 1  # one more, in which the last window ends
    config = load_config(
        args.config,
        [f"train.steps={steps}", f"train.save_every={SAVE_EVERY}", f"train.log_every={SKIP}"],
    )

    mesh = assembly.make_mesh(config)
    jax.set_mesh(mesh)
    assembly.prepare_data(config)
    tokenizer = assembly.tokenizer(config)
    with tempfile.TemporaryDirectory() as workdir:
        conditioner, frozen = assembly.prepare_encoders(config, workdir, mesh)
        model = assembly.make_model(config, conditioner)
        stream = mixture.make_stream(config, tokenizer=tokenizer)
        size = config.data.batch_size
        validation = {
            name: list(
                mixture.eval_batches(
                    config, name, split="validation", num=size, batch_size=size, tokenizer=tokenizer
                )
            )
            for name in stream.shares
        }

        functions = train.Step(
            config=config, model=model, conditioner=conditioner, task_names=tuple(TASKS)
        )
        frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
        batch = sharding.shard_batch(next(iter(validation.values()))[0], mesh)
        key = jax.random.key(0)
        shardings = sharding.tree_shardings(
            jax.eval_shape(functions.init, key, frozen, batch), mesh
        )
        update = functions.compiled_update(shardings)
        state = [jax.jit(functions.init, out_shardings=shardings)(key, frozen, batch)]

        def alone(count: int) -> np.ndarray:
            """Seconds a step."""
            # what the loop left running in the background, such as reading ahead, is done
            time.sleep(0.5)
            jax.block_until_ready(update_once())
            begin = now()
            for _ in range(count):
                metrics = update_once()
            jax.block_until_ready(metrics)
            return (now() - begin) / count

        def update_once() -> Any:
            state[0], metrics = update(state[0], frozen, batch)
            return metrics

        alternating = Alternating(stream, alone)
        train.train(
            config,
            workdir=workdir,
            stream=alternating,
            model=model,
            conditioner=conditioner,
            frozen=frozen,
            task_names=list(TASKS),
            validation=validation,
            mesh=mesh,
        )
        rows = read_metrics(f"{workdir}/metrics.jsonl")
        stream.close()

    outside = {}
    for kind, odd in (("data", 1), ("batch", 0)):
        # The rows of such windows; a row is of the SKIP steps before it.
        begins = {row["step"] - SKIP: row for row in rows if WINDOW < row["step"] < steps}
        steady = [
            row
            for begin, row in begins.items()
            if begin // WINDOW % 2 == odd and begin % WINDOW >= SKIP
        ]
        spent = {
            k: sum(row.get(f"seconds/{k}", 0.0) for row in steady)
            for k in ("step", "data", "log", "save")
        }
        total = sum(spent.values())
        outside[kind] = {name: seconds / total for name, seconds in spent.items() if name != "step"}
        parts = ", ".join(f"{name} {share:.2%}" for name, share in outside[kind].items())
        print(
            f"{kind}: by the loop's clock {sum(outside[kind].values()):.2%} is outside the step ({parts})"
        )
    for name, windows in alternating.seconds.items():
        wall, cpu = 1e3 * np.median(windows, axis=0)
        wall_ratio, cpu_ratio = np.median(alternating.ratios[name], axis=0)
        print(
            f"{name:6s} {wall:8.1f} ms a step, {wall_ratio:.3f} x alone; of CPU {cpu:8.1f} ms, {cpu_ratio:.3f} x"
        )
    seconds = {name: np.array(windows).tolist() for name, windows in alternating.seconds.items()}
    print(json.dumps(dict(outside=outside, seconds=seconds)))


if __name__ == "__main__":
    main()
