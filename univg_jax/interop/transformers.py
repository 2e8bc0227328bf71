"""Weights of Hugging Face `transformers` folders -> our modules and parameter trees."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from univg_jax.interop.folder import Params, PathLike, TensorFolder, map_weights, read_config, read_params
from univg_jax.models.minilm import MiniLM

WEIGHTS = "model.safetensors"

# Our module path -> theirs: of the whole network, and of one of its layers.
BERT = {
    "word_embeddings": "embeddings.word_embeddings.weight",
    "position_embeddings": "embeddings.position_embeddings.weight",
    "token_type_embeddings": "embeddings.token_type_embeddings.weight",
    "embeddings_norm": "embeddings.LayerNorm",
}
BERT_LAYER = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def load_minilm(
    folder: PathLike, *, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> tuple[MiniLM, Params]:
    """The BERT encoder of a folder (config.json, model.safetensors) as (module, parameters).

    `dtype` is the compute dtype. The pooler's and position-id tensors are not part of the encoder and are
    ignored. Raises what `read_config` and `read_params` raise, and ValueError for a variant that `MiniLM` lacks.
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
    abstract = _abstract(module, jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.bool_))
    prefix = _prefix(folder, "embeddings.word_embeddings.weight", ("", "bert."))
    weights = map_weights(
        abstract,
        outer={ours: prefix + theirs for ours, theirs in BERT.items()},
        block=BERT_LAYER,
        block_name=prefix + "encoder.layer.{}.",
    )
    ignored = prefix + r"(embeddings\.position_ids|pooler\.dense\.(weight|bias))"
    params = read_params(
        folder, WEIGHTS, abstract=abstract, weights=weights, ignored=ignored, mesh=mesh, dtype=param_dtype
    )
    return module, params


def _abstract(module: Any, *inputs: jax.ShapeDtypeStruct) -> Params:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def _require(folder: PathLike, config: dict[str, Any], **expected: Any) -> None:
    """Raises ValueError for a config that has another value than the (default) one that we support."""
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"{Path(folder) / 'config.json'}: {key} is {config[key]!r}; only {value!r} is supported")


def _prefix(folder: PathLike, name: str, prefixes: tuple[str, ...]) -> str:
    """Which of the prefixes a network's tensors have there: it may be stored alone or inside a larger model."""
    tensors = TensorFolder(folder, WEIGHTS)
    return next((prefix for prefix in prefixes if prefix + name in tensors), prefixes[0])
