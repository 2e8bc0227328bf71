"""MM-DiT against diffusers: live where torch is there (marker `parity`), by a stored reference
elsewhere.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import record_parity
from univg_jax.errors import NotFoundError, UserError
from univg_jax.interop.diffusers import WEIGHTS, load_transformer, save_transformer
from univg_jax.models.mmdit import MMDiT

REFERENCE = Path(__file__).parents[1] / "data" / "mmdit_reference.npz"
TINY = MMDiT(
    hidden_dim=16,
    depth=3,
    num_heads=2,
    in_channels=5,
    out_channels=2,
    text_dim=6,
    pooled_dim=3,
    pos_embed_max_size=8,
    pos_embed_base_size=4,
)

# num_layers, heads, head width, patch, channels in and out, qk_norm, (height, width) of latents,
# text tokens, batch
CONFIGS = {
    "qk-norm": (3, 4, 8, 2, 33, 16, "rms_norm", (8, 12), 7, 3),
    "no-qk-norm": (2, 3, 12, 2, 5, 4, None, (6, 10), 5, 2),
    "one-head": (2, 1, 20, 1, 3, 3, "rms_norm", (5, 7), 1, 2),
    "many-heads": (4, 11, 4, 3, 9, 5, "rms_norm", (9, 15), 13, 5),
    "one-block": (1, 2, 8, 2, 4, 4, None, (4, 4), 3, 1),
}


def inputs(model, *, height=6, width=10, tokens=5, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return dict(
        latents=normal(batch, height, width, model.in_channels),
        text_emb=normal(batch, tokens, model.text_dim),
        pooled_emb=normal(batch, model.pooled_dim),
        t=rng.uniform(size=batch).astype(np.float32),
    )


def random_params(model, seed=1, scale=0.3):
    """Parameters with nothing at zero or one, so that every path is active."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs(model, height=6, width=6))[
        "params"
    ]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


