"""Stage I on a Stable Diffusion 3 pipeline's folder: training through the command line, bad
folders, and the whole sampler against diffusers' pipeline (marker `parity`).
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from data_pipelines.mixture import Row, collate
from data_pipelines.tasks import Example
from data_pipelines.tokenizer import load_tokenizer
from tests.helpers import record_parity
from tests.sd3_folder import TRANSFORMER, write_sd3
from univg_jax import checkpoint, encoders
from univg_jax.batch import Batch
from univg_jax.cli.main import main
from univg_jax.flow import sample_noise
from univg_jax.interop.diffusers import WEIGHTS, init_transformer, load_transformer
from univg_jax.models.mmdit import make_mmdit
from univg_jax.models.univg import UniVG
from univg_jax.sampling import Generator, Sampler, guidance_weights

pytestmark = pytest.mark.xdist_group("sd3")  # one worker writes the folder and compiles

NUM_TOKENS = 77 + 12
ENCODERS = dict(text=dict(kind="sd3"), codec=dict(kind="vae"), identity=None)
FAST = dict(
    train=dict(steps=2, save_every=1, eval_examples=8, sample_examples=2),
    optim=dict(warmup=1),
    sampling=dict(steps=2),
    data=dict(batch_size=8, build=dict(num_scenes=16, nouns=4)),
    model=dict(
        overrides=dict(hidden_dim=32, depth=2, num_heads=2, qk_norm=None, pos_embed_max_size=12)
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("sd3") / "pipeline")


def train(workdir, folder, *more, encoders="sd3"):
    return main(
        [
            "train",
            f"--config=experiments/stage1_t2i.py:size=tiny,res=32,encoders={encoders}",
            f"--workdir={workdir}",
            *(f"--config.{key}={value}" for key, value in checkpoint.flat(FAST).items()),
            "--config.model.overrides.pos_embed_base_size=6",
            f"--config.conditioning.folder={folder}",
            f"--config.data.dir={workdir.parent / 'data'}",
            *more,
        ]
    )


@pytest.mark.slow
def test_stage_one_trains_from_public_weights_and_samples(folder, tmp_path, capsys):
    assert (
        train(
            tmp_path / "run", folder, f"--config.init_from.path={folder}", "--config.optim.lr=0.0"
        )
        == 0
    )
    # At a learning rate of zero, what was saved is what was loaded, and zero for what SD3 lacks.
    params = jax.tree.map(
        np.asarray, checkpoint.load_params(tmp_path / "run", which="params")["backbone"]
    )
    theirs = jax.tree.map(np.asarray, load_transformer(folder / "transformer")[1])
    kernel = params["patch_embed"].pop("kernel").reshape(4, 9, -1)
    np.testing.assert_array_equal(
        kernel[:, :4].reshape(16, -1), theirs["patch_embed"].pop("kernel")
    )
    assert (kernel[:, 4:] == 0).all()
    jax.tree.map(np.testing.assert_array_equal, params, theirs)

    out = tmp_path / "image.png"
    sample = [
        "sample",
        f"--checkpoint={tmp_path / 'run'}",
        "--task=t2i",
        "--prompt=a cat",
        f"--out={out}",
    ]
    assert main(sample) == 0
    with Image.open(out) as image:
        assert image.size == (32, 32)
    # The weights may have moved since, but not changed.
    moved = folder.rename(tmp_path / "moved")
    assert main(sample) == 1
    assert "is no folder; the sd3 text encoder is read from it" in capsys.readouterr().err
    assert main([*sample, f"--pretrained={moved}"]) == 0
    moved.rename(folder)


def spoil(folder, file, change):
    tensors = {name: np.array(value) for name, value in load_file(folder / file).items()}
    save_file(change(tensors), folder / file)


def another_family(folder):
    (folder / "vae" / "config.json").write_text(json.dumps(dict(_class_name="AutoencoderDC")))


def truncated(folder):
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def wrong_dtype(folder):
    spoil(
        folder,
        f"vae/{WEIGHTS}",
        lambda tensors: {n: x.astype(np.float64) for n, x in tensors.items()},
    )


def no_tokenizer_file(folder):
    (folder / "tokenizer_2" / "merges.txt").unlink()


def no_part(folder):
    (folder / "text_encoder_3" / "model-00002-of-00011.safetensors").unlink()


def no_tensor(folder):
    spoil(
        folder, "text_encoder_2/model.safetensors", lambda tensors: dict(list(tensors.items())[1:])
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            another_family,
            "vae/config.json: expected _class_name 'AutoencoderKL', got 'AutoencoderDC'",
        ),
        (truncated, "text_encoder/model.safetensors is not a readable safetensors file"),
        (wrong_dtype, "expected tensors of F32, F16, BF16, got "),
        (no_tokenizer_file, "tokenizer_2 has no merges.txt beside its vocab.json"),
        (
            no_part,
            "lacks model-00002-of-00011.safetensors, which model.safetensors.index.json names",
        ),
        (no_tensor, "text_encoder_2: tensors do not fit the network: missing: "),
    ],
)
def test_a_bad_folder_is_one_line_before_anything_is_written(tmp_path, capsys, damage, message):
    folder = write_sd3(tmp_path / "sd3")
    damage(folder)
    assert train(tmp_path / "run", folder) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sd3"]


def test_a_folder_that_is_not_there_and_a_wrong_length(tmp_path, folder, capsys):
    assert train(tmp_path / "run", tmp_path / "nowhere") == 1
    assert "is no folder; the sd3 text encoder is read from it" in capsys.readouterr().err
    assert train(tmp_path / "run", folder, "--config.data.num_tokens=40") == 1
    assert "num_tokens=40: CLIP takes 77 of it" in capsys.readouterr().err
    assert train(tmp_path / "run", folder, encoders="sd33") == 1
    assert "encoders='sd33' is not one of embedded, sd3" in capsys.readouterr().err


def test_parameters_that_do_not_fit_are_listed(folder):
    model = make_mmdit("tiny", **fields(hidden_dim=32, depth=3, num_heads=2))
    params = jax.eval_shape(model.init, jax.random.key(0), *model_inputs(model))["params"]
    with pytest.raises(
        ValueError,
        match=r"init_from .*: tensors do not fit the network: missing: blocks/image/k_norm",
    ):
        init_transformer(params, model, folder / "transformer")


def unused():
    raise AssertionError("nothing is fitted here")


def fields(**overrides):
    """Of a UniVG backbone whose latents, text and positions are those of the folder's transformer."""
    same = {name: getattr(TRANSFORMER, name) for name in ("text_dim", "pooled_dim", "out_channels")}
    table = dict(pos_embed_max_size=12, pos_embed_base_size=6)
    return dict(in_channels=9, **same, **table) | overrides


