"""Weights of Hugging Face `transformers` folders -> our modules and parameter trees."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError, safe_open

from univg_jax.models.minilm import MiniLM

# (their name, ours); a Linear's weight [out in] is our kernel [in out].
_BERT_NAMES = [
    (r"embeddings\.(word|position|token_type)_embeddings\.weight", r"\1_embeddings"),
    (r"embeddings\.LayerNorm\.(.*)", r"embeddings_norm/\1"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)\.(.*)", r"layers_\1/\2/\3"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)", r"layers_\1/attention_out/\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(.*)", r"layers_\1/attention_norm/\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)", r"layers_\1/mlp_in/\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(.*)", r"layers_\1/mlp_out/\2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(.*)", r"layers_\1/mlp_norm/\2"),
]
_BERT_UNUSED = r"embeddings\.position_ids|pooler\.dense\.(weight|bias)"  # no tensor of the encoder


def _ours(name: str) -> str | None:
    """Our path of one of their tensors, or None if we have no such tensor."""
    for pattern, path in _BERT_NAMES:
        if match := re.fullmatch(pattern, name):
            path = match.expand(path)
            return re.sub("weight$", "scale" if "_norm/" in path else "kernel", path)
    return None


def _read_config(folder: Path, *, model_type: str) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: not a Hugging Face model folder")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if config.get("model_type") != model_type:
        raise ValueError(f"{file} describes a {config.get('model_type')!r} model; expected {model_type!r}")
    return config


def _read_tensors(file: Path) -> Mapping[str, np.ndarray]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        with safe_open(file, framework="np") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file: {error}") from None


def load_minilm(folder: str | Path, *, dtype: Any = jnp.float32) -> tuple[MiniLM, dict]:
    """The BERT encoder of a folder (config.json, model.safetensors) as (module, float32 parameters).

    `dtype` is the compute dtype. The pooler's and position-id tensors are not part of the encoder and are
    ignored. Raises FileNotFoundError for an absent file, ValueError for another model family, a truncated file,
    and for missing, extra or misshaped tensors, all of them listed.
    """
    folder = Path(folder)
    config = _read_config(folder, model_type="bert")
    for key, expected in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(key, expected) != expected:
            raise ValueError(f"{folder / 'config.json'}: {key} is {config[key]!r}; only {expected!r} is supported")
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
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    expected = jax.eval_shape(module.init, jax.random.key(0), tokens, mask)["params"]
    shapes = {_path(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(expected)}

    file = folder / "model.safetensors"
    found, problems = {}, []
    for name, tensor in _read_tensors(file).items():
        name = name.removeprefix("bert.")
        if re.fullmatch(_BERT_UNUSED, name):
            continue
        path = _ours(name)
        if path not in shapes:
            problems.append(f"extra {name}")
            continue
        found[path] = _kernel(tensor) if path.endswith("/kernel") else tensor.astype(np.float32)
        if found[path].shape != shapes[path]:
            problems.append(f"{name} is {found[path].shape}, expected {shapes[path]} as {path}")
    problems += [f"missing {path}" for path in shapes if path not in found]
    if problems:
        raise ValueError(f"{file} does not fit its config.json: " + "; ".join(problems))
    return module, jax.tree_util.tree_map_with_path(lambda keys, _: found[_path(keys)], expected)


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _kernel(weight: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return np.ascontiguousarray(weight.T, np.float32)
