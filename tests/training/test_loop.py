"""The trainer: exact resume, independence of devices, hand-off, and a clear end for a NaN."""

import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from tests import helpers
from tests.marks import nightly
from univg_jax import checkpoint, files, sharding, writers
from univg_jax.errors import NonFiniteLossError, Preempted, UserError
from univg_jax.training import loop
from univg_jax.workdir import is_claimed, list_steps


def run(workdir, *, config=None, **options):
    return helpers.train_tiny(config or helpers.tiny_config(), workdir, **options)


def assert_equal_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: its folder, stream and final state."""
    workdir = tmp_path_factory.mktemp("finished")
    stream = helpers.CountingStream()
    state = run(workdir, stream=stream)
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


@pytest.mark.parametrize("after", [3, *nightly(5)])
def test_killed_and_resumed_equals_uninterrupted_bitwise(finished, tmp_path, after):
    _, uninterrupted, expected = finished
    first, second = KilledStream(after), helpers.CountingStream()
    with pytest.raises(Killed):
        run(tmp_path, stream=first)
    state = run(tmp_path, stream=second)
    assert_equal_bits(state, expected)
    resumed = 6 - len(second.seen) // 8
    assert resumed == after // 2 * 2  # the last multiple of save_every
    assert first.seen[: resumed * 8] + second.seen == uninterrupted.seen
    rows = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # no step twice, none missing
    # each batch meets one damaged record, and what was read for lost steps counts once
    assert [row["records/quarantined"] for row in rows] == [1, 2, 3, 4, 5, 6]


class TerminatedStream(helpers.CountingStream):
    """SIGTERM comes while a batch is read, or when the stream is set to where a resumed run goes
    on.
    """

    def __init__(self, batch: int | None = None) -> None:
        super().__init__()
        self.left = batch

    def __next__(self):
        if self.left is not None:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().__next__()

    def set_state(self, state):
        super().set_state(state)
        if self.left is None:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_loses_nothing_and_repeats_nothing(finished, tmp_path):
    _, uninterrupted, expected = finished
    first, at_restore, second = TerminatedStream(5), TerminatedStream(), helpers.CountingStream()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="step 5 is saved"):
        run(tmp_path, stream=first)
    with pytest.raises(Preempted, match="step 5 is saved"):
        run(tmp_path, stream=at_restore)
    assert signal.getsignal(signal.SIGTERM) == handler
    state = run(tmp_path, stream=second)
    assert_equal_bits(state, expected)
    assert first.seen + at_restore.seen + second.seen == uninterrupted.seen
    assert at_restore.seen == []
    rows = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/loss/ie" in row] == [3, 6]


TIMES = ("seconds/", "time", "goodput", "steps_per_second", "images_per_second")


def rows_of(workdir):
    """The rows of metrics, but for what the clock says."""
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    return [{k: x for k, x in row.items() if not k.startswith(TIMES)} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir, config=sparse())
    return workdir


def sparse():
    """Rows at steps 2, 4, 5, 6, and the steps 4 and 6 are kept."""
    return _with(helpers.tiny_config(), log_every=5, eval_every=6, save_every=2, keep=2)


@pytest.mark.parametrize("stops", [[3, 1], *nightly([1], [3], [5], [1, 1, 1, 1, 1])], ids=str)
def test_rows_and_kept_steps_do_not_tell_where_a_run_was_interrupted(undisturbed, tmp_path, stops):
    for steps in stops:
        with pytest.raises(Preempted):
            run(tmp_path, config=sparse(), stream=TerminatedStream(steps))
    run(tmp_path, config=sparse())
    assert [row["step"] for row in rows_of(undisturbed)] == [2, 4, 5, 6]
    assert rows_of(tmp_path) == rows_of(undisturbed)
    assert list_steps(tmp_path) == list_steps(undisturbed) == (4, 6)


def test_a_run_killed_before_it_removed_its_old_steps_removes_them(undisturbed, tmp_path):
    """It had saved its last step, and has nothing else to do."""
    run(tmp_path, config=_with(sparse(), keep=None))
    assert list_steps(tmp_path) == (2, 4, 6)
    run(tmp_path, config=sparse())
    assert list_steps(tmp_path) == list_steps(undisturbed)


@pytest.mark.parametrize(
    ("signum", "at"),
    [
        (signal.SIGTERM, 2),
        (signal.SIGINT, 6),
        *nightly((signal.SIGTERM, 6), (signal.SIGINT, 2)),
    ],
)
def test_a_signal_while_sampling(tmp_path, signum, at):
    """The step is saved, and its samples and its row are made when the run goes on.

    Also the last step: the run is not done, and has no summary.
    """
    config = _with(helpers.tiny_config(), sample_every=2)
    made, signals = [], [signum]

    def preview(params, folder):
        if signals and int(folder.name) == at:
            os.kill(os.getpid(), signals.pop())
        for name in ("samples/t2i", "samples/ie"):
            made.append((int(folder.name), name))
            yield name, np.zeros((4, 4, 3), np.uint8)

    with pytest.raises(Preempted, match=f"step {at} is saved") as end:
        run(tmp_path, config=config, preview=preview)
    assert end.value.exit_code == 128 + signum
    assert list_steps(tmp_path)[-1] == at
    assert made.pop() == (at, "samples/t2i")
    assert [row["step"] for row in rows_of(tmp_path) if "loss" in row] == list(range(1, at))
    assert not (tmp_path / "summary.json").exists()
    run(tmp_path, config=config, preview=preview)
    names = ("samples/t2i", "samples/ie")
    assert made == [(step, name) for step in (2, 4, 6) for name in names]
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "summary.json").exists()


def test_a_signal_while_validating(finished, tmp_path):
    signals = [signal.SIGTERM]

    class Terminating(list):
        def __iter__(self):
            if signals:
                os.kill(os.getpid(), signals.pop())
            return super().__iter__()

    rows = {"t2i": Terminating([helpers.batch(1000)]), "ie": [helpers.batch(1001)]}
    with pytest.raises(Preempted, match="step 3 is saved"):
        run(tmp_path, validation=rows)
    state = run(tmp_path, validation=rows)
    assert_equal_bits(state, finished[2])
    assert rows_of(tmp_path) == rows_of(finished[0])


def test_a_finished_run_restores_and_does_nothing(finished):
    workdir, _, expected = finished
    stream = helpers.CountingStream()
    assert_equal_bits(run(workdir, stream=stream), expected)
    assert stream.seen == []


@pytest.mark.parametrize("kept", [0, 2])
def test_rows_that_are_missing_are_said_and_the_summary_is_written(
    finished, tmp_path, kept, caplog
):
    workdir = shutil.copytree(finished[0], tmp_path / "copy")
    metrics = workdir / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:kept]))
    (workdir / "summary.json").unlink()
    run(workdir)
    assert f"metrics.jsonl: the rows of steps {kept + 1} to 6 are missing" in caplog.text
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 6
    assert (summary["first_loss"] is None) == (kept == 0)


def test_what_a_run_leaves_behind(finished):
    workdir, _, state = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["shares"] == {"t2i": 0.5, "ie": 0.5}
    assert summary["parameters"] == sum(x.size for x in jax.tree.leaves(state.params))
    rows = writers.read_metrics(workdir / "metrics.jsonl")
    assert summary["first_loss"] == rows[0]["loss"]
    assert summary["last_loss"] == rows[-1]["loss"]
    assert {
        "loss/t2i",
        "loss/ie",
        "share/ie",
        "lr",
        "grad_norm",
        "images_per_second",
        "seconds/data",
    } <= rows[0].keys()
    assert [row["step"] for row in rows if "val/loss/ie" in row] == [3, 6]
    # A row's loss is the mean over its tasks' rows.
    assert rows[0]["loss"] == pytest.approx(
        (rows[0]["loss/t2i"] + rows[0]["loss/ie"]) / 2, rel=1e-5
    )
    assert "backbone" in (workdir / "parameters.txt").read_text()
    assert list((workdir / "tensorboard").iterdir())


def seconds(row):
    return {
        name.removeprefix("seconds/"): value
        for name, value in row.items()
        if name.startswith("seconds/")
    }


def test_a_row_has_the_mean_square_of_each_tasks_latents(finished):
    step_fns, frozen = helpers.tiny_step(helpers.tiny_config())
    shown = helpers.batch(0)
    latents = np.asarray(step_fns.conditioner.target_latents(frozen, shown))
    row = writers.read_metrics(finished[0] / "metrics.jsonl")[0]
    for index, name in enumerate(helpers.TASKS):
        expected = np.square(latents[shown.task == index]).mean()
        np.testing.assert_allclose(row[f"latent_square/{name}"], expected, rtol=1e-5)  # float32


def test_where_the_time_went_adds_up_to_the_wall_time(finished):
    rows = writers.read_metrics(finished[0] / "metrics.jsonl")
    total = dict.fromkeys(("start", "compile", "data", "step", "save", "eval", "log"), 0.0)
    before = 0.0
    for row in rows:
        # the clock has no gaps
        assert sum(seconds(row).values()) == pytest.approx(row["time"] - before, rel=1e-6)
        before = row["time"]
        for name, value in seconds(row).items():
            total[name] += value  # KeyError: a kind of time that nothing of this run took
    assert all(total.values()), total
    assert {"start", "compile"} <= seconds(rows[0]).keys()
    # those of the last step come after its row: it is amended
    assert {"save", "eval"} <= seconds(rows[-1]).keys()
    assert rows[-1]["goodput"] == pytest.approx(total["step"] / rows[-1]["time"], rel=1e-6)


class LateStream(helpers.CountingStream):
    """A batch comes after the device is done."""

    PAUSE = 0.01

    def __next__(self):
        for array in jax.live_arrays():
            with contextlib.suppress(RuntimeError):  # the state before this one, which was donated
                array.block_until_ready()
        time.sleep(self.PAUSE)
        return super().__next__()


def test_a_batch_that_the_device_waits_for_is_time_of_data(tmp_path):
    run(tmp_path, stream=LateStream())
    rows = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert all(row["seconds/data"] >= LateStream.PAUSE for row in rows), rows


class TwoShapes(helpers.CountingStream):
    """8 rows, 16 rows, 8 rows, ...; notes what had been compiled when the first was asked for."""

    def __init__(self, compiled) -> None:
        super().__init__()
        self.compiled, self.before = compiled, None

    def specs(self):
        return [helpers.SHAPE.spec(8), helpers.SHAPE.spec(16)]

    def __next__(self):
        if self.before is None:
            self.before = list(self.compiled)
        self.position += 1
        return helpers.batch(self.position, size=8 * (1 + self.position % 2))


def test_every_shape_is_compiled_before_the_first_batch_and_never_again(tmp_path, caplog):
    compiled = []
    caplog.set_level("INFO", logger="absl")

    def note(event, _, *, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(fun_name)

    monitoring.register_event_duration_secs_listener(note)
    try:
        stream = TwoShapes(compiled)
        validation = {
            "t2i": [helpers.batch(1000), helpers.batch(1001)],
            "ie": [helpers.batch(1002, size=16)],
        }
        run(
            tmp_path,
            stream=stream,
            validation=validation,
            config=_with(helpers.tiny_config(), steps=4),
        )
    finally:
        monitoring.unregister_event_duration_listener(note)
    for name, times in {"jit(init)": 1, "jit(update)": 2, "jit(validate)": 2}.items():
        assert stream.before.count(name) == compiled.count(name) == times, name
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("compiling")]
    assert [re.search(r"\.\.\.$|took [\d.]+ s$", line) is not None for line in said] == [True, True]


def test_what_does_not_fit_is_said_before_the_compilation(finished, tmp_path, monkeypatch):
    """Whether the run goes on, or begins from another one, or there is no space for its saves."""
    steps = finished[0] / "checkpoints" / "6"
    shutil.copytree(steps, tmp_path / "own" / "checkpoints" / "6")
    shutil.copytree(steps, tmp_path / "damaged" / "checkpoints" / "6")
    (tmp_path / "damaged" / "checkpoints" / "6" / "state" / "_METADATA").write_text("{")
    longer, handed = _with(helpers.tiny_config(), steps=8), helpers.tiny_config()
    handed.init_from.path = str(finished[0])
    whole = copy.deepcopy(handed)
    whole.init_from.which = "state"
    monkeypatch.setattr(loop.Programs, "compile", None)
    for workdir, config, model, message in [
        ("own", longer, dict(depth=3), "checkpoints/6 does not fit the model: "),
        (
            "own",
            longer,
            dict(hidden_dim=64),
            r"bias is float32\[1,32\], the model.s float32\[1,64\]",
        ),
        ("damaged", longer, {}, "state/_METADATA"),
        ("new", handed, dict(depth=3), "step 6 does not fit the model .declare leaves as new"),
        ("new", whole, dict(depth=3), "checkpoints/6 does not fit the model: "),
    ]:
        with pytest.raises(UserError, match=message):
            run(tmp_path / workdir, config=config, model=model)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    for workdir in ("own", "new"):
        with pytest.raises(UserError, match=r"needs .* has 0\.00 MiB left"):
            run(tmp_path / workdir, config=longer)


def test_a_trace_is_written_and_changes_nothing(finished, tmp_path):
    state = run(tmp_path, profile=range(2, 4))
    assert_equal_bits(state, finished[2])
    (trace,) = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [e for plane in planes for line in plane.lines for e in line.events]
    # the updates from step 2 to step 4
    assert [dict(e.stats)["step_num"] for e in events if e.name == "train"] == [3, 4]
    # Calls of Python, whose names begin so, are not traced: that is not safe with threads.
    assert not [e.name for e in events if e.name.startswith("$")]
    steps = [
        row["step"]
        for row in writers.read_metrics(tmp_path / "metrics.jsonl")
        if "seconds/profile" in row
    ]
    assert steps == [2, 4]


@pytest.mark.parametrize(
    "axes", [dict(data=8), *nightly(dict(data=1, fsdp=8)), dict(data=2, fsdp=2, tensor=2)]
)
def test_devices_do_not_change_the_loss(axes):
    step, frozen = helpers.tiny_step(helpers.tiny_config())

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
    # Only the order of float32 sums differs; Adam's first steps magnify it by about 1 / sqrt(eps of
    # the moments).
    np.testing.assert_allclose(losses(sharding.make_mesh(**axes)), one, rtol=2e-5)


def test_accumulation_equals_the_whole_batch():

    def first_update(accumulate):
        config = helpers.tiny_config()
        config.optim.accumulate = accumulate
        step, frozen = helpers.tiny_step(config)
        state = step.init(jax.random.key(0), frozen, helpers.batch())
        return jax.jit(step.update)(state, frozen, helpers.batch())[1]

    whole, parts_ = first_update(1), first_update(4)
    # float32 sums in another order
    assert float(parts_["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-5)
    assert float(parts_["grad_norm"]) == pytest.approx(float(whole["grad_norm"]), rel=1e-4)
    np.testing.assert_allclose(parts_["loss_sum"], whole["loss_sum"], rtol=1e-5)


def test_rows_that_are_not_valid_count_nowhere():
    step, frozen = helpers.tiny_step(helpers.tiny_config())
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


def test_one_batch_overfits():
    config = helpers.tiny_config()
    config.optim.lr = 1e-2
    step, frozen = helpers.tiny_step(config)
    state = jax.jit(step.init)(jax.random.key(0), frozen, helpers.batch())
    update = jax.jit(step.update)
    losses = []
    for _ in range(150):
        state, metrics = update(state, frozen, helpers.batch())
        losses.append(float(metrics["loss"]))
    # Eight random images of noise are all but incompressible: half of the first loss, that of a
    # zero velocity, needs their targets memorized.
    assert np.mean(losses[-10:]) < 0.5 * losses[0]


def test_relative_paths_will_do(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = _with(helpers.tiny_config(), steps=1)
    config.init_from.path = os.path.relpath(finished[0])
    run("here", config=config)
    assert list_steps("here") == (1,)


def test_hand_off_takes_the_average_and_starts_a_new_optimizer(finished, tmp_path):
    workdir, _, previous = finished
    config = helpers.tiny_config()
    config.init_from.path = str(workdir)
    config.optim.lr = 0.0
    config.train.steps = 1
    stream = helpers.CountingStream()
    state = jax.device_get(run(tmp_path, config=config, stream=stream))
    assert_equal_bits(state.params, previous.ema)
    assert int(state.step) == 1
    assert stream.after == 6  # it begins after the batches of the run that it follows


def test_a_resumed_stage_takes_its_place_in_the_data_from_itself(finished, tmp_path):
    config = _with(helpers.tiny_config(), steps=1)
    config.init_from.path = str(finished[0])
    run(tmp_path, config=config)
    stream = helpers.CountingStream()
    run(tmp_path, config=_with(config, steps=2), stream=stream)
    assert (stream.after, stream.position) == (0, 2)


@pytest.mark.parametrize("which", ["ema", "params"])
def test_only_an_average_that_is_handed_over_needs_no_warm_up(finished, tmp_path, which):
    config = _with(helpers.tiny_config(), steps=1)
    config.init_from.update(dict(path=str(finished[0]), which=which))
    state = jax.device_get(run(tmp_path, config=config))
    start = getattr(finished[2], which)
    # One update: the average moves by 1 - 0.9, or by the warm-up's 1 - 1/10.
    share = 0.1 if which == "ema" else 0.9
    jax.tree.map(
        # float32 numbers of size 1, and their differences
        lambda e, p, e0: np.testing.assert_allclose(e, e0 + share * (p - e0), atol=1e-6),
        *(state.ema, state.params, start),
    )


def test_hand_off_rejects_undeclared_parameters(finished, tmp_path):
    config = helpers.tiny_config()
    config.init_from.path = str(finished[0])
    with pytest.raises(UserError, match="blocks"):
        run(tmp_path, config=config, model=dict(depth=3))
    # The workdir is not that config's: the corrected one may have it.
    assert not is_claimed(tmp_path)
    config.init_from.path = ""
    run(tmp_path, config=_with(config, steps=1))
    assert is_claimed(tmp_path)


def test_another_runs_whole_state_may_be_resumed(finished, tmp_path):
    """A fork goes on with the other run's optimizer, step and place in the data."""
    config = _with(helpers.tiny_config(), steps=8)
    longer = run(tmp_path / "longer", config=config)
    config.init_from.update(dict(path=str(finished[0]), which="state"))
    stream = helpers.CountingStream()
    assert_equal_bits(run(tmp_path / "fork", config=config, stream=stream), longer)
    assert stream.seen == list(range(6 * 8, 8 * 8))


