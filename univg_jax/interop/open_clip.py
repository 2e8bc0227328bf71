"""A CLIP of open_clip as a folder of Hugging Face, made once.

HPSv2's weights, `HPS_v2.1_compressed.pt` of xswu/HPSv2, exist in no other form.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from univg_jax.errors import UserError, quote
from univg_jax.files import write_folder
from univg_jax.interop.pickles import Array, read_pickle
from univg_jax.interop.tensors import PathLike
from univg_jax.interop.transformers import WEIGHTS, open_clip_text, open_clip_vision
from univg_jax.interop.writing import write_sharded
from univg_jax.streaming import Tensor

KEPT = ("config.json", "preprocessor_config.json")  # of the folder, beside its tokenizer's files
TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json")

# The names of open_clip -> those of transformers; a matrix `@` is the transposed one.
NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "@text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "@visual_projection.weight",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
JOINT = "attn.in_proj_"  # queries, keys and values below each other


def convert_open_clip(file: PathLike, out: PathLike, *, like: PathLike) -> None:
    """Writes the folder `out`: that of `like` with the weights of open_clip's `file`.

    `like` is a CLIP of the same sizes, of which the configuration and the tokenizer are taken, such
    as laion/CLIP-ViT-H-14-laion2B-s32B-b79K for HPSv2. The file is read without running what it
    asks for (`read_pickle`). Raises UserError, and writes nothing, if the weights are not those of
    such a CLIP or `out` has files.
    """
    with write_folder(out, seal=WEIGHTS) as folder:
        tensors = read_pickle(file, under="state_dict")
        for pattern in (*KEPT, *TOKENIZER):
            for found in Path(like).glob(pattern):
                shutil.copyfile(found, folder / found.name)
        renamed = dict(pair for name, x in tensors.items() for pair in _renamed(file, name, x))
        write_sharded(folder, WEIGHTS, {name: Tensor.of(x) for name, x in renamed.items()})
        for check in (open_clip_text, open_clip_vision):
            check(folder)


def _renamed(file: PathLike, name: str, x: Array) -> Iterator[tuple[str, Array]]:
    if match := BLOCK.fullmatch(name):
        tower, names = ("vision" if match[1] else "text"), IN_BLOCK
        prefix, name = f"{tower}_model.encoder.layers.{match[2]}.", match[3]
        if name.startswith(JOINT):
            kind = name.removeprefix(JOINT)
            for k, part in enumerate("qkv"):
                rows = len(x) // 3
                yield f"{prefix}self_attn.{part}_proj.{kind}", x[k * rows : (k + 1) * rows]
            return
    else:
        prefix, names = "", NAMES
    module, _, kind = name.rpartition(".")
    if name in names:
        new = names[name]
    elif module in names:
        new = f"{names[module]}.{kind}"
    else:
        raise UserError(f"{file} has {quote(name)}: expected the weights of a CLIP of open_clip")
    yield prefix + new.removeprefix("@"), x.T if new.startswith("@") else x
