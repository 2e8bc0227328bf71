"""One training step as pure functions: a first state, an update, a validation pass.

All randomness of an update comes from (seed, step, sample id), so `update` is a function of its
arguments alone: the same on any devices, and again after a resume.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray, PyTree

from univg_jax import flow, sharding, tpu
from univg_jax.batch import Batch, Conditions, pytree_dataclass
from univg_jax.conditioning import Conditioner
from univg_jax.models.univg import UniVG
from univg_jax.settings import Config
from univg_jax.training import optim

VALIDATION_TIMES = (np.arange(8) + 0.5) / 8


@pytree_dataclass
class TrainState:
    """All that training changes. `step` counts the updates that were made."""

    step: Int32[Array, ""]
    params: PyTree
    opt_state: PyTree
    ema: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStep:
    """The functions of a run. `task_names` is the order of `Batch.task`."""

    config: Config
    model: UniVG
    conditioner: Conditioner
    task_names: tuple[str, ...]

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer that `config.optim` describes."""
        return optim.make_optimizer(self.config.optim, total_steps=self.config.train.steps)

    def init(self, key: PRNGKeyArray, frozen: PyTree, batch: Batch) -> TrainState:
        """Random parameters, a fresh optimizer, and an average that starts at the parameters.

        Only the shapes of `frozen` and `batch` matter: arrays or `ShapeDtypeStruct`s.
        """
        params = self.model.init_params(key, *self.conditioner.encoded_spec(frozen, batch))
        ema = jax.tree.map(jnp.copy, params)
        opt_state = self.optimizer.init(params)
        return TrainState(step=jnp.int32(0), params=params, opt_state=opt_state, ema=ema)

    def encode(self, frozen: PyTree, batch: Batch) -> tuple[Float[Array, "b h w c"], Conditions]:
        """The target latents and the model's conditions, by the frozen encoders."""
        return (
            self.conditioner.target_latents(frozen, batch),
            self.conditioner.conditions(frozen, batch),
        )

    def loss_weights(
        self, x0: Float[Array, "b h w c"], source: Float[Array, "b h w c"], batch: Batch
    ) -> Float[Array, "b h w 1"]:
        """Weights of what counts, and of changed regions for the tasks of `flow.weight_changes`."""
        weights = _valid_weights(x0, batch)
        tasks = [self.task_names.index(name) for name in self.config.flow.weight_changes]
        if not tasks:
            return weights
        chosen = jnp.isin(batch.task, jnp.array(tasks)) & batch.has_source
        changed = flow.changed_cells(batch.target, batch.source, cell=_cell(x0, batch))
        changed &= chosen[:, None, None, None]
        return weights * flow.change_weights(x0, source, changed)

    def update(
        self, state: TrainState, frozen: PyTree, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step of gradient descent on the flow's loss, and what it measured."""
        x0, conditions = sharding.constrain_rows(self.encode(frozen, batch))
        return self.update_encoded(state, x0, conditions, batch)

    def update_encoded(
        self, state: TrainState, x0: Float[Array, "b h w c"], conditions: Conditions, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        """`update` after `encode`."""
        c = self.config.begun().optim
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)

        def objective(params: PyTree, rows: tuple) -> tuple[Float[Array, ""], Float[Array, " b"]]:
            x0, conditions, batch = sharding.constrain_rows(rows)
            losses = flow.loss(
                lambda x_t, t: self.model.apply(
                    {"params": params}, *sharding.constrain_rows((x_t, t)), conditions
                ),
                x0,
                key=key,
                sample_id=batch.sample_id,
                times=self.config.flow,
                weight=self.loss_weights(x0, conditions.cond_latents, batch),
            )
            losses = losses * batch.valid
            return jnp.sum(losses) / jnp.maximum(jnp.sum(batch.valid), 1), losses

        gradient = optim.value_and_grad(
            objective, accumulate=c.accumulate, weight=lambda rows: jnp.sum(rows[2].valid)
        )
        cast = self.model.cast_kernels(state.params)  # once for all micro-batches
        (loss, losses), grads = gradient(cast, (x0, conditions, batch))
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optim.update_ema(
            state.ema, params, decay=c.ema, step=state.step, warmup=c.ema_warmup, fresh=c.ema_fresh
        )
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        if self.config.train.non_finite == "skip":
            is_finite = jnp.all(jnp.isfinite(jnp.stack([loss, *norms.values()])))
            params, opt_state, ema = jax.tree.map(
                lambda new, old: jnp.where(is_finite, new, old),
                (params, opt_state, ema),
                (state.params, state.opt_state, state.ema),
            )
        metrics = {
            "loss": loss,
            **norms,
            "is_finite": jnp.isfinite(losses),
            "sample_id": batch.sample_id,
            **self.per_task(losses, batch.valid, batch.task),
            "latent_square_sum": jax.ops.segment_sum(
                jnp.mean(jnp.square(x0), axis=(1, 2, 3)) * batch.valid,
                batch.task,
                len(self.task_names),
            ),
        }
        state = TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema)
        return state, metrics

    def compiled_update(
        self, shardings: PyTree, *, encoded: bool = False
    ) -> Callable[..., tuple[TrainState, dict]]:
        """`update` (or `update_encoded`) as a program that replaces its state."""
        mesh = jax.tree.leaves(shardings)[0].mesh
        return jax.jit(
            self.update_encoded if encoded else self.update,
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=tpu.compiler_options(mesh.devices.flat[0]),
        )

    def validate(self, params: PyTree, frozen: PyTree, batch: Batch) -> dict[str, Array]:
        """Sums of each task's loss over eight fixed times, with noise fixed by the sample id."""
        key = jax.random.key(self.config.seed)
        x0, conditions = self.encode(frozen, batch)
        weight = _valid_weights(x0, batch)

        def at_time(_: None, t: Float[Array, ""]) -> tuple[None, Float[Array, " b"]]:
            noise_key = jax.random.fold_in(key, (t * 1000).astype(jnp.int32))
            noise = flow.sample_noise(noise_key, batch.sample_id, x0.shape[1:])
            predict = lambda x_t, t: self.model.apply({"params": params}, x_t, t, conditions)  # noqa: E731
            t = jnp.full(batch.size, t)
            return None, flow.loss_at(predict, x0, noise=noise, t=t, weight=weight)

        _, losses = jax.lax.scan(at_time, None, jnp.asarray(VALIDATION_TIMES, jnp.float32))
        return self.per_task(jnp.mean(losses, axis=0) * batch.valid, batch.valid, batch.task)

    def per_task(
        self, losses: Float[Array, " b"], valid: Bool[Array, " b"], task: Int32[Array, " b"]
    ) -> dict[str, Float[Array, " k"]]:
        """Sum of the losses and number of valid rows of each task."""
        k = len(self.task_names)
        count = jax.ops.segment_sum(valid.astype(jnp.float32), task, k)
        return {"loss_sum": jax.ops.segment_sum(losses, task, k), "count": count}


def _cell(x0: Float[Array, "b h w c"], batch: Batch) -> int:
    """Pixels a side of a latent cell."""
    return batch.target.shape[1] // x0.shape[1]


def _valid_weights(x0: Float[Array, "b h w c"], batch: Batch) -> Float[Array, "b h w 1"]:
    return flow.valid_weights(jnp.asarray(batch.loss_mask), cell=_cell(x0, batch))


def num_parameters(params: PyTree) -> int:
    """How many numbers a tree of arrays or shapes holds."""
    return sum(x.size for x in jax.tree.leaves(params))
