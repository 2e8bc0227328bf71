"""Where every array lives: one mesh, one ordered table of rules, one function from shapes to shardings.

Mesh axes: `data` replicates parameters, `fsdp` splits them (and the batch with `data`), `tensor` splits
the hidden features of a block (Megatron). One device is the mesh 1x1x1: there is no other code path.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
STACK = r"(^|/)blocks/"  # leaves under it carry the scanned layer axis in front
SMALL = 2**18  # bytes; below it a leaf that no rule names is replicated: gathering it costs more than holding it

# (regex searched in a leaf's path, spec of its last dimensions); the first match wins, no match: the fallback.
# Megatron's pairs: a kernel (in, out) split on its outputs feeds one split on its inputs, so that a block
# sums over `tensor` once per pair; the dimension that is left goes over fsdp.
RULES: tuple[tuple[str, P], ...] = (
    (r"block.*/(q|k|v|mlp/in|mlp/gate)/kernel$", P("fsdp", "tensor")),
    (r"block.*/(q|k|v|mlp/in)/bias$", P("tensor")),
    (r"block.*/(attn_out|mlp/out)/kernel$", P("tensor", "fsdp")),
)


class LeafSpec(NamedTuple):
    """Where one leaf lives."""

    path: str
    shape: tuple[int, ...]
    spec: P


def path_name(path: tuple) -> str:
    """The '/'-joined names that every rule, freeze pattern and error message speaks of."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh `data x fsdp x tensor` over `devices` (default: all); one size may be -1, the rest.

    Raises `ValueError` when the sizes cannot multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {asked}: sizes are positive and at most one is -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(f"mesh {asked}: the product must be the number of devices, {len(devices)}")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`; devices along `tensor` share them."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """The global batch on devices, of which each process gives its own rows (numpy, in process order).

    Raises `ValueError` when the rows do not divide over the devices.
    """
    rows = {len(x) for x in jax.tree.leaves(batch)}
    devices = sum(d.process_index == jax.process_index() for d in mesh.devices[:, :, 0].flat)
    if len(rows) != 1 or min(rows) % max(devices, 1):
        raise ValueError(f"a batch of {sorted(rows)} rows does not divide over {devices} devices of this process")
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array in the memory of every process, which all call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def tree_shardings(tree: Any, mesh: Mesh | AbstractMesh, *, rules: Sequence[tuple[str, P]] = RULES) -> Any:
    """The sharding of every leaf of any tree of shapes: parameters, optimizer state, EMA, frozen encoders.

    An optimizer's moments lie where their parameter does because their paths end with the parameter's.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name, shape = path_name(path), tuple(leaf.shape)
        stacked = int(bool(re.search(STACK, name)))
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None or len(spec) > len(shape) - stacked:  # the latter: factored moments of a matrix
            spec = _largest_dimension(shape, leaf.dtype, stacked, mesh)
        else:
            spec = _fitting(P(*[None] * (len(shape) - len(spec)), *spec), shape, name, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(place, tree)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes of `tree`, each with its sharding (a tree of them, or one for all): what a restore asks for."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )


def leaf_specs(tree: Any, shardings: Any, *, larger_than: int = SMALL) -> tuple[LeafSpec, ...]:
    """Path, shape and spec of every leaf of at least `larger_than` bytes, for golden renders."""
    return tuple(
        LeafSpec(path_name(path), tuple(leaf.shape), sharding.spec)
        for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings))
        if _bytes(leaf.shape, leaf.dtype) >= larger_than
    )


def unused_rules(tree: Any, *, rules: Sequence[tuple[str, P]] = RULES) -> tuple[str, ...]:
    """The patterns that decide about no leaf of `tree`: misspelt, or shadowed by one above."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    used = {next((pattern for pattern, _ in rules if re.search(pattern, name)), None) for name in names}
    return tuple(pattern for pattern, _ in rules if pattern not in used)


def _bytes(shape: Sequence[int], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _largest_dimension(shape: tuple[int, ...], dtype: Any, first: int, mesh: Mesh | AbstractMesh) -> P:
    """fsdp on the largest dimension that it divides, the layer axis left whole; replicated if small or none."""
    size = mesh.shape["fsdp"]
    candidates = [i for i in range(first, len(shape)) if shape[i] % size == 0 and shape[i] > 1]
    if size == 1 or not candidates or _bytes(shape, dtype) < SMALL:
        return P()
    best = max(candidates, key=lambda i: (shape[i], -i))
    return P(*[None] * best, "fsdp")


def _fitting(spec: P, shape: tuple[int, ...], name: str, mesh: Mesh | AbstractMesh) -> P:
    """`spec` without the axes that do not divide their dimension."""

    def keep() -> Iterator[Any]:
        for dim, axes in zip(shape, spec):
            size = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
            if dim % size:
                logging.info("%s %s: %d does not divide over %s=%d; replicated there", name, shape, dim, axes, size)
            yield None if dim % size else axes

    return P(*keep())
