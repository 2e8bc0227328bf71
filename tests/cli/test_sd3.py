"""Stage I on a Stable Diffusion 3 pipeline's folder through the command line, and bad folders."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.sd3_folder import write_sd3
from univg_jax import checkpoint
from univg_jax.cli.main import main
from univg_jax.interop.diffusers import WEIGHTS, open_transformer
from univg_jax.trees import flatten

pytestmark = pytest.mark.xdist_group("sd3")  # one worker writes the folder and compiles

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
            *(f"--config.{key}={value}" for key, value in flatten(FAST).items()),
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
    theirs = jax.tree.map(np.asarray, open_transformer(folder / "transformer").read())
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
    assert "is not a folder; the sd3 text encoder is read from it" in capsys.readouterr().err
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
        (no_tensor, "text_encoder_2/model.safetensors: tensors do not fit the network: missing: "),
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
    assert "nowhere' is not a folder" in capsys.readouterr().err
    assert train(tmp_path / "run", folder, "--config.data.num_tokens=40") == 1
    assert "num_tokens=40: CLIP takes 77 of it" in capsys.readouterr().err
    assert train(tmp_path / "run", folder, encoders="sd33") == 1
    assert "encoders='sd33' is not one of embedded, sd3" in capsys.readouterr().err
