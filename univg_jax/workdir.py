"""A workdir: the folder of one run, which belongs to one config, and its steps.

`config.json` says whose it is, `encoders` has what it encodes with, `checkpoints/STEP` are its
checkpoints, `evaluations/BENCHMARK.jsonl` has what was found of them. Paths may be `gs://`.
"""

import contextlib
import dataclasses
import json
import re
import secrets
import time
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from univg_jax import checksums
from univg_jax.errors import NotFoundError, UnreachableError, UserError, shorten, suggestion
from univg_jax.files import CHECKPOINTS, CONFIG, read_json, write_whole
from univg_jax.settings import Config
from univg_jax.stored import read_item, storage_named
from univg_jax.together import barrier, of_first, together
from univg_jax.trees import Json, flatten

ENCODERS = "encoders"
EVALUATIONS = "evaluations"

# Regexes of the dotted config keys that a resumed run may change: how long, how often, where; never
# what is learned.
MAY_CHANGE = (
    r"train\..*",
    r"sampling\..*",
    r"data\.(dir|read_threads|prefetch|text_cache|latent_cache|encode_missing)",
    r"mesh\..*",
    r"model\.overrides\.(remat|scan|attention)",
    r"conditioning\.folder",
    r"conditioning\.fit_on.*",  # once the codec is fitted, it is recorded
)
# Those that it may change if that is declared: how it learns, and from what. Not what a checkpoint
# has: the model and its encoders.
MAY_BE_ALLOWED = re.compile(r"name|seed|(tasks|data|flow|optim)\..*")


def resume(workdir: epath.PathLike, config: Config, *, allow: Sequence[str] = ()) -> Config:
    """The config with which the run in `workdir` goes on, or begins; writes nothing.

    Settings that are None and fixed when a run begins (`Config.begun`) are those of the run's own
    config, or of another run that it continues. `allow` are dotted keys, or sections, in which the
    config may differ from the run's own. Raises UserError if the workdir is another config's, or
    past `config.train.steps`.
    """
    begun, _ = _recorded(workdir)
    parent = config.init_from
    if begun is None and parent.path and parent.which == "state":
        path = epath.Path(parent.path)  # a workdir, or a checkpoint in it
        # An export, which has no checkpoints, is refused later: it has no state.
        runs = [f for f in (path, *path.parents[:2]) if (f / CHECKPOINTS).exists()]
        begun = _recorded(runs[0])[0] if runs else None
    if begun is not None:
        names = ("decay_steps", "ema_fresh")
        kept = {k: getattr(begun.optim, k) for k in names if getattr(config.optim, k) is None}
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, **kept))
    config = config.begun()
    _check_same(workdir, config, allow)
    check_not_past(workdir, config.train.steps)
    return config


# What a folder of checkpoints has: steps, one that is being written, what was set aside.
_OWN = re.compile(r"(0|[1-9]\d*)(\.damaged|\.orbax-checkpoint-tmp.*)?")


def is_claimed(workdir: epath.PathLike) -> bool:
    """Whether `workdir` belongs to a config, which then has trained in it."""
    return (epath.Path(workdir) / CONFIG).exists()


def claim_workdir(
    workdir: epath.PathLike, config: Config | Json, *, allow: Sequence[str] = ()
) -> None:
    """Makes `workdir` this config's: creates it, or finds the same config in it.

    Keys that match `MAY_CHANGE` may differ, those in `allow` (see `resume`), and `init_from` once
    the run has checkpoints: its parent is not opened again. Raises UserError with the other keys
    that differ, and both values, and writes nothing then. A config.json that is torn or gone is
    written again from the newest checkpoint's, with a warning.
    """
    config = _begun(config)
    lost = _check_same(workdir, config, allow)
    barrier("claim_workdir")  # nobody writes before everybody has read
    if jax.process_index() == 0:
        write_whole(epath.Path(workdir) / CONFIG, json.dumps(config.to_dict(), indent=1))
        if lost:
            logging.warning("%s", lost)
        end, steps = config.optim.decay_steps, config.train.steps
        if config.optim.schedule == "cosine" and end is not None and end < steps:
            logging.warning("optim.decay_steps=%d: the rate is zero from there to %d", end, steps)
    barrier("workdir_claimed")


def check_not_past(workdir: epath.PathLike, steps: int) -> None:
    """Raises UserError if a run has more steps than a config asks for."""
    if (newest := newest_step(workdir)) > steps:
        raise UserError(f"{workdir} is at step {newest}, past train.steps={steps}")


