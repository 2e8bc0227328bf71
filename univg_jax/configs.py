"""`FILE.py:name=value,...` and `key=value` overrides, to one checked `settings.Config`."""

import ast
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from univg_jax.errors import NotFoundError, UserError, suggestion
from univg_jax.settings import Config
from univg_jax.trees import flatten


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """Calls the file's `get_config` with the arguments after the colon, then applies the overrides.

    An override `key=value` takes the type of the value that it replaces. Raises UserError in one
    line that names the nearest valid name.
    """
    path, _, arguments = spec.partition(":")
    get_config = _load_function(path)
    config = get_config(**_parse_arguments(arguments, get_config, path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UserError(f"--config.{key} has no value: write --config.{key}=VALUE")
        _apply(config, key, value)
    return Config.of(config)


def _load_function(path: str) -> Callable[..., ConfigDict]:
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        python = [f for f in files if f.endswith(".py") and f != "__init__.py"]
        near = suggestion(path, [os.path.join(folder, f) for f in python])
        raise NotFoundError(f"config file {path!r} does not exist{near}")
    module_spec = importlib.util.spec_from_file_location("univg_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {path!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {path!r} defines no get_config()")
    return module.get_config


def _parse_arguments(text: str, get_config: Callable[..., ConfigDict], path: str) -> dict[str, Any]:
    parameters = inspect.signature(get_config).parameters
    arguments = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in parameters:
            raise UserError(f"{path} takes no argument {name!r}{suggestion(name, parameters)}")
        arguments[name] = _convert(value, parameters[name].default, f"{path}:{name}")
    return arguments


def _apply(config: ConfigDict, key: str, text: str) -> None:
    *parents, leaf = key.split(".")
    node: Any = config
    for name in parents:
        node = node.get(name) if isinstance(node, ConfigDict) else None
    if isinstance(node, ConfigDict) and parents[-2:] == ["model", "overrides"]:
        node[leaf] = _literal(text)  # any field of the model; checked where the model is made
        return
    if not isinstance(node, ConfigDict) or leaf not in node:
        raise UserError(f"unknown config key {key!r}{suggestion(key, flatten(config.to_dict()))}")
    if isinstance(node[leaf], ConfigDict):
        inside = ", ".join(f"{key}.{k}" for k in node[leaf])
        raise UserError(f"--config.{key} is a group; set one of {inside}")
    node[leaf] = _convert(text, node[leaf], f"--config.{key}")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _convert(text: str, default: Any, where: str) -> Any:
    """`text` as a value of the default's type: the type is part of the contract."""
    if isinstance(default, str):
        return text
    value = _literal(text)
    if isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    if isinstance(default, tuple):
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    is_bool = isinstance(value, bool)
    if default is None:
        return value
    if isinstance(default, float) and isinstance(value, int | float) and not is_bool:
        return float(value)
    if not isinstance(value, type(default)) or is_bool != isinstance(default, bool):
        raise UserError(
            f"{where}={text} should be {type(default).__name__}, as its default {default!r} is"
        )
    return value
