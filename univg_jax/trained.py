"""A trained model on disk: a step of a run, or a folder that `univg export` wrote.

`open_trained` tells which. Both have the same methods, so a `Pipeline`, the next stage of training
and another export read either.

An exported folder has, in every format, `provenance.json` (what it is and where it comes from) and
`checksums.json` of all its files, which is written last: a folder without it is not whole. In the
formats that can be read back it also has

    model.safetensors (or several and an index), or params/    the parameters, by their names
    config.json                                                the network's sizes
    encoders/                                                  the encoders' record, as in a workdir
    pretrained/                                                copies of pretrained encoders, if any

README.md, the card, has no checksum: its reader completes it. safetensors and pretrained encoders
are mapped into memory, which a bucket cannot do: of those there is a copy below `COPIES`.
"""

import abc
import copy
import dataclasses
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from univg_jax import checkpoint, checksums
from univg_jax.errors import NotFoundError, UserError, shorten
from univg_jax.files import check_address, check_space, read_json, write_streamed
from univg_jax.interop.folder import Weight, read_leaf
from univg_jax.interop.tensors import DTYPES, TensorFolder
from univg_jax.progress import timed
from univg_jax.quantization import SCALE, dequantize_array, restore
from univg_jax.sharding import replicated, with_shardings
from univg_jax.stored import Shapes, differences, read_arrays, saved_shapes, stream
from univg_jax.streaming import Block, Tensor, boxes
from univg_jax.trees import Json, named_leaves, nest
from univg_jax.workdir import CHECKPOINTS

PROVENANCE, WEIGHTS, PARAMS = "provenance.json", "model.safetensors", "params"
PRETRAINED = "pretrained"
VERSION = 1  # of what an exported folder has
COPIES = "~/.cache/univg_jax/exports"  # of exports in buckets, each by its digest
WHICH = ("ema", "params")  # the average of the parameters, or the parameters themselves


class Trained(abc.ABC):
    """A trained model on disk."""

    path: epath.Path

    @property
    @abc.abstractmethod
    def folder(self) -> epath.Path:
        """What has its `encoders`. Raises NotFoundError where there is no checkpoint."""

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """The run's step. Raises UserError if it is damaged, or no step is sound."""

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """16 hex digits that name the content."""

    @abc.abstractmethod
    def config(self) -> Json:
        """The run's config."""

    @abc.abstractmethod
    def data_state(self) -> Json | None:
        """Where the run's stream was."""

    @abc.abstractmethod
    def which(self, *, ema: bool) -> str:
        """The name in WHICH of what is asked for. Raises UserError if it is not there."""

    @abc.abstractmethod
    def load_params(
        self, *, which: str, abstract: PyTree, shardings: PyTree | None = None
    ) -> PyTree:
        """The parameters, with the shapes and dtypes of `abstract`.

        Raises UserError where they are not those of this tree.
        """

    @abc.abstractmethod
    def init_params(
        self, params: PyTree, *, which: str, new: Sequence[str], dropped: Sequence[str]
    ) -> PyTree:
        """Fresh `params` of a next stage, with the values of this model: `checkpoint.init_from`."""

    @abc.abstractmethod
    def check_init(
        self, params: PyTree, *, which: str, new: Sequence[str], dropped: Sequence[str]
    ) -> None:
        """Raises UserError if `init_params` would, as far as the shapes of `params` tell."""

    @abc.abstractmethod
    def tensors(self, which: str) -> dict[str, Tensor]:
        """The parameters as they are stored, to be read one after the other."""


def open_trained(path: epath.PathLike, *, step: int | None = None) -> "RunStep | ExportedModel":
    """What lies at `path`: a workdir, a step of it, or an exported folder.

    `step` is one of a workdir. Raises UserError for an export that is not whole, or that cannot be
    read back; of a workdir little is read.
    """
    check_address(path, where=str(path))
    path = epath.Path(path).expanduser()
    if (path / PROVENANCE).exists():
        exported = ExportedModel.open(path)
        if step not in (None, exported.step):
            raise NotFoundError(f"no step {step} in {path}: step {exported.step} was exported")
        return exported
    if step is not None:
        path = checkpoint.workdir_of(path) / CHECKPOINTS / str(step)
    return RunStep(path)


