"""What a run did since the last row: mean losses, shares of the tasks, where the time went."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array

from univg_jax import writers
from univg_jax.errors import NonFiniteLossError
from univg_jax.files import write_whole
from univg_jax.settings import Config, Train
from univg_jax.trees import Json

NORMS = ("loss", "grad_norm", "param_norm")  # of a step; the last is that of the new parameters
SPIKE = 2.0

# Activities whose seconds do not count as training speed.
NOT_TRAINING = ("start", "compile", "eval", "sample", "save", "profile")


class Clock:
    """Charges every second to one activity: the one that was named last, or that of a `with` block.

    start, compile: everything before the first step, and the compilation of it and of validation
    data: waiting for the next batch while the device had nothing to do
    step: dispatching steps and waiting for the device; all that no other activity claims
    eval, sample, save, log, profile: what they say
    """

    def __init__(self, activity: str) -> None:
        self.activity = activity
        self.begin = self._since = time.monotonic()
        self.seconds: dict[str, float] = {}

    def switch(self, activity: str) -> None:
        """Charges the time until now to the activity so far, and what follows to another one."""
        now = time.monotonic()
        self.seconds[self.activity] = self.seconds.get(self.activity, 0.0) + now - self._since
        self.activity, self._since = activity, now

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Charges the time inside the block to `activity`, or `self.activity` at its end."""
        before = self.activity
        self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def take(self) -> dict[str, float]:
        """The seconds of each activity since the last `take`."""
        self.switch(self.activity)
        taken, self.seconds = self.seconds, {}
        return {"data": 0.0, "step": 0.0} | taken

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was made, up to the last switch."""
        return self._since - self.begin


class History:
    """Makes the rows of metrics.jsonl from the metrics of steps and a clock.

    A row has all steps since the row before. Those that have no row yet are in the checkpoint
    (`get_state`), so the rows of a run do not tell where it was interrupted.

    The `seconds/*` of a row add up to the wall time since the row before. Of an attempt that ended,
    the time since its last row or checkpoint is lost. `time` is the run's wall time in seconds,
    all attempts together. `goodput` is the share of it that went to steps that count: the sum of
    `seconds/step` over the rows that the run has kept. A step that was lost with a crash and made
    again counts once, though `time` has both.

    `latent_square/TASK` is the mean square of the latents of a task's targets: 1 over all that the
    codec was fitted on. `records/*` are the stream's counters since the run began.

    `loss` and the norms are means over the row's steps, `*_max` the largest of them, and `spikes`
    counts steps whose loss is more than `SPIKE` times the median. Steps that were not finite are in
    none of these, `skipped` counts them.
    """

    def __init__(self, workdir: epath.Path, task_names: Sequence[str], settings: Train) -> None:
        self.clock = Clock("start")
        self._settings = settings
        self._skipped = 0  # in a row
        self._task_names = task_names
        self._file = workdir / "metrics.jsonl"
        self._rows = writers.read_metrics(self._file)
        self._seconds_before = max((row.get("time", 0.0) for row in self._rows), default=0.0)
        self._step_seconds = 0.0
        self._records_before: dict[str, float] = {}
        self._steps: list[dict[str, np.ndarray]] = []  # since the last row
        self.is_left = False  # what was due when the attempt before ended is still to be done
        self._last_row_seconds: dict[str, float] = {}

    @property
    def is_complete(self) -> bool:
        """Whether all steps have a row."""
        return not self._steps

    def get_state(self, *, records: Mapping[str, int], is_left: bool) -> Json:
        """The steps that have no row yet, and what else their row will have; see `take_row`.

        Also how many of the newest steps were skipped, which `max_skipped` bounds.
        `is_left`: what was due at this step is left to the next attempt.
        """
        skipped = {"skipped": self._skipped}
        if self.is_complete:
            return skipped
        self.clock.switch(self.clock.activity)
        return skipped | {
            "steps": [{name: x.tolist() for name, x in step.items()} for step in self._steps],
            "seconds": dict(self.clock.seconds),
            "records": self._total(records),
            "time": self._so_far()["time"],
            "is_left": is_left,
        }

    def set_state(self, state: Json) -> None:
        """Goes on from what `get_state` gave, in the attempt before."""
        self._skipped = state.get("skipped", 0)  # older checkpoints have none
        if "steps" not in state:
            return
        self._records_before, self.is_left = dict(state["records"]), state["is_left"]
        self._steps = [{k: np.asarray(x) for k, x in step.items()} for step in state["steps"]]
        self._seconds_before = max(self._seconds_before, state["time"])
        for name, seconds in state["seconds"].items():
            self.clock.seconds[name] = self.clock.seconds.get(name, 0.0) + seconds

    def resume(self, step: int, *, is_own: bool) -> list[writers.Row]:
        """Counts the steps up to `step` that earlier attempts made, and returns their rows.

        Later ones were lost. Call it after `set_state`. Warns if a step of this run's own
        (`is_own`) has neither a row nor a place in the next one.
        """
        kept = [row for row in self._rows if row["step"] <= step - self.is_left]
        newest = max((row["step"] for row in kept), default=0)
        if is_own and newest < (due := step - len(self._steps)):
            logging.warning(
                "%s: the rows of steps %d to %d are missing", self._file, newest + 1, due
            )
        self._step_seconds = sum(row.get("seconds/step", 0.0) for row in kept)
        # They only grow, so the last row decides.
        counts = (item for row in kept for item in row.items() if item[0].startswith("records/"))
        self._records_before = dict(counts) | self._records_before
        return kept

    def add(self, step: int, metrics: Mapping[str, Array]) -> int:
        """Fetches one step's metrics; returns how many valid rows it had, on all hosts.

        Raises NonFiniteLossError for a NaN or infinite one, unless it is skipped.
        """
        values = jax.device_get(dict(metrics))
        count = round(float(values["count"].sum()))
        is_finite, sample_id = values.pop("is_finite"), values.pop("sample_id")
        bad = [name for name in NORMS if not np.isfinite(values[name])]
        self._skipped = self._skipped + 1 if bad else 0
        if not bad:
            self._steps.append(values)
            return count
        # A gradient or an update that is not finite may come of any row.
        losses, whole = values["loss_sum"], bool(np.all(is_finite))
        is_bad = values["count"] > 0 if whole else ~np.isfinite(losses)
        tasks = [task for task, bad in zip(self._task_names, is_bad, strict=True) if bad]
        of = f"tasks {_listed(tasks)}; samples {_listed(_ranges(sample_id[whole | ~is_finite]))}"
        of = f"all losses are finite; {of}" if whole else of
        message = f"{bad[0]} is {values[bad[0]]} at step {step} ({of})"
        if self._settings.non_finite == "stop":
            raise NonFiniteLossError(f"{message}; that state was not saved")
        if self._skipped > self._settings.max_skipped:
            raise NonFiniteLossError(f"{message}, as were the {self._skipped - 1} steps before it")
        logging.warning("%s: skipped", message)
        self._steps.append({"count": values["count"]})
        return count

    def take_row(self, step: int, *, records: Mapping[str, int]) -> dict[str, float]:
        """The row of the steps added since the row before, which the next row starts after.

        `records` are the stream's counters on all hosts in this attempt. The row has their sums
        over all attempts.
        """
        if not self._steps:
            raise RuntimeError(f"no metrics since the last row, at step {step}")
        steps, self._steps = self._steps, []
        good = [step for step in steps if "loss" in step]
        row = {"skipped": float(len(steps) - len(good))}
        if good:
            row |= self._means(good)
        rows = np.sum([m["count"] for m in steps], dtype=np.float64)
        row |= self._total(records)
        seconds = self.clock.take()
        training = sum(s for name, s in seconds.items() if name not in NOT_TRAINING)
        row |= {"steps_per_second": len(steps) / training, "images_per_second": rows / training}
        self._step_seconds += seconds["step"]
        self._last_row_seconds = {f"seconds/{name}": s for name, s in seconds.items()}
        return {k: float(v) for k, v in row.items()} | self._last_row_seconds | self._so_far()

    def complete_row(self) -> dict[str, float]:
        """What the time since the last row, in which the run ends, changes in that row."""
        taken = self.clock.take()
        self._step_seconds += taken["step"]
        for name, seconds in taken.items():
            key = f"seconds/{name}"
            self._last_row_seconds[key] = self._last_row_seconds.get(key, 0.0) + seconds
        return self._last_row_seconds | self._so_far()

    def _means(self, steps: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
        """What a row says of steps that are finite."""
        total = {k: np.sum([m[k] for m in steps], axis=0, dtype=np.float64) for k in steps[0]}
        row = {k: float(total[k] / len(steps)) for k in NORMS}
        row |= {f"{k}_max": float(max(m[k] for m in steps)) for k in ("loss", "grad_norm")}
        losses = np.array([m["loss"] for m in steps], np.float64)
        row["spikes"] = float(np.sum(losses > SPIKE * np.median(losses)))
        rows = total["count"].sum()
        for name, loss, square, count in zip(
            self._task_names,
            *(total[key] for key in ("loss_sum", "latent_square_sum", "count")),
            strict=True,
        ):
            if count:
                row[f"latent_square/{name}"] = float(square / count)
                row[f"loss/{name}"] = float(loss / count)
                row[f"count/{name}"] = float(count)
                row[f"share/{name}"] = float(count / rows)
        return row

    def _total(self, records: Mapping[str, int]) -> dict[str, float]:
        totals = {
            f"records/{name}": self._records_before.get(f"records/{name}", 0.0) + count
            for name, count in records.items()
        }
        # Of forty datasets most have no damage.
        return {k: total for k, total in totals.items() if total or k.count("/") == 1}

    def _so_far(self) -> dict[str, float]:
        seconds = self._seconds_before + self.clock.elapsed
        return {"time": seconds, "goodput": self._step_seconds / seconds}


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _ranges(ids: np.ndarray) -> list[str]:
    """Whole numbers, ascending, those that follow each other as one: 3, 16 to 23."""
    ids = np.unique(ids.astype(np.int64))
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    return [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs if len(run)]


def write_summary(
    workdir: epath.Path, config: Config, task_names: Sequence[str], *, num_parameters: int
) -> Json:
    """Writes summary.json, a finished run in a few numbers, and returns it.

    Losses, times and shares are those of the rows that metrics.jsonl has; null where it has none.
    """
    rows = [row for row in writers.read_metrics(workdir / "metrics.jsonl") if "loss" in row]
    counts = {name: sum(row.get(f"count/{name}", 0.0) for row in rows) for name in task_names}
    total_count = sum(counts.values())
    total_weight = sum(task.weight for task in config.tasks.values())
    summary = {
        "stage": config.name,
        "steps": config.train.steps,
        "seconds": max((row.get("time", 0.0) for row in rows), default=0.0),
        "first_loss": rows[0]["loss"] if rows else None,
        "last_loss": rows[-1]["loss"] if rows else None,
        "shares": {name: count / total_count for name, count in counts.items() if count},
        "weights": {name: task.weight / total_weight for name, task in config.tasks.items()},
        "parameters": num_parameters,
        "config": config.to_dict(),
    }
    write_whole(workdir / "summary.json", json.dumps(summary, indent=1))
    return summary
