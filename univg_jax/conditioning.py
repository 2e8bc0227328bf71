"""Frozen encoders: a `Batch` -> the model's `Conditions` and the target latents x0.

    x0 = codec(target);  cond_latents = codec(source), 0 without a source;  mask = max over each latent cell
    text_emb, pooled_emb = text(tokens);  face_emb = identity(face), 0 without a face

`Conditioner` holds modules only; their parameters travel beside it as one pytree,
`{'text': ..., 'codec': ..., 'identity': ...}` (the last only if there is such an encoder), so that
its methods are pure functions for use inside jit. `prepare` obtains both before training, `load` afterwards. A new
kind of encoder ('vae', 'clip', 't5', ...) is one entry of `KINDS`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import logging
from etils import epath
from jaxtyping import Bool, Float, Int, Int32, UInt8

from univg_jax.batch import Array, Batch, Conditions
from univg_jax.interop.transformers import load_minilm
from univg_jax.models.codec import PatchCodec, fit_patch_codec
from univg_jax.models.identity import IdentityEncoder, fit_identity_encoder
from univg_jax.models.minilm import MiniLM, pool
from univg_jax.names import known
from univg_jax.pretrained import pretrained_folder

Frozen = Mapping[str, Any]  # part -> the parameters of its encoder
Images = UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"]  # in [0, 255], or in [-1, 1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditioner:
    """The modules of the frozen encoders; every method is a pure function of their parameters `frozen`."""

    text: MiniLM
    codec: PatchCodec
    identity: IdentityEncoder | None = None

    @property
    def latent_channels(self) -> int:
        return self.codec.channels

    @property
    def downsampling(self) -> int:
        """Image pixels per latent cell, a side."""
        return self.codec.patch

    @property
    def text_dim(self) -> int:
        return self.text.hidden_dim

    @property
    def pooled_dim(self) -> int:
        return self.text.hidden_dim

    @property
    def face_dim(self) -> int | None:
        """Width of `face_emb`; None (and then a `face_emb` of width 0) without an identity encoder."""
        return None if self.identity is None else self.identity.dim

    def encode(self, frozen: Frozen, images: Images) -> Float[Array, "b h2 w2 c"]:
        """Images -> latents of about unit variance. Raises ValueError if a side is no multiple of `downsampling`."""
        return jax.lax.stop_gradient(self.codec.apply({"params": frozen["codec"]}, _to_float(images), method="encode"))

    def decode(self, frozen: Frozen, latents: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 3"]:
        """Latents -> images, clipped to [-1, 1]."""
        return jnp.clip(self.codec.apply({"params": frozen["codec"]}, latents, method="decode"), -1, 1)

    def identify(self, frozen: Frozen, faces: Images) -> Float[Array, "b e"]:
        """Portraits of any size -> unit vectors of who they show; their dot product is the similarity."""
        if self.identity is None:
            raise ValueError("this run has no identity encoder: set conditioning.identity, e.g. dict(kind='lda')")
        return jax.lax.stop_gradient(self.identity.apply({"params": frozen["identity"]}, _to_float(faces)))

    def embed_text(
        self, frozen: Frozen, tokens: Int32[Array, "b m"], text_mask: Bool[Array, "b m"]
    ) -> Float[Array, "b m d"]:
        """Token embeddings, zero at the padding."""
        text_emb = self.text.apply({"params": frozen["text"]}, tokens, text_mask)
        return jax.lax.stop_gradient(jnp.where(text_mask[..., None], text_emb, 0))

    def target_latents(self, frozen: Frozen, batch: Batch) -> Float[Array, "b h w c"]:
        """x0: what the model learns to generate."""
        return self.encode(frozen, batch.target)

    def conditions(self, frozen: Frozen, batch: Batch) -> Conditions:
        """All that the model is conditioned on."""
        b, h, w, _ = batch.mask.shape
        f = self.downsampling
        if self.identity is None:
            face_emb = jnp.zeros((b, 0))
        else:
            face_emb = jnp.where(batch.has_face[:, None], self.identify(frozen, batch.face), 0)
        text_emb = self.embed_text(frozen, batch.tokens, batch.text_mask)
        return Conditions(
            # No source is a zero latent, which is not the latent of a black image.
            cond_latents=jnp.where(batch.has_source[:, None, None, None], self.encode(frozen, batch.source), 0),
            # A cell that the hole touches is generated whole.
            mask=jnp.asarray(batch.mask).reshape(b, h // f, f, w // f, f, 1).max((2, 4)).astype(jnp.float32),
            text_emb=text_emb,
            text_mask=jnp.asarray(batch.text_mask),
            pooled_emb=pool(text_emb, batch.text_mask),
            face_emb=face_emb,
            identity_slot=jnp.asarray(batch.identity_slot),
        )


def _to_float(images: Images) -> Float[Array, "b h w 3"]:
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 127.5 - 1 if images.dtype == jnp.uint8 else images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What encoders are fitted on; called only if one must be."""

    images: Callable[[], UInt8[np.ndarray, "n h w 3"]]
    portraits: Callable[[], tuple[UInt8[np.ndarray, "n f f 3"], Int[np.ndarray, " n"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """An encoder whose weights lie elsewhere; a run records only their hash."""

    defaults: Mapping[str, Any]
    weights: Callable[..., Path]  # options -> the weights file
    load: Callable[..., tuple[Any, Any]]  # weights file, dtype, options -> (module, parameters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """An encoder fitted on the run's own data; its parameters are saved beside the run."""

    defaults: Mapping[str, Any]
    module: Callable[..., Any]  # dtype, options -> module
    fit: Callable[..., dict[str, np.ndarray]]  # Data, options -> parameters


# part -> kind -> how its encoder is obtained. `defaults` names the options that a config may set.
KINDS: dict[str, dict[str, Pretrained | Fitted]] = {
    "text": {
        "minilm": Pretrained(
            defaults={},
            weights=lambda: pretrained_folder("minilm") / "model.safetensors",
            load=lambda file, dtype: load_minilm(file.parent, dtype=dtype),
        ),
    },
    "codec": {
        "linear": Fitted(
            defaults=dict(patch=4, channels=16, whiten=0.5),
            module=lambda dtype, patch, channels, whiten: PatchCodec(patch=patch, channels=channels, dtype=dtype),
            fit=lambda data, **options: fit_patch_codec(data.images(), **options),
        ),
    },
    "identity": {
        "lda": Fitted(
            defaults=dict(dim=64),
            module=lambda dtype, dim: IdentityEncoder(dim=dim),
            fit=lambda data, **options: fit_identity_encoder(*data.portraits(), **options),
        ),
    },
}
_RECORD = "encoders.json"


def prepare(
    config: Any,
    *,
    workdir: epath.PathLike,
    init_from: epath.PathLike | None = None,
    images: Callable[[], UInt8[np.ndarray, "n h w 3"]],
    portraits: Callable[[], tuple[UInt8[np.ndarray, "n f f 3"], Int[np.ndarray, " n"]]],
    dtype: Any = jnp.float32,
) -> tuple[Conditioner, dict[str, Any]]:
    """The encoders that `config` (mapping of text, codec, identity: a kind or a dict of kind and options) asks for.

    A fitted encoder is taken from `workdir/encoders`, else from the run that `init_from` lies in (later stages keep
    the first one's latent space), else fitted on `images()` or `portraits()` -> (portraits, persons), and
    saved. `workdir/encoders/encoders.json` records options and hashes of all. On several processes the first
    one prepares, the others wait and read. Raises ValueError for an unknown kind or option and if what is on disk was
    made otherwise; FileNotFoundError if `init_from` has no encoders.
    """
    options = _complete(dict(config))
    if jax.process_index() == 0:
        _prepare_files(options, epath.Path(workdir), init_from, Data(images=images, portraits=portraits))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("univg_jax.conditioning.prepare")
    return load(workdir, dtype=dtype)


def load(workdir: epath.PathLike, *, dtype: Any = jnp.float32) -> tuple[Conditioner, dict[str, Any]]:
    """The encoders of a run, from what `workdir/encoders` records alone; float32 parameters, `dtype` compute.

    Raises FileNotFoundError if the run has none, ValueError if weights are not those that the run was trained with.
    """
    folder = epath.Path(workdir) / "encoders"
    records = _read_records(folder)
    if records is None:
        raise FileNotFoundError(f"{folder / _RECORD} does not exist: {workdir} is not the folder of a run")
    modules, frozen = {}, {}
    for part, record in records.items():
        if record is None:
            continue
        kind, options = _kind(part, record), _options(record)
        file = _weights_file(folder, part, record)
        _check_hash(file, part, record)
        if isinstance(kind, Pretrained):
            modules[part], params = kind.load(Path(file), dtype, **options)
        else:
            modules[part], params = kind.module(dtype, **options), safetensors.numpy.load(file.read_bytes())
        frozen[part] = jax.tree.map(jnp.asarray, params)
    return Conditioner(**modules), frozen


def _prepare_files(options: dict, workdir: epath.Path, init_from: epath.PathLike | None, data: Data) -> None:
    """Brings `workdir/encoders` to what `options` ask for; a part is recorded only after its file is whole."""
    folder = workdir / "encoders"
    folder.mkdir(parents=True, exist_ok=True)
    records = _read_records(folder) or {}
    source = None if init_from is None else _encoders_of(epath.Path(init_from))
    for part, wanted in options.items():
        if part in records:
            _check_options(folder, part, records[part], wanted)
            continue
        record = wanted
        if wanted is not None:
            kind = _kind(part, wanted)
            if isinstance(kind, Fitted):
                inherited = (_read_records(source) or {}).get(part) if source else None
                if inherited is not None:
                    _check_options(source, part, inherited, wanted)
                    file = _weights_file(source, part, inherited)
                    _check_hash(file, part, inherited)
                    logging.info("The %s encoder is that of %s", part, source)
                    content = file.read_bytes()
                else:
                    logging.info("Fitting the %s encoder %s", part, wanted)
                    content = safetensors.numpy.save(kind.fit(data, **_options(wanted)))
                _write(_weights_file(folder, part, wanted), content)
            record = wanted | {"sha256": _sha256(_weights_file(folder, part, wanted))}
        records[part] = record
        _write(folder / _RECORD, json.dumps(records, indent=2).encode())


def _complete(config: Mapping[str, Any]) -> dict[str, dict | None]:
    """Every part with its kind and all its options; None for an absent identity encoder."""
    for part in config:
        known(part, KINDS, what="conditioning part")
    result: dict[str, dict | None] = {}
    for part in KINDS:
        given = config.get(part)
        if given is None and part == "identity":
            result[part] = None
            continue
        if given is None:
            raise ValueError(f"conditioning.{part} is missing; expected one of: {', '.join(KINDS[part])}")
        given = {"kind": given} if isinstance(given, str) else dict(given)
        defaults = _kind(part, given).defaults
        for option in given:
            known(option, ["kind", *defaults], what=f"conditioning.{part} option")
        result[part] = {**defaults, **given}
    return result


def _kind(part: str, record: Mapping[str, Any]) -> Pretrained | Fitted:
    return KINDS[part][known(record.get("kind"), KINDS[part], what=f"conditioning.{part}.kind")]


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("kind", "sha256")}


def _check_options(folder: epath.Path, part: str, recorded: dict | None, wanted: dict | None) -> None:
    old, new = ({k: v for k, v in (r or {"kind": None}).items() if k != "sha256"} for r in (recorded, wanted))
    different = [f"{k} is {old.get(k)!r}, asked for {new.get(k)!r}" for k in {**old, **new} if old.get(k) != new.get(k)]
    if different:
        raise ValueError(f"{folder} has another {part} encoder than conditioning.{part}: " + "; ".join(different))


def _check_hash(file: epath.Path, part: str, record: Mapping[str, Any]) -> None:
    if not file.exists():
        raise FileNotFoundError(f"{file}: the weights of the {part} encoder are gone")
    if (found := _sha256(file)) != record["sha256"]:
        raise ValueError(
            f"{file}: not the weights of the {part} encoder that the run was trained with "
            f"(sha256 {found[:12]}, recorded {record['sha256'][:12]})"
        )


def _weights_file(folder: epath.Path, part: str, record: Mapping[str, Any]) -> epath.Path:
    kind = _kind(part, record)
    if isinstance(kind, Pretrained):
        return epath.Path(kind.weights(**_options(record)))
    return folder / f"{part}.safetensors"


def _encoders_of(init_from: epath.Path) -> epath.Path:
    """The encoders of the run that a path (its folder, or a checkpoint inside it) belongs to."""
    for folder in (init_from, *list(init_from.parents)[:2]):
        if (folder / "encoders" / _RECORD).exists():
            return folder / "encoders"
    raise FileNotFoundError(f"init_from={init_from}: no encoders/{_RECORD} there; expected the folder of a run")


def _read_records(folder: epath.Path) -> dict[str, dict | None] | None:
    file = folder / _RECORD
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def _write(file: epath.Path, content: bytes) -> None:
    """All or nothing: a killed run leaves no half-written file under the final name."""
    partial = file.parent / f"{file.name}.partial"
    partial.write_bytes(content)
    partial.replace(file)


def _sha256(file: epath.Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
