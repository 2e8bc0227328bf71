"""A CLIP of open_clip becomes a folder of Hugging Face with the same weights."""

import pickle
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.evaluation.scorers.test_clip_scorer import write_whole_clip
from tests.interop.torch_file import torch_zip
from univg_jax.errors import NotFoundError, UserError
from univg_jax.evaluation.scorers.clip import Clip
from univg_jax.interop.open_clip import convert_open_clip

# How open_clip's `CLIP` names its parameters.
THEIRS = (
    (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.(\w+)", r"ln_final.\1"),
    (r"text_projection\.weight", "text_projection"),
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.pre_layrnorm\.(\w+)", r"visual.ln_pre.\1"),
    (r"vision_model\.post_layernorm\.(\w+)", r"visual.ln_post.\1"),
    (r"visual_projection\.weight", "visual.proj"),
    (r"layer_norm(\d)\.", r"ln_\1."),
    (r"self_attn\.out_proj\.", "attn.out_proj."),
    (r"mlp\.fc1\.", "mlp.c_fc."),
    (r"mlp\.fc2\.", "mlp.c_proj."),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
)


def as_open_clip(tensors):
    """The same weights by open_clip's names."""
    found = {"logit_scale": np.float32(4.6)[None].reshape(())}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", name):
            parts = [tensors[f"{match[1]}self_attn.{k}_proj.{match[2]}"] for k in "qkv"]
            name, value = f"{match[1]}attn.in_proj_{match[2]}", np.concatenate(parts)
        elif re.search(r"self_attn\.[kv]_proj|position_ids", name):
            continue
        for pattern, theirs in THEIRS:
            name = re.sub(pattern, theirs, name)
        found[name] = value.T.copy() if name in ("text_projection", "visual.proj") else value
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_whole_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def weights(folder):
    return as_open_clip(load_file(folder / "model.safetensors"))


def check_equal(folder, other):
    ours, theirs = Clip(str(folder)), Clip(str(other))
    images = [np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)]
    np.testing.assert_array_equal(theirs.image_embed(images), ours.image_embed(images))
    np.testing.assert_array_equal(theirs.text_embed(["a cat"]), ours.text_embed(["a cat"]))


def test_the_vectors_are_those_of_the_weights(folder, weights, tmp_path):
    (tmp_path / "HPS.pt").write_bytes(torch_zip(weights))
    convert_open_clip(tmp_path / "HPS.pt", tmp_path / "out", like=folder)
    check_equal(folder, tmp_path / "out")


def test_of_a_checkpoint_only_the_weights_are_read(folder, weights, tmp_path):
    content = {"epoch": 3, "name": "ViT-H-14", "state_dict": weights}
    (tmp_path / "HPS.pt").write_bytes(pickle.dumps(content))
    convert_open_clip(tmp_path / "HPS.pt", tmp_path / "out", like=folder)
    check_equal(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"visual.head.weight": np.ones((2, 2), np.float32)},
            r"HPS\.pt has 'visual\.head\.weight'",
        ),
        ({"ln_final.weight": np.ones(5, np.float32)}, r"final_layer_norm\.weight"),
        ({"ln_final.weight": None}, r"final_layer_norm\.weight"),
    ],
)
def test_other_weights_are_refused_and_nothing_is_written(folder, weights, tmp_path, change, line):
    changed = {name: x for name, x in (weights | change).items() if x is not None}
    (tmp_path / "HPS.pt").write_bytes(torch_zip(changed))
    with pytest.raises(UserError, match=line):
        convert_open_clip(tmp_path / "HPS.pt", tmp_path / "out", like=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["HPS.pt"]


def test_a_folder_that_is_no_clip_is_one_line(weights, tmp_path):
    (tmp_path / "HPS.pt").write_bytes(torch_zip(weights))
    with pytest.raises(NotFoundError, match=r"config\.json"):
        convert_open_clip(tmp_path / "HPS.pt", tmp_path / "out", like=tmp_path / "none")
