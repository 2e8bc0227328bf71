"""Weights of diffusers folders: the MM-DiT (read and written), and `AutoencoderKL` (read).

Ours and their MM-DiT differ in five things: kernels are [in, out] here and [out, in] there; the
patch embedding is a matmul here and a convolution there; its input channels have another order
(`sd3_config`); equal blocks are stacked here; and two kinds of tensors exist only there, the
position table (computed here) and the text queries of the last block (nothing reads them).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from univg_jax.errors import UserError, quote
from univg_jax.files import read_json
from univg_jax.interop.config import (
    MAX_NUMBER,
    MAX_SIZE,
    complete_config,
    config_file,
    naming,
    read_config,
    require,
)
from univg_jax.interop.folder import (
    CONV,
    Params,
    StoredModel,
    Weight,
    check_params,
    loader,
    map_weights,
    open_model,
    stored_tensors,
    write_params,
)
from univg_jax.interop.sd3_config import config_of, model_of, stored_channels
from univg_jax.interop.tensors import PathLike, TensorFolder, check_shapes
from univg_jax.interop.writing import MAX_FILE_BYTES
from univg_jax.models.layers import MLP, gelu_tanh, sincos_table
from univg_jax.models.mmdit import MMDiT
from univg_jax.models.vae import AutoencoderKL
from univg_jax.streaming import Tensor, everything
from univg_jax.trees import map_named, named_leaves

WEIGHTS = "diffusion_pytorch_model.safetensors"
TABLE = "pos_embed.pos_embed"
PROJECTOR = "identity_projector"  # in a pipeline that we exported
PATCHES = ("pos_embed.proj.weight", "pos_embed.proj.bias")

# Our module path -> diffusers' module name; of a block, after `transformer_blocks.<i>.`.
OUTER = {
    "patch_embed": "pos_embed.proj",
    "text_embed": "context_embedder",
    "time_embed/in": "time_text_embed.timestep_embedder.linear_1",
    "time_embed/out": "time_text_embed.timestep_embedder.linear_2",
    "pooled_embed/in": "time_text_embed.text_embedder.linear_1",
    "pooled_embed/out": "time_text_embed.text_embedder.linear_2",
    "out_modulation": "norm_out.linear",
    "out_proj": "proj_out",
}
BLOCK = {
    "image/modulation": "norm1.linear",
    "image/q": "attn.to_q",
    "image/k": "attn.to_k",
    "image/v": "attn.to_v",
    "image/q_norm": "attn.norm_q",
    "image/k_norm": "attn.norm_k",
    "image/attn_out": "attn.to_out.0",
    "image/mlp/in": "ff.net.0.proj",
    "image/mlp/out": "ff.net.2",
    "text/modulation": "norm1_context.linear",
    "text/q": "attn.add_q_proj",
    "text/k": "attn.add_k_proj",
    "text/v": "attn.add_v_proj",
    "text/q_norm": "attn.norm_added_q",
    "text/k_norm": "attn.norm_added_k",
    "text/attn_out": "attn.to_add_out",
    "text/mlp/in": "ff_context.net.0.proj",
    "text/mlp/out": "ff_context.net.2",
}


def open_transformer(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The MM-DiT of a folder of `SD3Transformer2DModel`, with the compute dtype `dtype`.

    Raises what `read_config` and `open_model` raise, and UserError for a variant that `MMDiT`
    lacks.
    """
    model = dataclasses.replace(model_of(folder), dtype=dtype)
    with naming(folder):
        abstract = _abstract(model)
    stored = open_model(
        folder,
        WEIGHTS,
        module=model,
        abstract=abstract,
        weights=_weights(model, stored_channels(model, folder)),
        unread={name: tensor.shape for name, tensor in _unread(model).items()},
    )
    if TABLE in stored.tensors:
        _check_table(model, stored.tensors.read(TABLE), Path(folder))
    return stored


load_transformer = loader(open_transformer)


def transformer_folder(path: epath.PathLike) -> epath.Path | None:
    """The diffusers folder of a transformer at `path`, or in the pipeline at `path`; else None.

    Raises UserError for a config.json that is not JSON; that of a run of ours is not looked at.
    """
    if not path or (epath.Path(path) / "checkpoints").exists():
        return None
    for folder in (epath.Path(path), epath.Path(path) / "transformer"):
        file = folder / "config.json"
        if file.exists() and "_class_name" in read_json(file):
            return folder
    return None