def test_an_interval_of_none_is_the_last_step_only(tmp_path):
    config = _with(helpers.tiny_config(), steps=3, keep=None, save_every=None)
    run(tmp_path, config=_with(config, log_every=None, eval_every=None, sample_every=None))
    assert list_steps(tmp_path) == (3,)
    (row,) = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert row["step"] == 3
    assert "val/loss/t2i" in row


def test_a_run_whose_workdir_was_taken_over_ends_at_its_next_step(tmp_path):
    stream = helpers.CountingStream()

    def check():
        if stream.position == 3:
            raise UserError("was taken over")

    with pytest.raises(UserError, match="was taken over"):
        run(tmp_path, stream=stream, check=check)
    assert list_steps(tmp_path) == (2,)


@pytest.mark.parametrize("may_write", [0, 1, 3, 6])
def test_a_run_that_lost_its_workdir_writes_nothing_any_more(tmp_path, may_write):
    """Neither rows nor checkpoints, nor what it would add at its end."""
    confirmed, left = [], {}

    def files():
        found = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
        kept = [path for path in found if "checkpoints" not in path.parts]
        return {path: path.read_bytes() for path in kept}

    def confirm():
        if threading.current_thread() is not threading.main_thread():
            return  # what was begun before may be committed
        confirmed.append(0)
        if len(confirmed) == may_write + 1:
            left.update(files())
        if len(confirmed) > may_write:
            raise UserError("was taken over")

    stream = helpers.CountingStream()
    with pytest.raises(UserError, match="was taken over"):
        run(tmp_path, stream=stream, confirm=confirm, profile=range(1, 5))
    assert files() == left
    # At the start, before the config is written, then a row at each step and a save at each second.
    rows = [row["step"] for row in writers.read_metrics(tmp_path / "metrics.jsonl")]
    expected = {0: ([], ()), 1: ([], ()), 3: ([1], ()), 6: ([1, 2, 3], (2,))}
    assert (rows, list_steps(tmp_path)) == expected[may_write]


