"""The VAE against diffusers' `AutoencoderKL`: live where torch is there (marker `parity`), stored
elsewhere.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import record_parity
from univg_jax.errors import UserError
from univg_jax.interop.diffusers import WEIGHTS, load_vae
from univg_jax.sharding import make_mesh
from univg_jax.trees import named_leaves

REFERENCE = Path(__file__).parents[1] / "data" / "vae_reference.npz"

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
TINY = dict(
    _class_name="AutoencoderKL",
    down_block_types=[DOWN] * 2,
    up_block_types=[UP] * 2,
    block_out_channels=[8, 12],
    layers_per_block=1,
    latent_channels=3,
    norm_num_groups=4,
    shift_factor=0.1,
)

# config, (height, width), batch
CONFIGS = {
    "sd": (
        dict(block_out_channels=(16, 24, 32, 32), layers_per_block=2, norm_num_groups=8),
        (24, 40),
        2,
    ),
    "sd3": (
        dict(
            block_out_channels=(16, 32, 48),
            layers_per_block=2,
            latent_channels=16,
            norm_num_groups=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        (20, 12),
        3,
    ),
    "no-attention": (
        dict(
            block_out_channels=(6, 10),
            latent_channels=1,
            norm_num_groups=1,
            mid_block_add_attention=False,
        ),
        (14, 10),
        2,
    ),
    "one-level": (
        dict(block_out_channels=(12,), norm_num_groups=12, use_post_quant_conv=False),
        (7, 5),
        1,
    ),
    "narrowing": (
        dict(
            block_out_channels=(64, 32),
            layers_per_block=3,
            norm_num_groups=32,
            use_quant_conv=False,
        ),
        (6, 18),
        5,
    ),
}


def images(height, width, batch, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def random_tensors(shapes, seed=1):
    """A file's tensors, by their names in order: norms near the identity, other maps of about unit
    gain.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        value = rng.normal(size=shape)
        if len(shape) > 1:
            value /= np.sqrt(np.prod(shape[1:]))
        else:
            value = 0.1 * value + ("norm" in name and name.endswith("weight"))
        tensors[name] = value.astype(np.float32)
    return tensors


