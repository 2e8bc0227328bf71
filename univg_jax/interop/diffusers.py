"""The MM-DiT's weights as a diffusers folder (`SD3Transformer2DModel`), both ways, without torch.

Ours and theirs differ in four things: kernels are [in, out] here and [out, in] there; the patch
embedding is a matmul here and a convolution there; equal blocks are stacked here; and two kinds of
tensors exist only there, the position table (computed here) and the text queries of the last block
(nothing reads them).
"""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from univg_jax.models.layers import sincos_table
from univg_jax.models.mmdit import MMDiT

PathLike = str | Path
Params = dict[str, Any]

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS_NAME = "SD3Transformer2DModel"
TABLE = "pos_embed.pos_embed"

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
LEAF = {"kernel": "weight", "bias": "bias", "scale": "weight"}


def load_transformer(folder: PathLike) -> tuple[MMDiT, Params]:
    """Opens a folder of `SD3Transformer2DModel`: `config.json` and safetensors, whole or sharded.

    Parameters become float32. All names, shapes and dtypes are checked before anything is read, then
    leaves are made one at a time.

    Raises FileNotFoundError for a missing file, and ValueError for another model family, a variant
    that `MMDiT` lacks, a broken file, or missing, extra or misshaped tensors (listed).
    """
    folder = Path(folder)
    model = _model_of(folder)
    tensors = TensorFolder(folder, WEIGHTS)
    rows = list(_rows(model))
    only_there = {name: shape for name, (shape, _) in _unread(model).items()}
    shapes = {name: _their_shape(model, path, leaf.shape) for path, leaf, names in rows for name in names}
    tensors.check({**shapes, **only_there}, optional=set(only_there))
    if TABLE in tensors:
        _check_table(model, tensors.read(TABLE), folder)

    params = {}
    for path, leaf, names in rows:
        value = np.empty(leaf.shape, np.float32)
        for part, name in zip(value if path[0] == "blocks" else [value], names, strict=True):
            part[...] = _to_ours(path, tensors.read(name))
        params[path] = jnp.asarray(value)
    return model, _nested(params)