def test_a_run_that_is_past_its_last_step_is_refused(finished):
    """It must not restart, and must not end as if it had been made."""
    with pytest.raises(UserError, match=r"is at step 6, past train\.steps=4"):
        run(finished[0], config=_with(helpers.tiny_config(), steps=4))


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(tmp_path):
    run(tmp_path, config=_with(helpers.tiny_config(), steps=2))

    # From here on the loss is NaN, from step 3 on.
    message = r"loss is nan at step 3 \(tasks t2i, ie; samples 16 to 23\)"
    with pytest.raises(NonFiniteLossError, match=message):
        run(tmp_path, change_frozen=broken)
    assert list_steps(tmp_path) == (2,)


def broken(frozen):
    """A codec as after a bad cast."""
    frozen["codec"]["mean"] = jnp.full_like(frozen["codec"]["mean"], jnp.nan)


def test_steps_that_are_not_finite_may_be_skipped_and_change_nothing(tmp_path, caplog):
    options = dict(non_finite="skip", save_every=2, log_every=2, eval_every=None, keep=None)
    config = _with(helpers.tiny_config(), steps=2, **options)
    before = run(tmp_path, config=config)
    with pytest.raises(NonFiniteLossError, match="the validation loss of task t2i is nan"):
        run(tmp_path, config=_with(config, steps=6), change_frozen=broken)
    after = checkpoint.restore(tmp_path / "checkpoints" / "4", before).state
    for name in ("params", "opt_state", "ema"):
        assert_equal_bits(getattr(before, name), getattr(after, name))
    assert int(after.step) == 4
    row = writers.read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (row["step"], row["skipped"], "loss" in row) == (4, 2, False)
    assert "loss is nan at step 3 (tasks t2i, ie; samples 16" in caplog.text