@dataclasses.dataclass(frozen=True)
class RunStep(Trained):
    """A workdir at its newest sound step, or one step; see `Trained`."""

    path: epath.Path

    @property
    def folder(self) -> epath.Path:
        return checkpoint.workdir_of(self.path)

    @functools.cached_property
    def step(self) -> int:
        return checkpoint.step_of(self.path)

    @property
    def digest(self) -> str:
        return checkpoint.digests(self.path)[self.step]

    def config(self) -> Json:
        return checkpoint.load_config(self.path)

    def data_state(self) -> Json | None:
        return checkpoint.load_data_state(self.path)

    def which(self, *, ema: bool) -> str:
        return WHICH[not ema]

    def load_params(
        self, *, which: str, abstract: PyTree, shardings: PyTree | None = None
    ) -> PyTree:
        return checkpoint.load_params(
            self.path, which=which, abstract=abstract, shardings=shardings
        )

    def init_params(
        self, params: PyTree, *, which: str, new: Sequence[str], dropped: Sequence[str]
    ) -> PyTree:
        return checkpoint.init_from(params, self.path, which=which, new=new, dropped=dropped).state

    def check_init(
        self, params: PyTree, *, which: str, new: Sequence[str], dropped: Sequence[str]
    ) -> None:
        checkpoint.check_init_from(params, self.path, which=which, new=new, dropped=dropped)

    def tensors(self, which: str) -> dict[str, Tensor]:
        step = self.folder / CHECKPOINTS / str(self.step)
        return {
            name: stream(step / "state", f"{which}/{name}") for name in saved_shapes(step, which)
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedModel(Trained):
    """An exported folder that can be read back; see `Trained`."""

    path: epath.Path
    provenance: Json = dataclasses.field(repr=False)

    @classmethod
    def open(cls, path: epath.Path) -> "ExportedModel":
        """Raises UserError if the folder is not whole, or of a format that is for others."""
        provenance = read_json(path / PROVENANCE)
        if not (path / checksums.FILE).exists():
            raise UserError(f"{path} is no whole export, it has no {checksums.FILE}: export again")
        found = provenance.get("version"), provenance.get("format")
        if found[0] != VERSION:
            raise UserError(f"{path} was exported by another version of univg_jax: export again")
        if found[1] not in STORES:
            raise UserError(
                f"{path} is an export in the format {found[1]}, which is for other libraries; "
                f"univg_jax reads {' and '.join(STORES)}"
            )
        return cls(path=path, provenance=provenance)

    @functools.cached_property
    def folder(self) -> epath.Path:
        """Where all is read from: the path, or the copy of what cannot be read in a bucket."""
        is_local = "://" not in os.fspath(self.path)
        if is_local or (self._store is OrbaxStore and not (self.path / PRETRAINED).is_dir()):
            return self.path
        copy = epath.Path(COPIES).expanduser() / _digest(self.path)
        _copy(self.path, copy)
        return copy

    @property
    def step(self) -> int:
        return self.provenance["step"]

    @functools.cached_property
    def digest(self) -> str:
        # What was copied has been verified.
        if self.folder == self.path and (problems := checksums.find_problems(self.path)):
            raise UserError(f"{self.path} is damaged: {shorten(problems)}")
        return _digest(self.path)

    def config(self) -> Json:
        config = copy.deepcopy(self.provenance["config"])
        if (self.path / PRETRAINED).is_dir():
            config["conditioning"]["folder"] = str(self.folder / PRETRAINED)
        return config

    def data_state(self) -> Json | None:
        return self.provenance["data_state"]

    def which(self, *, ema: bool) -> str:
        has = self.provenance["parameters"]
        if has == "ema" and not ema:
            raise UserError(f"{self.path} was exported without the raw parameters")
        return has

    def load_params(
        self, *, which: str, abstract: PyTree, shardings: PyTree | None = None
    ) -> PyTree:
        if shardings is not None:
            abstract = with_shardings(abstract, shardings)
        leaves = named_leaves(abstract)
        if problems := differences(leaves, self._shapes(leaves)):
            raise UserError(f"{self.path} does not fit the model: {shorten(problems)}")
        values = named_leaves(self._read(leaves))
        return jax.tree.unflatten(jax.tree.structure(abstract), [values[name] for name in leaves])

    def init_params(
        self, params: PyTree, *, which: str, new: Sequence[str], dropped: Sequence[str]
    ) -> PyTree:
        return checkpoint.fill(
            params,
            saved=self._shapes(named_leaves(params)),
            read=self._read,
            where=str(self.path),
            new=new,
            dropped=dropped,
        )

    def check_init(
        self, params: PyTree, *, which: str, new: Sequence[str], dropped: Sequence[str]
    ) -> None:
        saved = self._shapes(named_leaves(params))
        checkpoint.leaves_to_fill(
            params, saved=saved, where=str(self.path), new=new, dropped=dropped
        )

    def tensors(self, which: str) -> dict[str, Tensor]:
        return self._store.tensors(self.folder)

    @property
    def _store(self) -> "type[SafetensorsStore] | type[OrbaxStore]":
        return STORES[self.provenance["format"]]

    def _shapes(self, leaves: Shapes) -> dict[str, jax.ShapeDtypeStruct]:
        """Of what is stored, but with the dtypes of `leaves`, to which reading casts."""
        return {
            name: jax.ShapeDtypeStruct(x.shape, leaves[name].dtype if name in leaves else x.dtype)
            for name, x in self.tensors("").items()
        }

    def _read(self, leaves: Shapes) -> PyTree:
        """The stored values of these leaves, nested, with their dtypes and shardings."""
        self.digest  # noqa: B018 (raises if a file is not what was written)
        return self._store.read(self.folder, leaves)


def _digest(export: epath.Path) -> str:
    return hashlib.sha256((export / checksums.FILE).read_bytes()).hexdigest()[:16]


def _copy(export: epath.Path, folder: epath.Path) -> None:
    """Copies what is not in `folder` yet, or is damaged there. Raises UserError for other bytes."""

    def is_there(name: str) -> bool:
        return (folder / name).exists() and _sum(folder / name, sums[name]) == sums[name]

    sums = checksums.read(export)
    if not (missing := [name for name in sums if not is_there(name)]):
        return
    try:
        check_space(folder, sum((export / name).stat().length for name in missing))
        with timed(f"copying {export} to {folder}"):
            for name in missing:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with (export / name).open("rb") as stored:
                    write_streamed(folder / name, functools.partial(shutil.copyfileobj, stored))
    except FileNotFoundError as error:
        raise UserError(f"{export} is damaged: {error.filename or error} is missing") from None
    if damaged := [f"{name} is not what was written" for name in missing if not is_there(name)]:
        raise UserError(f"{export} is damaged: {shorten(damaged)}")


def _sum(file: epath.Path, like: str) -> str:
    return checksums.checksum(file, like.partition(":")[0])


class SafetensorsStore:
    """Parameters in safetensors files, with dots for slashes in their names."""

    @staticmethod
    def tensors(path: epath.Path) -> dict[str, Tensor]:
        """All of them, to be read one after the other; quantized ones in float32."""
        stored = TensorFolder(path, WEIGHTS)
        found = {name: _stream(stored, name) for name in stored.shapes}
        return {
            name.replace(".", "/"): restore(name, found)
            for name in found
            if not name.endswith(SCALE)
        }

    @staticmethod
    def read(path: epath.Path, leaves: Shapes) -> PyTree:
        """The values of these leaves, nested, with their dtypes and shardings."""
        stored = TensorFolder(path, WEIGHTS)
        return nest({name: _read(stored, name, like=leaf) for name, leaf in leaves.items()})


def _read(stored: TensorFolder, name: str, *, like: jax.ShapeDtypeStruct | jax.Array) -> jax.Array:
    """One parameter, with the shape, the dtype and the sharding of `like`."""
    theirs = name.replace("/", ".")

    def read(tensor: str, **changes: Any) -> jax.Array:
        shape = stored.shapes[tensor]
        options = {"dtype": DTYPES[stored.dtypes[tensor]], "sharding": like.sharding} | changes
        return read_leaf(
            stored,
            Weight(names=(tensor,), shape=shape, axes=tuple(range(len(shape)))),
            like=jax.ShapeDtypeStruct(shape, **options),
        )

    if theirs + SCALE not in stored:
        return read(theirs, dtype=like.dtype)
    whole = like.sharding
    if isinstance(whole, NamedSharding):  # every device has all scales
        whole = replicated(whole.mesh)
    scale = read(theirs + SCALE, sharding=whole)
    like = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=like.sharding)
    return dequantize_array(read(theirs), scale, like=like)


def _stream(stored: TensorFolder, name: str) -> Tensor:
    shape, dtype = stored.shapes[name], DTYPES[stored.dtypes[name]]

    def blocks() -> Iterator[Block]:
        for box in boxes(shape, dtype.itemsize):
            yield box, stored.read(name, box)

    return Tensor(shape=shape, dtype=dtype, blocks=blocks)


class OrbaxStore:
    """Parameters in a folder that orbax reads by itself."""

    @staticmethod
    def tensors(path: epath.Path) -> dict[str, Tensor]:
        """All of them, to be read one after the other."""
        return {name: stream(path / PARAMS, name) for name in saved_shapes(path, item=PARAMS)}

    @staticmethod
    def read(path: epath.Path, leaves: Shapes) -> PyTree:
        """The values of these leaves, nested, with their dtypes and shardings."""
        return read_arrays(path, nest(leaves), item=PARAMS)


STORES = {"orbax": OrbaxStore, "safetensors": SafetensorsStore}  # by the name of the format