def save_transformer(model: MMDiT, params: Params, folder: PathLike, *, max_file_bytes: int = 5 * 10**9) -> None:
    """Writes a folder that `SD3Transformer2DModel.from_pretrained` opens, in float32, sharded past `max_file_bytes`.

    Raises ValueError where the model uses an option that diffusers lacks, or `params` are not its own.
    """
    config = _config_of(model)
    flat = _leaves(params)
    rows = list(_rows(model))
    expected = {"/".join(path): leaf.shape for path, leaf, _ in rows}
    _check_shapes(expected, {"/".join(path): tuple(value.shape) for path, value in flat.items()}, "parameters")

    sizes = {name: 4 * math.prod(_their_shape(model, path, leaf.shape)) for path, leaf, names in rows for name in names}
    sizes |= {name: 4 * math.prod(shape) for name, (shape, _) in _unread(model).items()}
    files: list[list[str]] = [[]]
    room = max_file_bytes
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = max_file_bytes
        files[-1].append(name)
        room -= size

    places = {name: (path, i) for path, _, names in rows for i, name in enumerate(names)}

    def tensor(name: str) -> np.ndarray:
        if name not in places:
            shape, make = _unread(model)[name]
            return np.ascontiguousarray(make(), np.float32).reshape(shape)
        path, i = places[name]
        value = np.asarray(flat[path][i] if path[0] == "blocks" else flat[path], np.float32)
        return np.ascontiguousarray(_to_theirs(model, path, value))

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("diffusion_pytorch_model*.safetensors*"):
        old.unlink()
    stem, suffix = WEIGHTS.rsplit(".", 1)
    weight_map = {}
    for i, names in enumerate(files):
        file = WEIGHTS if len(files) == 1 else f"{stem}-{i + 1:05d}-of-{len(files):05d}.{suffix}"
        save_file({name: tensor(name) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


class TensorFolder:
    """The tensors of one or several safetensors files, read by name, one at a time."""

    def __init__(self, folder: Path, file: str):
        index = folder / f"{file}.index.json"
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            files = [file]
        self.folder = folder
        self._open = {}
        for part in files:
            if not (folder / part).exists():
                raise FileNotFoundError(f"{folder / part} does not exist")
            try:
                handle = safe_open(folder / part, framework="np")
            except SafetensorError as error:
                raise ValueError(f"{folder / part} is not a readable safetensors file: {error}") from error
            self._open |= dict.fromkeys(handle.keys(), handle)

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def read(self, name: str) -> np.ndarray:
        return self._open[name].get_tensor(name)

    def check(self, expected: dict[str, tuple[int, ...]], *, optional: set[str]) -> None:
        """Compares names, shapes and dtypes with the files' headers; raises ValueError listing what differs."""
        headers = {name: handle.get_slice(name) for name, handle in self._open.items()}
        found = {name: tuple(header.get_shape()) for name, header in headers.items()}
        needed = {name: shape for name, shape in expected.items() if name in found or name not in optional}
        _check_shapes(needed, found, str(self.folder))
        dtypes = {name: header.get_dtype() for name, header in headers.items()}
        wrong = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in ("F32", "F16", "BF16")]
        if wrong:
            raise ValueError(f"{self.folder}: expected tensors of F32, F16 or BF16, got {_some(wrong)}")


def _leaves(tree: Params) -> dict[tuple[str, ...], Any]:
    """The leaves of nested dicts by their keys."""
    return {tuple(k.key for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _nested(leaves: dict[tuple[str, ...], Any]) -> Params:
    """The inverse of `_leaves`."""
    tree: Params = {}
    for (*parents, last), leaf in leaves.items():
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf
    return tree


def _rows(model: MMDiT) -> Iterator[tuple[tuple[str, ...], jax.ShapeDtypeStruct, list[str]]]:
    """(path, abstract leaf, diffusers' names) of each of our parameters; of a stacked one, a name a block."""
    p = model.patch_size
    inputs = [(1, p, p, model.in_channels), (1, 1, model.text_dim), (1, model.pooled_dim), (1,)]
    init = jax.eval_shape(model.init, jax.random.key(0), *(jax.ShapeDtypeStruct(s, jnp.float32) for s in inputs))
    for path, leaf in _leaves(init["params"]).items():
        *module, kind = path
        if module[0] in ("blocks", "last_block"):
            blocks = range(model.depth - 1) if module[0] == "blocks" else [model.depth - 1]
            names = [f"transformer_blocks.{i}.{BLOCK['/'.join(module[1:])]}.{LEAF[kind]}" for i in blocks]
        else:
            names = [f"{OUTER['/'.join(module)]}.{LEAF[kind]}"]
        yield path, leaf, names


def _unread(model: MMDiT) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and a maker of each tensor that diffusers stores and we do not."""
    d, size = model.hidden_dim, model.pos_embed_max_size
    block = f"transformer_blocks.{model.depth - 1}.attn"
    tensors = {
        TABLE: ((1, size * size, d), lambda: _table(model)),
        f"{block}.add_q_proj.weight": ((d, d), lambda: np.zeros((d, d))),
        f"{block}.add_q_proj.bias": ((d,), lambda: np.zeros(d)),
    }
    if model.qk_norm:
        c = d // model.num_heads
        tensors[f"{block}.norm_added_q.weight"] = ((c,), lambda: np.ones(c))
    return tensors


def _table(model: MMDiT) -> np.ndarray:
    size = model.pos_embed_max_size
    return sincos_table(size, size, dim=model.hidden_dim, max_size=size, base_size=model.pos_embed_base_size)


def _check_table(model: MMDiT, table: np.ndarray, folder: Path) -> None:
    """A stored table must be the computed one: to a half-precision file's rounding (bfloat16: 2^-9)."""
    error = np.abs(table[0].astype(np.float32) - _table(model)).max()
    if not error <= 4e-3:
        raise ValueError(
            f"{folder}: {TABLE} is not the sin-cos table of pos_embed_max_size={model.pos_embed_max_size}, "
            f"base size {model.pos_embed_base_size} (differs by {error:.3g}); no other is supported"
        )


def _their_shape(model: MMDiT, path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[0] == "blocks":
        shape = shape[1:]
    if path == ("patch_embed", "kernel"):
        return (model.hidden_dim, model.in_channels, model.patch_size, model.patch_size)
    return shape[::-1]


def _to_ours(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    if value.ndim == 4:  # out, channel, row, column -> (row, column, channel), out
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    return value.T


def _to_theirs(model: MMDiT, path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    if path == ("patch_embed", "kernel"):
        p = model.patch_size
        return value.reshape(p, p, model.in_channels, -1).transpose(3, 2, 0, 1)
    return value.T


def _model_of(folder: Path) -> MMDiT:
    file = folder / "config.json"
    if not file.exists():
        inner = " (its transformer/ subfolder has one)" if (folder / "transformer" / "config.json").exists() else ""
        raise FileNotFoundError(f"{file} does not exist{inner}")
    try:
        stored = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if stored.get("_class_name") != CLASS_NAME:
        raise ValueError(f"{file}: expected _class_name {CLASS_NAME!r}, got {stored.get('_class_name')!r}")
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
    c = {**defaults, **{k: v for k, v in stored.items() if not k.startswith("_")}}
    hidden_dim = c["attention_head_dim"] * c["num_attention_heads"]
    for bad, why in {
        "dual_attention_layers": list(c["dual_attention_layers"]) != [],
        "caption_projection_dim": c["caption_projection_dim"] != hidden_dim,
        "qk_norm": c["qk_norm"] not in (None, "rms_norm"),
        "pos_embed_max_size": not c["pos_embed_max_size"],
    }.items():
        if why:
            raise ValueError(f"{file}: {bad}={c[bad]!r} is not supported")
    return MMDiT(
        hidden_dim=hidden_dim,
        depth=c["num_layers"],
        num_heads=c["num_attention_heads"],
        patch_size=c["patch_size"],
        in_channels=c["in_channels"],
        out_channels=c["out_channels"] or c["in_channels"],
        text_dim=c["joint_attention_dim"],
        pooled_dim=c["pooled_projection_dim"],
        qk_norm=c["qk_norm"],
        pos_embed_max_size=c["pos_embed_max_size"],
        pos_embed_base_size=c["sample_size"] // c["patch_size"],
    )


def _config_of(model: MMDiT) -> dict[str, Any]:
    for field, value in dict(position="sincos", mlp_ratio=4, sandwich_norm=False, shared_adaln=False).items():
        if getattr(model, field) != value:
            raise ValueError(f"diffusers has no {CLASS_NAME} with {field}={getattr(model, field)!r}, only {value!r}")
    return {
        "_class_name": CLASS_NAME,
        "_diffusers_version": "0.30.0",
        "sample_size": model.pos_embed_base_size * model.patch_size,
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "num_layers": model.depth,
        "attention_head_dim": model.hidden_dim // model.num_heads,
        "num_attention_heads": model.num_heads,
        "joint_attention_dim": model.text_dim,
        "caption_projection_dim": model.hidden_dim,
        "pooled_projection_dim": model.pooled_dim,
        "out_channels": model.out_channels,
        "pos_embed_max_size": model.pos_embed_max_size,
        "dual_attention_layers": [],
        "qk_norm": model.qk_norm,
    }


def _check_shapes(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], where: str) -> None:
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "extra": sorted(found.keys() - expected.keys()),
        "misshaped": [
            f"{name} (expected {list(expected[name])}, got {list(found[name])})"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ],
    }
    if any(problems.values()):
        raise ValueError(
            f"{where}: " + "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
        )


def _some(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