def test_so_many_steps_in_a_row_are_skipped_and_no_more(tmp_path):
    options = dict(non_finite="skip", max_skipped=2, eval_every=None)
    with pytest.raises(NonFiniteLossError, match=r"at step 3 .*, as were the 2 steps before it"):
        run(tmp_path, config=_with(helpers.tiny_config(), **options), change_frozen=broken)
    assert list_steps(tmp_path) == (2,)


def test_a_run_that_is_ended_again_and_again_skips_no_more_steps_in_a_row(tmp_path):
    options = dict(non_finite="skip", max_skipped=3, eval_every=None, save_every=1)
    config = _with(helpers.tiny_config(), **options)
    with pytest.raises(Killed):
        run(tmp_path, config=config, change_frozen=broken, stream=KilledStream(2))
    with pytest.raises(NonFiniteLossError, match=r"at step 4 .*, as were the 3 steps before it"):
        run(tmp_path, config=config, change_frozen=broken)


def test_an_update_that_is_not_finite_is_found_before_it_is_validated_or_saved(tmp_path):
    """The loss and the gradient of the step that makes it are still numbers."""
    config = _with(helpers.tiny_config(), steps=2, eval_every=1, save_every=1)
    config.optim.update(dict(name="adamw", lr=1e38, warmup=0, clip=1e38))
    with pytest.raises(NonFiniteLossError, match=r"param_norm is (inf|nan) at step 1"):
        run(tmp_path, config=config)
    assert list_steps(tmp_path) == ()
    assert writers.read_metrics(tmp_path / "metrics.jsonl") == []


