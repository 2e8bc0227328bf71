"""The frozen encoders of a run: which ones its config asks for, where they come from, what is
recorded of them.

`check` looks at what a config asks for, `prepare` obtains it before training, `load` afterwards,
`abstract` has the shapes alone. A new kind of encoder is one entry of `KINDS`.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from absl import logging
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from univg_jax import sharding
from univg_jax.conditioning import Conditioner
from univg_jax.errors import check_name
from univg_jax.interop.diffusers import open_vae
from univg_jax.interop.folder import StoredModel
from univg_jax.interop.transformers import open_clip_text, open_clip_vision, open_minilm, open_t5
from univg_jax.models.clip import CLIPText, CLIPVision
from univg_jax.models.codec import KLCodec, PatchCodec, fit_patch_codec
from univg_jax.models.identity import ClipIdentity, IdentityEncoder, fit_identity_encoder
from univg_jax.models.minilm import MiniLM
from univg_jax.models.t5 import T5Encoder
from univg_jax.models.text import ClipText, SD3Text, SentenceText
from univg_jax.models.vae import AutoencoderKL
from univg_jax.pretrained import pretrained_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """What encoders are fitted on; called only if one must be."""

    images: Callable[[], UInt8[np.ndarray, "n h w 3"]]
    portraits: Callable[[], tuple[UInt8[np.ndarray, "n f f 3"], Int[np.ndarray, " n"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """An encoder made of networks whose weights lie elsewhere; a run records only their
    fingerprint.
    """

    defaults: Mapping[str, Any]
    # folder, options -> networks by their field in the module
    open: Callable[..., dict[str, StoredModel]]
    module: Callable[..., Any]  # networks -> module
    # options -> networks as published, to plan with where the folder is not
    published: Callable[..., dict[str, Any]]
    # folder -> that of a text encoder's tokenizer
    tokenizer: Callable[[Path], Path | str] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """An encoder fitted on the run's own data; its parameters are saved beside the run."""

    defaults: Mapping[str, Any]
    module: Callable[..., Any]  # options -> module
    fit: Callable[..., dict[str, np.ndarray]]  # Data, options -> parameters


_RECORD = "encoders.json"
CLIP_BIG_G = dict(
    hidden_dim=1280, depth=32, num_heads=20, mlp_dim=5120, projection_dim=1280, activation="gelu"
)
SD3_TEXT_DIM = 4096  # what its transformer reads, of T5 XXL's width, also where T5 is left out


def _open_sd3(folder: Path, dtype: str) -> dict[str, StoredModel]:
    networks = {
        "clip_l": open_clip_text(folder / "text_encoder", dtype=jnp.dtype(dtype)),
        "clip_g": open_clip_text(folder / "text_encoder_2", dtype=jnp.dtype(dtype)),
    }
    for name, stored in networks.items():
        if stored.module.projection_dim is None:
            raise ValueError(
                f"{stored.tensors.folder}: {name} has no text_projection, which SD3's pooled text needs"
            )
    if (folder / "text_encoder_3").is_dir():  # SD3 may go without T5
        networks["t5"] = open_t5(folder / "text_encoder_3", dtype=jnp.dtype(dtype))
    return networks


def _sd3_text(clip_l: Any, clip_g: Any, t5: Any = None) -> SD3Text:
    return SD3Text(
        clip_l=clip_l, clip_g=clip_g, t5=t5, text_dim=SD3_TEXT_DIM if t5 is None else t5.hidden_dim
    )


def _t5_suffix(folder: Path) -> str:
    """Which of a pipeline's text encoders is T5: SD3's third, Flux's second, PixArt's only one."""
    for suffix in ("_3", "_2", ""):
        file = folder / f"text_encoder{suffix}" / "config.json"
        if file.is_file() and json.loads(file.read_text()).get("model_type") == "t5":
            return suffix
    raise FileNotFoundError(
        f"{folder} has no text_encoder, text_encoder_2 or text_encoder_3 that is a T5"
    )


