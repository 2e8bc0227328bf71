"""Where a run's parameters come from, and where in its data it begins."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree

from univg_jax import checkpoint
from univg_jax.batch import Batch
from univg_jax.checkpoint import Checkpointer, Restored
from univg_jax.errors import NotFoundError, UserError
from univg_jax.interop import diffusers
from univg_jax.interop.folder import StoredModel, check_params
from univg_jax.settings import Config, InitFrom
from univg_jax.together import together
from univg_jax.trained import ExportedModel, Trained, open_trained
from univg_jax.training.history import History
from univg_jax.training.step import TrainState, TrainStep
from univg_jax.trees import Json
from univg_jax.workdir import changes


@runtime_checkable
class DataStream(Protocol):
    """An endless iterator of host-local batches whose position can be saved."""

    def __next__(self) -> Batch: ...
    def specs(self) -> Sequence[Batch]:
        """Shapes and dtypes of every kind of global batch that will come."""
        ...

    def counters(self) -> Mapping[str, int]:
        """What this host's batches came across since the stream was made; they only grow."""
        ...

    @property
    def failure(self) -> Exception | None:
        """Why this host cannot go on, once its batches have no valid rows."""
        ...

    def get_state(self) -> Json: ...
    def set_state(self, state: Json) -> None:
        """Goes on at a position of this stream."""
        ...

    def continue_from(self, state: Json) -> None:
        """Begins where the stream of another run, the stage before, was at `state`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParentRun:
    """Another run of ours, the stage before, or what was exported of it.

    It has parameters by name, and fitted encoders.
    """

    settings: InitFrom

    @property
    def trained(self) -> Trained:
        """What lies there."""
        return open_trained(self.settings.path)

    @property
    def encoders_from(self) -> str | None:
        """The run whose fitted encoders, and so whose latent space, this one keeps."""
        return self.settings.path

    def check(self) -> None:
        """Raises UserError if there is no sound checkpoint, or not what is asked of an export."""
        self.trained.config()
        if isinstance(self.trained, ExportedModel) and self.settings.which == "state":
            raise UserError(
                f"init_from.which='state' goes on with a run, and {self.settings.path} is an export"
            )
        self.trained.which(ema=self.settings.which != "params")

    def check_fits(self, params: PyTree, step: TrainStep) -> None:
        """Raises UserError if `load` would, as far as the shapes of `params` tell."""
        s = self.settings
        self.trained.check_init(params, which=s.which, new=s.new, dropped=s.dropped)

    def load(self, params: PyTree, step: TrainStep, mesh: Mesh) -> Restored:
        """The parent's parameters in place of `params`, but for the leaves declared new."""
        s, trained = self.settings, self.trained
        filled = trained.init_params(params, which=s.which, new=s.new, dropped=s.dropped)
        return Restored(state=filled, data_state=trained.data_state())


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicWeights:
    """A diffusers folder with a transformer: public weights of the backbone."""

    folder: str

    encoders_from = None

    def check(self) -> None:
        """Raises UserError if the folder has no transformer that the library knows."""
        diffusers.open_transformer(self.folder)

    def check_fits(self, params: PyTree, step: TrainStep) -> None:
        """Raises UserError if `load` would, as far as the shapes of `params` tell."""
        diffusers.check_transformer(params["backbone"], step.model.backbone, self.folder)
        if projector := self._projector(params):
            check_params(params[diffusers.PROJECTOR], projector.abstract)

    def load(self, params: PyTree, step: TrainStep, mesh: Mesh) -> Restored:
        """The public weights as the backbone; what they lack (image and mask channels) is zero.

        A pipeline that we exported may have an identity projector, too.
        """
        self.check_fits(params, step)
        backbone = diffusers.init_transformer(
            params["backbone"], step.model.backbone, self.folder, mesh=mesh
        )
        state = {**params, "backbone": backbone}
        if projector := self._projector(params):
            state[diffusers.PROJECTOR] = jax.tree.map(
                lambda new, x: jax.device_put(x, new.sharding),
                params[diffusers.PROJECTOR],
                projector.read(mesh=mesh),
            )
        return Restored(state=state, data_state=None)

    def _projector(self, params: PyTree) -> StoredModel | None:
        """Theirs, where the model has one and they do."""
        folder = epath.Path(self.folder).parent / diffusers.PROJECTOR
        if diffusers.PROJECTOR not in params or not folder.exists():
            return None
        return diffusers.open_projector(folder)


