"""A Hugging Face folder, `config.json` and safetensors, read tensor by tensor straight into
(sharded) arrays.

A network's map says, for each of our parameters, which tensors hold it and how they lie:

    ours = reshape(transpose(theirs, axes))          a stacked parameter: one tensor a layer

Only headers are read before all names, shapes and dtypes are checked. Then each device's shard is
read by itself, so the host holds one shard of one parameter at a time. Pickles are never read.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from univg_jax.sharding import tree_shardings
from univg_jax.trees import path_name

PathLike = str | Path
Params = dict[str, Any]

BLOCK = 2**16  # bytes of a sample of a fingerprint
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
FLOATS = ("F32", "F16", "BF16")
LINEAR = (1, 0)  # [out in] -> [in out]
CONV = (2, 3, 1, 0)  # [out in h w] -> [h w in out]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """Where one of our parameters lies: `names` of theirs, each of `shape`, whose `axes` in our
    order are given.

    `stacked`: our leading axis counts layers, and `names` has one for each; otherwise one name.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    stacked: bool = False

    @property
    def transposed(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.axes)


LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight"}


def map_weights(
    abstract: Params,
    *,
    outer: Mapping[str, str],
    block: Mapping[str, str] | None = None,
    block_name: str = "",
) -> dict[str, Weight]:
    """Where each leaf of `abstract` lies, by names alone: kernels are transposed, all else is as it
    is there.

    `outer` maps module paths to their modules, or whole paths of leaves to their tensors. In
    `blocks` (stacked), `last_block` and `layers_<i>` lie the modules of `block`, theirs under
    `block_name` with the layer for `{}`.
    """
    flat = dict(leaves(abstract))
    depth = max(
        (leaf.shape[0] for path, leaf in flat.items() if path.startswith("blocks/")), default=0
    )
    weights = {}
    for path, leaf in flat.items():
        (first, *rest), kind = path.split("/")[:-1] or [path], path.split("/")[-1]
        stacked = first == "blocks"
        shape = tuple(leaf.shape[1:] if stacked else leaf.shape)
        if path in outer:
            names = [outer[path]]
        elif stacked or first == "last_block" or re.fullmatch(r"layers_\d+", first):
            layers = (
                range(depth)
                if stacked
                else [depth if first == "last_block" else int(first.split("_")[1])]
            )
            names = [
                f"{block_name.format(i)}{block['/'.join(rest)]}.{LEAVES[kind]}" for i in layers
            ]
        else:
            names = [f"{outer['/'.join([first, *rest])]}.{LEAVES[kind]}"]
        axes = {2: LINEAR, 4: CONV}[len(shape)] if kind == "kernel" else tuple(range(len(shape)))
        theirs = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
        weights[path] = Weight(names=tuple(names), shape=theirs, axes=axes, stacked=stacked)
    return weights


