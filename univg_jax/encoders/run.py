"""The frozen encoders of one run: what its config asks for, where they come from, what is recorded.

`check` looks at what a config asks for, `prepare` obtains it before training, `load` reads it
afterwards, `abstract` has the shapes alone. `record` says what the folder of a run has.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy
from absl import logging
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree

from univg_jax import fields, sharding
from univg_jax.conditioning import Codec, Conditioner, Frozen, TextEncoder
from univg_jax.encoders.kinds import (
    KINDS,
    FitData,
    Fitted,
    Images,
    Networks,
    Portraits,
    Pretrained,
)
from univg_jax.encoders.record import (
    RECORD,
    Record,
    check_hash,
    check_same,
    encoders_of,
    file_of,
    inherited_record,
    kind_of,
    options_of,
    read_fitted,
    read_records,
)
from univg_jax.errors import NotFoundError, UserError
from univg_jax.files import write_sealed, write_whole
from univg_jax.pretrained import local_path
from univg_jax.settings import Conditioning
from univg_jax.streaming import Tensor
from univg_jax.together import together
from univg_jax.trees import named_leaves
from univg_jax.workdir import ENCODERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoders:
    """The modules of a run's encoders, and their parameters (`abstract`: the shapes of these)."""

    conditioner: Conditioner
    frozen: Frozen


def check(conditioning: Conditioning, *, init_from: epath.PathLike | None = None) -> None:
    """Raises what `prepare` would about a config, its pretrained folders and its parent's encoders.

    Nothing is written.
    """
    if (folder := conditioning.folder) and not local_path(folder).is_dir():
        raise NotFoundError(f"conditioning.folder={folder!r} is not a folder")
    parent = None if init_from is None else encoders_of(epath.Path(init_from))
    for role, wanted in _chosen(conditioning).items():
        if wanted is not None:
            inherited = inherited_record(parent, role, wanted)
            if isinstance(kind_of(role, wanted), Pretrained):
                networks = _open(role, wanted, conditioning.folder)
                if inherited is not None:
                    _check_weights(networks, role, inherited, of=f"the parent run {parent.parent}")


def abstract(conditioning: Conditioning) -> Encoders:
    """The encoders that a config asks for, with shapes for parameters: nothing is read or fitted.

    A pretrained encoder is the one in `conditioning.folder` if that exists, else as published.
    """
    modules, frozen = {}, {}
    for role, record in _chosen(conditioning).items():
        if record is None:
            continue
        kind, folder = kind_of(role, record), conditioning.folder
        if isinstance(kind, Fitted):
            modules[role] = kind.module(**options_of(record))
        elif kind.needs_folder and folder and local_path(folder).is_dir():
            modules[role] = _module(kind, _open(role, record, folder))
        else:
            modules[role] = kind.module(**kind.published(jnp.dtype(record["dtype"])))
        dtype = jnp.dtype(record.get("dtype", "float32"))
        frozen[role] = jax.tree.map(
            lambda x, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype),
            kind.param_shapes(modules[role]),
        )
    return Encoders(conditioner=Conditioner(**modules), frozen=frozen)


def prepare(
    conditioning: Conditioning,
    *,
    workdir: epath.PathLike,
    init_from: epath.PathLike | None = None,
    images: Callable[[], Images],
    portraits: Callable[[], Portraits],
    mesh: Mesh | None = None,
    skip: Sequence[str] = (),
    anew: bool = False,
    before_write: Callable[[], None] = lambda: None,
) -> Encoders:
    """The encoders that a config asks for, from now on those of the run in `workdir`.

    A fitted encoder is taken from `workdir/encoders`, else from the run that `init_from` lies in
    (so that later stages keep the first one's latent space), else fitted on `images()` or
    `portraits()` and saved. A pretrained one must be the workdir's own,
    else that run's, if they have one. `init_from` is not opened where the workdir has all. With
    `anew` the workdir's own do not count: they are of a start that failed. On several processes the
    first one does this, the others wait and read. `mesh` and `skip` are those of `load`. Nothing is
    written if `before_write()` raises.

    Raises UserError for an unknown kind or option, if a folder is missing or what is on disk was
    made otherwise, and if `init_from` has no encoders.
    """
    chosen = _chosen(conditioning)
    with together():
        if jax.process_index() == 0:
            _obtain_missing(
                chosen,
                folder=conditioning.folder,
                encoders=epath.Path(workdir) / ENCODERS,
                init_from=init_from,
                data=FitData(images=images, portraits=portraits),
                anew=anew,
                before_write=before_write,
            )
    return load(workdir, folder=conditioning.folder, mesh=mesh, skip=skip)