# part -> kind -> how its encoder is obtained. `defaults` names the options that a config may set.
# Pretrained kinds but MiniLM are read from `conditioning.folder`, that of a diffusers pipeline.
KINDS: dict[str, dict[str, Pretrained | Fitted]] = {
    "text": {
        "minilm": Pretrained(
            defaults=dict(dtype="float32"),
            open=lambda folder, dtype: {
                "encoder": open_minilm(pretrained_folder("minilm"), dtype=jnp.dtype(dtype))
            },
            module=SentenceText,
            published=lambda dtype: {"encoder": MiniLM(dtype=jnp.dtype(dtype))},
            tokenizer=lambda folder: "minilm",
        ),
        "sd3": Pretrained(
            defaults=dict(dtype="float32"),
            open=_open_sd3,
            module=_sd3_text,
            published=lambda dtype: {
                "clip_l": CLIPText(dtype=jnp.dtype(dtype)),
                "clip_g": CLIPText(**CLIP_BIG_G, dtype=jnp.dtype(dtype)),
                "t5": T5Encoder(dtype=jnp.dtype(dtype)),
            },
            tokenizer=lambda folder: folder,
        ),
        "clip": Pretrained(
            defaults=dict(dtype="float32"),
            open=lambda folder, dtype: {
                "encoder": open_clip_text(folder / "text_encoder", dtype=jnp.dtype(dtype))
            },
            module=ClipText,
            published=lambda dtype: {"encoder": CLIPText(dtype=jnp.dtype(dtype))},
            tokenizer=lambda folder: folder / "tokenizer",
        ),
        "t5": Pretrained(
            defaults=dict(dtype="float32"),
            open=lambda folder, dtype: {
                "encoder": open_t5(
                    folder / f"text_encoder{_t5_suffix(folder)}", dtype=jnp.dtype(dtype)
                )
            },
            module=SentenceText,
            published=lambda dtype: {"encoder": T5Encoder(dtype=jnp.dtype(dtype))},
            tokenizer=lambda folder: folder / f"tokenizer{_t5_suffix(folder)}",
        ),
    },
    "codec": {
        "linear": Fitted(
            defaults=dict(patch=4, channels=16, whiten=0.5),
            module=lambda patch, channels, whiten: PatchCodec(patch=patch, channels=channels),
            fit=lambda data, **options: fit_patch_codec(data.images(), **options),
        ),
        "vae": Pretrained(
            defaults=dict(dtype="float32"),
            open=lambda folder, dtype: {"vae": open_vae(folder / "vae", dtype=jnp.dtype(dtype))},
            module=KLCodec,
            published=lambda dtype: {"vae": AutoencoderKL(dtype=jnp.dtype(dtype))},
        ),
    },
    "identity": {
        "lda": Fitted(
            defaults=dict(dim=64),
            module=lambda dim: IdentityEncoder(dim=dim),
            fit=lambda data, **options: fit_identity_encoder(*data.portraits(), **options),
        ),
        "clip": Pretrained(
            defaults=dict(dtype="float32"),
            open=lambda folder, dtype: {
                "clip": open_clip_vision(folder / "image_encoder", dtype=jnp.dtype(dtype))
            },
            module=ClipIdentity,
            published=lambda dtype: {"clip": CLIPVision(dtype=jnp.dtype(dtype))},
        ),
    },
}


def check(config: Any) -> None:
    """Raises what `prepare` would about a config or its pretrained folders, before anything is
    fitted or written.
    """
    for part, options in _complete(dict(config)).items():
        if options is not None and isinstance(_kind(part, options), Pretrained):
            _open(part, options, config.get("folder", ""))


def abstract(config: Any) -> tuple[Conditioner, dict[str, Any]]:
    """The encoders that `config` asks for, and the shapes of their parameters: nothing is read or
    fitted.

    A pretrained encoder is that of `conditioning.folder` if it is there, else as it was published.
    """
    modules, frozen = {}, {}
    for part, options in _complete(dict(config)).items():
        if options is None:
            continue
        kind, folder = _kind(part, options), config.get("folder", "")
        if isinstance(kind, Fitted):
            modules[part] = kind.module(**_options(options))
        elif options["kind"] != "minilm" and folder and Path(folder).is_dir():
            modules[part] = kind.module(
                **{n: s.module for n, s in _open(part, options, folder).items()}
            )
        else:
            modules[part] = kind.module(**kind.published(**_options(options)))
        stored = functools.partial(
            jax.ShapeDtypeStruct, dtype=jnp.dtype(options.get("dtype", "float32"))
        )
        frozen[part] = jax.tree.map(
            lambda x, stored=stored: stored(x.shape), _parameter_shapes(part, modules[part])
        )
    return Conditioner(**modules), frozen


def _parameter_shapes(part: str, module: Any) -> Any:
    key = jax.random.key(0)
    if part == "text":
        # one more than CLIP's positions, after which SD3's row is T5's
        tokens = jnp.zeros((1, 78), jnp.int32)
        if isinstance(module, ClipText):
            tokens = tokens[:, :77]
        inputs, method = (tokens, tokens == 0), None
    else:
        side = 64 if part == "codec" else 224
        inputs = (jnp.zeros((1, side, side, 3)),)
        method = (lambda codec, x: codec.decode(codec.encode(x))) if part == "codec" else None
    return jax.eval_shape(
        lambda: module.init(key, *inputs, **({"method": method} if method else {}))
    )["params"]