def _with(config, **train_fields):
    config.train.update(train_fields)
    return config


def test_previews_show_the_average(tmp_path):
    made = []

    def preview(params, folder):
        made.append((jax.device_get(params), pathlib.Path(folder).name))
        return [("samples/t2i", np.zeros((4, 4, 3), np.uint8))]

    config = _with(helpers.tiny_config(), steps=2, sample_every=2)
    state = run(tmp_path, config=config, preview=preview)
    (params, folder), *rest = made
    assert not rest
    assert folder == "0000002"
    assert_equal_bits(params, state.ema)


def test_validation_repeats_itself(finished):
    """The same rows, times and noise: a run's last validation is reproduced from its checkpoint."""
    workdir, _, state = finished
    step, frozen = helpers.tiny_step(helpers.tiny_config())
    mesh = sharding.make_mesh(data=-1)
    again = loop.validation_losses(
        jax.jit(step.validate), state.ema, frozen, {"ie": [helpers.batch(1001)]}, mesh
    )
    logged = writers.read_metrics(workdir / "metrics.jsonl")[-1]["val/loss/ie"]
    assert again["val/loss/ie"] == pytest.approx(logged, rel=1e-6)


def test_a_validation_loss_that_is_not_finite_is_named():
    """The training's may be finite where an encoder's products overflow for a held-out picture."""
    sums = {"loss_sum": np.array([1.0, np.inf]), "count": np.array([1.0, 1.0])}
    rows = {"t2i": [helpers.batch(0)]}
    with pytest.raises(NonFiniteLossError, match=r"validation loss of task t2i is inf"):
        loop.validation_losses(lambda *_: sums, {}, {}, rows, sharding.make_mesh(data=8, fsdp=1))
