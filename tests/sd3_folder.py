"""A Stable Diffusion 3 pipeline's folder with tiny random networks and every file of a real one."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tests.data_pipelines.test_tokenizer import CLIP, END, write_clip, write_t5
from univg_jax.interop.diffusers import VAE, WEIGHTS, save_transformer, vae_weights
from univg_jax.interop.folder import CONV, map_weights, write_params
from univg_jax.interop.transformers import CLIP_LAYER, CLIP_TEXT, CLIP_VISION, T5, T5_LAYER
from univg_jax.models.clip import CLIPText, CLIPVision
from univg_jax.models.mmdit import MMDiT
from univg_jax.models.t5 import T5Encoder
from univg_jax.models.vae import AutoencoderKL

TRANSFORMER = MMDiT(
    hidden_dim=32,
    depth=2,
    num_heads=2,
    in_channels=4,
    out_channels=4,
    text_dim=28,
    pooled_dim=14,
    qk_norm=None,
    pos_embed_max_size=12,
    pos_embed_base_size=6,
)


def random_params(module, *inputs, seed):
    """Initial parameters with noise on all of them, so that every path is active."""
    params = module.init(jax.random.key(seed), *inputs)["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), params)


def write_text_encoder(folder, *, width, heads, projection, activation, seed):
    """Writes a CLIP text tower with the vocabulary of `write_clip`."""
    fields = dict(
        hidden_dim=width, depth=2, num_heads=heads, mlp_dim=2 * width, projection_dim=projection
    )
    module = CLIPText(vocab_size=len(CLIP), eos_token_id=CLIP[END], activation=activation, **fields)
    params = random_params(module, jnp.zeros((1, 2), jnp.int32), seed=seed)
    prefix = "text_model."
    write_params(
        folder,
        "model.safetensors",
        params=params,
        weights=map_weights(
            params,
            outer={ours: prefix + theirs for ours, theirs in CLIP_TEXT.items()}
            | {"projection": "text_projection"},
            block=CLIP_LAYER,
            block_name=prefix + "encoder.layers.{}.",
        ),
        config=dict(
            architectures=["CLIPTextModelWithProjection"],
            model_type="clip_text_model",
            vocab_size=len(CLIP),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=77,
            projection_dim=projection,
            hidden_act=activation,
            layer_norm_eps=1e-5,
            eos_token_id=CLIP[END],
            bos_token_id=CLIP[END] - 1,
        ),
    )


def write_t5_encoder(folder, *, width, vocab_size):
    """Writes a T5 encoder, in several files as the real one."""
    module = T5Encoder(
        vocab_size=vocab_size, hidden_dim=width, depth=2, num_heads=2, head_dim=5, mlp_dim=20
    )
    params = random_params(module, jnp.zeros((1, 2), jnp.int32), seed=3)
    outer = T5 | {"word_embeddings": "shared.weight"}
    write_params(
        folder,
        "model.safetensors",
        params=params,
        weights=map_weights(params, outer=outer, block=T5_LAYER, block_name="encoder.block.{}."),
        config=dict(
            architectures=["T5EncoderModel"],
            model_type="t5",
            vocab_size=vocab_size,
            d_model=width,
            d_kv=5,
            d_ff=20,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            layer_norm_epsilon=1e-6,
        ),
        max_file_bytes=3000,
    )


def write_image_encoder(folder):
    """Writes CLIP's image tower, which SD3 lacks; Stage III encodes faces with it."""
    fields = dict(
        image_size=16,
        patch_size=4,
        hidden_dim=10,
        depth=2,
        num_heads=2,
        mlp_dim=20,
        projection_dim=6,
    )
    module = CLIPVision(activation="gelu", **fields)
    params = random_params(module, jnp.zeros((1, 16, 16, 3)), seed=6)
    prefix = "vision_model."
    weights = map_weights(
        params,
        outer={ours: prefix + theirs for ours, theirs in CLIP_VISION.items()}
        | {"projection": "visual_projection"},
        block=CLIP_LAYER,
        block_name=prefix + "encoder.layers.{}.",
    )
    kernel = "embed/patch_embed/kernel"
    weights[kernel] = dataclasses.replace(weights[kernel], shape=(10, 3, 4, 4), axes=CONV)
    config = dict(
        model_type="clip_vision_model",
        image_size=16,
        patch_size=4,
        hidden_size=10,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=6,
        hidden_act="gelu",
    )
    write_params(folder, "model.safetensors", params=params, weights=weights, config=config)


def write_vae(folder, *, channels=4):
    """Writes a VAE of three levels."""
    module = AutoencoderKL(latent_channels=channels, widths=(8, 12, 16), depth=1, groups=4)
    params = random_params(module, jnp.zeros((1, 4, 4, 3)), seed=4)
    write_params(
        folder,
        WEIGHTS,
        params=params,
        weights=vae_weights(params, names=VAE),
        config=dict(
            _class_name="AutoencoderKL",
            block_out_channels=[8, 12, 16],
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            latent_channels=channels,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    )


def write_sd3(folder: Path, *, channels: int = 4) -> Path:
    """Writes transformer, VAE, three text encoders with tokenizers, scheduler and index.

    `channels` are those of a latent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_clip(folder / "tokenizer")
    write_clip(folder / "tokenizer_2", pad="!")
    write_t5(folder / "tokenizer_3")
    write_text_encoder(
        folder / "text_encoder", width=8, heads=2, projection=6, activation="quick_gelu", seed=1
    )
    write_text_encoder(
        folder / "text_encoder_2", width=12, heads=3, projection=8, activation="gelu", seed=2
    )
    write_t5_encoder(folder / "text_encoder_3", width=28, vocab_size=400)
    write_vae(folder / "vae", channels=channels)
    model = dataclasses.replace(TRANSFORMER, in_channels=channels, out_channels=channels)
    inputs = jnp.zeros((1, 2, 2, channels)), jnp.zeros((1, 1, 28)), jnp.zeros((1, 14)), jnp.zeros(1)
    save_transformer(model, random_params(model, *inputs, seed=5), folder / "transformer")
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = dict(
        _class_name="FlowMatchEulerDiscreteScheduler", num_train_timesteps=1000, shift=3.0
    )
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = dict(_class_name="StableDiffusion3Pipeline", _diffusers_version="0.30.0", **parts)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