def _begun(config: Config | Json) -> Config:
    """A config of any age as `Config.begun`; older ones warm every average up."""
    if not isinstance(config, Config):
        optim = config.get("optim", {})
        older = {"ema_fresh": [".*"], **optim} if isinstance(optim, dict) else optim
        config = Config.of({**config, "optim": older})
    return config.begun()


def _recorded(workdir: epath.PathLike) -> tuple[Config | None, str]:
    """The config of the run in `workdir`, and what is to be said if config.json does not have it.

    Raises UserError if the workdir has steps or a config.json, but no config that can be read.
    """
    file = epath.Path(workdir) / CONFIG
    try:
        stored, lost = read_json(file), ""
    except UnreachableError:
        raise
    except UserError as error:
        steps = steps_in(file.parent / CHECKPOINTS)
        if not steps and isinstance(error, NotFoundError):
            return None, ""
        stored, step = _config_of_checkpoint(file.parent / CHECKPOINTS, steps)
        if stored is None:
            raise UserError(
                f"{error}, and no checkpoint has its content: use another workdir"
            ) from None
        lost = f"{error}: written again from checkpoint {step}"
    try:
        return _begun(stored), lost
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _config_of_checkpoint(root: epath.Path, steps: Sequence[int]) -> tuple[Json | None, int]:
    """The config in the newest step that has a sound one, and the step; None where none has."""
    for step in reversed(steps):
        if not checksums.find_problems(root / str(step), under="config/"):
            return read_item(root / str(step), "config"), step
    return None, 0


def changes(workdir: epath.PathLike, config: Config) -> dict[str, str]:
    """The keys of what is learned that are not as in the run in `workdir`, and both values."""
    recorded, _ = _recorded(workdir)
    if recorded is None:
        return {}
    theirs, ours = (flatten(as_json(c.begun().to_dict())) for c in (recorded, config))
    may_change = (*MAY_CHANGE, r"init_from\..*") if newest_step(workdir) else MAY_CHANGE
    if theirs["optim.decay_steps"] is None:
        may_change = (*may_change, r"optim\.decay_steps")  # no cosine has begun
    return {
        key: f"{key} is {ours.get(key, 'absent')!r}, there {theirs.get(key, 'absent')!r}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key, "absent") != theirs.get(key, "absent")
        and not any(re.fullmatch(pattern, key) for pattern in may_change)
    }


def _check_same(workdir: epath.PathLike, config: Config, allow: Sequence[str]) -> str:
    """Raises UserError if `workdir` is another config's; returns what `_recorded` has to say."""
    _, lost = _recorded(workdir)
    different = changes(workdir, config)
    keys = [*flatten(as_json(config.to_dict())), *different]
    for name in allow:
        if not any(_is_within(key, name) for key in keys):
            raise UserError(f"--allow_config_change: no key {name!r}{suggestion(name, keys)}")
    refused = {
        key: both
        for key, both in different.items()
        if not (MAY_BE_ALLOWED.fullmatch(key) and any(_is_within(key, name) for name in allow))
    }
    if refused:
        if not newest_step(workdir):
            end = "it has no checkpoint: delete it to begin anew"
        elif all(MAY_BE_ALLOWED.fullmatch(key) for key in refused):
            end = f"to go on all the same: --allow_config_change={','.join(different)}"
        else:
            end = "begin another run from it (init_from)"
        differences = shorten([*refused.values()])
        raise UserError(f"{workdir} belongs to another config: {differences}; {end}")
    return lost


def _is_within(key: str, name: str) -> bool:
    """Whether a dotted key is this one, or in the section of this name."""
    return key == name or key.startswith(f"{name}.")


def list_steps(workdir: epath.PathLike) -> tuple[int, ...]:
    """The committed steps of a workdir, ascending. Raises NotFoundError if it does not exist."""
    if not epath.Path(workdir).exists():
        raise NotFoundError(f"no checkpoint in {workdir}: it does not exist{nearest_run(workdir)}")
    return steps_in(epath.Path(workdir) / CHECKPOINTS)


def newest_step(workdir: epath.PathLike) -> int:
    """The newest step of a workdir whose checkpoint was finished; 0 where there is none."""
    return max(finished_steps(workdir), default=0)


