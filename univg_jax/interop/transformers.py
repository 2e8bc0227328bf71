"""Weights of Hugging Face `transformers` folders -> our modules and parameter trees.

`open_*` checks a folder against its config without reading a tensor; `load_*` opens and reads:
`load(folder, *, dtype, param_dtype, mesh) -> (module, params)` for `module.apply({'params':
params}, ...)`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from univg_jax.interop.folder import (
    CONV,
    Params,
    PathLike,
    StoredModel,
    TensorFolder,
    loader,
    map_weights,
    open_model,
    read_config,
)
from univg_jax.models.clip import CLIPText, CLIPVision
from univg_jax.models.dino import DINO
from univg_jax.models.minilm import MiniLM
from univg_jax.models.t5 import T5Encoder
from univg_jax.models.vit import ACTIVATIONS

WEIGHTS = "model.safetensors"

# Our module path -> theirs: of the whole network, and of one of its layers.
BERT = {
    "word_embeddings": "embeddings.word_embeddings.weight",
    "position_embeddings": "embeddings.position_embeddings.weight",
    "token_type_embeddings": "embeddings.token_type_embeddings.weight",
    "embeddings_norm": "embeddings.LayerNorm",
}
BERT_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "attn_out": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp/in": "intermediate.dense",
    "mlp/out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
CLIP_TEXT = {
    "token_embeddings": "embeddings.token_embedding.weight",
    "position_embeddings": "embeddings.position_embedding.weight",
    "final_norm": "final_layer_norm",
}
CLIP_VISION = {
    "embed/class_token": "embeddings.class_embedding",
    "embed/positions": "embeddings.position_embedding.weight",
    "embed/patch_embed": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
CLIP_LAYER = {
    "attn_norm": "layer_norm1",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/in": "mlp.fc1",
    "mlp/out": "mlp.fc2",
}
VIT = {
    "embed/class_token": "embeddings.cls_token",
    "embed/positions": "embeddings.position_embeddings",
    "embed/patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
VIT_LAYER = {
    "attn_norm": "layernorm_before",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "attn_out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp/in": "intermediate.dense",
    "mlp/out": "output.dense",
}

# What a config.json means that leaves a key out, as the towers' configs inside a whole CLIP's may.
CLIP_TEXT_DEFAULTS = dict(
    vocab_size=49408,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=77,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
    eos_token_id=49407,
)
CLIP_VISION_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=32,
    hidden_act="quick_gelu",
    layer_norm_eps=1e-5,
)
VIT_DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=16,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    qkv_bias=True,
)

T5 = {
    "relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "final_norm": "encoder.final_layer_norm",
}
T5_LAYER = {
    "attn_norm": "layer.0.layer_norm",
    "q": "layer.0.SelfAttention.q",
    "k": "layer.0.SelfAttention.k",
    "v": "layer.0.SelfAttention.v",
    "attn_out": "layer.0.SelfAttention.o",
    "mlp_norm": "layer.1.layer_norm",
    "mlp/gate": "layer.1.DenseReluDense.wi_0",
    "mlp/in": "layer.1.DenseReluDense.wi_1",
    "mlp/out": "layer.1.DenseReluDense.wo",
}


def open_minilm(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The BERT encoder of a folder (config.json, model.safetensors).

    `dtype` is the compute dtype. The pooler's and position-id tensors are not part of the encoder
    and are ignored. Raises what `read_config` and `open_model` raise, and ValueError for a variant
    that `MiniLM` lacks.
    """
    config = read_config(folder, key="model_type", expected=("bert",))
    _require(folder, config, hidden_act="gelu", position_embedding_type="absolute")
    module = MiniLM(
        vocab_size=config["vocab_size"],
        hidden_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        max_tokens=config["max_position_embeddings"],
        num_token_types=config["type_vocab_size"],
        eps=config["layer_norm_eps"],
        dtype=dtype,
    )
    abstract = _abstract(
        module, jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    )
    prefix = _prefix(folder, "embeddings.word_embeddings.weight", ("", "bert."))
    weights = map_weights(
        abstract,
        outer={ours: prefix + theirs for ours, theirs in BERT.items()},
        block=BERT_LAYER,
        block_name=prefix + "encoder.layer.{}.",
    )
    ignored = prefix + r"(embeddings\.position_ids|pooler\.dense\.(weight|bias))"
    return open_model(
        folder, WEIGHTS, module=module, abstract=abstract, weights=weights, ignored=ignored
    )


