"""Hugging Face folders: read onto any mesh, written back, and what is refused; on the networks of
an SD3 pipeline.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.sd3_folder import write_sd3
from univg_jax.errors import NotFoundError, UserError
from univg_jax.interop.diffusers import open_transformer, open_vae
from univg_jax.interop.transformers import open_clip_text, open_t5
from univg_jax.sharding import make_mesh, tree_shardings

OPEN = {
    "transformer": open_transformer,
    "vae": open_vae,
    "text_encoder": open_clip_text,
    "text_encoder_2": open_clip_text,
    "text_encoder_3": open_t5,
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return write_sd3(tmp_path_factory.mktemp("folder") / "sd3")


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", OPEN)
def test_written_back_is_the_same_and_again_in_several_files(pipeline, tmp_path, name):
    stored = OPEN[name](pipeline / name)
    params = stored.read()
    stored.write(tmp_path / "one", params)
    stored.write(tmp_path / "many", params, max_file_bytes=5000)
    for folder in ("one", "many"):
        again = OPEN[name](tmp_path / folder)
        assert again.module == stored.module
        assert_same_tree(again.read(), params)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    first = next(iter(load_file(next((tmp_path / "one").glob("*.safetensors"))).values()))
    assert first.dtype == np.float32


@pytest.mark.parametrize(
    "axes", [dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(data=8)]
)
@pytest.mark.parametrize("name", OPEN)
def test_every_mesh_holds_the_same_where_the_rules_say(pipeline, name, axes, monkeypatch):
    # these are tiny: nothing may be too small to split
    monkeypatch.setattr("univg_jax.sharding.MIN_SHARDED_SIZE", 0)
    mesh, stored = make_mesh(**axes), OPEN[name](pipeline / name)
    placed = stored.read(mesh=mesh)
    assert_same_tree(jax.device_get(placed), jax.device_get(stored.read()))
    assert jax.tree.map(lambda x: x.sharding, placed) == tree_shardings(stored.abstract, mesh)
    if axes.get("fsdp", 1) > 1:
        assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(placed))


def test_parameters_can_be_held_in_half_precision(pipeline):
    stored = open_t5(pipeline / "text_encoder_3", dtype=jnp.bfloat16)
    half = stored.read(dtype=jnp.bfloat16)
    assert_same_tree(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), stored.read()))


def test_a_fingerprint_tells_weights_apart(pipeline, tmp_path):
    stored = open_vae(pipeline / "vae")
    params = stored.read()
    stored.write(tmp_path / "same", params)
    params["decoder"]["conv_out"]["bias"] = params["decoder"]["conv_out"]["bias"] + 1e-3
    stored.write(tmp_path / "other", params)
    same, other = (open_vae(tmp_path / name).tensors.fingerprint() for name in ("same", "other"))
    assert same == open_vae(tmp_path / "same").tensors.fingerprint() != other


def test_other_parameters_are_not_written(pipeline, tmp_path):
    stored = open_vae(pipeline / "vae")
    params = stored.read()
    del params["decoder"]["conv_out"]["bias"]
    with pytest.raises(UserError, match=r"parameters: .*missing: decoder/conv_out/bias"):
        stored.write(tmp_path / "out", params)
    assert not (tmp_path / "out").exists()


def test_pickles_are_named_and_never_read(pipeline, tmp_path):
    folder = tmp_path / "vae"
    open_vae(pipeline / "vae").write(folder, open_vae(pipeline / "vae").read())
    weights = next(folder.glob("*.safetensors"))
    weights.rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(
        NotFoundError, match=r"diffusion_pytorch_model.bin is a pickle, .* never read"
    ):
        open_vae(folder)