def init_transformer(
    params: Params, model: MMDiT, folder: PathLike, *, mesh: Mesh | None = None
) -> Params:
    """Public SD3 weights in place of `params` of `model`, with zeros for input channels SD3 lacks.

    So at first the model ignores the image latent and the mask, and is SD3. The position table is
    not a parameter: the model computes its own, and the log compares it with theirs. It stands here
    because it is a matter of their layout: the channels are one axis of the patches' kernel.

    Raises what `open_transformer` raises, and UserError listing parameters of other names or
    shapes, or if the model reads its source as tokens.
    """
    stored = check_transformer(params, model, folder)
    theirs, p, kernel = stored.module, model.patch_size, "patch_embed/kernel"
    values = named_leaves(stored.read(mesh=mesh))
    added = model.in_channels - theirs.in_channels
    patches = values[kernel].reshape(p, p, theirs.in_channels, -1)
    patches = jnp.pad(patches, ((0, 0), (0, 0), (0, added), (0, 0)))
    values[kernel] = patches.reshape(-1, model.hidden_dim)
    logging.info(
        "parameters from %s: %d leaves, %d new input channels at zero; position table %s",
        folder, len(values), added, _compare_tables(model, theirs),
    )  # fmt: skip
    return map_named(lambda name, x: jax.device_put(values[name], x.sharding), params)


def check_transformer(params: Params, model: MMDiT, folder: PathLike) -> StoredModel:
    """The weights that `init_transformer` reads in place of `params`, or of their shapes.

    Raises UserError as it does; reads no weights.
    """
    if model.source != "channels":
        raise UserError(
            f"init_from {folder}: SD3's weights take model.overrides.source='channels', "
            f"not {model.source!r}"
        )
    stored = open_transformer(folder)
    channels = min(stored.module.in_channels, model.in_channels)
    expected = {name: tuple(leaf.shape) for name, leaf in named_leaves(params).items()}
    expected["patch_embed/kernel"] = (model.patch_size**2 * channels, model.hidden_dim)
    found = {name: leaf.shape for name, leaf in named_leaves(stored.abstract).items()}
    check_shapes(expected, found, where=f"init_from {folder}")
    return stored


def _compare_tables(model: MMDiT, theirs: MMDiT) -> str:
    (size, base), (their_size, their_base) = (
        (m.pos_embed_max_size, m.pos_embed_base_size) for m in (model, theirs)
    )
    is_crop = size * their_base == their_size * base and size < their_size
    relation = "cropped" if is_crop else "resized"
    relation = "the same" if (size, base) == (their_size, their_base) else relation
    return (
        f"{relation} ({size} tokens a side over an extent of {base}, "
        f"there {their_size} over {their_base})"
    )


def save_transformer(
    model: MMDiT, params: Params, folder: PathLike, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Writes a folder that `SD3Transformer2DModel.from_pretrained` opens, in float32.

    Several files are written if one would exceed `max_file_bytes`. Raises UserError if the model
    uses an option that diffusers lacks, or `params` are not its own.
    """
    config = config_of(model)
    check_params(params, _abstract(model))
    write_params(
        folder,
        WEIGHTS,
        params=params,
        weights=_weights(model, stored_channels(model)),
        config=config,
        unread=_unread(model),
        max_file_bytes=max_file_bytes,
    )


def transformer_tensors(model: MMDiT, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder of `SD3Transformer2DModel`, `PATCHES` first, from the parameters.

    The host holds one layer at a time. Raises UserError if the parameters have other names than the
    model, or other shapes.
    """
    expected = {name: tuple(leaf.shape) for name, leaf in named_leaves(_abstract(model)).items()}
    found = {name: leaf.shape for name, leaf in leaves.items()}
    check_shapes(expected, found, where="parameters")
    tensors = stored_tensors(leaves, _weights(model, stored_channels(model)))
    dtype = leaves["patch_embed/kernel"].dtype
    first = {name: tensors[name] for name in PATCHES}
    return first | {n: tensor.astype(dtype) for n, tensor in _unread(model).items()} | tensors


def without_source(model: MMDiT, leaves: Mapping[str, Tensor]) -> tuple[MMDiT, dict[str, Tensor]]:
    """The model of text-to-image alone, which reads the noisy latent alone, and its parameters.

    Without a source the source's latent is zero and the mask is one, everywhere. So their share in
    a patch is constant: nothing, and the sum of the mask's weights. It goes into the bias.
    """
    c, p, d = model.out_channels, model.patch_size, model.hidden_dim
    kernel = leaves["patch_embed/kernel"].read().astype(np.float32).reshape(p, p, 2 * c + 1, d)
    bias = leaves["patch_embed/bias"].read().astype(np.float32) + kernel[:, :, -1].sum((0, 1))
    patches = {"kernel": np.ascontiguousarray(kernel[:, :, :c]).reshape(-1, d), "bias": bias}
    dtype = leaves["patch_embed/kernel"].dtype
    folded = {f"patch_embed/{n}": Tensor.of(x).astype(dtype) for n, x in patches.items()}
    return dataclasses.replace(model, in_channels=c), {**leaves, **folded}


def _abstract(model: MMDiT) -> Params:
    p = model.patch_size
    inputs = [(1, p, p, model.in_channels), (1, 1, model.text_dim), (1, model.pooled_dim), (1,)]
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in inputs)
    return jax.eval_shape(model.init, jax.random.key(0), *shapes)["params"]