def tokenizer_folder(config: Any) -> str:
    """Where the tokenizer of the config's text encoder is: a folder, or a name of
    `univg_jax.pretrained`.
    """
    options = _complete(dict(config))["text"]
    return str(KINDS["text"][options["kind"]].tokenizer(Path(config.get("folder", ""))))


def text_identity(config: Any, *, num_tokens: int) -> dict[str, Any]:
    """What an embedding of a prompt depends on beside the prompt: the encoder, its weights, the
    number of tokens.
    """
    options = _complete(dict(config))["text"]
    networks = _open("text", options, config.get("folder", ""))
    return {**options, "sha256": _fingerprint(networks), "num_tokens": num_tokens}


def load_text(config: Any, *, mesh: Mesh | None = None) -> tuple[Any, dict[str, Any]]:
    """The text encoder alone, as (module, parameters)."""
    options = _complete(dict(config))["text"]
    networks = _open("text", options, config.get("folder", ""))
    module = KINDS["text"][options["kind"]].module(
        **{name: stored.module for name, stored in networks.items()}
    )
    dtype = jnp.dtype(options["dtype"])
    return module, {name: stored.read(mesh=mesh, dtype=dtype) for name, stored in networks.items()}


def prepare(
    config: Any,
    *,
    workdir: epath.PathLike,
    init_from: epath.PathLike | None = None,
    images: Callable[[], UInt8[np.ndarray, "n h w 3"]],
    portraits: Callable[[], tuple[UInt8[np.ndarray, "n f f 3"], Int[np.ndarray, " n"]]],
    mesh: Mesh | None = None,
    without: Sequence[str] = (),
) -> tuple[Conditioner, dict[str, Any]]:
    """The encoders that `config` (mapping of text, codec, identity: a kind or a dict of kind and
    options) asks for.

    Its `folder` is where pretrained ones lie. A fitted encoder is taken from `workdir/encoders`,
    else from the run that `init_from` lies in (later stages keep the first one's latent space),
    else fitted on `images()` or `portraits()` -> (portraits, persons), and saved.
    `workdir/encoders/encoders.json` records options and hashes of all. On several processes the
    first one prepares, the others wait and read. Raises ValueError for an unknown kind or option
    and if what is on disk was made otherwise; FileNotFoundError for an absent folder, and if
    `init_from` has no encoders.
    """
    options, folder = _complete(dict(config)), config.get("folder", "")
    if jax.process_index() == 0:
        _prepare_files(
            options,
            folder,
            epath.Path(workdir),
            init_from,
            Data(images=images, portraits=portraits),
        )
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("univg_jax.encoders.prepare")
    return load(workdir, folder=folder, mesh=mesh, without=without)


def load(
    workdir: epath.PathLike,
    *,
    folder: str = "",
    mesh: Mesh | None = None,
    without: Sequence[str] = (),
) -> tuple[Conditioner, dict[str, Any]]:
    """The encoders of a run, from what `workdir/encoders` records and the pretrained weights in
    `folder`.

    Parameters lie on `mesh` as `univg_jax.sharding` places them, else on the first device; those of
    the parts `without` are not read. Raises FileNotFoundError if the run has none, ValueError if
    weights are not those that the run was trained with.
    """
    encoders = epath.Path(workdir) / "encoders"
    records = _read_records(encoders)
    if records is None:
        raise FileNotFoundError(
            f"{encoders / _RECORD} does not exist: {workdir} is not the folder of a run"
        )
    modules, frozen = {}, {}
    for part, record in records.items():
        if record is None:
            continue
        kind, options = _kind(part, record), _options(record)
        if isinstance(kind, Pretrained):
            networks = _open(part, record, folder)
            _check_hash(_fingerprint(networks), _places(networks), part, record)
            modules[part] = kind.module(
                **{name: stored.module for name, stored in networks.items()}
            )
            if part not in without:
                dtype = jnp.dtype(options["dtype"])
                frozen[part] = {
                    name: stored.read(mesh=mesh, dtype=dtype) for name, stored in networks.items()
                }
        else:
            file = encoders / f"{part}.safetensors"
            modules[part], params = (
                kind.module(**options),
                safetensors.numpy.load(_read_fitted(file, part, record)),
            )
            places = None if mesh is None else sharding.tree_shardings(params, mesh)
            frozen[part] = jax.device_put(params, places)
    return Conditioner(**modules), frozen