def quick_jit(f):
    """`jit` for programs that run once: most of these tests' time is compilation."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def apply(model, params, **kwargs):
    return quick_jit(lambda p, k: model.apply({"params": p}, **k))(params, kwargs)


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edit(folder, change):
    """Rewrites a folder's tensors through `change(dict) -> dict`."""
    tensors = {name: np.array(value) for name, value in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_round_trip_is_exact(tmp_path, qk_norm):
    model = dataclasses.replace(TINY, qk_norm=qk_norm)
    params = random_params(model)
    save_transformer(model, params, tmp_path)
    loaded, loaded_params = load_transformer(tmp_path)
    assert loaded == model
    assert_same_tree(loaded_params, params)


def as_theirs(latents, channels):
    """(noise, image, mask) as diffusers' inpainting pipeline has them: (noise, mask, image)."""
    noise, image, mask = np.split(latents, [channels, 2 * channels], axis=-1)
    return np.concatenate([noise, mask, image], axis=-1)


def test_inputs_of_inpainting_are_stored_in_diffusers_order(tmp_path):
    """TINY has two channels of noise, two of the image, one of the mask."""
    params = random_params(TINY)
    save_transformer(TINY, params, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)["pos_embed.proj.weight"]  # [out in h w]
    x = inputs(TINY, height=2, width=2)["latents"]
    # A patch as their convolution sees it, and as our matrix does.
    theirs = np.einsum("bhwc,dchw->bd", as_theirs(x, 2), stored)
    ours = x.reshape(len(x), -1) @ params["patch_embed"]["kernel"]
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_who_wrote_an_inpainting_folder_decides_its_order(tmp_path):
    params = random_params(TINY)
    save_transformer(TINY, params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    def loaded(version, mark):
        changed = config | {"_diffusers_version": version, "_univg_channels": mark}
        changed = {name: value for name, value in changed.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        return load_transformer(tmp_path)[1]["patch_embed"]["kernel"]

    ours = params["patch_embed"]["kernel"]
    for version in ("0.30.0", "0.35.1"):
        np.testing.assert_array_equal(loaded(version, "noise, mask, image"), ours)
        other = loaded(version, "noise, image, mask").reshape(2, 2, 5, -1)
        np.testing.assert_array_equal(other[:, :, [0, 1, 3, 4, 2]], ours.reshape(2, 2, 5, -1))
    np.testing.assert_array_equal(loaded("0.35.1", None), ours)  # a public one
    for version, mark in (("0.30.0", None), ("0.35.1", "mask, noise, image")):
        with pytest.raises(UserError, match=r"earlier versions of univg_jax wrote 5 channels as"):
            loaded(version, mark)


def test_sharded_files_hold_the_same(tmp_path):
    params = random_params(TINY)
    save_transformer(TINY, params, tmp_path / "one")
    save_transformer(TINY, params, tmp_path / "many", max_file_bytes=20_000)
    parts = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(parts) > 3
    assert_same_tree(load_transformer(tmp_path / "many")[1], load_transformer(tmp_path / "one")[1])
    parts[1].unlink()
    with pytest.raises(NotFoundError, match=parts[1].name):
        load_transformer(tmp_path / "many")


def test_half_precision_files_load_as_float32(tmp_path):
    params = random_params(TINY)
    save_transformer(TINY, params, tmp_path)
    edit(
        tmp_path,
        lambda tensors: {name: value.astype(jnp.bfloat16) for name, value in tensors.items()},
    )
    _, loaded = load_transformer(tmp_path)
    assert_same_tree(
        loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    )


def test_wrong_tensors_are_listed(tmp_path):
    save_transformer(TINY, random_params(TINY), tmp_path)

    def spoil(tensors):
        del tensors["proj_out.weight"]
        tensors["transformer_blocks.1.attn.to_q.weight"] = np.zeros((3, 4), np.float32)
        return tensors | {"surplus": np.zeros(2, np.float32)}

    edit(tmp_path, spoil)
    with pytest.raises(
        UserError,
        match=r"missing: proj_out.weight; extra: surplus; misshaped: transformer_blocks.1",
    ) as e:
        load_transformer(tmp_path)
    assert "(expected [16, 16], got [3, 4])" in str(e.value)


def test_other_spoiled_folders(tmp_path):
    save_transformer(TINY, random_params(TINY), tmp_path)
    good = (tmp_path / "config.json").read_text()

    def refuses(message, error=UserError, **config):
        (tmp_path / "config.json").write_text(json.dumps({**json.loads(good), **config}))
        with pytest.raises(error, match=message):
            load_transformer(tmp_path)

    refuses("expected _class_name 'SD3Transformer2DModel', got 'UNet'", _class_name="UNet")
    refuses("dual_attention_layers", dual_attention_layers=[0])
    refuses("misshaped: pos_embed.pos_embed", pos_embed_max_size=9)
    refuses("not the sin-cos table", sample_size=32)
    (tmp_path / "config.json").write_text(good)
    edit(tmp_path, lambda tensors: {**tensors, "proj_out.bias": np.zeros(8, np.int32)})
    refuses(r"proj_out.bias \(I32\)")
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-100])
    refuses("not a readable safetensors file")
    with pytest.raises(NotFoundError, match=r"config.json"):
        load_transformer(tmp_path / "nowhere")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "transformer" / "config.json")
    with pytest.raises(NotFoundError, match="subfolder transformer has one"):
        load_transformer(tmp_path)


