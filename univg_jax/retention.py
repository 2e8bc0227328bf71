"""Which checkpoints of a run stay while it trains.

The newest `keep` do, and every `keep_every`-th step. With `train.best` also the best `keep_best` by
a number that `univg evaluate --follow` writes to `evaluations/BENCHMARK.jsonl` in the workdir, and
the oldest `keep` of those that wait for their evaluation: these are what a follower takes next, so
none is removed under it, and a run that nobody follows keeps twice as many at most. Without
`train.best` nobody waits for a follower.

A step that is saved because the run was told to end stays until the next one is saved, and pushes
none out: an interrupted run keeps the steps that an undisturbed one keeps.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from univg_jax.errors import quote, suggestion
from univg_jax.settings import Train
from univg_jax.together import of_first
from univg_jax.trees import Json
from univg_jax.workdir import EVALUATIONS
from univg_jax.writers import is_number, read_rows


class Retention:
    """Orbax asks it at each save (its `PreservationPolicy`), on all processes.

    The rows are read anew each time. Of steps that are as good as each other the first ones stay.
    A number that no row has is named once, with a warning.
    """

    def __init__(self, workdir: epath.PathLike, settings: Train) -> None:
        self._settings, self._best = settings, settings.best_number
        self._file = evaluations(workdir, self._best.benchmark) if self._best else None
        self._has_warned = False

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> Sequence[bool]:
        """Whether each of the checkpoints, of which it looks at the `step`, stays."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self.kept(steps)
        stays = np.array([step in kept for step in steps], np.int32)
        if self._best is not None:
            # Another process may have read the file before the follower's newest row.
            stays = of_first(stays)
        return [bool(x) for x in stays]

    def kept(self, steps: Collection[int]) -> set[int]:
        """Those of the steps that stay."""
        steps, keep, every = sorted(steps), self._settings.keep, self._settings.keep_every
        if keep is None:
            return set(steps)
        planned = [step for step in steps if self._settings.saves_at(step)]
        newest = {*planned[-keep:], *steps[-1:]}
        newest |= {step for step in planned if every is not None and step % every == 0}
        if self._best is None:
            return newest
        rows = {row["step"]: row for row in read_evaluations(self._file)}
        waiting = [step for step in planned if step not in rows and step not in newest]
        return {*newest, *self._best_of(planned, rows), *waiting[:keep]}

    def _best_of(self, steps: Sequence[int], rows: dict[int, Json]) -> list[int]:
        """The best of the steps; none where no row has the number."""
        name = self._best.number
        found = {step: row.get("numbers", {}) for step, row in rows.items()}
        names = {key: None for numbers in found.values() for key in numbers}
        if names and name not in names and not self._has_warned:
            self._has_warned = True
            logging.warning(
                "train.best: %s has no number %r%s", self._file, name, suggestion(name, names)
            )
        values = {s: found[s][name] for s in steps if is_number(found.get(s, {}).get(name))}
        sign = 1 if self._best.is_lower_better else -1
        return sorted(values, key=lambda s: (sign * values[s], s))[: self._settings.keep_best]


def evaluations(workdir: epath.PathLike, benchmark: str) -> epath.Path:
    """Where the rows of a run's evaluations lie."""
    return epath.Path(workdir) / EVALUATIONS / f"{benchmark}.jsonl"


def read_evaluations(file: epath.PathLike) -> list[Json]:
    """The rows of a file of evaluations, in order of steps; none where there is no file.

    A row has `numbers`, each a number or null, or an `error`. A line that is no such row is left
    out with a warning: its step counts as not evaluated.
    """
    return read_rows(file, _check_evaluation)


def _check_evaluation(row: Json) -> None:
    numbers = row.get("numbers")
    if "numbers" not in row:
        if not isinstance(row.get("error"), str):
            raise ValueError("it has neither numbers nor an error")
    elif not isinstance(numbers, dict):
        raise ValueError(f"its numbers are {quote(numbers)}")
    elif bad := [k for k, x in numbers.items() if not isinstance(x, int | float | None)]:
        raise ValueError(f"its {quote(bad[0])} is {quote(numbers[bad[0]])}")
    if not isinstance(row.get("settings", {}), dict):
        raise ValueError(f"its settings are {quote(row['settings'])}")
