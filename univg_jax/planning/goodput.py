"""Which share of its time a run on many chips trains, and how often it should save.

Chips fail independently of each other and of their age, so a pod of n chips fails at the rate
n / MTBF. A failure costs what was done since the newest checkpoint that is whole, and the time
until the run steps again. With

    r        failures a second
    L        seconds from one save to the next: `every` steps, and what a save blocks
    w        seconds from the begin of a save until it is whole; meanwhile the run goes on
    R        seconds from a failure to the first step after it

a run between two failures ends k checkpoints with the probability of living long enough: the first
takes L - blocked + w, each further one L. Another failure during R begins it anew, so that it takes
(exp(r R) - 1) / r on average. Of the quotient of both means there remains

    goodput = r (seconds of `every` steps) exp(-r (w - blocked + R)) / (exp(r L) - 1)

`simulate` plays the same chips, saves and failures out one after another, and knows none of this.
"""

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from univg_jax.errors import UserError
from univg_jax.fields import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """What the parts of a run take, in seconds."""

    step: float = setting(help="one training step", above=0)
    other: float = setting(0.0, "of each step, what else goes on between steps", least=0)
    blocked: float = setting(0.0, "for how long a save holds the steps up", least=0)
    save: float = setting(help="from the begin of a save until it is whole", least=0)
    restore: float = setting(help="from the start of the program until the state is there", least=0)
    compile: float = setting(0.0, "the programs", least=0)
    restart: float = setting(help="from a failure until the program runs again", least=0)

    @property
    def recovery(self) -> float:
        """From a failure to the first step after it."""
        return self.restart + self.restore + self.compile

    def between_saves(self, every: int) -> float:
        """From one save to the next, which waits until the one before is whole."""
        return max(every * (self.step + self.other) + self.blocked, self.save)


def measured(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the rows of a run's metrics.jsonl tell of its `Times`.

    Of a save they have what it blocks alone. Raises UserError if there are no steps in them.
    """
    count = max((row["step"] for row in rows), default=0)
    seconds: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith("seconds/"):
                name = key.removeprefix("seconds/")
                seconds[name] = seconds.get(name, 0.0) + value
    if not count or not seconds.get("step"):
        raise UserError("the rows have no steps, whose seconds could be counted")
    starts = max(1, sum("seconds/compile" in row for row in rows))
    saves = max(1, sum("seconds/save" in row for row in rows))
    named = ("start", "compile", "step", "save")
    return {
        "step": seconds["step"] / count,
        "other": sum(value for name, value in seconds.items() if name not in named) / count,
        "blocked": seconds.get("save", 0.0) / saves,
        "restore": seconds.get("start", 0.0) / starts,
        "compile": seconds.get("compile", 0.0) / starts,
    }


def expected(times: Times, *, chips: int, mtbf: float, every: int) -> float:
    """The share of all time that goes to steps that count. `mtbf` of one chip, in seconds."""
    rate, length = chips / mtbf, times.between_saves(every)
    lost = math.exp(-min(rate * (times.save - times.blocked + times.recovery), 700.0))
    return rate * every * times.step * lost / math.expm1(min(rate * length, 700.0))


def best_every(times: Times, *, chips: int, mtbf: float) -> int:
    """The number of steps from save to save with the largest expected goodput.

    It rises up to there and falls afterwards, so that a search by thirds finds it.
    """
    step = times.step + times.other
    low = max(1, math.floor((times.save - times.blocked) / step))  # below, saves wait for saves
    high = low + 2 + math.ceil(3 * mtbf / chips / step)
    while high - low > 2:
        third = (high - low) // 3
        a, b = low + third, high - third
        if _value(times, chips, mtbf, a) < _value(times, chips, mtbf, b):
            low = a + 1
        else:
            high = b - 1 if b > a else b
    return max(range(low, high + 1), key=lambda every: _value(times, chips, mtbf, every))


def _value(times: Times, chips: int, mtbf: float, every: int) -> float:
    return expected(times, chips=chips, mtbf=mtbf, every=every)


def simulate(
    times: Times, *, chips: int, mtbf: float, every: int, seconds: float, seed: int
) -> float:
    """The goodput of one run of at least so many `seconds`, event by event."""
    rng = np.random.default_rng(seed)
    lifetimes = rng.exponential(mtbf, chips)
    failures = [(float(life), chip) for chip, life in enumerate(lifetimes)]
    heapq.heapify(failures)

    def replace() -> float:
        """When the next chip fails; a new one takes its place."""
        when, chip = failures[0]
        heapq.heapreplace(failures, (when + rng.exponential(mtbf), chip))
        return when

    now = whole = 0.0  # `whole`: steps in the newest checkpoint that is whole
    failure = replace()
    while now < seconds:
        if failure < now + times.recovery:
            now, failure = failure, replace()
            continue
        now += times.recovery
        done, written = whole, []  # saves that are not whole yet: when they are, and their steps
        while now < failure and now < seconds:
            done += every
            begin = now + every * (times.step + times.other)
            if written:  # the save before comes first
                begin = max(begin, written[-1][0])
            written.append((begin + times.save, done))
            now = begin + times.blocked
            whole = max([whole, *(n for when, n in written if when <= min(now, failure))])
            written = [(when, n) for when, n in written if when > now]
        if now >= failure:
            now, failure = failure, replace()
    return whole * times.step / now
