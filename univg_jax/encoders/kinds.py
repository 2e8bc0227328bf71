"""Which frozen encoders there are, and how each is opened, fitted and planned.

A config chooses one kind for each role:

    text        prompts -> embeddings of the tokens and of the whole
    codec       images <-> latents
    identity    portraits -> unit vectors (optional)

A new kind is one entry of `KINDS`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree, UInt8

from univg_jax import settings
from univg_jax.errors import NotFoundError, UserError, check_name
from univg_jax.files import read_json
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

Networks = dict[str, StoredModel]  # by the field of the encoder's module that each one fills

# SD3's second text encoder; the first one is `CLIPText` as it stands, ViT-L/14.
CLIP_BIG_G = dict(
    hidden_dim=1280, depth=32, num_heads=20, mlp_dim=5120, projection_dim=1280, activation="gelu"
)
SD3_TEXT_DIM = 4096  # the width that SD3's transformer reads, T5 XXL's, even if T5 is left out


# All of one size, and they may come one by one.
Images = Iterable[UInt8[np.ndarray, "h w 3"]]
Portraits = Iterable[tuple[UInt8[np.ndarray, "f f 3"], int]]  # each with the number of its person


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitData:
    """What encoders are fitted on. Each function is called only if an encoder needs its data."""

    images: Callable[[], Images]
    portraits: Callable[[], Portraits]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What both sorts of encoders have."""

    module: Callable[..., Any]  # options (fitted) or networks (pretrained) -> the encoder's module
    inputs: tuple[
        jax.ShapeDtypeStruct, ...
    ]  # any that it accepts; they tell the parameters' shapes

    def param_shapes(self, module: Any) -> PyTree:
        """The shapes of a module's parameters."""
        return jax.eval_shape(module.init, jax.random.key(0), *self.inputs)["params"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted(Kind):
    """An encoder fitted on the run's own data; its parameters are saved beside the run."""

    options: type  # a dataclass of what a config may set
    fit: Callable[..., dict[str, np.ndarray]]  # FitData, options -> parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained(Kind):
    """An encoder made of networks whose weights lie elsewhere; a run records only their hash."""

    open: Callable[[Path, Any], Networks]  # conditioning.folder, compute dtype -> its networks
    # Compute dtype -> the modules as published, to plan a run where the folder is not at hand.
    published: Callable[[Any], dict[str, Any]]
    tokenizer: Callable[[Path], Path | str] | None = None  # conditioning.folder -> the tokenizer's
    needs_folder: bool = True  # False: the weights come with a package
    # Products in T5 and in VAEs are beyond float16's range (65504): the result is not a number.
    fits_float16: bool = True

    options: ClassVar[type] = settings.PretrainedEncoder


def find_kind(role: str, name: object) -> Fitted | Pretrained:
    """The kind of that name. Raises UserError for an unknown one, with the nearest."""
    return KINDS[role][check_name(name, KINDS[role], what=f"conditioning.{role}.kind")]


def _tokens(count: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (
        jax.ShapeDtypeStruct((1, count), jnp.int32),
        jax.ShapeDtypeStruct((1, count), jnp.bool_),
    )


def _image(side: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)


def _open_sd3(folder: Path, dtype: Any) -> Networks:
    networks = {
        "clip_l": open_clip_text(folder / "text_encoder", dtype=dtype),
        "clip_g": open_clip_text(folder / "text_encoder_2", dtype=dtype),
    }
    for name, stored in networks.items():
        if stored.module.projection_dim is None:
            raise UserError(
                f"{stored.tensors.folder}: {name} has no text_projection, "
                "which SD3's pooled text needs"
            )
    if (folder / "text_encoder_3").is_dir():  # SD3 also works without T5
        networks["t5"] = open_t5(folder / "text_encoder_3", dtype=dtype)
    return networks


def _sd3_text(clip_l: CLIPText, clip_g: CLIPText, t5: T5Encoder | None = None) -> SD3Text:
    text_dim = SD3_TEXT_DIM if t5 is None else t5.hidden_dim
    return SD3Text(clip_l=clip_l, clip_g=clip_g, t5=t5, text_dim=text_dim)


def _t5_suffix(folder: Path) -> str:
    """Which of a pipeline's text encoders is T5: SD3's third, Flux's second, PixArt's only one."""
    for suffix in ("_3", "_2", ""):
        file = folder / f"text_encoder{suffix}" / "config.json"
        if file.is_file() and read_json(file).get("model_type") == "t5":
            return suffix
    raise NotFoundError(
        f"{folder} has no text_encoder, text_encoder_2 or text_encoder_3 that is a T5"
    )


# role -> kind -> how to get the encoder. Pretrained kinds that need a folder are read from
# `conditioning.folder`, that of a diffusers pipeline.
KINDS: dict[str, dict[str, Fitted | Pretrained]] = {
    "text": {
        "minilm": Pretrained(
            module=SentenceText,
            inputs=_tokens(77),
            open=lambda folder, dtype: {
                "encoder": open_minilm(pretrained_folder("minilm"), dtype=dtype)
            },
            published=lambda dtype: {"encoder": MiniLM(dtype=dtype)},
            tokenizer=lambda folder: "minilm",
            needs_folder=False,
        ),
        "sd3": Pretrained(
            module=_sd3_text,
            inputs=_tokens(78),  # CLIP's 77, then T5's
            open=_open_sd3,
            published=lambda dtype: {
                "clip_l": CLIPText(dtype=dtype),
                "clip_g": CLIPText(**CLIP_BIG_G, dtype=dtype),
                "t5": T5Encoder(dtype=dtype),
            },
            tokenizer=lambda folder: folder,
            fits_float16=False,
        ),
        "clip": Pretrained(
            module=ClipText,
            inputs=_tokens(77),
            open=lambda folder, dtype: {
                "encoder": open_clip_text(folder / "text_encoder", dtype=dtype)
            },
            published=lambda dtype: {"encoder": CLIPText(dtype=dtype)},
            tokenizer=lambda folder: folder / "tokenizer",
        ),
        "t5": Pretrained(
            module=SentenceText,
            inputs=_tokens(77),
            open=lambda folder, dtype: {
                "encoder": open_t5(folder / f"text_encoder{_t5_suffix(folder)}", dtype=dtype)
            },
            published=lambda dtype: {"encoder": T5Encoder(dtype=dtype)},
            tokenizer=lambda folder: folder / f"tokenizer{_t5_suffix(folder)}",
            fits_float16=False,
        ),
    },
    "codec": {
        "linear": Fitted(
            # The latents' scale, which `whiten` decides, is fitted: no field of the module.
            module=lambda patch, channels, whiten: PatchCodec(patch=patch, channels=channels),
            inputs=_image(64),
            options=settings.LinearCodec,
            fit=lambda data, **options: fit_patch_codec(data.images(), **options),
        ),
        "vae": Pretrained(
            module=KLCodec,
            inputs=_image(64),
            open=lambda folder, dtype: {"vae": open_vae(folder / "vae", dtype=dtype)},
            published=lambda dtype: {"vae": AutoencoderKL(dtype=dtype)},
            fits_float16=False,
        ),
    },
    "identity": {
        "lda": Fitted(
            module=IdentityEncoder,
            inputs=_image(64),
            options=settings.LdaIdentity,
            fit=lambda data, **options: fit_identity_encoder(data.portraits(), **options),
        ),
        "clip": Pretrained(
            module=ClipIdentity,
            inputs=_image(64),
            open=lambda folder, dtype: {
                "clip": open_clip_vision(folder / "image_encoder", dtype=dtype)
            },
            published=lambda dtype: {"clip": CLIPVision(dtype=dtype)},
        ),
    },
}
