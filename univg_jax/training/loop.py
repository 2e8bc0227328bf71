"""Training, from mesh to loop, as one narrative.

The loop gets an iterator of batches and never sees a dataset. Its whole state is (`TrainState`, the
iterator's position), and both are in every checkpoint: a run that was killed, or moved to other
devices, goes on as if nothing had happened.
"""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from univg_jax import sharding, writers
from univg_jax.batch import Batch
from univg_jax.checkpoint import Checkpointer
from univg_jax.errors import NonFiniteLossError, Preempted
from univg_jax.files import write_whole
from univg_jax.progress import Bar, timed
from univg_jax.together import each_together, of_all, raise_together, together
from univg_jax.training import optim
from univg_jax.training.history import History, write_summary
from univg_jax.training.initialize import DataStream, check_fits, initial_state
from univg_jax.training.preemption import PreemptionNotice, Stopping
from univg_jax.training.profiling import Trace
from univg_jax.training.step import TrainState, TrainStep, num_parameters
from univg_jax.training.watchdog import Watchdog
from univg_jax.workdir import changes, check_not_past, claim_workdir, newest_step

Preview = Callable[[PyTree, epath.Path], Iterable[tuple[str, np.ndarray]]]


class PendingMetrics:
    """The metrics of the newest step, which the device may still be computing.

    They are fetched one step late, so that the host prepares a step while the device computes.
    """

    def __init__(self, history: History, stream: DataStream, *, batch_size: int) -> None:
        self._history, self._stream, self._batch_size = history, stream, batch_size
        self._newest: tuple[int, dict[str, Array]] | None = None

    def put(self, step: int, metrics: dict[str, Array]) -> None:
        """Takes the metrics of the step just dispatched; fetches those of the step before."""
        before, self._newest = self._newest, (step, metrics)
        if before is not None:
            self._add(*before)

    def fetch(self) -> None:
        """Waits for the newest step, if its metrics were not fetched yet."""
        if self._newest is not None:
            newest, self._newest = self._newest, None
            self._add(*newest)

    def _add(self, step: int, metrics: dict[str, Array]) -> None:
        # The metrics are the same on all hosts, so all of them come here at the same step.
        if self._history.add(step, metrics) < self._batch_size:
            raise_together(self._stream.failure)

    @property
    def is_computing(self) -> bool:
        """Whether the device has not finished the newest step."""
        return self._newest is not None and not self._newest[1]["loss"].is_ready()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled functions of a run, and the shapes and shardings of its state."""

    init: Callable[[], TrainState]
    update: Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, Array]]]
    validate: Callable[[PyTree, PyTree, Batch], dict[str, Array]]
    abstract: TrainState
    frozen: PyTree
    specs: Sequence[Batch]  # the shapes of batches

    @classmethod
    def trace(
        cls, step_fns: TrainStep, frozen: PyTree, specs: Sequence[Batch], *, mesh: Mesh
    ) -> "Programs":
        """The programs for batches of these shapes, which compile when they are first called."""

        # Steps use the keys 0..2^31-1 of the seed, so this one is unused.
        key = jax.random.fold_in(jax.random.key(step_fns.config.seed), 2**31)
        specs = [sharding.with_shardings(spec, sharding.batch_sharding(mesh)) for spec in specs]
        abstract = jax.eval_shape(step_fns.init, key, frozen, specs[0])
        shardings = sharding.tree_shardings(abstract, mesh)
        abstract = sharding.with_shardings(abstract, shardings)

        def init(key: jax.Array) -> TrainState:
            return step_fns.init(key, frozen, specs[0])

        init = jax.jit(init, out_shardings=shardings)
        update = step_fns.compiled_update(shardings)
        validate = jax.jit(step_fns.validate, out_shardings=sharding.replicated(mesh))
        return cls(
            init=lambda: init(key),
            update=update,
            validate=validate,
            abstract=abstract,
            frozen=frozen,
            specs=specs,
        )

    def compile(self) -> None:
        """Compiles `update` and `validate` for all shapes: a later call finds its program."""
        with timed("compiling the training step (minutes for large models)"):
            for spec in self.specs:
                self.update.lower(self.abstract, self.frozen, spec).compile()
                self.validate.lower(self.abstract.ema, self.frozen, spec).compile()


def train(
    step_fns: TrainStep,
    *,
    workdir: epath.PathLike,
    stream: DataStream,
    frozen: PyTree,
    validation: Mapping[str, Iterable[Batch]],
    preview: Preview | None = None,
    profile: range | None = None,
    check: Callable[[], None] = lambda: None,
    confirm: Callable[[], None] = lambda: None,
    allow_config_change: Sequence[str] = (),
) -> TrainState:
    """Trains in `workdir` until `config.train.steps`; returns the final state.

    Call it inside `jax.set_mesh(mesh)`: it trains on that mesh. `frozen` are the encoders'
    parameters. `validation` has this host's batches of each task, read anew each time.
    `preview(params, folder)` samples every task, writes its pictures and gives them by name.
    `profile` are the updates to trace into `workdir/profile`. `check()` is called at each step, and
    `confirm()` right before something is written into the workdir: both may end the run.
    `allow_config_change` are the keys of the config that may differ from those that the run began
    with (`workdir.resume`).

    A signal ends the run within the time of one step, of a batch of validation or of a task's
    samples, and of a save. What was due at that step is done when the run goes on.

    Raises `NonFiniteLossError` when the loss or the gradient is not finite, `Preempted` after
    SIGTERM or Ctrl-C once its step is saved, UserError if the workdir is past `config.train.steps`.
    """
    check_not_past(workdir, step_fns.config.train.steps)
    c = step_fns.config.train
    with together():
        confirm()  # the checkpointer removes what was never finished
    with (
        Watchdog(workdir, c) as watchdog,
        PreemptionNotice() as notice,
        Checkpointer(workdir, c, before_commit=confirm) as checkpointer,
    ):
        return _train(
            step_fns,
            stream,
            frozen,
            validation,
            preview=preview,
            profile=profile,
            check=check,
            confirm=confirm,
            allow_config_change=allow_config_change,
            notice=notice,
            watchdog=watchdog,
            checkpointer=checkpointer,
        )


def _train(
    step_fns: TrainStep,
    stream: DataStream,
    frozen: PyTree,
    validation: Mapping[str, Iterable[Batch]],
    *,
    preview: Preview | None,
    profile: range | None,
    check: Callable[[], None],
    confirm: Callable[[], None],
    allow_config_change: Sequence[str],
    notice: PreemptionNotice,
    watchdog: Watchdog,
    checkpointer: Checkpointer,
) -> TrainState:
    workdir, c = checkpointer.workdir, step_fns.config.train
    is_main = jax.process_index() == 0
    history = History(workdir, step_fns.task_names, c)
    newest = newest_step(workdir)

    # The mesh, the programs, all compiled before the first batch is taken, and the first state.
    # What may be wrong with it is found before the compilation, as far as that is cheap.
    if (mesh := jax.sharding.get_mesh()).empty:
        raise ValueError("no mesh: call train() inside `with jax.set_mesh(mesh)`")
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    programs = Programs.trace(step_fns, frozen, stream.specs(), mesh=mesh)
    check_fits(step_fns, abstract=programs.abstract, checkpointer=checkpointer)
    if newest < c.steps:
        checkpointer.check_space(programs.abstract)
        watchdog.begin("the compilation")
        with history.clock("compile"):
            programs.compile()
    watchdog.begin("the first state")
    state = initial_state(
        step_fns,
        programs.init,
        abstract=programs.abstract,
        checkpointer=checkpointer,
        stream=stream,
        history=history,
        mesh=mesh,
    )
    # Everything that could be wrong has been tried; from here on the workdir is this config's.
    if changed := changes(workdir, step_fns.config):
        logging.warning("%s goes on with another config: %s", workdir, "; ".join(changed.values()))
    with together():
        confirm()
    claim_workdir(workdir, step_fns.config, allow=allow_config_change)
    start = int(state.step)
    redo = history.is_left  # what was due at `start` is still to be done
    rows = history.resume(start, is_own=newest > 0)
    if is_main:
        overview = parameter_overview.get_parameter_overview(
            programs.abstract.params, include_stats="sharding"
        )
        write_whole(workdir / "parameters.txt", overview)

    config, clock = step_fns.config, history.clock
    pending = PendingMetrics(history, stream, batch_size=config.data.batch_size)
    schedule = optim.make_schedule(config.optim, total_steps=c.steps)
    writer = writers.create_writer(
        workdir, resume_step=start - redo, rows=rows, active=is_main, before_write=confirm
    )
    trace = Trace(workdir / "profile", steps=profile, start=start, before_write=confirm)
    bar = Bar(total=c.steps, initial=start, desc=config.name, unit="step", disable=not is_main)

    def part_is_done() -> None:
        watchdog.beat(f"a part of the {clock.activity} of step {step}")
        notice.check()

    def is_due(step: int, every: int | None) -> bool:
        is_multiple = every is not None and step % every == 0
        return (step > start or redo) and (step == c.steps or is_multiple)

    # The loop. DO NOT CHANGE THE ORDER: evaluate, write the row, save, next batch, update. With it
    # a checkpoint of step n has the state after n updates and the position after n batches, and a
    # resumed run, which starts at the top, sees exactly what the uninterrupted one saw.
    # Whatever happens, the contexts (and `checkpointer`'s) finish what was begun.
    with contextlib.closing(writer), bar, trace:
        clock.switch("step")
        watchdog.doing = lambda: clock.activity
        notice.begin()
        for step in range(start, c.steps + 1):
            check()
            watchdog.beat(f"step {step}")
            stopping, is_left = notice.stop_requested(), False
            is_planned = is_due(step, c.save_every)
            if trace.is_due(step):
                pending.fetch()
                with clock("profile"):
                    trace.toggle()
            try:
                if is_due(step, c.eval_every):
                    pending.fetch()  # or the wait for the step would count as evaluation
                    with clock("eval"):
                        losses = validation_losses(
                            programs.validate, state.ema, frozen, validation, mesh, part_is_done
                        )
                        writer.write_scalars(step, losses)
                if preview is not None and is_due(step, c.sample_every):
                    pending.fetch()
                    with clock("sample"):
                        folder, images = workdir / "samples" / f"{step:07d}", {}
                        for name, image in preview(state.ema, folder):
                            images[name] = image
                            part_is_done()
                        writer.write_images(step, images)
            except Stopping:
                stopping = is_left = True
            if not is_left and (is_planned or is_due(step, c.log_every)):
                pending.fetch()
                with clock("log"):
                    row = history.take_row(step, records=on_all_hosts(stream.counters()))
                    row["lr"] = float(schedule(step - 1))
                    writer.write_scalars(step, row)
                    with together():
                        writer.flush()
                    bar.set_postfix(loss=f"{row.get('loss', math.nan):.4f}", refresh=False)
            if is_planned or (stopping and step > start):
                pending.fetch()
                records = on_all_hosts(stream.counters())
                left = history.get_state(records=records, is_left=is_left)
                with clock("save"):
                    with together():
                        confirm()
                    checkpointer.save(step, state, stream.get_state(), config.to_dict(), left)
            if stopping or step == c.steps:
                break
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                with clock("data"):
                    batch = sharding.shard_batch(next(stream), mesh)
                    if pending.is_computing:  # the device did not wait for this batch
                        clock.activity = "step"
                with jax.transfer_guard("disallow"):
                    state, metrics = programs.update(state, frozen, batch)
            checkpointer.check()
            pending.put(step + 1, metrics)
            bar.update()
        with clock("save"):
            if step > start:
                checkpointer.wait()
            else:  # the last save was killed after its step was there
                with together():
                    confirm()
                checkpointer.prune()
        if step > start and history.is_complete:
            writer.write_scalars(step, history.complete_row())
    if step < c.steps or is_left:
        done = f"step {step} is saved" if step else "no step was made"
        cause = "Ctrl-C" if notice.signum == signal.SIGINT else "SIGTERM"
        raise Preempted(
            f"{cause}: {done}; the same command goes on from there", signum=notice.signum
        )
    if is_main:
        confirm()
        count = num_parameters(programs.abstract.params)
        write_summary(workdir, config, step_fns.task_names, num_parameters=count)
    return state


def on_all_hosts(counters: Mapping[str, int]) -> dict[str, int]:
    """The sums of all hosts' counters. All of them call it."""
    numbers = of_all(np.array(list(counters.values()), np.int32))
    sums = numbers.reshape(-1, len(counters)).sum(axis=0)
    return dict(zip(counters, sums.tolist(), strict=True))


def validation_losses(
    validate: Callable[[PyTree, PyTree, Batch], dict[str, Array]],
    params: PyTree,
    frozen: PyTree,
    validation: Mapping[str, Iterable[Batch]],
    mesh: Mesh,
    check: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Validation loss of each task: the same rows, times and noise every time.

    `check()` is called after each batch. Raises NonFiniteLossError for a loss that is not finite.
    """
    losses = {}
    for name, batches in validation.items():
        sums = []
        for batch in each_together(batches):
            sums.append(jax.device_get(validate(params, frozen, sharding.shard_batch(batch, mesh))))
            check()
        total = sum(s["loss_sum"].sum() for s in sums)
        loss = float(total / sum(s["count"].sum() for s in sums))
        if not np.isfinite(loss):
            raise NonFiniteLossError(f"the validation loss of task {name} is {loss}")
        losses[f"val/loss/{name}"] = loss
    return losses