def read_config(folder: PathLike, *, key: str, expected: Sequence[str]) -> dict[str, Any]:
    """`config.json`, whose `key` must be one of `expected`. Raises FileNotFoundError or ValueError."""
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        inner = sorted(f.parent.name for f in folder.glob("*/config.json"))
        hint = f" (subfolder {', '.join(inner)} has one)" if inner else ""
        raise FileNotFoundError(f"{folder} has no config.json: not the folder of a model{hint}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict) or config.get(key) not in expected:
        found = config.get(key) if isinstance(config, dict) else type(config).__name__
        raise ValueError(
            f"{file}: expected {key} {' or '.join(map(repr, expected))}, got {found!r}"
        )
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A network and where its parameters lie; made by `open_model`, which has checked that they all
    do.
    """

    module: Any
    abstract: Params  # shapes of the parameters
    weights: Mapping[str, Weight]  # by their '/'-joined paths
    tensors: "TensorFolder"

    def read(self, *, mesh: Mesh | None = None, dtype: Any = jnp.float32) -> Params:
        """The parameters as `dtype`: on `mesh` as `univg_jax.sharding` places them, else on the
        first device.
        """
        if mesh is None:
            shardings = jax.tree.map(
                lambda _: SingleDeviceSharding(jax.local_devices()[0]), self.abstract
            )
        else:
            shardings = tree_shardings(self.abstract, mesh)

        def place(path: tuple, leaf: Any, sharding: Any) -> jax.Array:
            weight = self.weights[path_name(path)]
            holders: dict[tuple, list[Any]] = {}  # devices by the part that they hold
            for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
                bounds = tuple(
                    s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True)
                )
                holders.setdefault(bounds, []).append(device)
            shards = {}
            for bounds, devices in holders.items():
                part = _read_part(self.tensors, weight, leaf.shape, bounds, np.dtype(dtype))
                shards |= {device: jax.device_put(part, device) for device in devices}
                jax.block_until_ready(list(shards.values()))  # before the next part takes memory
            return jax.make_array_from_single_device_arrays(
                leaf.shape, sharding, list(shards.values())
            )

        return jax.tree_util.tree_map_with_path(place, self.abstract, shardings)

    def write(self, folder: PathLike, params: Params, *, max_file_bytes: int = 5 * 10**9) -> None:
        """Writes `params` as the folder that was opened has them, with its config: the way back, in
        float32.

        Tensors that we have no use for (a pooler, a decoder) are not written. Raises ValueError for
        other parameters.
        """
        expected = {path: leaf.shape for path, leaf in leaves(self.abstract)}
        check_shapes(
            expected, {path: tuple(value.shape) for path, value in leaves(params)}, "parameters"
        )
        file = self.tensors.folder / "config.json"
        write_params(
            folder,
            self.tensors.file,
            params=params,
            weights=self.weights,
            config=json.loads(file.read_text()) if file.is_file() else None,
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
    """`module`, whose parameters have the shapes `abstract` and lie in `folder` as `weights` says.

    `file` is the name of the whole file; where `file.index.json` exists its parts are read.
    `unread` are tensors that may be there and have that shape, `ignored` a regex of those that may
    be there anyhow.

    Raises FileNotFoundError for a missing file; ValueError for a broken one, another dtype than 16-
    or 32-bit floats, and missing, extra or misshaped tensors, all listed. Only headers are read.
    """
    tensors = TensorFolder(folder, file, ignored=ignored)
    tensors.check(
        {name: w.shape for w in weights.values() for name in w.names}, unread=unread or {}
    )
    return StoredModel(module=module, abstract=abstract, weights=weights, tensors=tensors)


def loader(open_: Callable[..., StoredModel]) -> Callable[..., tuple[Any, Params]]:
    """`load(folder, *, dtype, param_dtype, mesh) -> (module, params)`: opens as `open_` does, then
    reads.
    """

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
    load.__doc__ = (
        f"{open_.__doc__.splitlines()[0]} As (module, parameters); see `{open_.__name__}`."
    )
    return load


def _read_part(
    tensors: "TensorFolder",
    weight: Weight,
    shape: tuple[int, ...],
    bounds: Sequence[tuple[int, int]],
    dtype: np.dtype,
) -> Shaped[np.ndarray, "..."]:
    """The box `bounds` of our parameter of `shape`."""
    box = [slice(*b) for b in bounds]
    layers = range(len(weight.names))[box[0]] if weight.stacked else [0]
    inner, inner_shape = (box[1:], shape[1:]) if weight.stacked else (box, shape)
    out = np.empty([stop - start for start, stop in bounds], dtype)
    for part, layer in zip(out if weight.stacked else [out], layers):
        if weight.transposed == inner_shape:
            theirs = [inner[weight.axes.index(axis)] for axis in range(len(weight.shape))]
            part[...] = tensors.read(weight.names[layer], theirs).transpose(weight.axes)
        else:
            part[...] = (
                tensors.read(weight.names[layer])
                .transpose(weight.axes)
                .reshape(inner_shape)[tuple(inner)]
            )
    return out


def write_params(
    folder: PathLike,
    file: str,
    *,
    params: Params,
    weights: Mapping[str, Weight],
    config: Mapping[str, Any] | None,
    unread: Mapping[str, Shaped[np.ndarray, "..."]] | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> None:
    """The inverse of `open_model` and `read`: a folder in float32, sharded past `max_file_bytes`,
    `config.json` last.

    `unread` are tensors that they have and we lack. The host holds one file's tensors at a time.
    """
    unread = unread or {}
    flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    places = {
        name: (path, layer) for path, w in weights.items() for layer, name in enumerate(w.names)
    }

    def tensor(name: str) -> np.ndarray:
        if name not in places:
            return np.ascontiguousarray(unread[name], np.float32)
        path, layer = places[name]
        weight = weights[path]
        value = np.asarray(flat[path][layer] if weight.stacked else flat[path], np.float32)
        return np.ascontiguousarray(
            value.reshape(weight.transposed).transpose(np.argsort(weight.axes))
        )

    sizes = {name: 4 * math.prod(w.shape) for w in weights.values() for name in w.names}
    sizes |= {name: 4 * value.size for name, value in unread.items()}
    files: list[list[str]] = [[]]
    room = max_file_bytes
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = max_file_bytes
        files[-1].append(name)
        room -= size

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = file.rsplit(".", 1)
    for old in folder.glob(f"{stem}*.{suffix}*"):
        old.unlink()
    weight_map = {}
    for i, names in enumerate(files):
        part = file if len(files) == 1 else f"{stem}-{i + 1:05d}-of-{len(files):05d}.{suffix}"
        save_file({name: tensor(name) for name in names}, folder / part, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, part)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{file}.index.json").write_text(json.dumps(index, indent=2))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class TensorFolder:
    """The tensors of one or several safetensors files, read by name, whole or in part."""

    def __init__(self, folder: PathLike, file: str, *, ignored: str = "(?!)"):
        self.folder, self.file = Path(folder), file
        self.file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for part in self._parts(file):
            with _opened(part) as handle:
                for name in handle.keys():  # noqa: SIM118 - no mapping
                    if re.fullmatch(ignored, name):
                        continue
                    header = handle.get_slice(name)
                    self.file_of[name] = part
                    self.shapes[name], self.dtypes[name] = (
                        tuple(header.get_shape()),
                        header.get_dtype(),
                    )

    def _parts(self, file: str) -> list[Path]:
        index = self.folder / f"{file}.index.json"
        if not index.exists():
            if not (self.folder / file).is_file():
                pickles = sorted(f.name for f in self.folder.glob("*") if f.suffix in PICKLES)
                why = (
                    f"; {pickles[0]} is a pickle, which can run code and is never read"
                    if pickles
                    else ""
                )
                raise FileNotFoundError(f"{self.folder} has neither {file} nor {index.name}{why}")
            return [self.folder / file]
        try:
            parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of safetensors files: {error!r}") from None
        if missing := [part for part in parts if not (self.folder / part).is_file()]:
            raise FileNotFoundError(
                f"{self.folder} lacks {some(missing)}, which {index.name} names"
            )
        return [self.folder / part for part in parts]

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def read(self, name: str, box: Sequence[slice] | None = None) -> Shaped[np.ndarray, "..."]:
        """The tensor, or the part of it in `box`. The file is mapped only while it is read."""
        with _opened(self.file_of[name]) as handle:
            return handle.get_tensor(name) if box is None else handle.get_slice(name)[tuple(box)]

    def fingerprint(self) -> str:
        """A hash that tells these weights from others without reading gigabytes.

        Of every file: its size and 64 blocks of 64 KiB, evenly spaced, the first with the header's
        names and shapes.
        """
        digest = hashlib.sha256()
        for file in sorted(set(self.file_of.values())):
            size = file.stat().st_size
            digest.update(f"{file.name} {size};".encode())
            with file.open("rb") as opened:
                for start in sorted({i * max(size - BLOCK, 0) // 63 for i in range(64)}):
                    opened.seek(start)
                    digest.update(opened.read(BLOCK))
        return digest.hexdigest()

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        *,
        unread: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Holds the headers against `expected`, and against `unread` where it is there; raises
        ValueError.
        """
        unread = {name: shape for name, shape in (unread or {}).items() if name in self.shapes}
        check_shapes({**expected, **unread}, self.shapes, str(self.folder))
        if wrong := [
            f"{name} ({dtype})" for name, dtype in self.dtypes.items() if dtype not in FLOATS
        ]:
            raise ValueError(
                f"{self.folder}: expected tensors of {', '.join(FLOATS)}, got {some(wrong)}"
            )


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from None


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raises ValueError that lists missing, extra and misshaped names."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "misshaped": [
            f"{name} (expected {list(expected[name])}, got {list(found[name])})"
            for name in sorted(expected.keys() & found.keys())
            if tuple(expected[name]) != tuple(found[name])
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{where}: tensors do not fit the network: {listed}")


def some(names: Sequence[str], most: int = 12) -> str:
    """The names, or the first of them and how many more."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def leaves(tree: Params) -> Iterator[tuple[str, Any]]:
    """('/'-joined path, leaf) of every leaf."""
    return ((path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def nested(flat: Mapping[str, Any]) -> Params:
    """The inverse of `leaves`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree
