"""Where every array lives: one mesh, one ordered table of rules, and shardings made of both.

Mesh axes: `data` replicates parameters, `fsdp` splits them (and, like `data`, the batch), `tensor`
splits the hidden features of a block (Megatron, arXiv 1909.08053). One device is the mesh 1x1x1:
there is no other code path.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Float, PyTree, Shaped

from univg_jax.batch import Array
from univg_jax.errors import UserError
from univg_jax.together import of_all
from univg_jax.trees import map_named, named_leaves

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes that split the rows of a batch
SCANNED = r"(^|/)blocks/"  # leaves under it have a leading axis, the scanned layers
# Upper limit of the default fsdp axis: beyond it little memory is saved and collectives get slower.
MAX_FSDP = 128
# Leaves with fewer elements (in one layer) are not split over fsdp: the collectives would cost more
# time than the memory is worth.
MIN_SHARDED_SIZE = 2**14

# (regex searched in a leaf's name, spec of its last dimensions: one axis or None each). The first
# match wins. A kernel [in, out] split on its outputs feeds a kernel split on its inputs, so that a
# block sums over `tensor` only once per pair. `layer_spec` then adds fsdp.
RULES: tuple[tuple[str, P], ...] = (
    (r"block.*/(q|k|v|mlp/in|mlp/gate)/kernel$", P(None, "tensor")),
    (r"block.*/(q|k|v|mlp/in)/bias$", P("tensor")),
    (r"block.*/(attn_out|mlp/out)/kernel$", P("tensor", None)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """Where one leaf lives."""

    path: str
    shape: tuple[int, ...]
    spec: P


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    width: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh `data x fsdp x tensor` over `devices` (default: all).

    One size may be -1: it takes the remaining devices. With the model's `width`, `data` and `fsdp`
    may both be -1: fsdp then takes the largest number of devices that divides both a slice and
    `width`, up to `MAX_FSDP`. Slices, which only a data center network joins, lie along `data`.
    Raises UserError when the sizes cannot multiply to the number of devices, or not within slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    sizes = [data, fsdp, tensor]
    requested = "mesh " + " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes[:2] == [-1, -1] and width and tensor > 0:
        sizes[1] = math.gcd(len(devices) // slices // tensor or 1, width, MAX_FSDP)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{requested}: sizes are positive and at most one is -1 (the rest)")
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise UserError(f"{requested}: the product must be the number of devices, {len(devices)}")
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if sizes[0] % slices:
        raise UserError(f"{requested}: data must be a multiple of the number of slices, {slices}")
    if slices > 1:
        within = (sizes[0] // slices, *sizes[1:])
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many shards the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Rows split over `data` and `fsdp`; devices along `tensor` hold the same rows."""
    return NamedSharding(mesh, P(ROWS))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """The global batch on devices, put together from the numpy rows that each process passes.

    All processes pass equally many rows. Raises UserError when the rows do not divide over the
    devices.
    """
    sharding = _input_sharding(mesh)
    rows = {len(x) for x in jax.tree.leaves(batch)}
    starts = sharding.addressable_devices_indices_map((mesh.size,)).values()
    num_shards = len({index[0].start for index in starts})
    if len(rows) != 1 or min(rows) % num_shards:
        raise UserError(
            f"a batch of {sorted(rows)} rows does not divide over {num_shards} devices "
            "of this process"
        )
    arrays = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
    return jax.device_put(arrays, batch_sharding(mesh))


