"""`config.json` of a model's folder, which may be anybody's: read, completed and checked."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from univg_jax.errors import NotFoundError, UserError, quote
from univg_jax.files import read_json
from univg_jax.interop.tensors import PathLike
from univg_jax.pretrained import local_path

# Sizes and depths far beyond those of any published network are those of a broken file.
MAX_SIZE, MAX_DEPTH, MAX_NUMBER = 2**20, 2**10, 1e30


def read_config(folder: PathLike, *, key: str, expected: Sequence[str]) -> dict[str, Any]:
    """`config.json`, whose `key` must be one of `expected`.

    Raises NotFoundError if there is none, and UserError for another content or a bucket.
    """
    folder = local_path(folder)
    file = folder / "config.json"
    if not file.is_file():
        inner = sorted(f.parent.name for f in folder.glob("*/config.json"))
        hint = f" (subfolder {', '.join(inner[:8])} has one)" if inner else ""
        raise NotFoundError(f"{folder} has no config.json: not the folder of a model{hint}")
    config = read_json(file)
    if config.get(key) not in expected:
        listed = " or ".join(map(repr, expected))
        raise UserError(f"{file}: expected {key} {listed}, got {quote(config.get(key))}")
    return config


def complete_config(
    folder: PathLike,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    ranges: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """`config` with the values of `defaults` for what it leaves out.

    A default also says what a value may be: a whole number from 1 to `MAX_SIZE`, or in the range of
    its key; a positive number; a text; a truth value. Values whose default is None or a tuple are
    the caller's to check. Raises UserError for any other value.
    """
    config, ranges = {**defaults, **config}, ranges or {}
    for key, default in defaults.items():
        value = config[key]
        if isinstance(default, bool | str):
            kind = type(default).__name__
            is_valid, expected = isinstance(value, type(default)), f"only a {kind} is supported"
        elif isinstance(default, int):
            low, high = ranges.get(key, (1, MAX_SIZE))
            is_valid = type(value) is int and low <= value <= high
            expected = f"only a single int is supported, from {low} to {high}"
        elif isinstance(default, float):
            is_valid = type(value) in (int, float) and 0 < value < MAX_NUMBER
            expected = "only a positive number is supported"
        else:
            continue
        if not is_valid:
            raise UserError(f"{config_file(folder)}: {key} is {quote(value)}; {expected}")
        config[key] = type(default)(value)
    return config


def require(folder: PathLike, config: Mapping[str, Any], **supported: tuple) -> None:
    """Raises UserError if a key is there and its value is none of the supported ones.

    Tuples count as lists: files have lists.
    """
    for key, values in supported.items():
        value = config.get(key, values[0])
        if (list(value) if isinstance(value, tuple) else value) not in values:
            names = " or ".join(map(repr, values))
            raise UserError(f"{config_file(folder)}: {key} is {quote(value)}; only {names}")


def config_file(folder: PathLike) -> Path:
    """The configuration of a model's folder."""
    return Path(folder) / "config.json"


@contextlib.contextmanager
def naming(folder: PathLike) -> Iterator[None]:
    """Errors about a network that a configuration asks for say which file that is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{config_file(folder)}: {error}") from None
