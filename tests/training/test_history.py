"""Rows of metrics: their clock has no gaps, and time that was lost counts once."""

import types

import jax.numpy as jnp
from etils import epath

from tests import helpers
from univg_jax import writers
from univg_jax.settings import Train
from univg_jax.training import history


def test_goodput_counts_a_step_that_was_lost_and_made_again_once(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(history, "time", types.SimpleNamespace(monotonic=lambda: now))
    metrics = {name: jnp.ones(()) for name in ("loss", "grad_norm", "param_norm")}
    metrics |= {name: jnp.ones(2) for name in ("loss_sum", "latent_square_sum", "count")}
    metrics |= {"is_finite": jnp.ones(2, bool), "sample_id": jnp.arange(2)}

    def attempt(*, start, stop):
        """3 s to start, then for every step 1 s of data, 4 s of step, its row, 2 s of saving."""
        nonlocal now
        attempt = history.History(epath.Path(tmp_path), helpers.TASKS, Train())
        clock = attempt.clock
        rows = attempt.resume(start, is_own=start > 0)
        writer = writers.JsonlWriter(tmp_path / "metrics.jsonl", rows)
        now += 3
        clock.switch("step")
        for step in range(start + 1, stop + 1):
            with clock("data"):
                now += 1
            now += 4
            attempt.add(step, metrics)
            records = {"quarantined": 2 * (step - start)}
            writer.write_scalars(step, attempt.take_row(step, records=records))
            writer.flush()
            with clock("save"):
                now += 2
        writer.write_scalars(stop, attempt.complete_row())
        writer.flush()

    attempt(start=0, stop=3)
    attempt(start=2, stop=3)  # step 3 was not saved
    rows = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["time"] == (3 + 3 * 7) + (3 + 1 * 7)
    assert rows[-1]["goodput"] == 3 * 4 / rows[-1]["time"]
    assert rows[1]["steps_per_second"] == 1 / 5  # of the loop, without saving
    # those of step 3 count once, though two attempts came across them
    assert [row["records/quarantined"] for row in rows] == [2, 4, 6]


def test_every_second_belongs_to_one_activity(monkeypatch):
    now = 0.0
    monkeypatch.setattr(history, "time", types.SimpleNamespace(monotonic=lambda: now))
    clock = history.Clock("start")
    now = 1.0
    clock.switch("step")
    with clock("data"):
        now = 3.0
        clock.activity = "step"  # the wait was free, as it turned out
    with clock("save"):
        now = 7.0
        with clock("log"):
            now = 8.0
        now = 10.0
    now = 15.0
    assert clock.take() == {"start": 1.0, "step": 7.0, "data": 0.0, "save": 6.0, "log": 1.0}
    assert clock.elapsed == 15.0
    assert clock.take() == {"data": 0.0, "step": 0.0}