def local_rows(array: jax.Array, mesh: Mesh) -> Shaped[np.ndarray, "..."]:
    """The rows of a global array that this process passed to `shard_batch`.

    It is a collective: all processes must call it.
    """
    array = jax.device_put(array, _input_sharding(mesh))
    # Devices along `tensor` may hold the same rows: keep one shard for each start.
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def all_gather_to_host(array: jax.Array) -> Shaped[np.ndarray, "..."]:
    """The whole array in the memory of every process; all processes must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return of_all(array, tiled=True)


def _input_sharding(mesh: Mesh) -> NamedSharding:
    """How rows enter the devices from hosts: as `batch_sharding`, if each row has only one host.

    Where devices along `tensor` belong to several processes, no process could pass all copies of
    its rows. Each device then takes rows of its own process, and `shard_batch` exchanges them.
    """
    groups = mesh.devices.reshape(num_row_shards(mesh), -1)
    if all(len({device.process_index for device in group}) == 1 for group in groups):
        return batch_sharding(mesh)
    return NamedSharding(mesh, P(mesh.axis_names))


def tree_shardings(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """The sharding of every leaf of a tree of shapes.

    The tree may be parameters, optimizer state, EMA or frozen encoders. An optimizer's moments get
    the sharding of their parameter because their names end with the parameter's.
    """

    def place(name: str, leaf: jax.ShapeDtypeStruct | Array) -> NamedSharding:
        num_scanned_axes = int(bool(re.search(SCANNED, name)))
        spec = layer_spec(name, tuple(leaf.shape)[num_scanned_axes:], mesh)
        return NamedSharding(mesh, P(*[None] * num_scanned_axes, *spec) if spec else P())

    return map_named(place, tree)


def layer_spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The spec of a leaf by `RULES` and fsdp; of a stacked leaf, the spec of one layer.

    An axis that does not divide its dimension is dropped there. Trailing Nones are left out.
    """
    rule = next((spec for pattern, spec in RULES if re.search(pattern, name)), P())
    # A matrix's factored moments have its name, but one dimension less.
    rule = P() if len(rule) > len(shape) else rule
    spec = [None] * (len(shape) - len(rule)) + [*rule]
    spec = _with_fsdp(_dividing(spec, name, shape, mesh), shape, mesh)
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def _dividing(
    spec: list[str | None], name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> list[str | None]:
    """`spec` without the axes that have one device or do not divide their dimension."""
    result = []
    for dim, axis in zip(shape, spec):
        size = mesh.shape[axis] if axis else 1
        if dim % size:
            logging.info(
                "%s %s: %d does not divide over %s=%d; replicated there",
                name, shape, dim, axis, size,
            )  # fmt: skip
        result.append(axis if size > 1 and dim % size == 0 else None)
    return result


def _with_fsdp(
    spec: list[str | None], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> list[str | None]:
    """`spec` with fsdp on the largest free dimension that it divides, unless the leaf is small.

    The last dimension is taken only if no other will do: a TPU stores it in lanes of 128, so that
    30 columns would take as much memory as 128.
    """
    size = mesh.shape["fsdp"]
    free = [i for i, dim in enumerate(shape) if spec[i] is None and dim % size == 0 and dim > 1]
    if size == 1 or not free or math.prod(shape) < MIN_SHARDED_SIZE:
        return spec
    best = max(free, key=lambda i: (i < len(shape) - 1, shape[i], -i))
    return ["fsdp" if i == best else axis for i, axis in enumerate(spec)]


def constrain_rows(tree: PyTree) -> PyTree:
    """Inside jit: splits the rows of every array over `data` and `fsdp`, if a mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(ROWS)), tree)


def is_fsdp() -> bool:
    """Inside jit: whether weights are split over fsdp, so that using one gathers it first."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["fsdp"] > 1


def rows_divisible(num_rows: int) -> bool:
    """Inside jit: whether a mesh is set that can split so many rows.

    A batch of one row, as used to initialize parameters, cannot be split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and num_rows % num_row_shards(mesh) == 0


def num_rows_at_once(num_rows: int) -> int:
    """Inside jit: rows of a batch of `num_rows` that all devices hold if each has one of them."""
    mesh = jax.sharding.get_abstract_mesh()
    return num_row_shards(mesh) if rows_divisible(num_rows) else 1


def platform() -> str:
    """Inside jit: what this is compiled for, "cpu", "tpu" or "gpu".

    The mesh comes first: `univg plan` compiles for devices that are not here.
    """
    return (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).platform


def weight_dtype(dtype: DTypeLike, sum_dtype: DTypeLike | None) -> jnp.dtype:
    """Inside jit: what `matmul` makes of a weight's dtype, for x of `dtype`, before it gathers."""
    # XLA's CPU compiler aborts on sums of bfloat16 over devices that are written by hand.
    sum_dtype = jnp.float32 if platform() == "cpu" else sum_dtype or dtype
    return jnp.promote_types(dtype, sum_dtype)


def matmul(
    x: Float[Array, "r i"],
    weight: Float[Array, "i o"],
    name: str,
    *,
    sum_dtype: DTypeLike | None = None,
) -> Float[Array, "r o"]:
    """x W in x's dtype, with the rows of x split over `data` and `fsdp`, W by the rule for `name`.

    This is the one place where FSDP communicates. W is gathered in x's dtype, and again for the
    gradient (no remat policy keeps it); the gradient is summed straight into shards, in `sum_dtype`
    (None: x's). In x's dtype, one training step moves three times the bytes of all weights. Written
    by hand because the compiler, left to itself, may move activations instead.
    """
    weight = weight.astype(weight_dtype(x.dtype, sum_dtype))
    if not is_fsdp() or not rows_divisible(len(x)):
        return _product(x, weight)
    mesh = jax.sharding.get_abstract_mesh()
    spec = layer_spec(name, weight.shape, mesh)
    # `tensor` stays with the compiler: inside, the code sees `data` and `fsdp` only.
    manual = P(*("fsdp" if axis == "fsdp" else None for axis in spec))
    rows = P(ROWS)

    def local(x: jax.Array, weight: jax.Array) -> jax.Array:
        # Declares the weight different on each device, so that its gradient is summed here; over
        # `data` last, after the reduce-scatter has cut it to a shard.
        if "fsdp" not in manual:
            return _product(x, jax.lax.pcast(weight, ROWS, to="varying"))
        weight = jax.lax.pcast(weight, "data", to="varying")
        return _product(x, _gather(weight, manual.index("fsdp"), mesh.shape["fsdp"], x.dtype))

    return jax.shard_map(local, in_specs=(rows, manual), out_specs=rows, axis_names=set(ROWS))(
        x, weight
    )


def _product(x: Float[Array, "r i"], weight: Float[Array, "i o"]) -> Float[Array, "r o"]:
    """x W in x's dtype; the gradient of W is in W's, which may be wider."""
    return x @ weight if x.dtype == weight.dtype else _mixed_product(x, weight)


@jax.custom_vjp
def _mixed_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return _mixed_product_forward(x, weight)[0]


def _mixed_product_forward(
    x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not a call of `_mixed_product`: remat's policies know a product, and not what calls one.
    return x @ weight.astype(x.dtype), (x, weight)


def _mixed_product_backward(
    saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    # Not rounded before it is summed over devices.
    of_weight = jnp.matmul(x.T, gradient, preferred_element_type=weight.dtype)
    return gradient @ weight.astype(x.dtype).T, of_weight


_mixed_product.defvjp(_mixed_product_forward, _mixed_product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(shard: jax.Array, axis: int, size: int, dtype: np.dtype) -> jax.Array:
    """The whole of `shard`, rounded to `dtype`; its gradient is summed in the shard's own dtype."""
    return _gather_forward(shard, axis, size, dtype)[0]


def _gather_forward(
    shard: jax.Array, axis: int, size: int, dtype: np.dtype
) -> tuple[jax.Array, None]:
    # Not a call of `_gather`: remat's policies know an all_gather, and not what calls one.
    whole = jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)
    return whole.astype(shard.dtype), None


def _gather_backward(
    axis: int, size: int, dtype: np.dtype, _: None, gradient: jax.Array
) -> tuple[jax.Array]:
    """A reduce-scatter in two hops, over `size / 4` devices, then over 4.

    XLA for TPU makes an all-reduce, twice the traffic, of a reduce-scatter over all devices of a
    slice, and keeps those over a part of them. Any torus of TPUs has sides of multiples of 4.
    """
    inner = 4 if size % 4 == 0 else 1
    outer = size // inner
    # After the first hop device i * inner + j holds chunk i of `outer`, after the second the j-th
    # piece of that chunk: its own shard, in the order in which `all_gather` joins them.
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


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """The shapes of `tree`, each with its sharding: what restoring a checkpoint asks for.

    `shardings` is a tree like `tree`, or one sharding for all leaves.
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )


def leaf_specs(tree: PyTree, shardings: PyTree, *, larger_than: int = 0) -> tuple[LeafSpec, ...]:
    """Name, shape and spec of every leaf of at least `larger_than` bytes."""
    return tuple(
        LeafSpec(path=name, shape=tuple(leaf.shape), spec=sharding.spec)
        for (name, leaf), sharding in zip(named_leaves(tree).items(), jax.tree.leaves(shardings))
        if math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize >= larger_than
    )