def _open(part: str, options: Mapping[str, Any], folder: str) -> dict[str, StoredModel]:
    kind = _kind(part, options)
    if options["kind"] != "minilm" and not (folder and Path(folder).is_dir()):
        raise FileNotFoundError(
            f"conditioning.folder={folder!r} is no folder; the {options['kind']} {part} encoder is read from it"
        )
    return kind.open(Path(folder), **_options(options))


def _places(networks: Mapping[str, StoredModel]) -> str:
    return ", ".join(str(stored.tensors.folder) for stored in networks.values())


def _fingerprint(networks: Mapping[str, StoredModel]) -> str:
    return hashlib.sha256(
        "".join(networks[name].tensors.fingerprint() for name in sorted(networks)).encode()
    ).hexdigest()


def _prepare_files(
    options: dict,
    pretrained: str,
    workdir: epath.Path,
    init_from: epath.PathLike | None,
    data: Data,
) -> None:
    """Brings `workdir/encoders` to what `options` ask for; a part is recorded only after its file
    is whole.
    """
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
            if isinstance(kind, Pretrained):
                record = wanted | {"sha256": _fingerprint(_open(part, wanted, pretrained))}
            else:
                inherited = (_read_records(source) or {}).get(part) if source else None
                if inherited is not None:
                    _check_options(source, part, inherited, wanted)
                    content = _read_fitted(source / f"{part}.safetensors", part, inherited)
                    logging.info("The %s encoder is that of %s", part, source)
                else:
                    logging.info("Fitting the %s encoder %s", part, wanted)
                    content = safetensors.numpy.save(kind.fit(data, **_options(wanted)))
                _write(folder / f"{part}.safetensors", content)
                record = wanted | {"sha256": hashlib.sha256(content).hexdigest()}
        records[part] = record
        _write(folder / _RECORD, json.dumps(records, indent=2).encode())


def _complete(config: Mapping[str, Any]) -> dict[str, dict | None]:
    """Every part with its kind and all its options; None for an absent identity encoder."""
    for part in config:
        check_name(part, [*KINDS, "folder"], what="conditioning part")
    result: dict[str, dict | None] = {}
    for part in KINDS:
        given = config.get(part)
        if given is None and part == "identity":
            result[part] = None
            continue
        if given is None:
            raise ValueError(
                f"conditioning.{part} is missing; expected one of: {', '.join(KINDS[part])}"
            )
        given = {"kind": given} if isinstance(given, str) else dict(given)
        defaults = _kind(part, given).defaults
        for option in given:
            check_name(option, ["kind", *defaults], what=f"conditioning.{part} option")
        result[part] = {**defaults, **given}
    return result


def _kind(part: str, record: Mapping[str, Any]) -> Pretrained | Fitted:
    return KINDS[part][
        check_name(record.get("kind"), KINDS[part], what=f"conditioning.{part}.kind")
    ]


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("kind", "sha256")}


def _check_options(
    folder: epath.Path, part: str, recorded: dict | None, wanted: dict | None
) -> None:
    old, new = (
        {k: v for k, v in (r or {"kind": None}).items() if k != "sha256"}
        for r in (recorded, wanted)
    )
    different = [
        f"{k} is {old.get(k)!r}, asked for {new.get(k)!r}"
        for k in {**old, **new}
        if old.get(k) != new.get(k)
    ]
    if different:
        raise ValueError(
            f"{folder} has another {part} encoder than conditioning.{part}: " + "; ".join(different)
        )


def _check_hash(found: str, where: Any, part: str, record: Mapping[str, Any]) -> None:
    if found != record["sha256"]:
        raise ValueError(
            f"{where}: not the weights of the {part} encoder that the run was trained with "
            f"(sha256 {found[:12]}, recorded {record['sha256'][:12]})"
        )


def _read_fitted(file: epath.Path, part: str, record: Mapping[str, Any]) -> bytes:
    if not file.exists():
        raise FileNotFoundError(f"{file}: the weights of the {part} encoder are gone")
    content = file.read_bytes()
    _check_hash(hashlib.sha256(content).hexdigest(), file, part, record)
    return content


def _encoders_of(init_from: epath.Path) -> epath.Path:
    """The encoders of the run that a path (its folder, or a checkpoint inside it) belongs to."""
    for folder in (init_from, *list(init_from.parents)[:2]):
        if (folder / "encoders" / _RECORD).exists():
            return folder / "encoders"
    raise FileNotFoundError(
        f"init_from={init_from}: no encoders/{_RECORD} there; expected the folder of a run"
    )


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
