"""The trainer: exact resume, independence of devices, hand-off, and a clear end for a NaN."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import helpers
from univg_jax import checkpoint, sharding, train, writers
from univg_jax.train import NonFiniteLossError, Step

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def parts():
    conditioner, frozen = helpers.tiny_conditioner()
    return conditioner, frozen, helpers.tiny_model(conditioner)


def run(parts, workdir, *, stream=None, config=None, mesh=None, preview=None):
    conditioner, frozen, model = parts
    return train.train(
        config or helpers.tiny_config(),
        workdir=workdir,
        stream=stream or helpers.CountingStream(),
        model=model,
        conditioner=conditioner,
        frozen=frozen,
        task_names=helpers.TASKS,
        validation={"t2i": [helpers.batch(1000)], "ie": [helpers.batch(1001)]},
        preview=preview,
        mesh=mesh,
    )


def assert_equal_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    """An uninterrupted run: its folder, stream and final state."""
    workdir = tmp_path_factory.mktemp("finished")
    stream = helpers.CountingStream()
    state = run(parts, workdir, stream=stream)
    return workdir, stream, jax.device_get(state)


class Killed(Exception):
    pass


class KilledStream(helpers.CountingStream):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def __next__(self):
        if not self.left:
            raise Killed
        self.left -= 1
        return super().__next__()


@pytest.mark.parametrize("after", [3, 5])
def test_killed_and_resumed_equals_uninterrupted_bitwise(parts, finished, tmp_path, after):
    _, uninterrupted, expected = finished
    first, second = KilledStream(after), helpers.CountingStream()
    with pytest.raises(Killed):
        run(parts, tmp_path, stream=first)
    state = run(parts, tmp_path, stream=second)
    assert_equal_bits(state, expected)
    resumed = 6 - len(second.seen) // 8
    assert resumed == after // 2 * 2  # the last multiple of save_every
    assert first.seen[: resumed * 8] + second.seen == uninterrupted.seen
    rows = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # no step twice, none missing


def test_a_finished_run_restores_and_does_nothing(parts, finished):
    workdir, _, expected = finished
    stream = helpers.CountingStream()
    assert_equal_bits(run(parts, workdir, stream=stream), expected)
    assert stream.seen == []


def test_what_a_run_leaves_behind(finished):
    workdir, _, state = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["shares"] == {"t2i": 0.5, "ie": 0.5}
    assert summary["parameters"] == sum(x.size for x in jax.tree.leaves(state.params))
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    assert summary["first_loss"] == rows[0]["loss"]
    assert summary["last_loss"] == rows[-1]["loss"]
    assert {"loss/t2i", "loss/ie", "share/ie", "lr", "grad_norm", "images_per_second", "seconds/data"} <= rows[0].keys()
    assert [row["step"] for row in rows if "val/loss/ie" in row] == [3, 6]
    # A row's loss is the mean over its tasks' rows.
    assert rows[0]["loss"] == pytest.approx((rows[0]["loss/t2i"] + rows[0]["loss/ie"]) / 2, rel=1e-5)
    assert "backbone" in (workdir / "parameters.txt").read_text()
    assert list((workdir / "tensorboard").iterdir())


@pytest.mark.parametrize("axes", [dict(data=8), dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_devices_do_not_change_the_loss(parts, axes):
    conditioner, frozen, model = parts
    step = Step(config=helpers.tiny_config(), model=model, conditioner=conditioner, task_names=helpers.TASKS)

    def losses(mesh):
        jax.set_mesh(mesh)
        init = lambda: step.init(jax.random.key(0), frozen, helpers.batch())  # noqa: E731
        shardings = sharding.tree_shardings(jax.eval_shape(init), mesh)
        state = jax.jit(init, out_shardings=shardings)()
        update = jax.jit(step.update, out_shardings=(shardings, None))
        values = []
        for i in range(4):
            state, metrics = update(state, frozen, sharding.shard_batch(helpers.batch(i), mesh))
            values.append(float(metrics["loss"]))
        return values

    one = losses(sharding.make_mesh(data=1, devices=jax.devices()[:1]))
    # Only the order of float32 sums differs; Adam's first steps magnify it by about 1 / sqrt(eps of the moments).
    np.testing.assert_allclose(losses(sharding.make_mesh(**axes)), one, rtol=2e-5)


def test_accumulation_equals_the_whole_batch(parts):
    conditioner, frozen, model = parts

    def first_update(accumulate):
        config = helpers.tiny_config()
        config.optim.accumulate = accumulate
        step = Step(config=config, model=model, conditioner=conditioner, task_names=helpers.TASKS)
        state = step.init(jax.random.key(0), frozen, helpers.batch())
        return jax.jit(step.update)(state, frozen, helpers.batch())[1]

    whole, parts_ = first_update(1), first_update(4)
    assert float(parts_["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-5)  # float32 sums in another order
    assert float(parts_["grad_norm"]) == pytest.approx(float(whole["grad_norm"]), rel=1e-4)
    np.testing.assert_allclose(parts_["loss_sum"], whole["loss_sum"], rtol=1e-5)


def test_rows_that_are_not_valid_count_nowhere(parts):
    conditioner, frozen, model = parts
    step = Step(config=helpers.tiny_config(), model=model, conditioner=conditioner, task_names=helpers.TASKS)
    state = step.init(jax.random.key(0), frozen, helpers.batch())
    full = helpers.batch()
    valid, target = full.valid.copy(), full.target.copy()
    valid[5:] = False
    target[5:] = 255 - target[5:]
    padded = dataclasses.replace(full, valid=valid)
    other_padding = dataclasses.replace(padded, target=target)
    update = jax.jit(step.update)
    (a, one), (b, two) = update(state, frozen, padded), update(state, frozen, other_padding)
    assert_equal_bits(a, b)
    assert_equal_bits(one, two)
    assert one["count"].sum() == 5


def test_one_batch_overfits(parts):
    conditioner, frozen, model = parts
    config = helpers.tiny_config()
    config.optim.lr = 1e-2
    step = Step(config=config, model=model, conditioner=conditioner, task_names=helpers.TASKS)
    state = jax.jit(step.init)(jax.random.key(0), frozen, helpers.batch())
    update = jax.jit(step.update)
    losses = []
    for _ in range(150):
        state, metrics = update(state, frozen, helpers.batch())
        losses.append(float(metrics["loss"]))
    # Eight random images of noise are all but incompressible: half of the first loss, that of a zero
    # velocity, needs their targets memorized.
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


def test_relative_paths_will_do(parts, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = _with(helpers.tiny_config(), steps=1)
    config.init_from.path = os.path.relpath(finished[0])
    run(parts, "here", config=config)
    assert checkpoint.list_steps("here") == (1,)


def test_hand_off_takes_the_average_and_starts_a_new_optimizer(parts, finished, tmp_path):
    workdir, _, previous = finished
    config = helpers.tiny_config()
    config.init_from.path = str(workdir)
    config.optim.lr = 0.0
    config.train.steps = 1
    state = jax.device_get(run(parts, tmp_path, config=config))
    assert_equal_bits(state.params, previous.ema)
    assert int(state.step) == 1


def test_hand_off_rejects_undeclared_parameters(parts, finished, tmp_path):
    conditioner, frozen, _ = parts
    config = helpers.tiny_config()
    config.init_from.path = str(finished[0])
    deeper = helpers.tiny_model(conditioner, depth=3)
    with pytest.raises(ValueError, match="blocks"):
        run((conditioner, frozen, deeper), tmp_path, config=config)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(parts, tmp_path):

    config = helpers.tiny_config()
    conditioner, frozen, model = parts
    broken = dict(frozen, codec=dict(frozen["codec"]))
    run(parts, tmp_path, config=_with(config, steps=2))
    # From here on the codec is broken, as by a bad cast: the loss is NaN from step 3 on.
    broken["codec"]["mean"] = jnp.full_like(broken["codec"]["mean"], jnp.nan)
    with pytest.raises(NonFiniteLossError, match=r"loss is nan at step 3 \(tasks t2i, ie\)"):
        run((conditioner, broken, model), tmp_path, config=_with(helpers.tiny_config(), steps=6))
    assert checkpoint.list_steps(tmp_path) == (2,)


def _with(config, **train_fields):
    config.train.update(train_fields)
    return config


def test_previews_are_drawn_from_the_average(parts, tmp_path):
    drawn = []

    def preview(params, frozen, folder):
        drawn.append((jax.device_get(params), pathlib.Path(folder).name))
        return {"samples/t2i": np.zeros((4, 4, 3), np.uint8)}

    config = _with(helpers.tiny_config(), steps=2, sample_every=2)
    state = run(parts, tmp_path, config=config, preview=preview)
    (params, folder), *rest = drawn
    assert not rest
    assert folder == "0000002"
    assert_equal_bits(params, state.ema)


def test_validation_repeats_itself(finished, parts):
    """The same rows, times and noise: a run's last validation is reproduced from its checkpoint."""
    workdir, _, state = finished
    conditioner, frozen, model = parts
    step = Step(config=helpers.tiny_config(), model=model, conditioner=conditioner, task_names=helpers.TASKS)
    mesh = sharding.make_mesh(data=-1)
    again = train.evaluate(jax.jit(step.validate), state.ema, frozen, {"ie": [helpers.batch(1001)]}, mesh)
    logged = writers.read_metrics(workdir / "metrics.jsonl")[-1]["val/loss/ie"]
    assert again["val/loss/ie"] == pytest.approx(logged, rel=1e-6)