def test_what_diffusers_lacks_is_not_written(tmp_path):
    for option in (
        dict(position="rope"),
        dict(sandwich_norm=True),
        dict(shared_adaln=True),
        dict(source="tokens"),
        dict(mlp_ratio=2),
        dict(head_dim=16),
    ):
        model = dataclasses.replace(TINY, **option)
        with pytest.raises(UserError, match=f"diffusers has no .* with {next(iter(option))}"):
            save_transformer(model, {}, tmp_path)
    with pytest.raises(UserError, match="missing: blocks/image/attn_out/bias"):
        save_transformer(TINY, {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_equals_the_stored_diffusers_activation():
    """`mmdit_reference.npz` is diffusers' output for these parameters: see
    `test_the_stored_activation_is_current`.
    """
    want = np.load(REFERENCE)["output"]
    got = apply(TINY, random_params(TINY), **inputs(TINY))
    np.testing.assert_allclose(got, want, atol=2e-5 * want.std())  # float32 through three blocks


def theirs(model, folder):
    """diffusers' model from a folder."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)


def their_output(reference, x):
    import torch

    latents, channels = x["latents"], reference.config.out_channels
    if latents.shape[-1] == 2 * channels + 1:
        latents = as_theirs(latents, channels)
    out = reference(
        hidden_states=torch.tensor(latents.transpose(0, 3, 1, 2)),
        encoder_hidden_states=torch.tensor(x["text_emb"]),
        pooled_projections=torch.tensor(x["pooled_emb"]),
        timestep=1000 * torch.tensor(x["t"]),
    )
    return out.sample.permute(0, 2, 3, 1)


@pytest.mark.parity
def test_the_stored_activation_is_current(tmp_path):
    """Fails where the reference is out of date; delete the file to write it anew."""
    pytest.importorskip("torch")
    save_transformer(TINY, random_params(TINY), tmp_path)
    output = their_output(theirs(TINY, tmp_path), inputs(TINY)).detach().numpy()
    if not REFERENCE.exists():
        np.savez(REFERENCE, output=output)
    # other torch kernels
    np.testing.assert_allclose(np.load(REFERENCE)["output"], output, atol=1e-5 * output.std())


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_gradients_equal_diffusers(tmp_path, name, record_property):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    depth, heads, width, patch, c_in, c_out, qk_norm, (h, w), tokens, batch = CONFIGS[name]
    torch.manual_seed(0)
    reference = diffusers.SD3Transformer2DModel(
        sample_size=4 * patch,
        patch_size=patch,
        in_channels=c_in,
        num_layers=depth,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=10,
        caption_projection_dim=heads * width,
        pooled_projection_dim=6,
        out_channels=c_out,
        pos_embed_max_size=9,
        qk_norm=qk_norm,
    )
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.1 * torch.randn_like(p)  # larger, and float32 is ill-conditioned on either side
    reference.save_pretrained(tmp_path / "theirs")
    model, params = load_transformer(tmp_path / "theirs")
    x = inputs(model, height=h, width=w, tokens=tokens, batch=batch)
    cotangent = np.random.default_rng(2).normal(size=(batch, h, w, c_out)).astype(np.float32)

    want = their_output(reference, x)
    (want * torch.tensor(cotangent)).sum().backward()
    want = want.detach().numpy()

    def loss(params):
        out = model.apply({"params": params}, **x)
        return jnp.sum(out * cotangent), out

    grads, out = quick_jit(jax.grad(loss, has_aux=True))(params)
    forward_error = np.abs(out - want).max() / want.std()
    # float32 roundings, and PyTorch's exp is an ulp off in a time frequency
    assert forward_error <= 2e-5

    # Their gradients become our tree on the way that weights take.
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    reference.save_pretrained(tmp_path / "gradients")
    _, want_grads = load_transformer(tmp_path / "gradients")
    gradient_error = 0.0
    for (path, want_grad), grad in zip(
        jax.tree_util.tree_leaves_with_path(want_grads), jax.tree.leaves(grads), strict=True
    ):
        error = np.abs(grad - want_grad).max() / np.abs(want_grad).max()
        gradient_error = max(gradient_error, error)
        assert error <= 1e-4, f"{jax.tree_util.keystr(path)}: {error}"
    configuration = (
        f"{heads} heads of {width}, {depth} blocks, patch {patch}, channels {c_in} to {c_out}, "
        f"qk norm {qk_norm}, latents {h}x{w}, {tokens} text tokens, batch {batch}"
    )
    errors = dict(forward=forward_error, gradient=gradient_error)
    record_parity(
        record_property,
        network="MM-DiT (SD3Transformer2DModel)",
        configuration=configuration,
        **errors,
    )

    # and back: what we write, they open as the same function
    save_transformer(
        model, load_transformer(tmp_path / "theirs")[1], tmp_path / "ours", max_file_bytes=50_000
    )
    np.testing.assert_allclose(
        their_output(theirs(model, tmp_path / "ours"), x).detach(), want, atol=1e-6 * want.std()
    )
