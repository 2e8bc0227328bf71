"""`FILE.py:name=value,...` and `key=value` overrides, to one checked `settings.Config`."""

import fnmatch
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from ml_collections import ConfigDict

from univg_jax import fields
from univg_jax.errors import NotFoundError, UserError, check_name, quote, suggestion
from univg_jax.files import read_json
from univg_jax.settings import Config, Options

PACKAGE = "experiments"  # whose modules may be named without it


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """The config that `spec` names, with the overrides `key=value`.

    Before the colon stands a Python file, a module of `experiments` (`emoji` or
    `experiments.emoji`), or any other importable module; its `get_config` is called with the
    arguments after the colon. A JSON file, such as a run's config.json, is a config as it stands.

    Raises UserError in one line: for an unknown name, with the nearest one, for a value that
    cannot be, and for what the file itself raises, with its place.
    """
    path, _, arguments = spec.partition(":")
    path = os.path.expanduser(path)
    if path.endswith(".json"):
        values = _read_json(path, arguments)
    else:
        values = _call(path, arguments)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{key} has no value: write --config.{key}=VALUE")
        _apply(values, key, text)
    return Config.of(values)


def _read_json(path: str, arguments: str) -> dict[str, Any]:
    if arguments:
        raise UserError(f"{path} takes no arguments after the colon, only --config.KEY=VALUE")
    return read_json(path)


def _call(path: str, arguments: str) -> dict[str, Any]:
    """The nested values that the `get_config` of a file or module returns."""
    try:
        get_config = getattr(_load_module(path), "get_config", None)
        if not callable(get_config):
            raise UserError(f"config {path!r} defines no get_config()")
        config = get_config(**_parse_arguments(arguments, get_config, path))
        if isinstance(config, Config | ConfigDict):
            return config.to_dict()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a user's code raises; a SystemExit would end well
        raise UserError(f"config {path!r}{_place(error)}: {_summary(error)}") from error
    raise UserError(f"get_config of {path!r} gave {quote(config)}: expected a ConfigDict")


def _summary(error: BaseException) -> str:
    message = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _place(error: BaseException) -> str:
    """File and line of the innermost code that is neither ours nor a library's."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f", {error.filename} line {error.lineno}"
    libraries = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        is_library = frame.filename.startswith((*libraries, "<frozen"))
        if frame.filename != __file__ and not is_library:
            return f", {frame.filename} line {frame.lineno}"
    return ""


def _load_module(path: str) -> Any:
    if os.path.isfile(path):
        module_spec = importlib.util.spec_from_file_location("univg_config", path)
        if module_spec is None or module_spec.loader is None:
            raise UserError(f"config file {path!r} is not a Python file")
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return module
    if not path.endswith(".py") and os.sep not in path:
        for name in (f"{PACKAGE}.{path}", path):
            if _is_module(name):
                return importlib.import_module(name)
    folder = os.path.dirname(path) or "."
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    python = [os.path.join(folder, f) for f in files if f.endswith(".py") and f != "__init__.py"]
    kind = "config file" if path.endswith(".py") or os.sep in path else "config"
    packaged = _packaged()
    if (name := os.path.basename(path).removesuffix(".py")) in packaged:
        raise NotFoundError(f"{kind} {path!r} does not exist here; {name!r} alone names ours")
    raise NotFoundError(f"{kind} {path!r} does not exist{suggestion(path, [*python, *packaged])}")


def _is_module(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _packaged() -> list[str]:
    """The names of the experiments that come with the library."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    names = sorted(os.listdir(folder)) if folder and os.path.isdir(folder) else []
    return [n.removesuffix(".py") for n in names if n.endswith(".py") and n != "__init__.py"]


def _parse_arguments(text: str, get_config: Callable[..., Any], path: str) -> dict[str, Any]:
    parameters = inspect.signature(get_config).parameters
    arguments = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, _, value = item.partition("=")
        if name not in parameters:
            raise UserError(f"{path} takes no argument {name!r}{suggestion(name, parameters)}")
        default = parameters[name].default
        arguments[name] = _convert(value, default, f"{path}:{name}")
    return arguments


def _convert(text: str, default: Any, where: str) -> Any:
    """`text` as a value of the default's type: the type is part of the contract."""
    value = text if isinstance(default, str) else fields.parse_literal(text)
    if default is None or default is inspect.Parameter.empty:
        return value
    return fields.read(type(default), value, where)


def _apply(values: dict[str, Any], key: str, text: str) -> None:
    """Sets one key; what it may be is checked with the whole config."""
    known = dict(fields.leaves(Config))
    field = next((f for name, f in known.items() if fnmatch.fnmatchcase(key, name)), None)
    *parents, leaf = key.split(".")
    node: Any = values
    for name in parents:
        node = node.get(name) if isinstance(node, dict) else None
    is_option = any(
        key.startswith(f"{name}.") and Options in (f.type, *get_args(f.type))
        for name, f in known.items()
    )  # checked by whoever the options are of
    if not isinstance(node, dict) or not (leaf in node or field or is_option):
        from univg_jax.trees import flatten  # loads JAX, which a config does not need

        names = [*flatten(values), *(name for name in known if "*" not in name)]
        check_name(key, list(dict.fromkeys(names)), what="config key")
        raise UserError(f"config key {key!r}: {'.'.join(parents)} is not in this config")
    if field is None and isinstance(node.get(leaf), Mapping):
        inside = ", ".join(f"{key}.{k}" for k in node[leaf])
        raise UserError(f"--config.{key} is a group; set one of {inside}")
    is_text = isinstance(node.get(leaf), str) if field is None else field.type is str
    value = text if is_text else fields.parse_literal(text)
    is_list = field is not None and "tuple" in str(field.type)
    node[leaf] = (value,) if is_list and not isinstance(value, tuple | list | dict) else value