def model_inputs(model):
    shapes = [(1, 2, 2, model.in_channels), (1, 1, model.text_dim), (1, model.pooled_dim), (1,)]
    return [jnp.zeros(shape) for shape in shapes]


@pytest.fixture(scope="module")
def generator(folder, tmp_path_factory):
    """Our sampler on the folder's networks: a UniVG model that begins as SD3."""
    conditioner, frozen = encoders.prepare(
        dict(ENCODERS, folder=str(folder)),
        workdir=tmp_path_factory.mktemp("run"),
        images=unused,
        portraits=unused,
    )
    backbone = make_mmdit("tiny", **fields(hidden_dim=32, depth=2, num_heads=2, qk_norm=None))
    params = backbone.init(jax.random.key(7), *model_inputs(backbone))["params"]
    params = {"backbone": init_transformer(params, backbone, folder / "transformer")}
    sampler = Sampler(solver="euler", steps=6, shift=3.0)
    return (
        Generator(model=UniVG(backbone=backbone), conditioner=conditioner, sampler=sampler),
        params,
        frozen,
    )


def prompts(folder, *texts) -> Batch:
    """Rows of plain prompts: a text's task has a tag, which SD3 does not know."""
    tokenizer = load_tokenizer(str(folder))
    blank = Example(target=np.zeros((24, 24, 3), np.uint8), text="")
    rows = [Row(example=blank, task="t2i", sample_id=i) for i in range(len(texts))]
    batch = collate(
        rows, tokenizer=tokenizer, resolution=24, num_tokens=NUM_TOKENS, face_resolution=16
    )
    encoded = [tokenizer(text, NUM_TOKENS) for text in texts]
    tokens, text_mask = (
        np.stack([e.tokens for e in encoded]),
        np.stack([e.text_mask for e in encoded]),
    )
    return dataclasses.replace(batch, tokens=tokens, text_mask=text_mask)


@pytest.mark.parity
def test_the_whole_sampler_equals_diffusers_pipeline(folder, generator, record_property):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    generate, params, frozen = generator
    texts, scale, steps = ["a cat at it", "so, person 12"], 4.5, generate.sampler.steps
    passes = [prompts(folder, *texts), prompts(folder, "", "")]
    ours = generate(params, frozen, passes, weights=guidance_weights(text=scale), seed=3)

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
