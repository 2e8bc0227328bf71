"""`config.json` of diffusers' `SD3Transformer2DModel` <-> our MM-DiT, and the order of its inputs.

A model with an image and a mask among its inputs has 2 c + 1 channels (33 of SD3's latents). Ours
are (noise, image, mask); those of diffusers' `StableDiffusion3InpaintPipeline` are (noise, mask,
image). Folders have theirs, whoever wrote them. Only earlier versions of ours wrote our own order,
and nothing in their folders says so: such a folder is refused until somebody says which it is.
"""

from typing import Any

from univg_jax.errors import UserError
from univg_jax.interop.config import (
    MAX_DEPTH,
    complete_config,
    config_file,
    naming,
    read_config,
    require,
)
from univg_jax.interop.tensors import PathLike
from univg_jax.models.mmdit import MMDiT

CLASS_NAME = "SD3Transformer2DModel"
CHANNELS = "_univg_channels"  # diffusers leaves names that begin with _ alone
THEIRS, OURS = "noise, mask, image", "noise, image, mask"
UNMARKED = "0.30.0"  # the version that our folders without a mark say
MAX_TABLE = 2**30  # entries of the position table; SD3.5-large has 0.36e9


def model_of(folder: PathLike) -> MMDiT:
    """The model of a folder. Raises UserError for a variant or a size that `MMDiT` lacks."""
    stored = read_config(folder, key="_class_name", expected=(CLASS_NAME,))
    if stored.get("out_channels", 16) is None:
        stored = {**stored, "out_channels": stored.get("in_channels", 16)}
    defaults = dict(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        num_layers=18,
        attention_head_dim=64,
        num_attention_heads=18,
        joint_attention_dim=4096,
        caption_projection_dim=1152,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=96,
        dual_attention_layers=(),
        qk_norm=None,
    )
    ranges = dict(num_layers=(1, MAX_DEPTH), patch_size=(1, 64), pos_embed_max_size=(1, 4096))
    c = complete_config(folder, stored, defaults, ranges=ranges)
    hidden_dim = c["attention_head_dim"] * c["num_attention_heads"]
    require(
        folder,
        c,
        dual_attention_layers=([],),
        caption_projection_dim=(hidden_dim,),
        qk_norm=(None, "rms_norm"),
    )
    size, base_size = c["pos_embed_max_size"], c["sample_size"] // c["patch_size"]
    if not base_size or size * size * hidden_dim > MAX_TABLE:
        raise UserError(
            f"{config_file(folder)}: no position table of {size} x {size} tokens of {hidden_dim} "
            f"over an extent of {base_size}"
        )
    with naming(folder):
        return MMDiT(
            hidden_dim=hidden_dim,
            depth=c["num_layers"],
            num_heads=c["num_attention_heads"],
            patch_size=c["patch_size"],
            in_channels=c["in_channels"],
            out_channels=c["out_channels"],
            text_dim=c["joint_attention_dim"],
            pooled_dim=c["pooled_projection_dim"],
            qk_norm=c["qk_norm"],
            pos_embed_max_size=size,
            pos_embed_base_size=base_size,
        )


def stored_channels(model: MMDiT, folder: PathLike | None = None) -> tuple[int, ...]:
    """Which of the stored input channels is each of the model's; () where they are the same.

    `folder`: the one that is read; None for one to be written. Raises UserError if it may have
    either order.
    """
    c = model.out_channels
    if model.in_channels != 2 * c + 1:
        return ()
    order = THEIRS
    if folder is not None:
        config = read_config(folder, key="_class_name", expected=(CLASS_NAME,))
        is_ours = config.get("_diffusers_version") == UNMARKED
        order = config.get(CHANNELS, "unknown" if is_ours else THEIRS)
    if order not in (THEIRS, OURS):
        raise UserError(
            f"{config_file(folder)}: earlier versions of univg_jax wrote {model.in_channels} "
            f"channels as {OURS!r}, diffusers has {THEIRS!r}; add the right one as {CHANNELS!r}"
        )
    return (*range(c), *range(c + 1, 2 * c + 1), c) if order == THEIRS else ()


def config_of(model: MMDiT) -> dict[str, Any]:
    """The inverse. Raises UserError for an option that diffusers lacks."""
    for field, value in dict(
        position="sincos",
        mlp_ratio=4,
        sandwich_norm=False,
        shared_adaln=False,
        source="channels",
    ).items():
        if getattr(model, field) != value:
            raise UserError(
                f"diffusers has no {CLASS_NAME} with {field}={getattr(model, field)!r}, "
                f"only {value!r}"
            )
    if model.heads_dim != model.hidden_dim:
        raise UserError(
            f"diffusers has no {CLASS_NAME} with head_dim={model.head_dim} where num_heads * "
            f"head_dim is not hidden_dim, {model.hidden_dim}"
        )
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": UNMARKED,
        CHANNELS: THEIRS,
        "sample_size": model.pos_embed_base_size * model.patch_size,
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "num_layers": model.depth,
        "attention_head_dim": model.heads_dim // model.num_heads,
        "num_attention_heads": model.num_heads,
        "joint_attention_dim": model.text_dim,
        "caption_projection_dim": model.hidden_dim,
        "pooled_projection_dim": model.pooled_dim,
        "out_channels": model.out_channels,
        "pos_embed_max_size": model.pos_embed_max_size,
        "dual_attention_layers": [],
        "qk_norm": model.qk_norm,
    }
