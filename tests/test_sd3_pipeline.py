"""Our sampler on a Stable Diffusion 3 pipeline's folder, against diffusers' own pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.collate import Collator
from data_pipelines.tasks import Example
from data_pipelines.tokenizer import load_tokenizer
from tests.helpers import prepare_encoders, record_parity, unused
from tests.sd3_folder import TRANSFORMER, random_params, write_sd3
from univg_jax.batch import Batch, BatchShape
from univg_jax.errors import UserError
from univg_jax.flow import sample_noise
from univg_jax.interop.diffusers import init_transformer, save_transformer
from univg_jax.models.mmdit import make_mmdit
from univg_jax.models.univg import UniVG
from univg_jax.sampling import Generator, guidance_weights
from univg_jax.settings import Guidance, Sampler

pytestmark = pytest.mark.xdist_group("sd3")  # one worker writes the folder and compiles

NAMES = ("", "_2", "_3")  # of a pipeline's text encoders
NUM_TOKENS = 77 + 12
ENCODERS = dict(text=dict(kind="sd3"), codec=dict(kind="vae"), identity=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


def test_parameters_that_do_not_fit_are_listed(folder):
    model = make_mmdit("tiny", **fields(hidden_dim=32, depth=3, num_heads=2))
    params = jax.eval_shape(model.init, jax.random.key(0), *model_inputs(model))["params"]
    with pytest.raises(
        UserError,
        match=r"init_from .*: tensors do not fit the network: missing: blocks/image/k_norm",
    ):
        init_transformer(params, model, folder / "transformer")


def test_public_weights_read_their_source_as_channels(folder):
    model = make_mmdit("tiny", **fields(source="tokens"))
    with pytest.raises(UserError, match=r"take model\.overrides\.source='channels', not 'tokens'"):
        init_transformer({}, model, folder / "transformer")


def fields(**overrides):
    """Fields of a backbone with the latents, text and positions of the folder's transformer."""
    same = {name: getattr(TRANSFORMER, name) for name in ("text_dim", "pooled_dim", "out_channels")}
    table = dict(pos_embed_max_size=12, pos_embed_base_size=6)
    return dict(in_channels=9, **same, **table) | overrides


def model_inputs(model):
    shapes = [(1, 2, 2, model.in_channels), (1, 1, model.text_dim), (1, model.pooled_dim), (1,)]
    return [jnp.zeros(shape) for shape in shapes]


@pytest.fixture(scope="module")
def generator(folder, tmp_path_factory):
    """Our sampler on the folder's networks: a UniVG model that begins as SD3."""
    found = prepare_encoders(
        dict(ENCODERS, folder=str(folder)),
        tmp_path_factory.mktemp("run"),
        images=unused,
        portraits=unused,
    )
    backbone = make_mmdit("tiny", **fields(hidden_dim=32, depth=2, num_heads=2, qk_norm=None))
    params = backbone.init(jax.random.key(7), *model_inputs(backbone))["params"]
    params = {"backbone": init_transformer(params, backbone, folder / "transformer")}
    generator = Generator(
        model=UniVG(backbone=backbone),
        conditioner=found.conditioner,
        sampler=Sampler(solver="euler", steps=6, shift=3.0),
    )
    return generator, params, found.frozen


def prompts(folder, *texts) -> Batch:
    """Rows of plain prompts: a text's task has a tag, which SD3 does not know."""
    tokenizer = load_tokenizer(str(folder))
    blank = Example(target=np.zeros((24, 24, 3), np.uint8), text="")
    shape = BatchShape(height=24, width=24, num_tokens=NUM_TOKENS, face=16)
    collator = Collator(tokenizer=tokenizer, shape=shape)
    batch = collator([collator.row(blank, task="t2i", sample_id=i) for i in range(len(texts))])
    encoded = [tokenizer(text, NUM_TOKENS) for text in texts]
    return dataclasses.replace(
        batch,
        tokens=np.stack([e.tokens for e in encoded]),
        text_mask=np.stack([e.text_mask for e in encoded]),
    )


