"""Follows a run while it trains: each of its checkpoints is evaluated once, as they come.

    WORKDIR/evaluations/geneval.jsonl   a row a step: its `numbers`, or its `error`
    WORKDIR/tensorboard/geneval         the numbers as scalars geneval/NUMBER, made from the rows

A step that has numbers is not evaluated again, whatever ended the follower before. One that failed
is tried once each time the follower starts. The oldest checkpoint comes first. One that training
removes before it was read is passed over: with `train.best` those that wait stay (`retention`).
While a checkpoint is being written or removed it is not looked at. Once its parameters are read, it
is not needed any more.

All processes call everything here. Process 0 chooses the step, and writes.
"""

import contextlib
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Collection, Iterator

import jax
import numpy as np
from etils import epath

from univg_jax import assembly
from univg_jax.errors import NotFoundError, UserError, shorten
from univg_jax.evaluation.results import Done, Json
from univg_jax.files import append_lines, read_json
from univg_jax.lock import WorkdirLock
from univg_jax.pipeline import Pipeline
from univg_jax.retention import evaluations, read_evaluations
from univg_jax.settings import Config
from univg_jax.together import of_first, together
from univg_jax.workdir import CHECKPOINTS, CONFIG, finished_steps
from univg_jax.writers import TensorBoardWriter, is_number

POLL = 2.0  # seconds between two looks at the workdir
_NONE, _OVER = -1, -2  # in place of a step: there is none now, and there will be none

Say = Callable[[str], None]


def wait_for_run(workdir: epath.PathLike, *, say: Say) -> None:
    """Returns when the run in `workdir`, which need not exist yet, has its first checkpoint."""
    _Steps(epath.Path(workdir), say=say).wait()


def follow(
    workdir: epath.PathLike,
    benchmark: str,
    *,
    load: Callable[[epath.Path], Pipeline],
    job: Callable[[Pipeline], Done],
    settings: Json,
    say: Say,
    show: Callable[[int, Done], None],
) -> None:
    """Evaluates the checkpoints of a run until it is finished and all of them are evaluated.

    `load` gives the pipeline of the first checkpoint; later ones are `Pipeline.at`. `settings` say
    how `job` evaluates, and are stored in each row. `say` is told in a line what happens, `show`
    the step and what is done, once its row is written.

    Raises UserError if another process that lives follows the run on this benchmark, if rows that
    are there have other settings, and at the end if an evaluation failed.
    """
    workdir = epath.Path(workdir)
    is_main = jax.process_index() == 0
    scalars = workdir / "tensorboard" / benchmark
    with WorkdirLock(scalars, active=is_main) as lock, contextlib.ExitStack() as stack:
        log = None
        if is_main:
            log = stack.enter_context(contextlib.closing(_Log(workdir, benchmark, settings)))
        steps = _Steps(workdir, done=log.steps if log else (), say=say)
        blank, failed = None, []
        for step in steps:
            path, failure = workdir / CHECKPOINTS / str(step), None
            try:
                with together():
                    pipeline = load(path) if blank is None else blank.at(path)
            except Exception as error:
                if steps.is_gone(step):
                    say(f"step {step} was removed before it could be read: it is left out")
                    continue
                if not isinstance(error, UserError):
                    raise
                failure = error
            else:
                blank = dataclasses.replace(pipeline, params=None)
                try:
                    done = job(pipeline)
                except UserError as error:
                    failure = error
                del pipeline  # so that the next parameters have its memory
            if failure is not None:
                failed.append(step)
                say(f"step {step} could not be evaluated: {failure}")
                if log:
                    lock.confirm()
                    log.add(step, error=str(failure))
                continue
            if log:
                lock.confirm()
                log.add(step, **_found(done))
            show(step, done)
    if failed:
        steps = ", ".join(map(str, failed))
        raise UserError(
            f"{workdir}: the evaluation of steps {steps} failed; the same command tries them again"
        )
    say(f"{workdir}: the training is finished, and its checkpoints are evaluated")


