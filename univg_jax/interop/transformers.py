"""Weights of Hugging Face `transformers` folders -> our modules and parameter trees.

`open_*(folder, *, dtype)` checks a folder against its config without reading a tensor; `dtype` is
the compute dtype of the module. All raise what `read_config` and `open_model` raise, and UserError
for a variant that our module lacks. `load_*(folder, *, dtype, param_dtype, mesh)` opens and reads:
`(module, params)` for `module.apply({'params': params}, ...)`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from univg_jax.errors import UserError, quote
from univg_jax.interop.config import (
    MAX_DEPTH,
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
    loader,
    map_weights,
    open_model,
)
from univg_jax.interop.tensors import PathLike, TensorFolder
from univg_jax.models.clip import CLIPText, CLIPVision
from univg_jax.models.dino import DINO
from univg_jax.models.minilm import MiniLM
from univg_jax.models.t5 import T5Encoder
from univg_jax.models.vit import ACTIVATIONS

Config = dict[str, Any]  # of a config.json
Encoder = MiniLM | T5Encoder | CLIPText | CLIPVision | DINO

WEIGHTS = "model.safetensors"

# For each network: our module path -> theirs, of the whole and of one layer; and the values that
# transformers takes for keys that a config.json leaves out.
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
BERT_DEFAULTS = dict(
    vocab_size=30522,
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=512,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    hidden_act="gelu",
    position_embedding_type="absolute",
)

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
VIT_DEFAULTS = CLIP_VISION_DEFAULTS | dict(
    patch_size=16, hidden_act="gelu", layer_norm_eps=1e-12, qkv_bias=True
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
T5_DEFAULTS = dict(
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


def open_minilm(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The BERT encoder of a folder (`BertModel`, alone or inside a model with a head).

    The pooler's and position-id tensors are not part of the encoder and are ignored.
    """
    config = read_config(folder, key="model_type", expected=("bert",))
    config = _complete(folder, config, BERT_DEFAULTS)
    require(folder, config, hidden_act=("gelu",), position_embedding_type=("absolute",))
    module = MiniLM(
        vocab_size=config["vocab_size"],
        max_tokens=config["max_position_embeddings"],
        num_token_types=config["type_vocab_size"],
        **_block_fields(config),
        dtype=dtype,
    )
    return _open_encoder(
        folder,
        module,
        prefixes=("", "bert."),
        outer=BERT,
        block=BERT_LAYER,
        block_name="encoder.layer.{}.",
        ignored=r"(bert\.)?(embeddings\.position_ids|pooler\.dense\.(weight|bias))",
    )