def finished_steps(workdir: epath.PathLike) -> tuple[int, ...]:
    """The steps of a workdir whose checkpoint was finished, ascending; none if it does not exist.

    What is being written, or removed, is none.
    """
    root = epath.Path(workdir) / CHECKPOINTS
    return tuple(s for s in steps_in(root) if (root / str(s) / checksums.FILE).exists())


def steps_in(root: epath.Path) -> tuple[int, ...]:
    """The committed steps in a folder of checkpoints, ascending."""
    with storage_named(f"{root} cannot be read", root):
        steps = ocp.utils.checkpoint_steps(root) if root.exists() else ()
    return tuple(sorted({step for step in steps if (root / str(step)).is_dir()}))


def foreign_names(root: epath.Path) -> list[str]:
    """What is no checkpoint of ours in a folder of checkpoints."""
    return sorted(child.name for child in root.iterdir() if not _OWN.fullmatch(child.name))


def look_for_foreign_files(root: epath.Path) -> None:
    """Names what is no checkpoint of ours in a folder of checkpoints, and leaves it alone.

    But a file that stands where a step's folder would go is set aside.
    """
    if jax.process_index() == 0:
        if foreign := foreign_names(root):
            logging.warning("%s has what is no checkpoint, ignored: %s", root, shorten(foreign))
        for child in sorted(root.iterdir()):
            if child.name.isdigit() and not child.is_dir():
                _rename(child)


def set_aside(root: epath.Path, steps: Sequence[int]) -> None:
    """Renames steps that are no sound checkpoints to `STEP.damaged`; all processes call it."""
    if jax.process_index() == 0:
        for step in steps:
            _rename(root / str(step))
    barrier("set_aside")


def _rename(step: epath.Path) -> None:
    target = step.parent / f"{step.name}.damaged"
    if target.exists():
        (target.rmtree if target.is_dir() else target.unlink)()
    step.rename(target)
    logging.warning("%s is no sound checkpoint: it is %s now", step, target.name)


def is_run(folder: epath.PathLike) -> bool:
    """Whether a folder is a workdir."""
    return any((epath.Path(folder) / name).exists() for name in (CONFIG, CHECKPOINTS))


def runs_below(folder: epath.PathLike) -> list[epath.Path]:
    """The workdirs in a folder, in the order of their names; none if it does not exist."""
    folder = epath.Path(folder)
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    return [child for child in children if child.is_dir() and is_run(child)]


def nearest_run(path: epath.PathLike) -> str:
    """The end of a message about a folder that is no run: the runs in it, or the nearest place.

    Where nothing is near, it is empty.
    """
    path = epath.Path(path)
    children = path.iterdir() if path.is_dir() else ()
    below = runs_below(path) or [run for child in sorted(children) for run in runs_below(child)]
    if below:
        return f"; the runs in it are {shorten([str(run) for run in below])}"
    parent = path.parent
    beside = [child for child in parent.iterdir() if child != path] if parent.is_dir() else []
    runs = [child for child in beside if is_run(child) or runs_below(child)]
    return suggestion(str(path), [str(run) for run in runs]) if runs else ""


def probe(workdir: epath.PathLike, *, patience: float = 10.0) -> None:
    """Tries whether a workdir can be written, and is the same for all processes.

    Each writes a file, renames it and reads those of all others. Raises UserError if that fails,
    such as where each host has a disk of its own. Leaves nothing but the folder behind.
    """
    index, count = jax.process_index(), jax.process_count()
    token = int(of_first(np.array(secrets.randbits(31), np.int32)))
    files = [epath.Path(workdir) / f".probe.{token}.{i}" for i in range(count)]
    try:
        with together():
            write_whole(files[index], str(index))
        with together():
            # A network's disk may show what another host wrote a moment later.
            deadline = time.monotonic() + patience
            while lost := [i for i, file in enumerate(files) if not file.exists()]:
                if time.monotonic() >= deadline:
                    listed = ", ".join(map(str, lost))
                    raise UserError(
                        f"{workdir} is not shared: process {index} does not see what process "
                        f"{listed} writes there; all processes need one disk or bucket"
                    )
                time.sleep(0.1)
            for i, file in enumerate(files):
                if file.read_text() != str(i):
                    raise UserError(f"{file} is not what process {i} wrote")
    finally:
        with contextlib.suppress(OSError):
            files[index].unlink(missing_ok=True)


def as_json(config: Json) -> Json:
    """A config as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(config))