def find_parent(settings: InitFrom) -> ParentRun | PublicWeights | None:
    """What `init_from.path` names; None where it names nothing."""
    if folder := diffusers.transformer_folder(settings.path):
        return PublicWeights(folder=str(folder))
    return ParentRun(settings=settings) if settings.path else None


def begin_stream(
    config: Config, stream: DataStream, *, workdir: epath.PathLike | None = None
) -> None:
    """Puts a fresh stream where a run begins, or goes on in its workdir: see `initial_state`.

    Raises UserError if the data is no longer that of the run.
    """
    # All processes look for a sound checkpoint together, so that is no part of the block below.
    settings, state, begin = config.init_from, None, stream.set_state
    with contextlib.suppress(NotFoundError):  # no checkpoint yet
        if workdir is not None:
            state = checkpoint.load_data_state(workdir)
            if changes(workdir, config):
                begin = functools.partial(_go_on_changed, stream)
    if state is None and isinstance(find_parent(settings), ParentRun):
        state = open_trained(settings.path).data_state()
        begin = stream.set_state if settings.which == "state" else stream.continue_from
    with together():
        if state is not None:
            begin(state)


def _go_on_changed(stream: DataStream, state: Json) -> None:
    """Goes on in a run whose config has changed, at its place in the data.

    Where that is a place in another mixture, each task goes on in its sources where it was.
    """
    try:
        stream.set_state(state)
    except UserError as error:
        stream.continue_from(state)
        reason = str(error).partition(";")[0]
        logging.warning("%s: each task goes on in its sources where it was there", reason)
    else:
        logging.warning("the data go on at sample %d, in the same order", state.get("next", 0))


def check_fits(step: TrainStep, *, abstract: TrainState, checkpointer: Checkpointer) -> None:
    """Raises UserError if `initial_state` would, as far as the shapes of `abstract` tell.

    It reads no array, so it is cheap beside the compilation.
    """
    settings = step.config.init_from
    if checkpointer.latest_step():
        checkpoint.check_fits(checkpointer.directory, abstract)
    elif settings.path and settings.which == "state":
        checkpoint.check_fits(settings.path, abstract)
    elif parent := find_parent(settings):
        parent.check_fits(abstract.params, step)


def initial_state(
    step: TrainStep,
    init: Callable[[], TrainState],
    *,
    abstract: TrainState,
    checkpointer: Checkpointer,
    stream: DataStream,
    history: History,
    mesh: Mesh,
) -> TrainState:
    """The state that training goes on from; puts `stream` and `history` there.

    `init()` makes a fresh one.

    The order of precedence:
        1. the newest sound checkpoint of this workdir: all of the state, and the place in the data
        2. with `init_from.which="state"`, the same of another run
        3. with `init_from.path`, the parameters of another run, whose place in the data this one's
           begins after (`stream.continue_from`), or public weights
        4. a fresh start
    """
    settings = step.config.init_from
    if checkpointer.latest_step():
        restored = checkpointer.restore(abstract)
        history.set_state(restored.history)
        logging.info("resumed %s at step %d", checkpointer.workdir, int(restored.state.step))
    elif settings.path and settings.which == "state":
        restored = checkpoint.restore(settings.path, abstract)
        logging.info("resumed the run %s at step %d", settings.path, int(restored.state.step))
    else:
        state = init()
        if (parent := find_parent(settings)) is None:
            return state
        loaded = parent.load(state.params, step, mesh)
        if loaded.data_state is not None:
            stream.continue_from(loaded.data_state)
        params = loaded.state
        return dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))
    if changes(checkpointer.workdir, step.config):
        _go_on_changed(stream, restored.data_state)
    else:
        stream.set_state(restored.data_state)
    return restored.state