@pytest.fixture
def folder(tmp_path):
    """diffusers' folder of `TINY`, with the tensors that the reference lists."""
    shapes = json.loads(str(np.load(REFERENCE)["shapes"]))
    save_file(random_tensors(shapes), tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def apply(model, params, x, method):
    return jax.jit(
        lambda p, x: model.apply({"params": p}, x, method=method),
        compiler_options={"xla_backend_optimization_level": 0},
    )(params, x)


def test_equals_the_stored_diffusers_activations(folder):
    """`vae_reference.npz` is diffusers' output for these parameters: see
    `test_the_stored_activations_are_current`.
    """
    model, params = load_vae(folder)
    assert (model.shift_factor, model.scaling_factor, model.downsampling) == (0.1, 0.18215, 2)
    want = np.load(REFERENCE)
    x = images(6, 10, batch=2)
    moments = apply(model, params, x, "encode_raw")
    for got, name in ((moments.mean, "mean"), (moments.logvar, "logvar")):
        # float32 through the levels
        np.testing.assert_allclose(got, want[name], atol=2e-5 * want[name].std())
    decoded = apply(model, params, (want["mean"] - 0.1) * 0.18215, "decode")
    np.testing.assert_allclose(decoded, want["decoded"], atol=2e-5 * want["decoded"].std())


def test_old_names_of_the_attention(folder):
    want = load_vae(folder)[1]
    tensors = {name: np.array(value) for name, value in load_file(folder / WEIGHTS).items()}
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        tensors = {name.replace(f".{new}.", f".{old}."): value for name, value in tensors.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, folder / WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, load_vae(folder)[1], want)


def test_parameters_go_where_they_are_asked(folder):
    mesh = make_mesh(fsdp=8)
    model, params = load_vae(folder, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, mesh=mesh)
    assert model.dtype == jnp.bfloat16
    for leaf in named_leaves(params).values():
        assert leaf.dtype == jnp.bfloat16
        assert leaf.sharding.mesh == mesh


def test_other_families_and_variants_are_refused(folder):
    def refuses(message, **config):
        (folder / "config.json").write_text(json.dumps(TINY | config))
        with pytest.raises(UserError, match=message) as error:
            load_vae(folder)
        assert "\n" not in str(error.value)

    refuses(
        "expected _class_name 'AutoencoderKL', got 'AutoencoderTiny'", _class_name="AutoencoderTiny"
    )
    refuses(
        r"down_block_types is \['AttnDownEncoderBlock2D', 'DownEncoderBlock2D'\]; only",
        down_block_types=["AttnDownEncoderBlock2D", DOWN],
    )
    refuses("up_block_types is .*; only", up_block_types=[UP])
    refuses("act_fn is 'relu'; only 'silu'", act_fn="relu")
    refuses("in_channels is 4; only 3", in_channels=4)
    refuses("out_channels is 1; only 3", out_channels=1)
    refuses("latents_mean is .*; only None", latents_mean=[0.0, 1.0, 2.0])
    refuses(r"widths \[12\] do not divide into 8 groups", norm_num_groups=8)
    refuses("extra: .*quant_conv.bias", use_quant_conv=False)
    refuses("extra: .*mid_block.attentions.0.group_norm.bias", mid_block_add_attention=False)
    refuses(
        r"misshaped: .*conv_in.weight \(expected \[12, 5, 3, 3\], got \[12, 3, 3, 3\]\)",
        latent_channels=5,
    )
    refuses("missing: decoder.up_blocks.0.resnets.2.conv1.bias, .* and 20 more", layers_per_block=2)


def theirs(config):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    levels = len(config["block_out_channels"])
    config = dict(down_block_types=[DOWN] * levels, up_block_types=[UP] * levels) | config
    return diffusers.AutoencoderKL(**{k: v for k, v in config.items() if k != "_class_name"}).eval()


def their_outputs(reference, x):
    """(mean, logvar, decoded mean)."""
    import torch

    with torch.no_grad():
        distribution = reference.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latent_dist
        decoded = reference.decode(distribution.mean).sample
    return [
        y.permute(0, 2, 3, 1).numpy() for y in (distribution.mean, distribution.logvar, decoded)
    ]


@pytest.mark.parity
def test_the_stored_activations_are_current():
    """Fails where the reference is out of date; delete the file to write it anew."""
    torch = pytest.importorskip("torch")
    reference = theirs(TINY)
    shapes = {name: list(value.shape) for name, value in reference.state_dict().items()}
    reference.load_state_dict(
        {name: torch.tensor(value) for name, value in random_tensors(shapes).items()}
    )
    outputs = dict(
        zip(("mean", "logvar", "decoded"), their_outputs(reference, images(6, 10, batch=2)))
    )
    if not REFERENCE.exists():
        np.savez_compressed(REFERENCE, shapes=json.dumps(shapes), **outputs)
    stored = np.load(REFERENCE)
    assert json.loads(str(stored["shapes"])) == shapes
    for name, output in outputs.items():
        # other torch kernels
        np.testing.assert_allclose(stored[name], output, atol=1e-5 * output.std())


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(tmp_path, name, record_property):
    torch = pytest.importorskip("torch")
    config, (height, width), batch = CONFIGS[name]
    reference = theirs(config)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.05 * torch.randn_like(p)
    reference.save_pretrained(tmp_path)
    model, params = load_vae(tmp_path)
    x = images(height, width, batch)
    wanted = their_outputs(reference, x)
    moments = apply(model, params, x, "encode_raw")
    decoded = apply(model, params, model.normalize(wanted[0]), "decode")
    error = max(
        np.abs(got - want).max() / want.std()
        for got, want in zip((moments.mean, moments.logvar, decoded), wanted)
    )
    options = ", ".join(f"{key} {value}" for key, value in config.items())
    configuration = f"{options}; {height}x{width} px, batch {batch}; mean, log variance, decoded"
    record_parity(
        record_property, network="VAE (AutoencoderKL)", configuration=configuration, forward=error
    )
    assert error <= 2e-5  # float32 roundings


@pytest.mark.parity
def test_tiling_changes_no_more_than_in_diffusers(tmp_path):
    """Their rule has ragged last tiles, ours equal ones; with the same size and overlap ours is
    closer to no tiling.
    """
    torch = pytest.importorskip("torch")
    reference = theirs(CONFIGS["sd3"][0])
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.05 * torch.randn_like(p)
    reference.save_pretrained(tmp_path)
    model, params = load_vae(tmp_path)
    tiled = model.clone(tile_size=32, tile_overlap=8)
    y, x = np.mgrid[:96, :64] / 2
    x = np.stack([np.sin(x + y / 3), np.cos(y - x / 2), np.sin(x / 2) * np.cos(y)], -1)[
        None
    ].astype(np.float32)
    (mean, _, decoded), ours = (
        their_outputs(reference, x),
        apply(tiled, params, x, "encode_raw").mean,
    )
    ours_decoded = apply(tiled, params, model.normalize(mean), "decode")
    reference.enable_tiling()
    (
        reference.tile_sample_min_size,
        reference.tile_latent_min_size,
        reference.tile_overlap_factor,
    ) = 32, 8, 0.25
    theirs_tiled = their_outputs(reference, x)[0]
    with torch.no_grad():
        theirs_decoded = (
            reference.decode(torch.tensor(mean.transpose(0, 3, 1, 2)))
            .sample.permute(0, 2, 3, 1)
            .numpy()
        )
    for plain, our, their in ((mean, ours, theirs_tiled), (decoded, ours_decoded, theirs_decoded)):
        assert 0 < np.abs(our - plain).mean() <= np.abs(their - plain).mean()