def load(
    workdir: epath.PathLike, *, folder: str = "", mesh: Mesh | None = None, skip: Sequence[str] = ()
) -> Encoders:
    """The encoders that a run has recorded, with the pretrained weights in `folder`.

    Parameters are placed on `mesh` as `univg_jax.sharding` says, else on the first device. Those of
    encoders whose role is in `skip` are not read. Raises UserError if the run has no
    encoders, or if weights are not those that it was trained with.
    """
    encoders = epath.Path(workdir) / ENCODERS
    records = read_records(encoders)
    if records is None:
        raise NotFoundError(
            f"{encoders / RECORD} does not exist: {workdir} is not the folder of a run"
        )
    modules, frozen = {}, {}
    for role, record in records.items():
        if record is None:
            continue
        modules[role], params = _load_one(
            role, record, encoders=encoders, folder=folder, mesh=mesh, skip=role in skip
        )
        if params is not None:
            frozen[role] = params
    return Encoders(conditioner=Conditioner(**modules), frozen=frozen)


def tensors(workdir: epath.PathLike, *, folder: str = "") -> dict[str, Tensor]:
    """The parameters that `load` reads, by `role/name`, to be read one after the other.

    Raises what `load` raises.
    """
    encoders, found = epath.Path(workdir) / ENCODERS, {}
    for role, record in (read_records(encoders) or {}).items():
        if record is None:
            continue
        if isinstance(kind_of(role, record), Pretrained):
            networks, dtype = _open(role, record, folder), jnp.dtype(record["dtype"])
            _check_weights(networks, role, record, of=f"the run {encoders.parent}")
            parts = {name: stored.stream(dtype=dtype) for name, stored in networks.items()}
        else:
            fitted = safetensors.numpy.load(read_fitted(encoders, role, record))
            parts = {name: Tensor.of(value) for name, value in fitted.items()}
        found |= {f"{role}/{name}": tensor for name, tensor in named_leaves(parts).items()}
    return found


def _load_one(
    role: str,
    record: Record,
    *,
    encoders: epath.Path,
    folder: str,
    mesh: Mesh | None,
    skip: bool = False,
) -> tuple[Any, PyTree | None]:
    """The module and the parameters of one recorded encoder; `skip`: no parameters."""
    kind = kind_of(role, record)
    if isinstance(kind, Pretrained):
        networks = _open(role, record, folder)
        _check_weights(networks, role, record, of=f"the run {encoders.parent}")
        return _module(kind, networks), None if skip else _read(networks, record, mesh)
    if skip:
        return kind.module(**options_of(record)), None
    params = safetensors.numpy.load(read_fitted(encoders, role, record))
    shardings = None if mesh is None else sharding.tree_shardings(params, mesh)
    return kind.module(**options_of(record)), jax.device_put(params, shardings)


def prepare_codec(
    conditioning: Conditioning,
    *,
    workdir: epath.PathLike,
    init_from: epath.PathLike | None = None,
    images: Callable[[], Images],
    mesh: Mesh | None = None,
) -> tuple[Codec, PyTree]:
    """The codec alone, (module, parameters): obtained and recorded in `workdir` as by `prepare`.

    A run that begins from this folder keeps a codec that was fitted here. Raises what `prepare`
    raises.
    """
    encoders = epath.Path(workdir) / ENCODERS
    with together():
        if jax.process_index() == 0:
            _obtain_missing(
                {"codec": _chosen(conditioning)["codec"]},
                folder=conditioning.folder,
                encoders=encoders,
                init_from=init_from,
                data=FitData(images=images, portraits=lambda: ()),
                anew=False,
            )
    record = read_records(encoders)["codec"]
    return _load_one("codec", record, encoders=encoders, folder=conditioning.folder, mesh=mesh)


def codec_identity(workdir: epath.PathLike, codec: Codec) -> dict[str, Any]:
    """All that a picture's latents depend on but the picture: the codec's kind, options, weights.

    And what a latent is: its channels, and pixels a side of a cell.
    """
    record = read_records(epath.Path(workdir) / ENCODERS)["codec"]
    return {**record, "channels": codec.latent_channels, "downsampling": codec.downsampling}


def load_text(
    conditioning: Conditioning, *, mesh: Mesh | None = None
) -> tuple[TextEncoder, PyTree]:
    """The text encoder alone: (module, parameters)."""
    record, networks = _open_text(conditioning)
    return _module(kind_of("text", record), networks), _read(networks, record, mesh)


def text_identity(conditioning: Conditioning, *, num_tokens: int) -> dict[str, Any]:
    """All that a prompt's embedding depends on but the prompt: encoder, weights, row length."""
    record, networks = _open_text(conditioning)
    return {**record, "sha256": _fingerprint(networks), "num_tokens": num_tokens}


def tokenizer_folder(conditioning: Conditioning) -> str:
    """The folder of the text encoder's tokenizer, or a name of `univg_jax.pretrained`."""
    kind = kind_of("text", _chosen(conditioning)["text"])
    return str(kind.tokenizer(local_path(conditioning.folder)))


def pretrained_files(conditioning: Conditioning) -> list[Path]:
    """All files in `conditioning.folder` that the run's encoders and its tokenizer are read from.

    Encoders that come with a package have none there.
    """
    folder, files = local_path(conditioning.folder), []
    for role, record in _chosen(conditioning).items():
        if record is None or not isinstance(kind := kind_of(role, record), Pretrained):
            continue
        if kind.needs_folder:
            for stored in _open(role, record, conditioning.folder).values():
                files += [*stored.tensors.files, *stored.tensors.folder.glob("*.json")]
            if kind.tokenizer is not None:
                of_it = "tokenizer*/**/*" if kind.tokenizer(folder) == folder else "**/*"
                files += [f for f in kind.tokenizer(folder).glob(of_it) if f.is_file()]
    return sorted(dict.fromkeys(files))


