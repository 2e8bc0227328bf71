"""Nested trees and the names of their leaves.

A leaf's name joins the keys on its path by '/': `blocks/mlp/in/kernel`. Sharding rules, freeze
patterns, checkpoints and error messages all speak of leaves by these names. Nested configs are
named alike, joined by '.'.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

Json = dict[str, Any]  # nested dicts of what JSON can hold


def path_name(path: tuple) -> str:
    """The name of a leaf, from its path as `jax.tree_util` gives it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Every leaf of a pytree by its name, in the order of `jax.tree.leaves`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function: Callable[..., Any], tree: PyTree, *others: PyTree) -> PyTree:
    """The tree of `function(name, leaf, ...)`, with a leaf of each tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(path_name(path), *leaves), tree, *others
    )


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts whose leaves have these names: the inverse of `named_leaves` for dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[last] = leaf
    return tree


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one dict under dotted keys. An empty mapping inside is kept as a value."""
    flat = {}
    for key, value in config.items():
        is_group = isinstance(value, Mapping) and len(value) > 0
        flat |= flatten(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
    return flat
