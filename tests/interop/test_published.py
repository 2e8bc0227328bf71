"""README's table of weights: folders laid out and configured as the published ones are."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.tokenizer import load_tokenizer
from tests.data_pipelines.test_spiece import model as spiece_model
from tests.data_pipelines.test_tokenizer import T5_PIECES, write_clip, write_t5
from tests.sd3_folder import (
    write_image_encoder,
    write_sd3,
    write_t5_encoder,
    write_text_encoder,
    write_vae,
)
from univg_jax import encoders
from univg_jax.errors import NotFoundError, UserError
from univg_jax.interop.diffusers import open_transformer, open_vae
from univg_jax.interop.transformers import open_clip_text, open_clip_vision, open_dino, open_t5
from univg_jax.settings import Conditioning

VAE = "diffusion_pytorch_model"


def variants(folder):
    """Files of half precision, and pickles, beside those that are read."""
    for file in list(folder.rglob("*.safetensors")):
        stem = file.name.removesuffix(".safetensors")
        first, dash, rest = stem.partition("-")
        shutil.copy(file, file.with_name(f"{first}.fp16{dash}{rest}.safetensors"))
        file.with_name("pytorch_model.bin").write_bytes(b"pickle")
    for index in list(folder.rglob("*.safetensors.index.json")):
        shutil.copy(index, index.with_name(index.name.replace(".json", ".fp16.json")))


def around(folder):
    """What else lies in a repository."""
    for name in (".gitattributes", "README.md", "LICENSE.md", "v1-5-pruned.safetensors"):
        (folder / name).write_text("text")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text('{"model_type": "clip"}')


def sd3(folder):
    write_sd3(folder)
    write_image_encoder(folder / "image_encoder")
    (folder / "tokenizer_3" / "spiece.model").write_bytes(spiece_model())


def sd1(folder):
    """A text encoder without a projection, whose positions are a tensor of whole numbers."""
    write_clip(folder / "tokenizer")
    parts = dict(width=8, heads=2, projection=6, activation="quick_gelu", seed=1)
    write_text_encoder(folder / "text_encoder", **parts)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    write_vae(folder / "vae")


def flux(folder):
    write_clip(folder / "tokenizer")
    write_t5(folder / "tokenizer_2")
    (folder / "tokenizer_2" / "spiece.model").write_bytes(spiece_model())
    parts = dict(width=8, heads=2, projection=6, activation="quick_gelu", seed=1)
    write_text_encoder(folder / "text_encoder", **parts)
    write_t5_encoder(folder / "text_encoder_2", width=12, vocab_size=400)
    write_vae(folder / "vae")


def pixart(folder):
    """Its tokenizer has neither tokenizer.json nor a vocabulary of words."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "spiece.model").write_bytes(spiece_model())
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    special |= dict(additional_special_tokens=sentinels)
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(special))
    config = special | dict(tokenizer_class="T5Tokenizer", extra_ids=100, model_max_length=120)
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    added = {name: len(T5_PIECES) + 99 - i for i, name in enumerate(sentinels)}
    (tokenizer / "added_tokens.json").write_text(json.dumps(added))
    write_t5_encoder(folder / "text_encoder", width=12, vocab_size=400)
    write_vae(folder / "vae")


ROWS = {  # of the table: what writes the folder, the encoders of a run, its number of tokens
    "sd3": (sd3, dict(text="sd3", identity="clip"), 87),
    "clip-of-sd1": (sd1, dict(text="clip"), 77),
    "t5-of-sd3": (sd3, dict(text="t5"), 10),
    "t5-of-flux": (flux, dict(text="t5"), 10),
    "t5-of-pixart": (pixart, dict(text="t5"), 10),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_pipeline_as_published_serves_a_run(tmp_path, row):
    write, chosen, num_tokens = ROWS[row]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder)
    variants(folder)
    around(folder)
    config = Conditioning(folder=str(folder), codec="vae", **chosen)
    encoders.check(config)
    tokenizer = load_tokenizer(encoders.tokenizer_folder(config))
    assert tokenizer("a cat", num_tokens).text_mask.sum() > 2


def test_a_folder_with_a_variant_only_says_so(tmp_path):
    write_vae(tmp_path)
    (tmp_path / f"{VAE}.safetensors").rename(tmp_path / f"{VAE}.fp16.safetensors")
    (tmp_path / f"{VAE}.bin").write_bytes(b"pickle")
    with pytest.raises(NotFoundError, match=rf"{VAE}\.fp16\.safetensors is a variant: rename it"):
        open_vae(tmp_path)


