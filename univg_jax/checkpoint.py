"""Save, restore onto any mesh, verify, hand over from stage to stage.

A checkpoint is `workdir/checkpoints/STEP`: `state` (arrays under their path names), `data` (the
stream's position), `config`, `history` (what the next row of metrics has of the steps so far), and
`checksums.json` of all their files, which is committed together with them. A step counts as sound
only if its checksums hold, because orbax alone restores a flipped bit silently. Who is given a
workdir takes its newest step, and raises UserError if that is damaged: nobody goes on from an older
one unasked (`fall_back`).

In a run of several processes every process calls every function here. Paths may be `gs://`.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jaxtyping import PyTree
from orbax.checkpoint.future import ChainedFuture, Future
from orbax.checkpoint.handlers import DefaultCheckpointHandlerRegistry
from orbax.checkpoint.path import atomicity, atomicity_defaults

from univg_jax import checksums, stored
from univg_jax.errors import AlreadyExistsError, NotFoundError, UserError, shorten
from univg_jax.files import check_space, write_whole
from univg_jax.lock import WorkdirLock
from univg_jax.retention import Retention
from univg_jax.settings import Train
from univg_jax.sharding import with_shardings
from univg_jax.stored import (
    STATE,
    Shapes,
    differences,
    num_retries,
    read_arrays,
    read_item,
    read_state,
    saved_shapes,
    storage_named,
)
from univg_jax.streaming import BLOCK_BYTES
from univg_jax.together import together
from univg_jax.trees import Json, named_leaves, nest
from univg_jax.workdir import (
    CHECKPOINTS,
    ENCODERS,
    as_json,
    claim_workdir,
    look_for_foreign_files,
    nearest_run,
    set_aside,
    steps_in,
)

# Orbax's notes. In a bucket a step without the first one was never finished.
COMMITTED, METADATA = "commit_success.txt", "_CHECKPOINT_METADATA"
# The files of a step that say what arrays it has, which are little beside the arrays.
_SHAPES = tuple(f"{STATE}/{name}" for name in ("_", "array_metadatas/", "d/", "manifest.ocdbt"))

EVERY_STEP = Train(save_every=1)  # all steps are planned, and the newest are kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """What a run continues from, or a stage starts from: state or parameters, and the stream's."""

    state: PyTree
    data_state: Json | None  # None: there is none, in public weights
    history: Json = dataclasses.field(default_factory=dict)  # what no row of metrics has yet


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What `verify` found: a sound step has no problems.

    Additional files, which no save wrote, are none where nothing reads them.
    """

    step: int
    problems: tuple[str, ...]
    additional: tuple[str, ...] = ()


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of trees; each process also sums the files that it has written."""

    async def async_save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> list[Future]:
        writes = await super().async_save(directory, *args, **kwargs)
        own = f"process_{jax.process_index()}"

        def is_own(name: str) -> bool:
            folder, _, rest = name.partition("/")
            return folder == f"ocdbt.{own}" or rest == own

        return [ChainedFuture(writes, cb=lambda: checksums.write_own(directory, is_own))]


class _Summed:
    """How orbax commits a step, with the checksums of all its files made just before.

    A mixin of orbax's temporary paths. A step is not committed if `before_commit()` raises.
    """

    before_commit: Callable[[], None] = staticmethod(lambda: None)

    @classmethod
    def from_final(cls, *args: Any, **options: Any) -> "_Summed":
        path = super().from_final(*args, **options)
        path.metadata = options.get("checkpoint_metadata_store")
        return path

    async def finalize(self) -> None:
        """Process 0 calls this when all processes have written and summed their files."""
        if self.metadata is None:  # an item in a step
            await super().finalize()
        else:
            await asyncio.to_thread(self._finalize)

    def _finalize(self) -> None:
        folder, final = self.get(), self.get_final()
        self.before_commit()
        self.metadata.wait_until_finished()
        self.metadata.update(file_path=folder / METADATA, commit_timestamp_nsecs=time.time_ns())
        self.metadata.wait_until_finished()
        note = f"Checkpoint commit was successful to {final}".encode()
        late = {COMMITTED: checksums.checksum_of(note)}
        state = folder / STATE
        checksums.combine(
            folder, step=int(final.name), of_processes=state, prefix=f"{STATE}/", late=late
        )
        self.before_commit()
        write_whole(folder / COMMITTED, note)
        if folder != final:
            folder.rename(final)