def _weights(model: MMDiT, channels: tuple[int, ...]) -> dict[str, Weight]:
    weights = map_weights(
        _abstract(model), outer=OUTER, block=BLOCK, block_name="transformer_blocks.{}."
    )
    p = model.patch_size  # the patches' matmul is a convolution there
    shape = (model.hidden_dim, model.in_channels, p, p)
    return weights | {
        "patch_embed/kernel": dataclasses.replace(
            weights["patch_embed/kernel"], shape=shape, axes=CONV, channels=channels
        )
    }


def _unread(model: MMDiT) -> dict[str, Tensor]:
    """Tensors that diffusers stores and we do not, float32."""
    d, size = model.hidden_dim, model.pos_embed_max_size
    block, ones = f"transformer_blocks.{model.depth - 1}.attn", np.ones((), np.float32)
    constants = {
        f"{block}.add_q_proj.weight": np.broadcast_to(0 * ones, (d, d)),
        f"{block}.add_q_proj.bias": np.broadcast_to(0 * ones, (d,)),
    }
    if model.qk_norm:
        constants[f"{block}.norm_added_q.weight"] = np.broadcast_to(ones, (d // model.num_heads,))
    shape = 1, size * size, d
    table = Tensor(
        shape=shape, dtype=ones.dtype, blocks=lambda: [(everything(shape), _table(model)[None])]
    )
    return {TABLE: table, **{name: Tensor.of(value) for name, value in constants.items()}}


def _table(model: MMDiT) -> np.ndarray:
    size = model.pos_embed_max_size
    table = sincos_table(
        size, size, dim=model.hidden_dim, max_size=size, base_size=model.pos_embed_base_size
    )
    return np.asarray(table)


def _check_table(model: MMDiT, table: np.ndarray, folder: Path) -> None:
    """Raises UserError unless the stored position table is the one that the model computes."""
    # Entries are at most 1, so a file in bfloat16 rounds them by up to 2^-9.
    error = np.abs(table[0].astype(np.float32) - _table(model)).max()
    if not error <= 4e-3:
        raise UserError(
            f"{config_file(folder)}: {TABLE} is not the sin-cos table of "
            f"pos_embed_max_size={model.pos_embed_max_size}, base size "
            f"{model.pos_embed_base_size} (differs by {error:.3g}); no other is supported"
        )


def open_projector(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The identity projector of an exported pipeline. Raises what `open_model` raises."""
    config = read_config(folder, key="_class_name", expected=("IdentityProjector",))
    c = complete_config(folder, config, dict(face_dim=768, text_dim=4096))
    model = MLP(c["text_dim"], c["text_dim"], gelu_tanh, dtype)
    face = jax.ShapeDtypeStruct((1, c["face_dim"]), jnp.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), face)["params"]
    weights = projector_weights(abstract)
    return open_model(folder, WEIGHTS, module=model, abstract=abstract, weights=weights)


load_projector = loader(open_projector)


def projector_weights(params: Params) -> dict[str, Weight]:
    """Where an identity projector's parameters are stored."""
    return map_weights(params, outer={"in": "linear_1", "out": "linear_2"})


# Regexes in our module paths -> theirs, applied in this order.
VAE = (
    (r"^quant$", "quant_conv"),
    (r"^post_quant$", "post_quant_conv"),
    (r"/(down|up)_(\d+)_res_(\d+)", r".\1_blocks.\2.resnets.\3"),
    (r"/(down|up)_(\d+)_conv", r".\1_blocks.\2.\1samplers.0.conv"),
    (r"/mid_res_(\d+)", r".mid_block.resnets.\1"),
    (r"/mid_attn/norm", ".mid_block.attentions.0.group_norm"),
    (r"/mid_attn/(q|k|v)", r".mid_block.attentions.0.to_\1"),
    (r"/mid_attn/attn_out", ".mid_block.attentions.0.to_out.0"),
    (r"/norm_out", ".conv_norm_out"),
    (r"/", "."),
)
# Files written by old versions of diffusers have other names for the attention's maps.
OLD_ATTENTION = (
    (r"\.to_q$", ".query"),
    (r"\.to_k$", ".key"),
    (r"\.to_v$", ".value"),
    (r"\.to_out\.0$", ".proj_attn"),
)


def open_vae(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The VAE of a folder (`AutoencoderKL`: SD 1 to 3, SDXL, Flux), with the compute dtype `dtype`.

    Raises what `read_config` and `open_model` raise, and UserError for a variant that our
    `AutoencoderKL` lacks.
    """
    model = _vae_of(folder, dtype=dtype)
    image = jax.ShapeDtypeStruct((1, model.downsampling, model.downsampling, 3), jnp.float32)
    with naming(folder):
        abstract = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    is_old = "encoder.mid_block.attentions.0.query.weight" in TensorFolder(folder, WEIGHTS)
    weights = vae_weights(abstract, names=VAE + OLD_ATTENTION if is_old else VAE)
    return open_model(folder, WEIGHTS, module=model, abstract=abstract, weights=weights)


load_vae = loader(open_vae)


def steady_vae(folder: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of a VAE that gives our codec's latents in every pipeline.

    Our codec takes the mode of the posterior. diffusers' inpainting pipeline draws a sample of it,
    and forgets the shift of the latents before it decodes them. So here the 1x1 convolutions
    between the networks and the latents, which are the identity where the folder has none, take
    the shift over, and set the log variance to -30, the least: a deviation of 3e-7. All else is
    stored as it was.

    Raises what `open_vae` raises.
    """
    stored = open_vae(folder)
    model, tensors = stored.module, stored.tensors
    c, shift = model.latent_channels, model.shift_factor

    def conv(name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        if f"{name}.weight" not in tensors:
            return np.eye(size), np.zeros(size)
        weight, bias = (
            tensors.read(f"{name}.{part}").astype(np.float64) for part in ("weight", "bias")
        )
        return weight[:, :, 0, 0], bias

    weight, bias = conv("quant_conv", 2 * c)
    weight[c:], bias[c:] = 0, -30
    after = weight, bias - shift * (np.arange(2 * c) < c)
    weight, bias = conv("post_quant_conv", c)
    before = weight, bias + weight @ np.full(c, shift)
    out = {name: tensors.stream(name) for name in tensors.shapes}
    for name, (weight, bias) in {"quant_conv": after, "post_quant_conv": before}.items():
        out[f"{name}.weight"] = Tensor.of(weight[:, :, None, None].astype(np.float32))
        out[f"{name}.bias"] = Tensor.of(bias.astype(np.float32))
    config = read_json(config_file(tensors.folder))
    return out, config | dict(use_quant_conv=True, use_post_quant_conv=True, shift_factor=0.0)


def vae_weights(abstract: Params, *, names: tuple[tuple[str, str], ...]) -> dict[str, Weight]:
    """Where the parameters of an `AutoencoderKL` are stored; `names`: regexes, replacements."""
    outer = {}
    for path in named_leaves(abstract):
        module = path.rpartition("/")[0]
        outer[module] = module
        for ours, theirs in names:
            outer[module] = re.sub(ours, theirs, outer[module])
    return map_weights(abstract, outer=outer)


def _vae_of(folder: PathLike, *, dtype: Any) -> AutoencoderKL:
    stored = read_config(folder, key="_class_name", expected=("AutoencoderKL",))
    defaults = dict(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(64,),
        layers_per_block=1,
        act_fn="silu",
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.18215,
        shift_factor=None,
        latents_mean=None,
        latents_std=None,
        use_quant_conv=True,
        use_post_quant_conv=True,
        mid_block_add_attention=True,
    )
    ranges = dict(layers_per_block=(1, 16), latent_channels=(1, 2**10))
    c = complete_config(folder, stored, defaults, ranges=ranges)
    widths, shift = c["block_out_channels"], c["shift_factor"]
    if not (
        isinstance(widths, list | tuple)
        and 0 < len(widths) <= 8
        and all(type(width) is int and 0 < width <= MAX_SIZE for width in widths)
    ):
        raise UserError(f"{config_file(folder)}: block_out_channels is {quote(widths)}")
    if shift is not None and not (type(shift) in (int, float) and abs(shift) < MAX_NUMBER):
        raise UserError(f"{config_file(folder)}: shift_factor is {quote(shift)}, no number")
    require(
        folder,
        c,
        in_channels=(3,),
        out_channels=(3,),
        down_block_types=(["DownEncoderBlock2D"] * len(widths),),
        up_block_types=(["UpDecoderBlock2D"] * len(widths),),
        act_fn=("silu",),
        latents_mean=(None,),
        latents_std=(None,),
    )
    with naming(folder):
        return AutoencoderKL(
            latent_channels=c["latent_channels"],
            widths=tuple(widths),
            depth=c["layers_per_block"],
            groups=c["norm_num_groups"],
            quant_conv=c["use_quant_conv"],
            post_quant_conv=c["use_post_quant_conv"],
            mid_attention=c["mid_block_add_attention"],
            scaling_factor=c["scaling_factor"],
            shift_factor=float(shift or 0),
            dtype=dtype,
        )