LEVELS = dict(
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    **dict(act_fn="silu", in_channels=3, out_channels=3, layers_per_block=2, norm_num_groups=32),
)
CLIP_L = dict(
    **dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    **dict(vocab_size=49408, max_position_embeddings=77, hidden_act="quick_gelu"),
    **dict(layer_norm_eps=1e-5, projection_dim=768, bos_token_id=0, eos_token_id=2, pad_token_id=1),
)
BIG_G = CLIP_L | dict(
    **dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32),
    **dict(num_attention_heads=20, hidden_act="gelu", projection_dim=1280),
)
VISION_L = dict(
    **dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
    **dict(image_size=224, patch_size=14, hidden_act="quick_gelu", projection_dim=768),
)
SD3 = dict(
    **dict(_class_name="SD3Transformer2DModel", attention_head_dim=64, in_channels=16),
    **dict(joint_attention_dim=4096, out_channels=16, patch_size=2, pooled_projection_dim=2048),
    **dict(sample_size=128, num_attention_heads=24, num_layers=24, caption_projection_dim=1536),
    **dict(pos_embed_max_size=192, _diffusers_version="0.29.0.dev0"),
)
KL = dict(_class_name="AutoencoderKL", _diffusers_version="0.29.0.dev0", **LEVELS)
QUANT = dict(use_quant_conv=False, use_post_quant_conv=False, latents_mean=None, latents_std=None)
CONFIGS = {  # as in the published config.json
    "sd1-vae": (open_vae, KL | dict(latent_channels=4, sample_size=512)),
    "sdxl-vae": (
        open_vae,
        KL | dict(latent_channels=4, scaling_factor=0.13025, force_upcast=True, sample_size=1024),
    ),
    "sd3-vae": (
        open_vae,
        KL | QUANT | dict(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609),
    ),
    "flux-vae": (
        open_vae,
        KL
        | QUANT
        | dict(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
        | dict(mid_block_add_attention=True, force_upcast=True),
    ),
    "clip-l": (open_clip_text, dict(model_type="clip_text_model", **CLIP_L)),
    "clip-big-g": (open_clip_text, dict(model_type="clip_text_model", **BIG_G)),
    "clip-whole": (
        open_clip_vision,
        dict(
            **dict(model_type="clip", projection_dim=768, logit_scale_init_value=2.6592),
            **dict(text_config=CLIP_L, text_config_dict=CLIP_L),
            **dict(vision_config=VISION_L, vision_config_dict=VISION_L),
        ),
    ),
    "clip-vision": (open_clip_vision, dict(model_type="clip_vision_model", **VISION_L)),
    "t5-xxl": (
        open_t5,
        dict(
            **dict(model_type="t5", d_model=4096, d_kv=64, d_ff=10240, num_layers=24),
            **dict(num_heads=64, vocab_size=32128, feed_forward_proj="gated-gelu"),
            **dict(relative_attention_num_buckets=32, relative_attention_max_distance=128),
            **dict(layer_norm_epsilon=1e-6, num_decoder_layers=24, dense_act_fn="gelu_new"),
            **dict(is_gated_act=True, tie_word_embeddings=False, dropout_rate=0.1),
        ),
    ),
    "dino-vits16": (
        open_dino,
        dict(
            **dict(model_type="vit", hidden_size=384, intermediate_size=1536),
            **dict(num_hidden_layers=12, num_attention_heads=6, hidden_act="gelu"),
            **dict(image_size=224, patch_size=16, num_channels=3, qkv_bias=True),
            **dict(layer_norm_eps=1e-12, pooler_act="tanh"),
        ),
    ),
    "sd3-medium": (open_transformer, SD3),
    "sd3.5-large": (
        open_transformer,
        SD3
        | dict(num_attention_heads=38, num_layers=38, caption_projection_dim=2432)
        | dict(qk_norm="rms_norm", dual_attention_layers=[]),
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_understood(tmp_path, name):
    """Then only the weights are missing, which are gigabytes."""
    open_, config = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotFoundError, match=r"has neither .*\.safetensors nor"):
        open_(tmp_path)


def test_sd35_medium_is_refused(tmp_path):
    config = SD3 | dict(qk_norm="rms_norm", dual_attention_layers=list(range(13)))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"dual_attention_layers is \[0, 1, .*; only \[\]"):
        open_transformer(tmp_path)
