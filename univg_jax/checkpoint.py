"""Save, restore onto any mesh, verify, hand over from stage to stage.

A checkpoint is `workdir/checkpoints/STEP`: `state` (arrays under their path names), `data` (where
the stream stands), `config`, and `checksums.json` of all their files, which is committed together
with them. A step is believed only if its checksums hold: orbax alone restores a flipped bit
silently.

In a run of several processes every process calls every function here. Paths may be `gs://`.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from univg_jax.sharding import path_name, with_shardings

CHECKPOINTS, CHECKSUMS, CONFIG = "checkpoints", "checksums.json", "config.json"
# written while or after summing; no data
UNSUMMED = ("_CHECKPOINT_METADATA", "commit_success.txt", CHECKSUMS)

# Dotted config keys that a resumed run may change: how long, how often, where; never what is
# learnt.
MAY_CHANGE = (
    r"train\..*",
    r"sampling\..*",
    r"data\.(dir|read_threads|prefetch|text_cache)",
    r"mesh\..*",
    r"model\.overrides\.(remat|scan|attention)",
    r"conditioning\.folder",
)


class Restored(NamedTuple):
    """What a run continues from."""

    state: Any
    data_state: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What `verify` found: a sound step has no problems."""

    step: int
    problems: tuple[str, ...]


