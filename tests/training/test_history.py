"""Rows of metrics: their clock has no gaps, and time that was lost counts once."""

import json
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from tests import helpers
from univg_jax import writers
from univg_jax.errors import NonFiniteLossError
from univg_jax.settings import Train
from univg_jax.training import history


def metrics_of(**changes):
    """A step's metrics with four rows, of which each task has two."""
    metrics = {name: jnp.ones(()) for name in ("loss", "grad_norm", "param_norm")}
    metrics |= {name: 2 * jnp.ones(2) for name in ("loss_sum", "latent_square_sum", "count")}
    metrics |= {"is_finite": jnp.ones(4, bool), "sample_id": jnp.array([7, 5, 6, 12], jnp.uint32)}
    return metrics | {name: jnp.asarray(x) for name, x in changes.items()}


def make_history(folder, **settings):
    made = history.History(epath.Path(folder), helpers.TASKS, Train(**settings))
    made.clock.switch("step")
    return made


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


def test_a_row_tells_the_largest_norms_and_the_spikes_of_the_loss(tmp_path):
    found = make_history(tmp_path)
    losses, norms = (1.0, 1.2, 2.5, 0.9, 30.0), (0.5, 0.25, 8.0, 0.25, 1.0)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        found.add(step, metrics_of(loss=loss, grad_norm=norm))
    row = found.take_row(5, records={})
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert (row["loss_max"], row["grad_norm"], row["grad_norm_max"]) == (30.0, 2.0, 8.0)
    assert row["spikes"] == 2  # 2.5 and 30 are more than twice the median, 1.2
    found.add(6, metrics_of(grad_norm=0.125))
    row = found.take_row(6, records={})  # the records are of the row's own steps
    assert (row["loss_max"], row["grad_norm_max"], row["spikes"]) == (1.0, 0.125, 0)


def test_a_step_that_is_not_finite_is_in_no_record_of_norms(tmp_path):
    found = make_history(tmp_path, non_finite="skip")
    found.add(1, metrics_of(grad_norm=3.0))
    found.add(2, metrics_of(grad_norm=jnp.inf))
    row = found.take_row(2, records={})
    assert (row["grad_norm_max"], row["spikes"], row["skipped"]) == (3.0, 0, 1)


@pytest.mark.parametrize("name", ["grad_norm", "param_norm"])
def test_where_the_losses_are_finite_the_whole_batch_is_named(tmp_path, name):
    message = (
        rf"{name} is inf at step 7 \(all losses are finite; tasks ie; samples 5 to 7, 12\); that "
        "state was not saved"
    )
    with pytest.raises(NonFiniteLossError, match=message):
        make_history(tmp_path).add(7, metrics_of(count=[0.0, 4.0], **{name: jnp.inf}))


def test_only_rows_whose_loss_is_not_finite_are_named_where_there_are_some(tmp_path):
    bad = dict(loss=jnp.nan, loss_sum=[1.0, jnp.nan], is_finite=[True, True, False, False])
    with pytest.raises(
        NonFiniteLossError, match=r"loss is nan at step 7 \(tasks ie; samples 6, 12\)"
    ):
        make_history(tmp_path).add(7, metrics_of(**bad))


def test_the_line_of_a_large_batch_is_short(tmp_path):
    size = dict(is_finite=jnp.ones(4096, bool), sample_id=3 * jnp.arange(4096, dtype=jnp.uint32))
    with pytest.raises(NonFiniteLossError, match=r"samples 0, 3, .*, 21 and 4088 more\)") as found:
        make_history(tmp_path).add(7, metrics_of(grad_norm=jnp.inf, **size))
    assert len(str(found.value)) < 200


def test_the_bound_of_skipped_steps_is_that_of_the_run_and_not_of_an_attempt(tmp_path):
    """Attempts that end after every second step, all of which are skipped: the fifth ends."""
    settings, state = dict(non_finite="skip", max_skipped=4), {}
    for step in (2, 4):
        found = make_history(tmp_path, **settings)
        found.set_state(state)
        for k in (step - 1, step):
            found.add(k, metrics_of(grad_norm=jnp.inf))
        found.take_row(step, records={})  # then no steps are left for the next row
        state = json.loads(json.dumps(found.get_state(records={}, is_left=False)))
    found = make_history(tmp_path, **settings)
    found.set_state(state)
    with pytest.raises(NonFiniteLossError, match="as were the 4 steps before it"):
        found.add(5, metrics_of(grad_norm=jnp.inf))


def test_histories_of_older_checkpoints_are_read(tmp_path):
    found = make_history(tmp_path, non_finite="skip")
    found.set_state({})
    steps = [{name: [1.0] for name in ("loss", "count")}]
    older = dict(steps=steps, seconds={"step": 2.0}, records={}, time=3.0, is_left=True)
    found.set_state(older)
    assert found.is_left
    state = found.get_state(records={}, is_left=False)
    assert (state["steps"], state["skipped"]) == (steps, 0)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text(), x))
NAMES = st.sampled_from(["step", "time", "seconds/step", "records/quarantined", "loss", "count/ie"])


@given(damaged=st.lists(VALUES | st.dictionaries(NAMES, VALUES, min_size=1), max_size=4))
def test_whatever_the_rows_are_a_run_goes_on_with_those_that_can_be(tmp_path_factory, damaged):
    folder = tmp_path_factory.mktemp("rows")
    good = [{"step": step, "time": float(step), "seconds/step": 0.5} for step in (101, 102, 103)]
    lines = [json.dumps(row) for row in [*damaged, *good]]
    pathlib.Path(folder / "metrics.jsonl").write_text("\n".join(lines))
    found = make_history(folder)
    rows = found.resume(103, is_own=True)
    assert [row for row in rows if row["step"] > 100] == good
    found.add(104, metrics_of())
    assert found.take_row(104, records={"quarantined": 1})["loss"] == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"step": 2, "seconds/step": null}', "its 'seconds/step' is None"),
        ('{"step": 2, "loss": NaN}', "its 'loss' is nan"),
        ('{"step": 2.5, "loss": 1}', "its step is 2.5"),
        ('{"loss": 1}', "its step is None"),
        ("[2]", "it is no object"),
    ],
)
def test_a_row_that_cannot_be_is_left_out_and_named(tmp_path, caplog, line, reason):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    assert make_history(tmp_path).resume(3, is_own=True) == [{"step": 1}, {"step": 3}]
    assert f"{tmp_path}/metrics.jsonl: line 2 is left out: {reason} (" in caplog.text