def open_t5(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The encoder of a T5 v1.1 folder, stored alone (`T5EncoderModel`) or in a whole model.

    A decoder and its head are ignored. The original T5, whose MLP has no gate, is refused.
    """
    config = read_config(folder, key="model_type", expected=("t5",))
    config = _complete(folder, config, T5_DEFAULTS)
    require(folder, config, feed_forward_proj=("gated-gelu",))
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
    if not 4 <= module.num_buckets < 4 * module.max_distance:  # a row for near ones, one for far
        raise UserError(
            f"{config_file(folder)}: {module.num_buckets} buckets of positions for distances to "
            f"{module.max_distance}"
        )
    # If a file has a table of the encoder's own, transformers reads that, else the shared one.
    own, shared = "encoder.embed_tokens.weight", "shared.weight"
    has_own = own in TensorFolder(folder, WEIGHTS)
    return _open_encoder(
        folder,
        module,
        outer=T5 | {"word_embeddings": own if has_own else shared},
        block=T5_LAYER,
        block_name="encoder.block.{}.",
        unread={shared: (module.vocab_size, module.hidden_dim)} if has_own else None,
        ignored=r"decoder\..*|lm_head\.weight",
    )


def open_clip_text(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """CLIP's text tower, from its own folder or from that of a whole `CLIPModel`.

    It has a projection if the file has one. The other tower is ignored.
    """
    fields = {name: name for name in ("vocab_size", "eos_token_id")}
    fields["max_tokens"] = "max_position_embeddings"
    tables = dict(fields=fields, defaults=CLIP_TEXT_DEFAULTS, outer=CLIP_TEXT)
    return _open_clip(folder, "text", CLIPText, **tables, dtype=dtype)


def open_clip_vision(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """CLIP's image tower, from its own folder or from that of a whole `CLIPModel`.

    It has a projection if the file has one. The other tower is ignored.
    """
    fields = {name: name for name in ("image_size", "patch_size")}
    tables = dict(fields=fields, defaults=CLIP_VISION_DEFAULTS, outer=CLIP_VISION)
    return _open_clip(folder, "vision", CLIPVision, **tables, dtype=dtype)


def open_dino(folder: PathLike, *, dtype: Any = jnp.float32) -> StoredModel:
    """The `ViTModel` of a folder, such as facebook/dino-vits16.

    Pooler, classifier and mask token are ignored.
    """
    config = read_config(folder, key="model_type", expected=("vit",))
    config = _complete(folder, config, VIT_DEFAULTS)
    require(folder, config, num_channels=(3,), hidden_act=tuple(ACTIVATIONS))
    module = DINO(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        qkv_bias=config["qkv_bias"],
        activation=config["hidden_act"],
        **_block_fields(config),
        dtype=dtype,
    )
    d, side = module.hidden_dim, module.image_size // module.patch_size
    return _open_encoder(
        folder,
        module,
        prefixes=("", "vit."),
        outer=VIT,
        block=VIT_LAYER,
        block_name="encoder.layer.{}.",
        shapes={"embed/class_token": (1, 1, d), "embed/positions": (1, 1 + side**2, d)},
        ignored=r"(vit\.)?(pooler\.dense\.(weight|bias)|embeddings\.mask_token)"
        r"|classifier\.(weight|bias)",
    )


load_minilm, load_t5, load_dino = loader(open_minilm), loader(open_t5), loader(open_dino)
load_clip_text, load_clip_vision = loader(open_clip_text), loader(open_clip_vision)


def _open_clip(
    folder: PathLike,
    tower: str,
    cls: type,
    *,
    fields: Mapping[str, str],
    defaults: Config,
    outer: Mapping[str, str],
    dtype: Any,
) -> StoredModel:
    """One tower, "text" or "vision", as a `cls`; `fields` maps its own fields to config keys."""
    heads = {"text": "text_projection", "vision": "visual_projection"}
    other = "vision" if tower == "text" else "text"
    stored = read_config(folder, key="model_type", expected=(f"clip_{tower}_model", "clip"))
    config, is_whole = stored, stored["model_type"] == "clip"
    if is_whole:
        # If there are two configs of a tower, transformers takes the one under the older key,
        # `text_config_dict`, and the defaults for what that leaves out.
        config = stored.get(f"{tower}_config_dict") or stored.get(f"{tower}_config") or {}
        if not isinstance(config, dict):
            raise UserError(f"{config_file(folder)}: {tower}_config is {quote(config)}, no object")
    config = _complete(folder, config, defaults)
    # Only a tower that stands alone may lack a projection.
    has_head = is_whole or f"{heads[tower]}.weight" in TensorFolder(folder, WEIGHTS)
    require(folder, config, num_channels=(3,), hidden_act=tuple(ACTIVATIONS))
    head = complete_config(folder, stored, dict(projection_dim=512)) if has_head else {}
    module = cls(
        **{field: config[key] for field, key in fields.items()},
        **_block_fields(config),
        projection_dim=head.get("projection_dim"),
        activation=config["hidden_act"],
        dtype=dtype,
    )
    return _open_encoder(
        folder,
        module,
        prefixes=(f"{tower}_model.", ""),
        outer=outer,
        block=CLIP_LAYER,
        block_name="encoder.layers.{}.",
        head={"projection": heads[tower]},
        ignored=rf"{other}_model\..+|{heads[other]}\.weight|logit_scale"
        rf"|({tower}_model\.)?embeddings\.position_ids",
    )


def _complete(folder: PathLike, config: Config, defaults: Config) -> Config:
    ranges = dict(image_size=(1, 2**14), patch_size=(1, 2**10), eos_token_id=(0, MAX_SIZE))
    ranges |= dict.fromkeys(("num_layers", "num_hidden_layers"), (1, MAX_DEPTH))
    config = complete_config(folder, config, defaults, ranges=ranges)
    if "patch_size" in defaults and config["patch_size"] > config["image_size"]:
        raise UserError(f"{config_file(folder)}: a patch_size above image_size")
    return config


def _block_fields(config: Config) -> dict[str, Any]:
    return dict(
        hidden_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        eps=config["layer_norm_eps"],
    )


def _open_encoder(
    folder: PathLike,
    module: Encoder,
    *,
    outer: Mapping[str, str],
    block: Mapping[str, str],
    block_name: str,
    prefixes: tuple[str, ...] = ("",),
    head: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    **options: Any,
) -> StoredModel:
    """`open_model` of a module whose tensors have one of the prefixes; its `head` has none.

    The prefix tells whether the network is stored alone or inside a larger model. `shapes` are the
    stored shapes of those of our parameters that have fewer axes.
    """
    tensors, first = TensorFolder(folder, WEIGHTS), next(iter(outer.values()))
    prefix = next((prefix for prefix in prefixes if prefix + first in tensors), prefixes[0])
    with naming(folder):
        abstract = _abstract(module)
    weights = map_weights(
        abstract,
        outer={ours: prefix + theirs for ours, theirs in outer.items()} | dict(head or {}),
        block=block,
        block_name=prefix + block_name,
    )
    for path, shape in (shapes or {}).items():
        axes = tuple(range(len(shape)))
        weights[path] = dataclasses.replace(weights[path], shape=shape, axes=axes)
    if isinstance(module, CLIPVision | DINO):  # the patches' matmul is a convolution there
        path, p = "embed/patch_embed/kernel", module.patch_size
        shape = (module.hidden_dim, 3, p, p)
        weights[path] = dataclasses.replace(weights[path], shape=shape, axes=CONV)
    return open_model(folder, WEIGHTS, module=module, abstract=abstract, weights=weights, **options)


def _abstract(module: Encoder) -> Params:
    """The shapes of a module's parameters."""
    if isinstance(module, CLIPVision | DINO):
        p = module.patch_size
        inputs = (jax.ShapeDtypeStruct((1, p, p, 3), jnp.float32),)
    else:
        inputs = tuple(jax.ShapeDtypeStruct((1, 2), dtype) for dtype in (jnp.int32, jnp.bool_))
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