class Checkpointer:
    """Writes and reads the checkpoints of one workdir.

    Saves are asynchronous: an error of one is raised by the next `save`, `check`, `wait` or
    `close`. The latest `keep` steps stay, and every multiple of `keep_every`.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        save_every: int = 1000,
        keep: int = 3,
        keep_every: int | None = None,
    ):
        self.directory = _absolute(workdir) / CHECKPOINTS
        self._save_every = save_every
        self._saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def should_save(self, step: int) -> bool:
        """Whether `step` is one of the regular saves."""
        return step > 0 and step % self._save_every == 0

    def save(self, step: int, state: Any, data_state: Mapping[str, Any], config: Any) -> None:
        """Starts to save `state`, which may be donated as soon as this returns; a saved step is
        left as it is.

        Raises `ValueError` naming the leaves that are not finite, and saves nothing then.
        """
        self.wait()  # also: the callback of the save before must see its own step
        if step in self._manager.all_steps():
            return
        flags = jax.device_get(
            _finite({name: x for name, x in _leaves(state).items() if _is_float(x)})
        )
        if bad := [name for name, finite in flags.items() if not finite]:
            raise ValueError(f"step {step} is not finite, nothing saved: {_some(bad)}")
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(_nested(_leaves(state))),
                data=ocp.args.JsonSave(dict(data_state)),
                config=ocp.args.JsonSave(plain(config)),
            ),
            force=True,
        )

    def latest_step(self) -> int | None:
        """The newest step written, sound or not; None in a new workdir."""
        return self._manager.latest_step()

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """The state laid out as the shapes' shardings say, from `step` or the newest sound step.

        Newer damaged steps are set aside as `STEP.damaged`, with a warning. Raises
        `FileNotFoundError` if there is nothing to restore, `ValueError` if nothing is sound or the
        state has other leaves or shapes.
        """
        self.wait()
        root, sound = _locate(self.directory if step is None else self.directory / str(step))
        state = _read_state(root / str(sound), abstract_state)
        data_state = _read_json(root / str(sound), "data")
        if step is None:
            self._set_aside([s for s in self._manager.all_steps() if s > sound])
        return Restored(state, data_state)

    def check(self) -> None:
        """Raises the error of a failed asynchronous write, if any: cheap, call it each step."""
        self._manager.check_for_errors()

    def wait(self) -> None:
        """Returns when all that was to be saved is on disk."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _write_checksums(self) -> None:
        # Orbax calls this on process 0 when all processes have written, just before the step is
        # committed.
        unfinished = self.directory / f"{self._saving}.orbax-checkpoint-tmp"
        # buckets do not rename
        step_dir = unfinished if unfinished.exists() else self.directory / str(self._saving)
        files = [name for name in _files(step_dir) if name not in UNSUMMED]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            sums = dict(zip(files, pool.map(lambda name: _sum(step_dir / name), files)))
        (step_dir / CHECKSUMS).write_text(json.dumps(sums, indent=1))

    def _set_aside(self, steps: Sequence[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                target = self.directory / f"{step}.damaged"
                if target.exists():
                    target.rmtree()
                (self.directory / str(step)).rename(target)
        if steps:
            _barrier("set_aside")
            self._manager.reload()


def list_steps(workdir: epath.PathLike) -> tuple[int, ...]:
    """The committed steps of a workdir, ascending; raises `FileNotFoundError` if it does not exist."""
    if not epath.Path(workdir).exists():
        raise FileNotFoundError(f"no checkpoint in {workdir}: it does not exist")
    return _steps(epath.Path(workdir) / CHECKPOINTS)


def latest_step(workdir: epath.PathLike) -> int | None:
    """The newest committed step; None if there is none, or no such workdir."""
    return max(_steps(epath.Path(workdir) / CHECKPOINTS), default=None)


def workdir_of(path: epath.PathLike) -> epath.Path:
    """The workdir that a path (itself, its folder of checkpoints, or a step) belongs to; raises
    `FileNotFoundError`.
    """
    return _parse(path)[0].parent


def step_of(path: epath.PathLike) -> int:
    """The step that `load_params` reads at `path`; raises what it raises."""
    return _locate(path)[1]


def verify(path: epath.PathLike) -> tuple[StepReport, ...]:
    """Recomputes the checksums of every step of a workdir (or of one step); raises
    `FileNotFoundError` if none.
    """
    root, step = _parse(path)
    steps = _steps(root) if step is None else (step,)
    return tuple(StepReport(step=s, problems=_problems(root / str(s))) for s in steps)


def copy(workdir: epath.PathLike, step: int | None, out: epath.PathLike) -> int:
    """Copies a sound step (None: the newest) and its config into another workdir; returns the step.

    Raises `ValueError` if the step is damaged or `out` has it already.
    """
    root, step = _locate(workdir if step is None else epath.Path(workdir) / CHECKPOINTS / str(step))
    target = epath.Path(out) / CHECKPOINTS / str(step)
    if target.exists():
        raise ValueError(f"{target} exists, nothing copied")
    claim_workdir(out, _read_json(root / str(step), "config"))
    if jax.process_index() == 0:
        unfinished = target.parent / f"{step}.orbax-checkpoint-tmp"
        if unfinished.exists():
            unfinished.rmtree()
        for name in _files(root / str(step)):
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (root / str(step) / name).copy(unfinished / name)
        unfinished.rename(target)
    _barrier("copied")
    if problems := _problems(target):
        raise ValueError(f"the copy {target} is damaged: {_some(problems)}")
    return step


def load_params(
    path: epath.PathLike, *, which: str = "ema", abstract: Any = None, shardings: Any = None
) -> Any:
    """The parameters alone (`which`: 'ema' or 'params') of a workdir's newest sound step, or of one
    step.

    `path` is a workdir or `workdir/checkpoints/STEP`. With `abstract`, they must be exactly its
    leaves and shapes; without, nested dicts of whatever was saved. `shardings`: a tree of them or
    one for all; default: those of `abstract`, else the first device. Raises `FileNotFoundError` or
    `ValueError`.
    """
    root, step = _locate(path)
    if abstract is None:
        abstract = _nested(_saved(root / str(step), which))
    if shardings is not None:
        abstract = with_shardings(abstract, shardings)
    return _read_state(root / str(step), {which: abstract}, prefix=which)[which]


def load_config(path: epath.PathLike) -> dict[str, Any]:
    """The config that wrote the checkpoint at `path` (a workdir or a step), as plain dicts and
    lists.
    """
    root, step = _locate(path, under="config/")
    return _read_json(root / str(step), "config")


def init_from(
    params: Any,
    path: epath.PathLike,
    *,
    which: str = "ema",
    new: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> Any:
    """The parameters a stage starts from: those of the checkpoint at `path`, but for the declared
    leaves.

    `params`: this stage's own initial parameters, which give every leaf its shape and sharding.
    `new`, `dropped`: regexes searched in parameter paths. Leaves that match `dropped` are not read;
    leaves that the checkpoint then lacks keep their initial value if `new` matches. Any other
    difference in leaves, shapes or types raises `ValueError` with all of them.
    """
    root, step = _locate(path)
    saved = {k: v for k, v in _saved(root / str(step), which).items() if not _matches(dropped, k)}
    values = _leaves(params)
    kept = sorted(name for name in values if name not in saved and _matches(new, name))
    read = {name: x for name, x in values.items() if name not in kept}
    if problems := _differences(read, saved):
        raise ValueError(
            f"{path} does not fit the model (declare leaves as new or dropped): {_some(problems)}"
        )
    values |= _leaves(_read_arrays(root / str(step), {which: _nested(read)})[which])
    logging.info(
        "parameters from %s, step %d: %d leaves read, new: %s",
        path,
        step,
        len(read),
        kept or "none",
    )
    return jax.tree.unflatten(jax.tree.structure(params), values.values())


def claim_workdir(
    workdir: epath.PathLike, config: Any, *, may_change: Sequence[str] = MAY_CHANGE
) -> None:
    """Makes `workdir` this config's: creates it, or finds the same config in it but for keys that
    may change.

    `may_change`: regexes of whole dotted keys. Raises `ValueError` naming the first keys that
    differ, with both values, and writes nothing then.
    """
    file, config = epath.Path(workdir) / CONFIG, plain(config)
    if file.exists():
        try:
            theirs = flat(json.loads(file.read_text()))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); choose another workdir") from None
        ours = flat(config)
        different = [
            f"{key} is {ours.get(key, 'absent')!r}, there {theirs.get(key, 'absent')!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key, "absent") != theirs.get(key, "absent")
            and not any(re.fullmatch(pattern, key) for pattern in may_change)
        ]
        if different:
            raise ValueError(f"{workdir} belongs to another config: {_some(different, 3)}")
    elif list(_steps(file.parent / CHECKPOINTS)):
        raise ValueError(f"{workdir} has checkpoints but no {CONFIG}; choose another workdir")
    _barrier("claim_workdir")  # nobody writes before everybody has read
    if jax.process_index() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.parent / f"{CONFIG}.tmp"
        unfinished.write_text(json.dumps(config, indent=1))
        unfinished.replace(file)
    _barrier("workdir_claimed")


def plain(config: Any) -> Any:
    """A config as JSON gives it back: dicts, lists, numbers, strings."""
    return json.loads(json.dumps(config.to_dict() if hasattr(config, "to_dict") else config))


# --- which step ---


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax refuses relative paths; `resolve` would take a bucket's address for one."""
    path = epath.Path(path)
    return path if "://" in os.fspath(path) else path.resolve()


def _steps(root: epath.Path) -> tuple[int, ...]:
    return tuple(sorted(ocp.utils.checkpoint_steps(root))) if root.exists() else ()


def _parse(path: epath.PathLike) -> tuple[epath.Path, int | None]:
    """(folder of steps, step or None) of a workdir, its folder of steps, or a step; it exists and
    is not empty.
    """
    path = _absolute(path)
    is_step = path.parent.name == CHECKPOINTS and path.name.isdigit()
    if not path.exists() and not (is_step and path.parent.exists()):
        raise FileNotFoundError(f"no checkpoint in {path}: it does not exist")
    root = path.parent if is_step else path if path.name == CHECKPOINTS else path / CHECKPOINTS
    steps = _steps(root)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {root.parent}: it has no steps")
    if is_step and int(path.name) not in steps:
        raise FileNotFoundError(
            f"no step {path.name} in {root}: steps are {', '.join(map(str, steps))}"
        )
    return root, int(path.name) if is_step else None


def _locate(path: epath.PathLike, *, under: str = "") -> tuple[epath.Path, int]:
    """The named step, or the newest whose files under `under` are sound."""
    root, step = _parse(path)
    for candidate in reversed(_steps(root)) if step is None else (step,):
        problems = _problems(root / str(candidate), under=under)
        if not problems:
            return root, candidate
        logging.error("CHECKPOINT %s IS DAMAGED: %s", root / str(candidate), _some(problems))
    raise ValueError(
        f"no sound checkpoint in {path}; step {candidate} is damaged: {_some(problems)}"
    )


# --- checksums ---


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            yield from _files(child, f"{prefix}{child.name}/")
        else:
            yield prefix + child.name


def _sum(file: epath.Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as f:
        while chunk := f.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _problems(step_dir: epath.Path, *, under: str = "") -> tuple[str, ...]:
    """What is wrong with a step's files. Processes share the reading and agree on whether it is
    sound.
    """
    try:
        sums = json.loads((step_dir / CHECKSUMS).read_text())
        files = sorted(name for name in sums if name.startswith(under))
    except (OSError, ValueError, AttributeError) as error:
        return (f"{CHECKSUMS} is unreadable ({type(error).__name__})",)

    def problem(name: str) -> str | None:
        if not (step_dir / name).exists():
            return f"{name} is missing"
        return None if _sum(step_dir / name) == sums[name] else f"{name} is not what was written"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = tuple(
            filter(None, pool.map(problem, files[jax.process_index() :: jax.process_count()]))
        )
    if jax.process_count() > 1 and np.any(multihost_utils.process_allgather(np.array(bool(found)))):
        return found or ("another process found damage",)
    return found


# --- trees: stored as nested dicts by path name, so optax's structures are never orbax's business
# ---


def _leaves(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[last] = leaf
    return tree


def _saved(step_dir: epath.Path, prefix: str = "") -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the saved leaves; with a prefix, of that part and under names within it."""
    tree = ocp.PyTreeCheckpointHandler().metadata(step_dir / "state").tree
    if prefix:
        if not tree.get(prefix):
            raise ValueError(f"{step_dir} has no {prefix!r}; it has {', '.join(sorted(tree))}")
        tree = tree[prefix]
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in _leaves(tree).items()}


def _differences(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    def show(x: Any) -> str:
        return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"

    return [
        *(f"{name} {show(x)} is missing" for name, x in wanted.items() if name not in saved),
        *(f"{name} {show(x)} is extra" for name, x in saved.items() if name not in wanted),
        *(
            f"{name} is {show(saved[name])}, the model's {show(x)}"
            for name, x in wanted.items()
            if name in saved and show(x) != show(saved[name])
        ),
    ]


def _read_state(step_dir: epath.Path, abstract: Any, *, prefix: str = "") -> Any:
    """The tree of `abstract`, whose leaves must be all that is saved (under `prefix`)."""
    wanted = _leaves(abstract)
    saved = {f"{prefix}/{k}" if prefix else k: v for k, v in _saved(step_dir, prefix).items()}
    if problems := _differences(wanted, saved):
        raise ValueError(f"{step_dir} does not fit the model: {_some(problems)}")
    values = _leaves(_read_arrays(step_dir, _nested(wanted)))
    return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in wanted])


def _read_arrays(step_dir: epath.Path, nested: Any) -> Any:
    default = SingleDeviceSharding(jax.local_devices()[0])
    nested = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default
        ),
        nested,
    )
    args = ocp.args.PyTreeRestore(
        item=nested,
        restore_args=ocp.checkpoint_utils.construct_restore_args(nested),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(step_dir / "state", args=args)


def _read_json(step_dir: epath.Path, item: str) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(step_dir / item)


# --- small things ---


@jax.jit
def _finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in leaves.items()}


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _some(lines: Sequence[str], most: int = 12) -> str:
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, under dotted keys."""
    if not isinstance(config, dict) or not config:
        return {prefix.rstrip("."): config}
    return {
        k: v for key, value in config.items() for k, v in flat(value, f"{prefix}{key}.").items()
    }


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