class _SummedThenRenamed(_Summed, atomicity.AtomicRenameTemporaryPath):
    """On a disk: the step gets its name when it is whole."""


class _SummedThenNoted(_Summed, atomicity.CommitFileTemporaryPath):
    """In a bucket, which cannot rename folders: what is not whole lacks `COMMITTED`."""


class _Deleter:
    """Deletes old steps as orbax does, but a step that cannot be deleted is no fault of a save."""

    def __init__(self, deleter: Any) -> None:
        self._deleter = deleter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._deleter, name)

    def delete_steps(self, steps: Sequence[int]) -> None:
        for step in steps:
            try:
                self._deleter.delete(step)
            except OSError as error:
                logging.warning("checkpoint %d cannot be deleted, it stays: %s", step, error)


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which asks JAX for preemptions at each save; we ask ourselves.

    JAX's service takes each number that it is asked with for the place where the process is, and
    after a signal all processes agree on the next one. Orbax asks with steps, and
    `training.preemption` with its calls. Where the signal came in a save, all would wait for a
    place that they had passed, and none would end.
    """

    def reached_preemption(self, step: int) -> bool:
        """Nobody is asked."""
        return False


class Checkpointer:
    """Writes and reads the checkpoints of one workdir; `retention.Retention` says which are kept.

    Saves are asynchronous: the error of one is raised by the next `save`, `check`, `wait` or
    `close`. It is a UserError with the path and the cause where the storage refused.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        settings: Train = EVERY_STEP,
        *,
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        """If `before_commit()` raises, what is being saved then does not become a step."""
        self.workdir = _absolute(workdir)
        self.directory = self.workdir / CHECKPOINTS
        path = _SummedThenNoted if _is_bucket(self.directory) else _SummedThenRenamed
        path = type(path.__name__, (path,), {"before_commit": staticmethod(before_commit)})
        self._retention = Retention(self.workdir, settings)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention,
            cleanup_tmp_directories=True,
            temporary_path_class=path,
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        look_for_foreign_files(self.directory)
        handlers = DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, _StateHandler())
        self._manager = _Manager(self.directory, options=options, handler_registry=handlers)
        self._retries = num_retries()
        self._manager._checkpoint_deleter = _Deleter(self._manager._checkpoint_deleter)

    def save(
        self, step: int, state: PyTree, data_state: Json, config: Json, history: Json | None = None
    ) -> None:
        """Starts to save `state`, which may be donated as soon as this returns.

        A step that is saved already is left as it is. Raises UserError with the leaves that are not
        finite, or where the disk has no space for them or lost the step before, and saves nothing
        then.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        leaves = named_leaves(state)
        flags = jax.device_get(_are_finite({k: x for k, x in leaves.items() if _is_float(x)}))
        if bad := [name for name, finite in flags.items() if not finite]:
            raise UserError(f"step {step} is not finite, nothing saved: {shorten(bad)}")
        with together():
            newest = self._manager.latest_step()
            if newest is not None and not (self.directory / str(newest)).exists():
                raise UserError(f"{self.directory / str(newest)} is gone: who moved or deleted it?")
        self.check_space(state)
        with _writing(self.directory):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(
                        nest(leaves), nest({name: _pieces(x) for name, x in leaves.items()})
                    ),
                    data=ocp.args.JsonSave(dict(data_state)),
                    config=ocp.args.JsonSave(as_json(config)),
                    history=ocp.args.JsonSave(dict(history or {})),
                ),
                force=True,
            )

    def check_space(self, state: PyTree) -> None:
        """Raises UserError if the disk has no space for one more checkpoint of such a state.

        A bucket has no end. All processes call it.
        """
        with together():
            if jax.process_index() == 0 and not _is_bucket(self.directory):
                needed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
                check_space(self.directory, needed)

    def prune(self) -> None:
        """Removes the steps that are not to be kept: a save does that, if it is not killed then.

        All processes call it.
        """
        self.wait()
        with together():
            if jax.process_index() == 0:
                steps = self._manager.all_steps()
                old = set(steps) - self._retention.kept(steps)
                self._manager._checkpoint_deleter.delete_steps(sorted(old))

    def latest_step(self) -> int | None:
        """The newest step written, sound or not; None in a new workdir."""
        return self._manager.latest_step()

    def restore(self, abstract_state: PyTree) -> Restored:
        """The newest step, with the shapes and shardings of `abstract_state`.

        Raises NotFoundError if there is nothing to restore, UserError if the step is damaged or the
        state has other leaves. Additional files in it are named in a warning.
        """
        self.wait()
        root, step = _locate(self.directory)
        return _restore(root / str(step), abstract_state)

    def check(self) -> None:
        """Raises the error of a failed asynchronous write, if any: cheap, call it each step."""
        with _writing(self.directory):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when all that was to be saved is on disk."""
        with _writing(self.directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        if (retries := num_retries()) > self._retries:
            logging.warning(
                "%s: %d requests failed and were sent again",
                *(self.directory, retries - self._retries),
            )
            self._retries = retries

    def close(self) -> None:
        """Waits for the last save and ends the threads."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Who interrupts does not want to wait: what is being written then is never committed.
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.close()


def _writing(folder: epath.Path) -> contextlib.AbstractContextManager[None]:
    return storage_named(f"a checkpoint in {folder} cannot be written", folder)


def _is_bucket(folder: epath.Path) -> bool:
    """Whether orbax commits steps there by a note in them."""
    usual = atomicity_defaults.get_default_temporary_path_class(folder)
    return issubclass(usual, atomicity.CommitFileTemporaryPath)


def workdir_of(path: epath.PathLike) -> epath.Path:
    """The workdir of a path: itself, its folder of checkpoints, or a step. Raises NotFoundError."""
    return _parse(path)[0].parent


def step_of(path: epath.PathLike) -> int:
    """The step that `load_params` reads at `path`; raises what it raises."""
    return _locate(path)[1]


def digests(path: epath.PathLike) -> dict[int, str]:
    """16 hex digits that name the content of each step of a workdir, or of one step.

    They are of its checksums, so they change with its parameters and its config, and a copy in
    another folder has the same. Nothing is verified. Raises NotFoundError if there is none.
    """
    root, step = _parse(path)
    files = {
        s: root / str(s) / checksums.FILE for s in (steps_in(root) if step is None else [step])
    }
    return {
        s: hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for s, file in files.items()
        if file.exists()
    }


def _find_problems(folder: epath.Path, *, under: str | tuple[str, ...] = "") -> tuple[str, ...]:
    """What is wrong with the files of a step whose names begin with (one of) `under`."""
    closed = f"{STATE}/array_metadatas"  # here orbax reads whatever there is
    return checksums.find_problems(folder, under=under, closed=closed, step=int(folder.name))


def verify(path: epath.PathLike) -> tuple[StepReport, ...]:
    """Recomputes the checksums of every step of a workdir, or of one step.

    Raises NotFoundError if there is none.
    """
    root, step = _parse(path)
    steps = steps_in(root) if step is None else (step,)
    found = {s: _find_problems(root / str(s)) for s in steps}
    return tuple(
        StepReport(
            step=s,
            problems=problems,
            additional=() if problems else checksums.find_additional(root / str(s)),
        )
        for s, problems in found.items()
    )


def fall_back(workdir: epath.PathLike) -> None:
    """Sets aside, as `STEP.damaged`, every step of a workdir that is newer than its newest sound.

    Logs an error for each. Raises UserError, and changes nothing, if there are steps and none is
    sound.
    """
    root, damaged = _absolute(workdir) / CHECKPOINTS, {}
    for step in reversed(steps_in(root)):
        if not (problems := _find_problems(root / str(step))):
            break
        damaged[step] = problems
        logging.error("CHECKPOINT %s IS DAMAGED: %s", root / str(step), shorten(problems))
    else:
        if damaged:
            raise UserError(f"{workdir} has no sound checkpoint to fall back to")
    if damaged:
        set_aside(root, list(damaged))
        logging.error("FALLING BACK TO STEP %d: THE STEPS AFTER IT ARE MADE AGAIN", step)


def copy(workdir: epath.PathLike, step: int | None, out: epath.PathLike) -> int:
    """Copies a step (None: the newest) into another workdir; returns the step.

    What a run is besides goes with it: its config and its encoders. Raises UserError if the step is
    damaged, or `out` has it already, or other encoders, or trains.
    """
    root, step = _locate(workdir if step is None else epath.Path(workdir) / CHECKPOINTS / str(step))
    target = epath.Path(out) / CHECKPOINTS / str(step)
    if step in steps_in(target.parent):
        raise AlreadyExistsError(f"{target} exists, nothing copied")
    with WorkdirLock(out, active=jax.process_index() == 0) as lock:
        claim_workdir(out, read_item(root / str(step), "config"))
        with together():
            if jax.process_index() == 0:
                _copy_encoders(root.parent / ENCODERS, epath.Path(out) / ENCODERS)
                _copy_step(root / str(step), target, before_commit=lock.confirm)
    if problems := _find_problems(target):
        raise UserError(f"the copy {target} is damaged: {shorten(problems)}")
    return step


def _copy_step(
    source: epath.Path, target: epath.Path, *, before_commit: Callable[[], None]
) -> None:
    is_bucket = _is_bucket(target)  # which cannot rename: a step without `COMMITTED` is none
    unfinished = target if is_bucket else target.parent / f"{target.name}.orbax-checkpoint-tmp"
    if unfinished.exists():
        unfinished.rmtree()
    names = set(checksums.list_files(source)).difference(checksums.find_additional(source))
    for name in sorted(names, key=lambda name: name == COMMITTED):
        if name == COMMITTED:
            before_commit()
        (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).copy(unfinished / name)
    if not is_bucket:
        unfinished.rename(target)


def _copy_encoders(source: epath.Path, target: epath.Path) -> None:
    for name in checksums.list_files(source) if source.exists() else ():
        content, file = (source / name).read_bytes(), target / name
        if file.exists() and file.read_bytes() != content:
            raise UserError(f"{file} is another one than {source / name}: copy to another folder")
        write_whole(file, content)


def restore(path: epath.PathLike, abstract_state: PyTree) -> Restored:
    """The whole state and data position of a workdir's newest step, or of one step."""
    root, step = _locate(path)
    return _restore(root / str(step), abstract_state)


def check_fits(path: epath.PathLike, abstract_state: PyTree) -> None:
    """Raises UserError if `restore` would not give such a state, as far as shapes tell.

    No array is read.
    """
    root, step = _locate(path, under=_SHAPES)
    stored.check_fits(root / str(step), abstract_state)


def load_params(
    path: epath.PathLike,
    *,
    which: str = "ema",
    abstract: PyTree | None = None,
    shardings: PyTree | None = None,
) -> PyTree:
    """The parameters alone (`which`: 'ema' or 'params') of a workdir's newest step.

    `path` is a workdir or one step, `workdir/checkpoints/STEP`. With `abstract`, they must be
    exactly its leaves and shapes; without, the result is nested dicts of whatever was saved.
    `shardings`: a tree of them or one for all; default: those of `abstract`, else the first device.
    Raises UserError.
    """
    root, step = _locate(path)
    if abstract is None:
        abstract = nest(saved_shapes(root / str(step), which))
    if shardings is not None:
        abstract = with_shardings(abstract, shardings)
    return read_state(root / str(step), {which: abstract}, prefix=which)[which]


def load_config(path: epath.PathLike) -> Json:
    """The config that wrote the checkpoint at `path` (a workdir or a step), as nested dicts."""
    root, step = _locate(path, under="config/")
    return read_item(root / str(step), "config")


def load_data_state(path: epath.PathLike) -> Json:
    """The state of the stream in the checkpoint at `path` (a workdir or a step)."""
    root, step = _locate(path, under="data/")
    return read_item(root / str(step), "data")


def init_from(
    params: PyTree,
    path: epath.PathLike,
    *,
    which: str = "ema",
    new: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> Restored:
    """What a stage starts from: the checkpoint's parameters, but for the declared leaves, and the
    state of its stream.

    `params`: this stage's own initial parameters, which give every leaf its shape and sharding.
    `new`, `dropped`: regexes searched in parameter paths. Leaves that match `dropped` are not read;
    leaves that the checkpoint then lacks keep their initial value if `new` matches. Any other
    difference in leaves, shapes or types raises UserError with all of them.
    """
    root, step = _locate(path)
    filled = fill(
        params,
        saved=saved_shapes(root / str(step), which),
        read=lambda wanted: read_arrays(root / str(step), {which: nest(wanted)})[which],
        where=_where(path, step),
        new=new,
        dropped=dropped,
    )
    return Restored(state=filled, data_state=read_item(root / str(step), "data"))


def check_init_from(
    params: PyTree,
    path: epath.PathLike,
    *,
    which: str = "ema",
    new: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> None:
    """Raises UserError if `init_from` would, as far as shapes tell. No array is read."""
    root, step = _locate(path, under=_SHAPES)
    saved = saved_shapes(root / str(step), which)
    leaves_to_fill(params, saved=saved, where=_where(path, step), new=new, dropped=dropped)


def _where(path: epath.PathLike, step: int) -> str:
    return f"{path}, step {step}"


def fill(
    params: PyTree,
    *,
    saved: Shapes,
    read: Callable[[Mapping[str, jax.Array]], PyTree],
    where: str,
    new: Sequence[str],
    dropped: Sequence[str],
) -> PyTree:
    """`params` with the values that are `saved`, but for the declared leaves; see `init_from`.

    `read(leaves)` has the nested values of some leaves, which tell their shapes and shardings.
    """
    wanted = leaves_to_fill(params, saved=saved, where=where, new=new, dropped=dropped)
    values = named_leaves(params)
    kept = sorted(values.keys() - wanted.keys())
    values |= named_leaves(read(wanted))
    logging.info("parameters from %s: %d leaves read, new: %s", where, len(wanted), kept or "none")
    return jax.tree.unflatten(jax.tree.structure(params), values.values())


def leaves_to_fill(
    params: PyTree, *, saved: Shapes, where: str, new: Sequence[str], dropped: Sequence[str]
) -> Shapes:
    """The leaves of `params`, or of its shapes, that `fill` reads. Raises UserError as it does."""
    saved = {name: x for name, x in saved.items() if not _matches(dropped, name)}
    wanted = {
        name: x
        for name, x in named_leaves(params).items()
        if name in saved or not _matches(new, name)
    }
    if problems := differences(wanted, saved):
        raise UserError(
            f"{where} does not fit the model (declare leaves as new or dropped): "
            f"{shorten(problems)}"
        )
    return wanted


def _absolute(path: epath.PathLike) -> epath.Path:
    # Orbax refuses relative paths; `resolve` would take a bucket's address for a relative path.
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else path.resolve()


def _parse(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """(folder of steps, step or None) of a workdir, its steps, or one. Raises NotFoundError."""
    path = _absolute(path)
    is_step = path.parent.name == CHECKPOINTS and path.name.isdigit()
    if not path.exists() and not (is_step and path.parent.exists()):
        raise NotFoundError(f"no checkpoint in {path}: it does not exist{nearest_run(path)}")
    root = path.parent if is_step else path if path.name == CHECKPOINTS else path / CHECKPOINTS
    steps = steps_in(root)
    if not steps:
        path = root.parent
        raise NotFoundError(f"no checkpoint in {path}: it has no steps{nearest_run(path)}")
    if is_step and int(path.name) not in steps:
        there = ", ".join(map(str, steps))
        raise NotFoundError(f"no step {path.name} in {root}: steps are {there}")
    return root, int(path.name) if is_step else None


def _locate(path: epath.PathLike, *, under: str | tuple[str, ...] = "") -> tuple[epath.Path, int]:
    """The named step, or the newest. Raises UserError if its files under `under` are damaged."""
    root, step = _parse(path)
    is_named, step = step is not None, steps_in(root)[-1] if step is None else step
    if problems := _find_problems(root / str(step), under=under):
        older = [] if is_named else [other for other in steps_in(root) if other < step]
        go_on = (
            f"; name an older step, {root / str(older[-1])}, or continue the run with --fallback"
            if older
            else ""
        )
        raise UserError(f"checkpoint {root / str(step)} is damaged: {shorten(problems, 4)}{go_on}")
    return root, step


def _restore(step_dir: epath.Path, abstract_state: PyTree) -> Restored:
    if jax.process_index() == 0 and (additional := checksums.find_additional(step_dir)):
        logging.warning("%s has additional files: %s", step_dir, shorten(additional))
    state = read_state(step_dir, abstract_state)
    history = read_item(step_dir, "history") if (step_dir / "history").exists() else {}
    return Restored(state=state, data_state=read_item(step_dir, "data"), history=history)


def _pieces(x: jax.Array) -> ocp.SaveArgs:
    """Arrays are stored in pieces, so that a part is read without the rest (`stored.stream`).

    A piece of a stacked parameter has one layer.
    """
    return ocp.SaveArgs(chunk_byte_size=BLOCK_BYTES, shard_axes=(0,) if x.ndim > 2 else ())


@jax.jit
def _are_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # The largest value is NaN if any is. On CPUs this takes a third of the time of `isfinite`.
    return {name: jnp.max(jnp.abs(x), initial=0) < jnp.inf for name, x in leaves.items()}


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