@pytest.mark.parity
def test_the_whole_sampler_equals_diffusers_pipeline(folder, generator, record_property):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    generate, params, frozen = generator
    texts, scale, steps = ["a cat at it", "so, person 12"], 4.5, generate.sampler.steps
    passes = [prompts(folder, *texts), prompts(folder, "", "")]
    weights = guidance_weights(Guidance(text=scale))
    seeds = jnp.full(len(texts), 3, jnp.uint32)
    ours = generate(params, frozen, passes, weights=weights, seeds=seeds)

    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = np.asarray(sample_noise(jax.random.key(3), jnp.asarray(passes[0].sample_id), (6, 6, 4)))
    with torch.no_grad():
        theirs = pipeline(
            texts,
            height=24,
            width=24,
            guidance_scale=scale,
            latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
            # The same times as ours, before the shift; their default grid ends a thousandth above
            # zero.
            sigmas=np.linspace(1, 0, steps + 1)[:-1].tolist(),
            max_sequence_length=12,
            output_type="np",
        ).images
    error = np.abs((np.asarray(ours) + 1) / 2 - theirs).max()
    configuration = (
        f"3 text encoders, MM-DiT, VAE; {steps} Euler steps, shift 3, guidance {scale}, batch 2"
    )
    record_parity(
        record_property,
        network="StableDiffusion3Pipeline",
        configuration=configuration,
        image=error,
    )
    assert theirs.std() > 0.05
    assert error < 1e-3  # of a range of 1: float32 through 12 forward passes


@pytest.mark.parity
def test_the_velocity_of_the_inpainting_pipeline_is_ours(tmp_path, record_property):
    """What diffusers' own pipeline gives a transformer of 33 channels that we wrote."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    backbone = make_mmdit(
        "tiny", **fields(hidden_dim=32, depth=2, num_heads=2, in_channels=33, out_channels=16)
    )
    params = random_params(backbone, *model_inputs(backbone), seed=8)
    save_transformer(backbone, params, tmp_path)
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusion3InpaintPipeline(
        transformer=diffusers.SD3Transformer2DModel.from_pretrained(tmp_path),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=diffusers.AutoencoderKL(
            latent_channels=16, norm_num_groups=4, shift_factor=0.1, block_out_channels=(8,)
        ),
        **dict.fromkeys(f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in NAMES),
    )
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, 12, 12, 16)).astype(np.float32)
    text = rng.normal(size=(1, 5, backbone.text_dim)).astype(np.float32)
    pooled = rng.normal(size=(1, backbone.pooled_dim)).astype(np.float32)
    hole = np.zeros((12, 12), np.uint8)
    hole[2:9, 3:6] = 255
    seen = {}

    def keep(module, args, kwargs, output):
        seen.update(x=kwargs["hidden_states"], t=kwargs["timestep"], velocity=output[0])

    pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        pipeline(
            image=Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)),
            mask_image=Image.fromarray(hole),
            prompt_embeds=torch.tensor(text),
            pooled_prompt_embeds=torch.tensor(pooled),
            latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
            height=12,
            width=12,
            guidance_scale=0.0,
            strength=1.0,
            num_inference_steps=1,
            output_type="latent",
        )
    theirs = {name: np.asarray(x) for name, x in seen.items()}
    x, velocity = (theirs[name].transpose(0, 2, 3, 1) for name in ("x", "velocity"))
    # The image's latents are a sample of the VAE's: they are what is neither noise nor mask.
    mask, image = hole[None, ..., None] / np.float32(255), x[..., 17:]
    np.testing.assert_array_equal(x[..., :16], noise)
    np.testing.assert_array_equal(x[..., 16:17], mask)
    latents = np.concatenate([noise, image, mask], axis=-1)
    ours = backbone.apply({"params": params}, latents, text, pooled, theirs["t"] / 1000)
    error = np.abs(ours - velocity).max() / velocity.std()
    record_parity(
        record_property,
        network="StableDiffusion3InpaintPipeline",
        configuration="its velocity at one step; 33 channels, MM-DiT of 2 blocks",
        forward=error,
    )
    assert error <= 2e-5  # float32
