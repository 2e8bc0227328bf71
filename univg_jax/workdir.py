"""A workdir: the folder of one run, which belongs to one config, and its steps.

`config.json` says whose it is, `encoders` has what it encodes with, `checkpoints/STEP` are its
checkpoints. Paths may be `gs://`.
"""

import json
import re

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from univg_jax.errors import NotFoundError, UserError, shorten, suggestion
from univg_jax.files import write_whole
from univg_jax.trees import Json, flatten

CHECKPOINTS, CONFIG, ENCODERS = "checkpoints", "config.json", "encoders"

# Regexes of the dotted config keys that a resumed run may change: how long, how often, where; never
# what is learned.
MAY_CHANGE = (
    r"train\..*",
    r"sampling\..*",
    r"data\.(dir|read_threads|prefetch|text_cache)",
    r"mesh\..*",
    r"model\.overrides\.(remat|scan|attention)",
    r"conditioning\.folder",
    r"conditioning\.fit_on.*",  # once the codec is fitted, it is recorded
)


def claim_workdir(workdir: epath.PathLike, config: Json) -> None:
    """Makes `workdir` this config's: creates it, or finds the same config in it.

    Keys that match `MAY_CHANGE` may differ. Raises UserError with the first keys that differ
    otherwise, and both values, and writes nothing then.
    """
    file, config = epath.Path(workdir) / CONFIG, as_json(config)
    if file.exists():
        try:
            theirs = flatten(json.loads(file.read_text()))
        except (ValueError, AttributeError) as error:
            raise UserError(f"{file} is not JSON ({error}); choose another workdir") from None
        ours = flatten(config)
        different = [
            f"{key} is {ours.get(key, 'absent')!r}, there {theirs.get(key, 'absent')!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key, "absent") != theirs.get(key, "absent")
            and not any(re.fullmatch(pattern, key) for pattern in MAY_CHANGE)
        ]
        if different:
            raise UserError(f"{workdir} belongs to another config: {shorten(different, 3)}")
    elif steps_in(file.parent / CHECKPOINTS):
        raise UserError(f"{workdir} has checkpoints but no {CONFIG}; choose another workdir")
    barrier("claim_workdir")  # nobody writes before everybody has read
    if jax.process_index() == 0:
        write_whole(file, json.dumps(config, indent=1))
    barrier("workdir_claimed")


def list_steps(workdir: epath.PathLike) -> tuple[int, ...]:
    """The committed steps of a workdir, ascending. Raises NotFoundError if it does not exist."""
    if not epath.Path(workdir).exists():
        raise NotFoundError(f"no checkpoint in {workdir}: it does not exist{nearest_run(workdir)}")
    return steps_in(epath.Path(workdir) / CHECKPOINTS)


def steps_in(root: epath.Path) -> tuple[int, ...]:
    """The committed steps in a folder of checkpoints, ascending."""
    return tuple(sorted(ocp.utils.checkpoint_steps(root))) if root.exists() else ()


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


def as_json(config: Json) -> Json:
    """A config as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(config))


def barrier(name: str) -> None:
    """Waits for all other processes, if there are any."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