def open_t5(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The encoder of a T5 v1.1 folder, alone (`T5EncoderModel`) or of a whole model,.

    `dtype` is the compute dtype. A decoder and its head are ignored. Raises what `read_config` and
    `open_model` raise, and ValueError for the original T5, whose MLP has no gate.
    """
    defaults = dict(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=2048,
        num_layers=6,
        num_heads=8,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="relu",
    )
    config = defaults | read_config(folder, key="model_type", expected=("t5",))
    _require(folder, config, feed_forward_proj="gated-gelu")
    module = T5Encoder(
        vocab_size=config["vocab_size"],
        hidden_dim=config["d_model"],
        depth=config["num_layers"],
        num_heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        num_buckets=config["relative_attention_num_buckets"],
        max_distance=config["relative_attention_max_distance"],
        eps=config["layer_norm_epsilon"],
        dtype=dtype,
    )
    # The encoder's own table, where a file has one, is what it reads; else it shares the model's.
    own, shared = "encoder.embed_tokens.weight", "shared.weight"
    words = own if own in TensorFolder(folder, WEIGHTS) else shared
    abstract = _abstract(module, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return open_model(
        folder,
        WEIGHTS,
        module=module,
        abstract=abstract,
        weights=map_weights(
            abstract,
            outer=T5 | {"word_embeddings": words},
            block=T5_LAYER,
            block_name="encoder.block.{}.",
        ),
        unread={shared: (module.vocab_size, module.hidden_dim)} if words == own else None,
        ignored=r"decoder\..*|lm_head\.weight",
    )


def open_clip_text(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """CLIP's text tower, from its own folder or that of the whole `CLIPModel`.

    `dtype` is the compute dtype. The projection is there where the file has one; the other tower is
    ignored. Raises what `read_config` and `open_model` raise, and ValueError for a variant that
    `CLIPText` lacks.
    """
    config = _clip_config(
        folder, "text", projection="text_projection.weight", defaults=CLIP_TEXT_DEFAULTS
    )
    module = CLIPText(
        vocab_size=config["vocab_size"],
        max_tokens=config["max_position_embeddings"],
        projection_dim=config["projection_dim"],
        eos_token_id=config["eos_token_id"],
        **_block_fields(config),
        dtype=dtype,
    )
    return _open_encoder(
        folder,
        module,
        jax.ShapeDtypeStruct((1, 2), jnp.int32),
        prefixes=("text_model.", ""),
        outer=CLIP_TEXT,
        block=CLIP_LAYER,
        block_name="encoder.layers.{}.",
        head={"projection": "text_projection"},
        ignored=r"vision_model\..+|visual_projection\.weight|logit_scale|(text_model\.)?embeddings\.position_ids",
    )


def open_clip_vision(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """CLIP's image tower, from its own folder or that of the whole `CLIPModel`.

    `dtype` is the compute dtype. The projection is there where the file has one; the other tower is
    ignored. Raises what `read_config` and `open_model` raise, and ValueError for a variant that
    `CLIPVision` lacks.
    """
    config = _clip_config(
        folder, "vision", projection="visual_projection.weight", defaults=CLIP_VISION_DEFAULTS
    )
    module = CLIPVision(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        projection_dim=config["projection_dim"],
        **_block_fields(config),
        dtype=dtype,
    )
    return _open_encoder(
        folder,
        module,
        _one_patch(module),
        prefixes=("vision_model.", ""),
        outer=CLIP_VISION,
        block=CLIP_LAYER,
        block_name="encoder.layers.{}.",
        head={"projection": "visual_projection"},
        ignored=r"text_model\..+|text_projection\.weight|logit_scale|(vision_model\.)?embeddings\.position_ids",
        shapes=_patch_kernel(module),
    )


def open_dino(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The `ViTModel` of a folder, such as facebook/dino-vits16,.

    `dtype` is the compute dtype. Pooler, classifier and mask token are ignored. Raises what
    `read_config` and `open_model` raise, and ValueError for a variant that `DINO` lacks.
    """
    config = {**VIT_DEFAULTS, **read_config(folder, key="model_type", expected=("vit",))}
    _require_encoder(folder, config, defaults=VIT_DEFAULTS)
    module = DINO(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        qkv_bias=config["qkv_bias"],
        **_block_fields(config),
        dtype=dtype,
    )
    d, side = module.hidden_dim, module.image_size // module.patch_size
    return _open_encoder(
        folder,
        module,
        _one_patch(module),
        prefixes=("", "vit."),
        outer=VIT,
        block=VIT_LAYER,
        block_name="encoder.layer.{}.",
        ignored=r"(vit\.)?(pooler\.dense\.(weight|bias)|embeddings\.mask_token)|classifier\.(weight|bias)",
        shapes=_patch_kernel(module)
        | {
            "embed/class_token": ((1, 1, d), (0, 1, 2)),
            "embed/positions": ((1, 1 + side**2, d), (0, 1, 2)),
        },
    )


load_minilm, load_t5, load_dino = loader(open_minilm), loader(open_t5), loader(open_dino)
load_clip_text, load_clip_vision = loader(open_clip_text), loader(open_clip_vision)


def _clip_config(
    folder: PathLike, tower: str, *, projection: str, defaults: dict[str, Any]
) -> dict[str, Any]:
    """The config of one tower; `projection_dim` is None where the tower stands alone, without
    `projection`.
    """
    stored = read_config(folder, key="model_type", expected=(f"clip_{tower}_model", "clip"))
    whole = stored["model_type"] == "clip"
    # Of two configs of a tower transformers takes the older key, `text_config_dict`, and defaults
    # for the rest.
    own = (
        (stored.get(f"{tower}_config_dict") or stored.get(f"{tower}_config") or {})
        if whole
        else stored
    )
    config = {**defaults, **own}
    _require_encoder(folder, config, defaults=defaults)
    projected = whole or projection in TensorFolder(folder, WEIGHTS)
    return {**config, "projection_dim": stored.get("projection_dim", 512) if projected else None}


def _require_encoder(folder: PathLike, config: dict[str, Any], *, defaults: dict[str, Any]) -> None:
    """Raises ValueError for what `models.encoder` lacks, and for values of another type than the
    defaults'.
    """
    for key, value in defaults.items():
        if not isinstance(config[key], type(value)):
            expected = f"{Path(folder) / 'config.json'}: {key} is {config[key]!r}; only"
            raise ValueError(f"{expected} a single {type(value).__name__} is supported")
    _require(folder, config, num_channels=3, hidden_act=tuple(ACTIVATIONS))


def _block_fields(config: dict[str, Any]) -> dict[str, Any]:
    return dict(
        hidden_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        activation=config["hidden_act"],
        eps=config["layer_norm_eps"],
    )


def _one_patch(module: CLIPVision | DINO) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, module.patch_size, module.patch_size, 3), jnp.float32)


