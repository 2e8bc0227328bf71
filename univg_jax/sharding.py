"""Where every array lives: one mesh, one ordered table of rules, one function from shapes to
shardings.

Mesh axes: `data` replicates parameters, `fsdp` splits them (and the batch with `data`), `tensor`
splits the hidden features of a block (Megatron). One device is the mesh 1x1x1: there is no other
code path.
"""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from univg_jax.batch import Array

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split the rows of a batch
SCANNED = r"(^|/)blocks/"  # leaves under it carry the scanned layer axis in front
# devices that share weights where nobody says how many: more would save little and wait longer
MAX_FSDP = 128
# elements of a layer; below it a leaf is whole along fsdp: gathering it costs more than holding it
MIN_SHARDED_SIZE = 2**14

# (regex searched in a leaf's path, spec of its last dimensions); the first match wins. Where a rule
# is silent about fsdp, it takes the leaf's largest free dimension. Megatron's pairs: a kernel (in,
# out) split on its outputs feeds one split on its inputs, so that a block sums over `tensor` once
# per pair.
RULES: tuple[tuple[str, P], ...] = (
    (r"block.*/(q|k|v|mlp/in|mlp/gate)/kernel$", P(None, "tensor")),
    (r"block.*/(q|k|v|mlp/in)/bias$", P("tensor")),
    (r"block.*/(attn_out|mlp/out)/kernel$", P("tensor", None)),
)


class LeafSpec(NamedTuple):
    """Where one leaf lives."""

    path: str
    shape: tuple[int, ...]
    spec: P


def path_name(path: tuple) -> str:
    """The '/'-joined names that every rule, freeze pattern and error message speaks of."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    width: int = 0,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh `data x fsdp x tensor` over `devices` (default: all); one size may be -1, the rest.

    With the model's `width`, `data` and `fsdp` may both be -1: then fsdp takes as many devices of a
    slice as divide it, up to `MAX_FSDP`. Slices, which only a data center network joins, lie along
    `data`. Raises `ValueError` when the sizes cannot multiply to the number of devices, or not
    within slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    sizes = [data, fsdp, tensor]
    asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes[:2] == [-1, -1] and width and tensor > 0:
        sizes[1] = math.gcd(len(devices) // slices // tensor or 1, width, MAX_FSDP)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {asked}: sizes are positive and at most one is -1 (the rest)")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(f"mesh {asked}: the product must be the number of devices, {len(devices)}")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if sizes[0] % slices:
        raise ValueError(f"mesh {asked}: data must be a multiple of the number of slices, {slices}")
    if slices > 1:
        within = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`; devices along `tensor` share them."""
    return NamedSharding(mesh, P(ROWS))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """The global batch on devices, of which each process gives its own rows (numpy), as many as
    every other.

    Raises `ValueError` when the rows do not divide over the devices.
    """
    given = _given_sharding(mesh)
    rows = {len(x) for x in jax.tree.leaves(batch)}
    parts = len(
        {index[0].start for index in given.addressable_devices_indices_map((mesh.size,)).values()}
    )
    if len(rows) != 1 or min(rows) % parts:
        raise ValueError(
            f"a batch of {sorted(rows)} rows does not divide over {parts} devices of this process"
        )
    arrays = jax.tree.map(lambda x: jax.make_array_from_process_local_data(given, x), batch)
    return jax.device_put(arrays, batch_sharding(mesh))