def _chosen(conditioning: Conditioning) -> dict[str, Record | None]:
    """For every role the kind with all its options; None if there is no identity encoder."""
    chosen: dict[str, Record | None] = {}
    for role, kinds in KINDS.items():
        given = getattr(conditioning, role)
        if given is None:
            if role != "identity":
                raise UserError(
                    f"conditioning.{role} is missing; expected one of: {', '.join(kinds)}"
                )
            chosen[role] = None
            continue
        given = {"kind": given} if isinstance(given, str) else dict(given)
        options = kind_of(role, given).options
        kind = given.pop("kind", None)
        made = fields.make(options, given, f"conditioning.{role}")
        chosen[role] = {**dataclasses.asdict(made), "kind": kind}
        if chosen[role].get("dtype") == "float16" and not kind_of(role, chosen[role]).fits_float16:
            raise UserError(
                f"conditioning.{role}.dtype='float16': the {kind} encoder's products are beyond "
                "float16's range; expected 'bfloat16' or 'float32'"
            )
    return chosen


def _obtain_missing(
    chosen: Mapping[str, Record | None],
    *,
    folder: str,
    encoders: epath.Path,
    init_from: epath.PathLike | None,
    data: FitData,
    anew: bool,
    before_write: Callable[[], None] = lambda: None,
) -> None:
    """Brings the folder `encoders` to what a config chose."""
    records = {} if anew else read_records(encoders) or {}
    is_complete = init_from is None or chosen.keys() <= records.keys()
    parent = None if is_complete else encoders_of(epath.Path(init_from))
    for role, wanted in chosen.items():
        if role in records:
            check_same(encoders, role, records[role], wanted)
            continue
        record = wanted
        if wanted is not None:
            if isinstance(kind_of(role, wanted), Pretrained):
                networks = _open(role, wanted, folder)
                if (inherited := inherited_record(parent, role, wanted)) is not None:
                    _check_weights(networks, role, inherited, of=f"the parent run {parent.parent}")
                digest = _fingerprint(networks)
            else:
                content = _inherit_or_fit(role, wanted, parent=parent, data=data)
                before_write()
                write_whole(encoders / file_of(role), content)
                digest = hashlib.sha256(content).hexdigest()
            record = wanted | {"sha256": digest}
        # Only now, so that a run that was killed while it fitted does so again.
        records[role] = record
        before_write()
        write_sealed(encoders / RECORD, records)


def _inherit_or_fit(
    role: str, wanted: Record, *, parent: epath.Path | None, data: FitData
) -> bytes:
    """The content of a fitted encoder's file: the parent's if it has one, else newly fitted."""
    if (inherited := inherited_record(parent, role, wanted)) is not None:
        logging.info("The %s encoder is the one in %s", role, parent)
        return read_fitted(parent, role, inherited)
    logging.info("Fitting the %s encoder %s", role, wanted)
    return safetensors.numpy.save(kind_of(role, wanted).fit(data, **options_of(wanted)))


def _open(role: str, record: Record, folder: str) -> Networks:
    kind = kind_of(role, record)
    if kind.needs_folder and not (folder and local_path(folder).is_dir()):
        raise NotFoundError(
            f"conditioning.folder={folder!r} is not a folder; the {record['kind']} {role} encoder "
            "is read from it"
        )
    return kind.open(local_path(folder), jnp.dtype(record["dtype"]))


def _open_text(conditioning: Conditioning) -> tuple[Record, Networks]:
    record = _chosen(conditioning)["text"]
    return record, _open("text", record, conditioning.folder)


def _module(kind: Pretrained, networks: Networks) -> Any:
    return kind.module(**{name: stored.module for name, stored in networks.items()})


def _read(networks: Networks, record: Record, mesh: Mesh | None) -> PyTree:
    dtype = jnp.dtype(record["dtype"])
    return {name: stored.read(mesh=mesh, dtype=dtype) for name, stored in networks.items()}


def _fingerprint(networks: Networks, *, sampled: bool = False) -> str:
    """The hash of all networks; `sampled`: the one that earlier versions recorded."""
    tensors = [networks[name].tensors for name in sorted(networks)]
    each = (t.sampled_fingerprint() if sampled else t.fingerprint() for t in tensors)
    return hashlib.sha256("".join(each).encode()).hexdigest()


def _check_weights(networks: Networks, role: str, record: Record, *, of: str) -> None:
    """Raises UserError if pretrained weights are not those that `of`, a run, has recorded."""
    found, recorded = _fingerprint(networks), record["sha256"]
    where = ", ".join(str(stored.tensors.folder) for stored in networks.values())
    if found != recorded and _fingerprint(networks, sampled=True) == recorded:
        logging.warning(
            "%s: %s was recorded by an earlier version, so its %s encoder is compared by samples "
            "of its files only", where, of, role,
        )  # fmt: skip
    else:
        check_hash(found, where, role, record, of=of)
