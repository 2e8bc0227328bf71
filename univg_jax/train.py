"""Training, from mesh to loop, as one narrative.

The trainer gets an iterator of batches and never sees a dataset. All its randomness comes from
(seed, step, sample id), its whole state is (`TrainState`, the iterator's position), and both are in
every checkpoint: a run that was killed, or moved to other devices, goes on as if nothing had
happened.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from clu import parameter_overview
from etils import epath
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, PyTree
from ml_collections import ConfigDict
from tqdm import tqdm

from univg_jax import flow, optim, sharding, tpu, writers
from univg_jax.batch import Batch, Conditions, pytree_dataclass
from univg_jax.checkpoint import Checkpointer, init_from
from univg_jax.conditioning import Conditioner
from univg_jax.interop.diffusers import init_transformer, transformer_folder
from univg_jax.models.univg import UniVG
from univg_jax.preemption import Notice, Preempted
from univg_jax.profiling import Trace

VALIDATION_TIMES = (np.arange(8) + 0.5) / 8
# time that is not the loop's steady course
BESIDE = ("start", "compile", "eval", "sample", "save", "profile")


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became NaN or infinite; no checkpoint holds that state."""


@runtime_checkable
class Stream(Protocol):
    """An endless iterator of host-local batches whose position can be saved."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@pytree_dataclass
class TrainState:
    step: Int32[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """The pure functions of a run: initialisation, one update, one validation pass."""

    config: ConfigDict
    model: UniVG
    conditioner: Conditioner
    task_names: tuple[str, ...]

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optim.make_optimizer(optim_config(self.config))

    def init(self, key: PRNGKeyArray, frozen: PyTree, batch: Batch) -> TrainState:
        """Parameters drawn from `key`, an optimizer at rest, an average that starts at the
        parameters.
        """
        x0 = self.conditioner.target_latents(frozen, batch)
        t = jnp.zeros(batch.size)
        params = self.model.init(key, x0, t, self.conditioner.conditions(frozen, batch))["params"]
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(
            step=jnp.int32(0), params=params, opt_state=self.optimizer.init(params), ema=ema
        )

    def row_weights(
        self, x0: Float[Array, "b h w c"], source: Float[Array, "b h w c"], batch: Batch
    ) -> Any:
        """Loss weights of changed regions for the tasks that ask for them; None where none does."""
        tasks = [self.task_names.index(name) for name in self.config.flow.weight_changes]
        if not tasks:
            return None
        chosen = jnp.isin(batch.task, jnp.array(tasks)) & batch.has_source
        return jnp.where(chosen[:, None, None, None], flow.change_weights(x0, source), 1.0)

    def update(
        self, state: TrainState, frozen: PyTree, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step of gradient descent on the flow's loss, and what it measured."""
        x0, conditions = sharding.split_rows(self.encode(frozen, batch))
        return self.update_encoded(state, x0, conditions, batch)

    def compiled_update(
        self, shardings: PyTree, *, encoded: bool = False
    ) -> Callable[..., tuple[TrainState, dict]]:
        """`update` (or `update_encoded`) as a program that replaces a state that lies as
        `shardings` say.
        """
        mesh = jax.tree.leaves(shardings)[0].mesh
        return jax.jit(
            self.update_encoded if encoded else self.update,
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=tpu.compiler_options(mesh.devices.flat[0]),
        )

    def encode(self, frozen: PyTree, batch: Batch) -> tuple[Float[Array, "b h w c"], Conditions]:
        """What the frozen encoders make of a batch: the target latents and the model's conditions."""
        return self.conditioner.target_latents(frozen, batch), self.conditioner.conditions(
            frozen, batch
        )

    def update_encoded(
        self, state: TrainState, x0: Float[Array, "b h w c"], conditions: Conditions, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """`update` after `encode`."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)

        def objective(params: PyTree, rows: tuple) -> tuple[Float[Array, ""], Float[Array, " b"]]:
            x0, conditions, batch = sharding.split_rows(rows)
            losses = flow.loss(
                lambda x_t, t: self.model.apply(
                    {"params": params}, *sharding.split_rows((x_t, t)), conditions
                ),
                x0,
                key=key,
                sample_id=batch.sample_id,
                times=training_times(self.config),
                weight=self.row_weights(x0, conditions.cond_latents, batch),
            )
            losses = losses * batch.valid
            return jnp.sum(losses) / jnp.maximum(jnp.sum(batch.valid), 1), losses

        gradient = optim.value_and_grad(
            objective,
            accumulate=self.config.optim.accumulate,
            weight=lambda rows: jnp.sum(rows[2].valid),
        )
        (loss, losses), grads = gradient(state.params, (x0, conditions, batch))
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        c = self.config.optim
        ema = optim.update_ema(state.ema, params, decay=c.ema, step=state.step, warmup=c.ema_warmup)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            **self.per_task(losses, batch.valid, batch.task),
        }
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    def validate(self, params: PyTree, frozen: PyTree, batch: Batch) -> dict[str, Array]:
        """Sums of the loss of each task over eight fixed times, with noise fixed by the sample id."""
        key = jax.random.key(self.config.seed)
        x0 = self.conditioner.target_latents(frozen, batch)
        conditions = self.conditioner.conditions(frozen, batch)

        def at_time(_: None, t: Float[Array, ""]) -> tuple[None, Float[Array, " b"]]:
            noise = flow.sample_noise(
                jax.random.fold_in(key, (t * 1000).astype(jnp.int32)), batch.sample_id, x0.shape[1:]
            )
            predict = lambda x_t, t: self.model.apply({"params": params}, x_t, t, conditions)  # noqa: E731
            return None, flow.loss_at(predict, x0, noise=noise, t=jnp.full(batch.size, t))

        _, losses = jax.lax.scan(at_time, None, jnp.asarray(VALIDATION_TIMES, jnp.float32))
        return self.per_task(jnp.mean(losses, axis=0) * batch.valid, batch.valid, batch.task)

    def per_task(
        self, losses: Float[Array, " b"], valid: Bool[Array, " b"], task: Int32[Array, " b"]
    ) -> dict[str, Float[Array, " k"]]:
        k = len(self.task_names)
        count = jax.ops.segment_sum(valid.astype(jnp.float32), task, k)
        return {"loss_sum": jax.ops.segment_sum(losses, task, k), "count": count}


def training_times(config: ConfigDict) -> flow.Times:
    """How a config draws times. Raises ValueError for what `flow.Times` does not know."""
    c = config.flow
    return flow.Times(distribution=c.distribution, mean=c.mean, std=c.std, shift=c.shift)


def optim_config(config: ConfigDict) -> dict[str, Any]:
    """What the optimizer is made from: `config.optim`, and the end of the schedule."""
    return dict(config.optim, total_steps=config.train.steps)


def train(
    config: ConfigDict,
    *,
    workdir: epath.PathLike,
    stream: Stream,
    model: UniVG,
    conditioner: Conditioner,
    frozen: PyTree,
    task_names: Sequence[str],
    validation: Mapping[str, Sequence[Batch]],
    preview: Callable[[PyTree, PyTree, epath.Path], dict[str, np.ndarray]] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    profile: range | None = None,
) -> TrainState:
    """Runs `config` in `workdir` until `config.train.steps`; returns the final state.

    `validation` has batches of each task; `preview(params, frozen, folder)` draws samples of every
    task and returns grids; `profile` are the updates to trace, `workdir/profile` is where. Raises
    `NonFiniteLossError` when the loss or the gradient is not finite, `Preempted` after SIGTERM,
    once its step is saved.
    """
    workdir = epath.Path(workdir)
    c = config.train
    is_main = jax.process_index() == 0
    history = History(workdir, task_names)  # its clock runs from here
    notice = Notice()

    # The mesh, and where every leaf of the state lives on it.
    mesh = mesh or sharding.make_mesh(**config.mesh, width=model.backbone.hidden_dim)
    jax.set_mesh(mesh)
    step_functions = Step(
        config=config, model=model, conditioner=conditioner, task_names=tuple(task_names)
    )
    frozen = jax.device_put(frozen, sharding.tree_shardings(frozen, mesh))
    example = sharding.shard_batch(next(iter(validation.values()))[0], mesh)
    init_key = jax.random.fold_in(jax.random.key(config.seed), 2**31)  # no step's key
    abstract = jax.eval_shape(step_functions.init, init_key, frozen, example)
    shardings = sharding.tree_shardings(abstract, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )

    # The programs, all compiled before the first batch is taken: one for each shape of batch, which
    # those of `validation` have too. Calling a jitted function later finds what was compiled for
    # its shapes here.
    init = jax.jit(step_functions.init, out_shardings=shardings)
    update = step_functions.compiled_update(shardings)
    validate = jax.jit(step_functions.validate, out_shardings=sharding.replicated(mesh))
    checkpointer = Checkpointer(workdir, keep=c.keep)
    start = checkpointer.latest_step() or 0
    history.lap("start")
    if start < c.steps:
        if not start:
            init.lower(init_key, frozen, example).compile()
        for batch in distinct_shapes(validation):
            batch = sharding.shard_batch(batch, mesh)
            update.lower(abstract, frozen, batch).compile()
            validate.lower(abstract.ema, frozen, batch).compile()
        history.lap("compile")

    # The state: our own checkpoint, else another run's parameters, else a fresh start.
    if start:
        state, data_state = checkpointer.restore(abstract)
        start = int(state.step)
        stream.set_state(data_state)
        logging.info("resumed %s at step %d", workdir, start)
    else:
        state = init(init_key, frozen, example)
        if config.init_from.path:
            source = config.init_from
            if folder := transformer_folder(source.path):  # public weights of the backbone
                backbone = init_transformer(
                    state.params["backbone"], model.backbone, folder, mesh=mesh
                )
                params = {**state.params, "backbone": backbone}
            else:
                params = init_from(
                    state.params,
                    source.path,
                    which=source.which,
                    new=source.new,
                    dropped=source.dropped,
                )
            state = dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))

    num_parameters = sum(x.size for x in jax.tree.leaves(abstract.params))
    if is_main:
        overview = parameter_overview.get_parameter_overview(
            abstract.params, include_stats="sharding"
        )
        (workdir / "parameters.txt").write_text(overview)
    writer = writers.create_writer(workdir, resume_step=start, active=is_main)
    schedule = optim.make_schedule(optim_config(config))
    trace = Trace(workdir / "profile", steps=profile)
    if profile and start >= profile.stop:
        logging.info(
            "no trace: the run goes on at step %d, behind %d:%d", start, profile.start, profile.stop
        )
    history.resume(start)

    # The loop. The order is fixed: evaluate, save, next batch, step. So what is saved at step n is
    # the state after n updates together with the position after n batches, and a resumed run, which
    # starts at the top, sees exactly what the uninterrupted one saw. A row is written before its
    # step is saved. metrics that the device may still be computing
    pending: tuple[int, dict[str, Array]] | None = None

    def settle() -> None:
        nonlocal pending
        if pending is not None:
            history.add(*pending)
            pending = None
            history.lap("step")

    def computing() -> bool:
        return pending is not None and not pending[1]["loss"].is_ready()

    def due(step: int, every: int) -> bool:
        return step > start and (step == c.steps or step % every == 0)

    bar = tqdm(
        total=c.steps,
        initial=start,
        desc=config.name,
        unit="step",
        disable=not is_main,
        mininterval=0.5,
    )
    # whatever happens, what was begun is written
    with notice, checkpointer, contextlib.closing(writer), bar, trace:
        history.lap("start")
        for step in range(start, c.steps + 1):
            leaves = notice.reached()
            saves = due(step, c.save_every) or (leaves and step > start)
            if trace.turns(step):
                settle()
                trace.turn()
                history.lap("profile")
            if due(step, c.eval_every):
                settle()  # or the wait for the step would count as evaluation
                writer.write_scalars(step, evaluate(validate, state.ema, frozen, validation, mesh))
                history.lap("eval")
            if preview is not None and due(step, c.sample_every):
                settle()
                writer.write_images(
                    step, preview(state.ema, frozen, workdir / "samples" / f"{step:07d}")
                )
                history.lap("sample")
            if saves or due(step, c.log_every):
                settle()
                scalars = history.scalars(step) | {"lr": float(schedule(step - 1))}
                writer.write_scalars(step, scalars)
                writer.flush()
                bar.set_postfix(loss=f"{scalars['loss']:.4f}", refresh=False)
                history.lap("log")
            if saves:
                checkpointer.save(step, state, stream.get_state(), config)
                history.lap("save")
            if leaves or step == c.steps:
                break
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                batch = sharding.shard_batch(next(stream), mesh)
                history.lap("step" if computing() else "data")
                with jax.transfer_guard("disallow"):
                    state, metrics = update(state, frozen, batch)
                history.lap("step")
            checkpointer.check()
            settle()  # step n - 1, now that step n is on its way
            pending = (step + 1, metrics)
            bar.update()
        if step > start:
            checkpointer.wait()
            history.lap("save")
            writer.write_scalars(step, history.rest())
    if step < c.steps:
        state_is = f"step {step} is saved" if step else "no step was made"
        raise Preempted(f"SIGTERM: {state_is}; the same command goes on from there")

    if is_main:
        weights = {name: float(t.weight) for name, t in config.tasks.items()}
        summary = summarize(
            workdir, config, task_names, weights=weights, num_parameters=num_parameters
        )
        (workdir / "summary.json").write_text(json.dumps(summary, indent=1))
    return state


def distinct_shapes(validation: Mapping[str, Sequence[Batch]]) -> list[Batch]:
    """A batch of each shape that occurs."""

    def shape(batch: Batch) -> tuple:
        return jax.tree.structure(batch), *((x.shape, x.dtype) for x in jax.tree.leaves(batch))

    return list(
        {shape(batch): batch for batches in validation.values() for batch in batches}.values()
    )


class History:
    """What happened since the last written row: mean losses, shares of the tasks, and where the
    time went.

    `lap(name)` says what the time since the lap before it was for, so the `seconds/*` of a row add
    up to the wall time since the row before:
        data: taking the next batch and starting its transfer, where the device was done before that
        was step: dispatching steps and waiting for the device; and taking batches meanwhile eval,
        sample, save, log, profile: what they say start, compile: everything before the first step,
        and the compilation of it and of validation
    A process that was killed after its last row leaves no trace of the time since.

    `time` is the run's wall time in seconds, all attempts together, and `goodput` is the share of
    it that went to steps that count: the sum of `seconds/step` over the rows that the run has kept.
    A step that was lost with a crash and made again counts once, though `time` has both.
    """

    def __init__(self, workdir: epath.Path, task_names: Sequence[str]) -> None:
        self.task_names = task_names
        self.rows = writers.read_metrics(workdir / "metrics.jsonl")
        self.seconds_before = max((row.get("time", 0.0) for row in self.rows), default=0.0)
        self.stepped = 0.0
        self.begin = self.mark = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self.steps: list[dict[str, np.ndarray]] = []
        self.spent = {"data": 0.0, "step": 0.0}

    def resume(self, step: int) -> None:
        """Counts the steps up to `step` that earlier attempts made; those that they made after it
        are lost.
        """
        self.stepped = sum(row.get("seconds/step", 0.0) for row in self.rows if row["step"] <= step)

    def lap(self, name: str) -> None:
        """Counts the time since the last lap as `seconds/<name>`."""
        now = time.monotonic()
        self.spent[name] = self.spent.get(name, 0.0) + now - self.mark
        self.mark = now

    def add(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Fetches one step's metrics; raises `NonFiniteLossError` for a loss or gradient that is
        not finite.
        """
        values = jax.device_get(dict(metrics))
        for name in ("loss", "grad_norm"):
            if not np.isfinite(values[name]):
                bad = [
                    t
                    for t, x in zip(self.task_names, values["loss_sum"], strict=True)
                    if not np.isfinite(x)
                ]
                where = f" (tasks {', '.join(bad)})" if bad else ""
                raise NonFiniteLossError(
                    f"{name} is {values[name]} at step {step}{where}; that state was not saved"
                )
        self.steps.append(values)

    def scalars(self, step: int) -> dict[str, float]:
        """The row of the steps added since the last call."""
        if not self.steps:
            raise ValueError(f"no metrics since the last row, at step {step}")
        total = {
            k: np.sum([m[k] for m in self.steps], axis=0, dtype=np.float64) for k in self.steps[0]
        }
        n = len(self.steps)
        row = {k: float(total[k] / n) for k in ("loss", "grad_norm", "param_norm")}
        for name, loss, count in zip(
            self.task_names, total["loss_sum"], total["count"], strict=True
        ):
            if count:
                row[f"loss/{name}"] = float(loss / count)
                row[f"count/{name}"] = float(count)
                row[f"share/{name}"] = float(count / total["count"].sum())
        stepping = sum(seconds for name, seconds in self.spent.items() if name not in BESIDE)
        row |= {
            "steps_per_second": n / stepping,
            "images_per_second": float(total["count"].sum()) / stepping,
        }
        self.seconds = {f"seconds/{name}": seconds for name, seconds in self.spent.items()}
        self.stepped += self.spent["step"]
        self._clear()
        return row | self.seconds | self._so_far()

    def rest(self) -> dict[str, float]:
        """What the time since the last row, to its step's last save, changes in that row."""
        for name, seconds in self.spent.items():
            self.seconds[f"seconds/{name}"] = self.seconds.get(f"seconds/{name}", 0.0) + seconds
        return self.seconds | self._so_far()

    def _so_far(self) -> dict[str, float]:
        seconds = self.seconds_before + self.mark - self.begin
        return {"time": seconds, "goodput": self.stepped / seconds}


def evaluate(
    validate: Callable[[PyTree, PyTree, Batch], dict[str, Array]],
    params: PyTree,
    frozen: PyTree,
    validation: Mapping[str, Sequence[Batch]],
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Validation loss of each task: the same rows, times and noise every time."""
    scalars = {}
    for name, batches in validation.items():
        sums = [
            jax.device_get(validate(params, frozen, sharding.shard_batch(b, mesh))) for b in batches
        ]
        scalars[f"val/loss/{name}"] = float(
            sum(s["loss_sum"].sum() for s in sums) / sum(s["count"].sum() for s in sums)
        )
    return scalars


def summarize(
    workdir: epath.Path,
    config: ConfigDict,
    task_names: Sequence[str],
    *,
    weights: Mapping[str, float],
    num_parameters: int,
) -> dict[str, Any]:
    """The run in a few numbers, from its `metrics.jsonl`."""
    rows = [r for r in writers.read_metrics(workdir / "metrics.jsonl") if "loss" in r]
    counts = {name: sum(r.get(f"count/{name}", 0.0) for r in rows) for name in task_names}
    total = sum(counts.values())
    return {
        "stage": config.name,
        "steps": rows[-1]["step"],
        "seconds": rows[-1]["time"],
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "shares": {name: n / total for name, n in counts.items() if n},
        "weights": {name: w / sum(weights.values()) for name, w in weights.items()},
        "parameters": num_parameters,
        "config": config.to_dict(),
    }