def local_rows(array: jax.Array, mesh: Mesh) -> np.ndarray:
    """The rows of a global array that belong to those this process gave to `shard_batch`; all
    processes call it.
    """
    given = jax.device_put(array, _given_sharding(mesh))
    parts = {shard.index[0].start or 0: shard.data for shard in given.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def all_gather_to_host(array: jax.Array) -> np.ndarray:
    """The whole array in the memory of every process, which all call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _given_sharding(mesh: Mesh) -> NamedSharding:
    """Where rows enter: as `batch_sharding`, unless devices that share rows belong to several
    processes.

    Then each device takes rows of its own process, and the devices along `tensor` exchange theirs.
    """
    groups = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    if all(len({device.process_index for device in group}) == 1 for group in groups):
        return batch_sharding(mesh)
    return NamedSharding(mesh, P(mesh.axis_names))


def tree_shardings(
    tree: Any, mesh: Mesh | AbstractMesh, *, rules: Sequence[tuple[str, P]] = RULES
) -> Any:
    """The sharding of every leaf of any tree of shapes: parameters, optimizer state, EMA, frozen
    encoders.

    An optimizer's moments lie where their parameter does because their paths end with the
    parameter's.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name, shape = path_name(path), tuple(leaf.shape)
        layers = int(bool(re.search(SCANNED, name)))
        spec = layer_spec(name, shape[layers:], mesh, rules=rules)
        return NamedSharding(mesh, P(*[None] * layers, *spec) if spec else P())

    return jax.tree_util.tree_map_with_path(place, tree)


def layer_spec(
    name: str,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    *,
    rules: Sequence[tuple[str, P]] = RULES,
) -> P:
    """The spec of a leaf; of one layer of it where layers are stacked."""
    rule = next((spec for pattern, spec in rules if re.search(pattern, name)), P())
    if len(rule) > len(shape):  # factored moments of a matrix
        rule = P()
    axes = _with_fsdp(
        _fitting(P(*[None] * (len(shape) - len(rule)), *rule), shape, name, mesh), shape, mesh
    )
    while axes and axes[-1] is None:
        axes = axes[:-1]
    return P(*axes)


def constrain_rows(tree: Any) -> Any:
    """Inside jit: the rows of every array over `data` and `fsdp`; as it is where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(ROWS)), tree)


def is_fsdp() -> bool:
    """Inside jit: whether weights are split over fsdp, so that their use gathers them."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1


def rows_divisible(count: int) -> bool:
    """Inside jit: whether so many rows can be split over the mesh. A batch of one, made for its
    shapes, cannot.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and count % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0


def matmul(x: Float[Array, "r i"], weight: Float[Array, "i o"], name: str) -> Float[Array, "r o"]:
    """x W of rows that are split over `data` and `fsdp`, with a W of which each device holds its
    shard by the rules.

    The one place where FSDP communicates, in the weight's dtype: W is gathered, and again for the
    gradient (no remat policy keeps it); the gradient is summed straight into shards. That is three
    times the bytes of all weights a step. Left to itself the compiler may move activations instead.
    """
    if not is_fsdp() or not rows_divisible(len(x)):
        return x @ weight
    mesh = jax.sharding.get_abstract_mesh()
    spec = layer_spec(name, weight.shape, mesh)
    manual = P(*("fsdp" if axis == "fsdp" else None for axis in spec))
    rows = P(ROWS)

    def local(x: jax.Array, weight: jax.Array) -> jax.Array:
        if "fsdp" in manual:
            # its gradient is summed over data last, as a shard
            weight = jax.lax.pcast(weight, "data", to="varying")
            weight = _gather(weight, manual.index("fsdp"), mesh.shape["fsdp"])
        return x @ weight

    # `tensor` stays with the compiler.
    return jax.shard_map(
        local, in_specs=(rows, manual), out_specs=rows, axis_names={"data", "fsdp"}
    )(x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(shard: jax.Array, axis: int, size: int) -> jax.Array:
    return jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True)


def _gather_forward(shard: jax.Array, axis: int, size: int) -> tuple[jax.Array, None]:
    return jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True), None


def _gather_backward(axis: int, size: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """A reduce-scatter in two hops, over `size / 4` devices, then over 4.

    XLA for TPU makes an all-reduce, twice the traffic, of a reduce-scatter over all devices of a
    slice, and keeps those over a part of them. Any torus of TPUs has sides of multiples of 4.
    """
    inner = 4 if size % 4 == 0 else 1
    outer = size // inner
    hops = [
        [[i * inner + j for i in range(outer)] for j in range(inner)],
        [[i * inner + j for j in range(inner)] for i in range(outer)],
    ]
    for groups in hops:
        if len(groups[0]) > 1:
            gradient = jax.lax.psum_scatter(
                gradient, "fsdp", scatter_dimension=axis, axis_index_groups=groups, tiled=True
            )
    return (gradient,)


_gather.defvjp(_gather_forward, _gather_backward)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes of `tree`, each with its sharding (a tree of them, or one for all): what a restore
    asks for.
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )


def leaf_specs(tree: Any, shardings: Any, *, larger_than: int = 0) -> tuple[LeafSpec, ...]:
    """Path, shape and spec of every leaf of at least `larger_than` bytes, for golden renders."""
    return tuple(
        LeafSpec(path_name(path), tuple(leaf.shape), sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shardings)
        )
        if _bytes(leaf.shape, leaf.dtype) >= larger_than
    )


def unused_rules(tree: Any, *, rules: Sequence[tuple[str, P]] = RULES) -> tuple[str, ...]:
    """The patterns that decide about no leaf of `tree`: misspelt, or shadowed by one above."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    used = {
        next((pattern for pattern, _ in rules if re.search(pattern, name)), None) for name in names
    }
    return tuple(pattern for pattern, _ in rules if pattern not in used)


def _bytes(shape: Sequence[int], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _with_fsdp(spec: tuple, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> tuple:
    """`spec` with fsdp on the largest dimension that is free and that it divides, unless the leaf
    is small or has it.

    The last dimension only where no other will do: a TPU stores it in lanes of 128, and 30 columns
    take as much room.
    """
    size = mesh.shape["fsdp"]
    free = [i for i, dim in enumerate(shape) if spec[i] is None and dim % size == 0 and dim > 1]
    if (
        size == 1
        or not free
        or math.prod(shape) < MIN_SHARDED_SIZE
        or any("fsdp" in _axes(axes) for axes in spec)
    ):
        return spec
    best = max(free, key=lambda i: (i < len(shape) - 1, shape[i], -i))
    return tuple("fsdp" if i == best else axes for i, axes in enumerate(spec))


def _axes(entry: Any) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _fitting(spec: P, shape: tuple[int, ...], name: str, mesh: Mesh | AbstractMesh) -> tuple:
    """`spec` without the axes that do not divide their dimension, nor those of one device."""

    def keep() -> Iterator[Any]:
        for dim, entry in zip(shape, spec):
            axes = tuple(a for a in _axes(entry) if mesh.shape[a] > 1)
            size = math.prod(mesh.shape[a] for a in axes)
            if dim % size:
                logging.info(
                    "%s %s: %d does not divide over %s=%d; replicated there",
                    name,
                    shape,
                    dim,
                    axes,
                    size,
                )
            kept = axes if dim % size == 0 else ()
            yield kept[0] if len(kept) == 1 else kept or None

    return tuple(keep())
