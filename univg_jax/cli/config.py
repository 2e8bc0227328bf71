"""`--config=FILE.py:name=value,...` and `--config.key=value` to one checked `ConfigDict`."""

import ast
import importlib.util
import inspect
import os
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from univg_jax.errors import suggestion


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Calls the file's `get_config` with the arguments after the colon, then applies `key=value`
    overrides.

    Raises FileNotFoundError or ValueError, in one line that names the nearest valid name.
    """
    path, _, arguments = spec.partition(":")
    get_config = _load_function(path)
    config = get_config(**_parse_arguments(arguments, get_config, path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--config.{key} has no value: write --config.{key}=VALUE")
        _apply(config, key, value)
    return config.lock()


def _load_function(path: str) -> Any:
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        names = (
            [os.path.join(folder, f) for f in sorted(os.listdir(folder))]
            if os.path.isdir(folder)
            else []
        )
        python = [n for n in names if n.endswith(".py") and not n.endswith("__init__.py")]
        raise FileNotFoundError(f"config file {path!r} does not exist{suggestion(path, python)}")
    module_spec = importlib.util.spec_from_file_location("univg_config", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"config file {path!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"config file {path!r} defines no get_config()")
    return module.get_config


def _parse_arguments(text: str, get_config: Any, path: str) -> dict[str, Any]:
    parameters = inspect.signature(get_config).parameters
    arguments = {}
    for item in filter(None, text.split(",")):
        name, _, value = item.partition("=")
        if name not in parameters:
            raise ValueError(f"{path} takes no argument {name!r}{suggestion(name, parameters)}")
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
        raise ValueError(f"unknown config key {key!r}{suggestion(key, _flatten(config))}")
    if isinstance(node[leaf], ConfigDict):
        raise ValueError(
            f"--config.{key} is a group; set one of {', '.join(f'{key}.{k}' for k in node[leaf])}"
        )
    node[leaf] = _convert(text, node[leaf], f"--config.{key}")


def _flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


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
    if isinstance(default, bool) or default is None:
        right = isinstance(value, bool) or default is None
    elif isinstance(default, float):
        right = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if right else value
    elif isinstance(default, tuple):
        value = value if isinstance(value, tuple | list) else (value,)
        right, value = True, tuple(value)
    else:
        right = isinstance(value, type(default)) and not isinstance(value, bool)
    if not right:
        raise ValueError(
            f"{where}={text} should be {type(default).__name__}, as its default {default!r} is"
        )
    return value