def _patch_kernel(module: CLIPVision | DINO) -> dict[str, Any]:
    """The matmul of the patches is a convolution there."""
    return {
        "embed/patch_embed/kernel": (
            (module.hidden_dim, 3, module.patch_size, module.patch_size),
            CONV,
        )
    }


def _open_encoder(
    folder: PathLike,
    module: Any,
    inputs: jax.ShapeDtypeStruct,
    *,
    prefixes: tuple[str, ...],
    outer: Mapping[str, str],
    block: Mapping[str, str],
    block_name: str,
    head: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    **options: Any,
) -> StoredModel:
    """`open_model` of a module that transformers stores under one of the prefixes, its `head`
    beside it.

    `shapes` are (shape, axes) of those tensors that are more than a transpose away.
    """
    prefix = _prefix(folder, next(iter(outer.values())), prefixes)
    abstract = _abstract(module, inputs)
    weights = map_weights(
        abstract,
        outer={ours: prefix + theirs for ours, theirs in outer.items()} | dict(head or {}),
        block=block,
        block_name=prefix + block_name,
    )
    for path, (shape, axes) in (shapes or {}).items():
        weights[path] = dataclasses.replace(weights[path], shape=shape, axes=axes)
    return open_model(folder, WEIGHTS, module=module, abstract=abstract, weights=weights, **options)


def _abstract(module: Any, *inputs: jax.ShapeDtypeStruct) -> Params:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def _require(folder: PathLike, config: dict[str, Any], **expected: Any) -> None:
    """Raises ValueError for a config that has another value than the (default) one, or those, that
    we support.
    """
    for key, value in expected.items():
        supported = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] not in supported:
            names = " or ".join(map(repr, supported))
            raise ValueError(
                f"{Path(folder) / 'config.json'}: {key} is {config[key]!r}; only {names} is supported"
            )


def _prefix(folder: PathLike, name: str, prefixes: tuple[str, ...]) -> str:
    """Which of the prefixes a network's tensors have there: it may be stored alone or inside a
    larger model.
    """
    tensors = TensorFolder(folder, WEIGHTS)
    return next((prefix for prefix in prefixes if prefix + name in tensors), prefixes[0])
