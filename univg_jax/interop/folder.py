"""Hugging Face folders, read tensor by tensor straight into (sharded) arrays, and written.

A folder has a `config.json` and safetensors files. A network's map says, for each of our
parameters, which stored tensors hold it and in which layout:

    ours = reshape(transpose(theirs, axes))          a stacked parameter: one tensor a layer

Only headers are read before all names, shapes and dtypes are checked. Then each device's shard is
read by itself, so the host holds one shard of one parameter at a time. Pickles, which can run code,
are never read.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Shaped

from univg_jax.files import read_json, write_whole
from univg_jax.interop.config import config_file
from univg_jax.interop.tensors import PathLike, TensorFolder, check_shapes
from univg_jax.interop.writing import MAX_FILE_BYTES, write_sharded
from univg_jax.pretrained import local_path
from univg_jax.sharding import tree_shardings
from univg_jax.streaming import Block, Tensor, boxes, everything
from univg_jax.trees import named_leaves, nest

Params = dict[str, Any]  # nested, as Flax has them

LINEAR = (1, 0)  # [out in] -> [in out]
CONV = (2, 3, 1, 0)  # [out in h w] -> [h w in out]
TENSORS = {"kernel": "weight", "bias": "bias", "scale": "weight"}  # our leaf -> their tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """Where one of our parameters is stored: in the tensors `names`, each of `shape`.

    `axes` transposes a stored tensor to our order. `channels` says for each of our input channels
    which stored one (axis 1) it is, where their order is another. `stacked`: our leading axis
    counts layers, and `names` has one for each; otherwise there is one name.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    stacked: bool = False
    channels: tuple[int, ...] = ()

    @property
    def transposed(self) -> tuple[int, ...]:
        """The shape of a stored tensor in our order of axes."""
        return tuple(self.shape[axis] for axis in self.axes)

    def stored(self, value: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
        """Our parameter, or one layer of it, as it is stored."""
        value = value.reshape(self.transposed).transpose(np.argsort(self.axes))
        return value[:, np.argsort(self.channels)] if self.channels else value


def map_weights(
    abstract: Params,
    *,
    outer: Mapping[str, str],
    block: Mapping[str, str] | None = None,
    block_name: str = "",
) -> dict[str, Weight]:
    """Where each leaf of `abstract` is stored, from the names of modules alone.

    Kernels are transposed; everything else is stored as we have it. `outer` maps our module paths
    to theirs, or whole paths of leaves to tensors. Our modules `blocks` (stacked) and `last_block`
    consist of the modules in `block`; theirs are named `block_name`, with the layer for `{}`, and
    then as `block` says.
    """
    leaves = named_leaves(abstract)
    num_stacked = max(
        (leaf.shape[0] for path, leaf in leaves.items() if path.startswith("blocks/")), default=0
    )
    weights = {}
    for path, leaf in leaves.items():
        module, _, kind = path.rpartition("/")
        first, _, inner = module.partition("/")
        stacked = first == "blocks"
        shape = tuple(leaf.shape[1:] if stacked else leaf.shape)
        if path in outer:
            names = (outer[path],)
        elif stacked or first == "last_block":
            layers = range(num_stacked) if stacked else [num_stacked]
            names = tuple(f"{block_name.format(i)}{block[inner]}.{TENSORS[kind]}" for i in layers)
        else:
            names = (f"{outer[module]}.{TENSORS[kind]}",)
        axes = {2: LINEAR, 4: CONV}[len(shape)] if kind == "kernel" else tuple(range(len(shape)))
        theirs = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
        weights[path] = Weight(names=names, shape=theirs, axes=axes, stacked=stacked)
    return weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A network and where its parameters are stored; made by `open_model`, which checked them."""

    module: Any
    abstract: Params  # shapes of the parameters
    weights: Mapping[str, Weight]  # by the parameters' names
    tensors: TensorFolder

    def read(self, *, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Params:
        """The parameters as `dtype`, on `mesh` as `univg_jax.sharding` places them.

        Without a mesh they are on the first device.
        """
        if mesh is None:
            first = SingleDeviceSharding(jax.local_devices()[0])
            shardings = dict.fromkeys(self.weights, first)
        else:
            shardings = named_leaves(tree_shardings(self.abstract, mesh))
        return nest(
            {
                name: read_leaf(
                    self.tensors,
                    self.weights[name],
                    like=jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[name]),
                )
                for name, leaf in named_leaves(self.abstract).items()
            }
        )

    def stream(self, *, dtype: Any = jnp.float32) -> dict[str, Tensor]:
        """The parameters as `dtype`, to be read one after the other; no device is used."""

        def tensor(weight: Weight, shape: tuple[int, ...]) -> Tensor:
            def blocks() -> Iterator[Block]:
                for box in boxes(shape, np.dtype(dtype).itemsize):
                    bounds = tuple((cut.start, cut.stop) for cut in box)
                    yield box, _read_box(self.tensors, weight, shape, bounds, np.dtype(dtype))

            return Tensor(shape=shape, dtype=np.dtype(dtype), blocks=blocks)

        leaves = named_leaves(self.abstract)
        return {name: tensor(self.weights[name], tuple(x.shape)) for name, x in leaves.items()}

    def write(
        self, folder: PathLike, params: Params, *, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        """Writes `params` under the names of the folder that was opened, with its config, float32.

        Tensors that the network does not use (a pooler, a decoder) are not written. Raises
        UserError for parameters of other names or shapes.
        """
        check_params(params, self.abstract)
        file = config_file(self.tensors.folder)
        write_params(
            folder,
            self.tensors.file,
            params=params,
            weights=self.weights,
            config=read_json(file) if file.is_file() else None,
            max_file_bytes=max_file_bytes,
        )


def open_model(
    folder: PathLike,
    file: str,
    *,
    module: Any,
    abstract: Params,
    weights: Mapping[str, Weight],
    unread: Mapping[str, tuple[int, ...]] | None = None,
    ignored: str = "(?!)",
) -> StoredModel:
    """`module`, whose parameters of shapes `abstract` are stored in `folder` as `weights` says.

    `file` is the name of the whole file; if `file.index.json` exists, the files that it lists are
    read instead. `unread` are tensors that may exist and then have that shape; `ignored` is a regex
    of tensors that may exist in any shape. Only headers are read.

    Raises NotFoundError for a missing file; UserError for a broken one, for another dtype than 16-
    or 32-bit floats, and for missing, extra or misshaped tensors, all listed.
    """
    tensors = TensorFolder(folder, file, ignored=ignored)
    expected = {name: w.shape for w in weights.values() for name in w.names}
    tensors.check(expected, unread=unread or {})
    return StoredModel(module=module, abstract=abstract, weights=weights, tensors=tensors)


def loader(open_: Callable[..., StoredModel]) -> Callable[..., tuple[Any, Params]]:
    """`load(folder, *, dtype, param_dtype, mesh) -> (module, params)`: `open_`, then read."""

    def load(
        folder: PathLike,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
    ) -> tuple[Any, Params]:
        stored = open_(folder, dtype=dtype)
        return stored.module, stored.read(mesh=mesh, dtype=param_dtype)

    load.__name__ = open_.__name__.replace("open", "load", 1)
    summary = open_.__doc__.splitlines()[0]
    load.__doc__ = f"{summary} Returns (module, parameters); see `{open_.__name__}`."
    return load


def read_leaf(
    tensors: TensorFolder, weight: Weight, *, like: jax.ShapeDtypeStruct | jax.Array
) -> jax.Array:
    """One parameter of ours, with the shape, the dtype and the sharding of `like`."""
    shape, sharding = tuple(like.shape), like.sharding
    holders: dict[tuple, list[jax.Device]] = {}  # devices by the bounds of what they hold
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, devices in holders.items():
        shard = _read_box(tensors, weight, shape, bounds, np.dtype(like.dtype))
        arrays += [jax.device_put(shard, device) for device in devices]
        # Transfers are asynchronous: without waiting, the host would hold several shards.
        jax.block_until_ready(arrays)
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_box(
    tensors: TensorFolder,
    weight: Weight,
    shape: tuple[int, ...],
    bounds: Sequence[tuple[int, int]],
    dtype: np.dtype,
) -> Shaped[np.ndarray, "..."]:
    """The elements of our parameter of `shape` within `bounds`, (start, stop) of each axis."""
    box = [slice(*b) for b in bounds]
    layers = range(len(weight.names))[box[0]] if weight.stacked else [0]
    inner, inner_shape = (box[1:], shape[1:]) if weight.stacked else (box, shape)
    out = np.empty([stop - start for start, stop in bounds], dtype)
    for target, layer in zip(out if weight.stacked else [out], layers):
        name = weight.names[layer]
        if weight.transposed == inner_shape:
            theirs = [inner[weight.axes.index(axis)] for axis in range(len(weight.shape))]
            target[...] = tensors.read(name, theirs).transpose(weight.axes)
        else:  # After a reshape, a box of our parameter is no box of the stored tensor.
            stored = tensors.read(name)
            stored = stored[:, list(weight.channels)] if weight.channels else stored
            whole = stored.transpose(weight.axes).reshape(inner_shape)
            target[...] = whole[tuple(inner)]
    return out


def write_params(
    folder: PathLike,
    file: str,
    *,
    params: Params,
    weights: Mapping[str, Weight],
    config: Mapping[str, Any] | None,
    unread: Mapping[str, Tensor] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """The inverse of `open_model` and `read`: writes a folder in float32, `config.json` last.

    Several files are written if one would exceed `max_file_bytes`. `unread` are tensors that they
    have and we lack. The host holds one layer at a time.
    """
    leaves = {name: Tensor.of(leaf) for name, leaf in named_leaves(params).items()}
    folder = local_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = file.rsplit(".", 1)
    for old in folder.glob(f"{stem}*.{suffix}*"):
        old.unlink()
    tensors = stored_tensors(leaves, weights) | dict(unread or {})
    tensors = {name: tensor.astype(np.dtype(np.float32)) for name, tensor in tensors.items()}
    write_sharded(folder, file, tensors, max_file_bytes=max_file_bytes)
    if config is not None:
        write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")


def stored_tensors(
    leaves: Mapping[str, Tensor], weights: Mapping[str, Weight]
) -> dict[str, Tensor]:
    """Our parameters under their stored names and in their layout, to be written in this order.

    The host holds one layer at a time of those that are stacked.
    """
    # Layers of the parameter that is being cut, from the one that is its key.
    rest: dict[tuple[str, int], Iterator[np.ndarray]] = {}

    def blocks(path: str, index: int) -> Iterator[Block]:
        weight, layers = weights[path], rest.pop((path, index), None)
        rest.clear()
        if layers is None:
            layers = itertools.islice(_layers(leaves[path], stacked=weight.stacked), index, None)
        yield everything(weight.shape), weight.stored(next(layers))
        rest[path, index + 1] = layers

    return {
        name: Tensor(
            shape=weight.shape,
            dtype=leaves[path].dtype,
            blocks=functools.partial(blocks, path, index),
        )
        for path, weight in weights.items()
        for index, name in enumerate(weight.names)
    }


def _layers(tensor: Tensor, *, stacked: bool) -> Iterator[Shaped[np.ndarray, "..."]]:
    """The layers of a stacked parameter in order, or the whole of another one."""
    if not stacked:
        yield tensor.read()
        return
    layer, filled = np.empty(tensor.shape[1:], tensor.dtype), 0
    for (_, *inner), block in tensor.blocks():  # of several layers, or of a part of one
        for part in block:
            layer[tuple(inner)] = part
            filled += part.size
            if filled == layer.size:
                yield layer
                layer, filled = np.empty(layer.shape, layer.dtype), 0


def check_params(params: Params, abstract: Params) -> None:
    """Raises UserError if `params` have other names or shapes than `abstract`."""
    expected, found = (
        {name: tuple(leaf.shape) for name, leaf in named_leaves(tree).items()}
        for tree in (abstract, params)
    )
    check_shapes(expected, found, where="parameters")