def _found(done: Done) -> Json:
    numbers = {name: x if is_number(x) else None for name, x in done.numbers.items()}
    return {"numbers": numbers, "primary": done.primary, "folder": str(done.folder)}


class _Steps:
    """The steps to evaluate, as they come, the same ones on all processes; each is given once."""

    def __init__(self, workdir: epath.Path, *, done: Collection[int] = (), say: Say) -> None:
        self._workdir, self._given, self._say = workdir, set(done), say

    def __iter__(self) -> Iterator[int]:
        while (step := self.wait()) != _OVER:
            self._given.add(step)
            yield step

    def wait(self) -> int:
        """The next step, or _OVER; says once that it waits."""
        is_waiting = False
        while (step := self._agreed(self._next)) == _NONE:
            if not is_waiting:
                newest = max(self._given, default=None)
                after = "the first checkpoint" if newest is None else f"one after step {newest}"
                there = "" if self._workdir.exists() else ", which does not exist yet"
                self._say(f"waiting for {after} in {self._workdir}{there}")
            is_waiting = True
            time.sleep(POLL)
        return step

    def is_gone(self, step: int) -> bool:
        """Whether a step's checkpoint was removed, or is in this moment."""
        time.sleep(POLL)
        return bool(self._agreed(lambda: step not in finished_steps(self._workdir)))

    def _next(self) -> int:
        is_over = _is_finished(self._workdir)  # asked first: then no step comes any more
        new = [step for step in finished_steps(self._workdir) if step not in self._given]
        return min(new) if new else _OVER if is_over else _NONE

    @staticmethod
    def _agreed(find: Callable[[], int]) -> int:
        """What process 0 finds."""
        return int(of_first(np.array(find() if jax.process_index() == 0 else 0, np.int32)))


def _is_finished(workdir: epath.Path) -> bool:
    """Whether a run has made all steps of its own config."""
    try:
        config = Config.of(read_json(workdir / CONFIG))
    except NotFoundError:
        return False  # it has not begun
    return assembly.is_finished(config, workdir)


class _Log:
    """The rows of a run's evaluations, and the scalars that are made from them."""

    def __init__(self, workdir: epath.Path, benchmark: str, settings: Json) -> None:
        self._file, self._benchmark = evaluations(workdir, benchmark), benchmark
        self._settings = json.loads(json.dumps(settings))  # as a row gives them back
        rows = [row for row in read_evaluations(self._file) if "numbers" in row]
        for row in rows:
            self._check(row.get("settings", {}), row["step"])
        self.steps = tuple(row["step"] for row in rows)
        # All of them anew, in place of the earlier ones: so each is shown once.
        folder = str(workdir / "tensorboard" / benchmark)
        self._scalars = TensorBoardWriter(folder, purge_step=0)
        for row in rows:
            self._write_scalars(row)

    def add(self, step: int, **found: object) -> None:
        """Adds a row."""
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        row = {"step": step, **found, "date": date, "settings": self._settings}
        append_lines(self._file, [json.dumps(row)])
        self._write_scalars(row)

    def close(self) -> None:
        """Ends the file of scalars."""
        self._scalars.close()

    def _write_scalars(self, row: Json) -> None:
        numbers = {
            f"{self._benchmark}/{name}": value
            for name, value in row.get("numbers", {}).items()
            if is_number(value)
        }
        self._scalars.write_scalars(row["step"], numbers)
        self._scalars.flush()

    def _check(self, theirs: Json, step: int) -> None:
        ours = self._settings
        differing = [
            f"{name} is {ours.get(name)!r}, there {theirs.get(name)!r}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if differing:
            raise UserError(
                f"{self._file} was made with other settings, which do not compare (step {step}: "
                f"{shorten(differing, 3)}): repeat those, or move the file away"
            )
