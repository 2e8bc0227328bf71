"""Batch -> conditions, and how a run gets, keeps and hands on its frozen encoders."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from data_pipelines.tokenizer import load_tokenizer
from tests.sd3_folder import write_image_encoder, write_sd3
from univg_jax import conditioning, sharding
from univg_jax.batch import fake_batch

SPEC = dict(batch_size=4, resolution=16, num_tokens=10, face_resolution=16)
CONFIG = dict(text="minilm", codec=dict(kind="linear", patch=4, channels=8, whiten=0.5), identity=None)
WITH_FACES = {**CONFIG, "identity": dict(kind="lda", dim=4)}


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)


def portraits() -> tuple[np.ndarray, np.ndarray]:
    return images(), np.arange(40) // 4


def unused():
    raise AssertionError("nothing should be fitted here")


def prepare(config, workdir, **options):
    options = dict(images=images, portraits=portraits) | options
    return conditioning.prepare(config, workdir=workdir, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, *prepare(WITH_FACES, workdir)


@pytest.fixture(scope="module")
def batch():
    batch = fake_batch(**SPEC)
    face = np.random.default_rng(1).integers(0, 256, batch.face.shape, dtype=np.uint8)
    return dataclasses.replace(batch, face=face, has_face=np.array([True, False, True, False]))


@pytest.fixture(scope="module")
def conditions(run, batch):
    _, conditioner, frozen = run
    return jax.jit(conditioner.conditions)(frozen, batch)


def test_shapes_follow_the_properties(run, batch, conditions):
    _, c, frozen = run
    assert conditions.cond_latents.shape == (4, 16 // c.downsampling, 16 // c.downsampling, c.latent_channels)
    assert conditions.mask.shape == (4, 4, 4, 1)
    assert conditions.text_emb.shape == (4, 10, c.text_dim)
    assert conditions.pooled_emb.shape == (4, c.pooled_dim)
    assert conditions.face_emb.shape == (4, c.face_dim)
    assert jax.jit(c.target_latents)(frozen, batch).shape == conditions.cond_latents.shape


def test_absent_parts_are_zero_and_present_ones_are_not(run, batch, conditions):
    _, c, frozen = run
    absent = ~batch.has_source
    assert (np.asarray(conditions.cond_latents)[absent] == 0).all()
    # A black source is something else than no source.
    assert np.abs(c.encode(frozen, batch.source[absent])).max() > 0.1
    present = c.encode(frozen, batch.source[~absent])
    # The compiled and the eager matmul may sum in another order.
    np.testing.assert_allclose(np.asarray(conditions.cond_latents)[~absent], present, atol=1e-5)
    norms = np.linalg.norm(conditions.face_emb, axis=-1)
    np.testing.assert_allclose(norms, batch.has_face, atol=1e-5)  # unit vectors in float32
    assert (np.asarray(conditions.text_emb)[~batch.text_mask] == 0).all()
    assert (np.abs(np.asarray(conditions.text_emb)[batch.text_mask]).max(-1) > 0).all()


def test_a_latent_cell_touched_by_the_hole_is_generated(run, batch):
    _, c, frozen = run
    mask = np.zeros((4, 16, 16, 1), np.uint8)
    mask[0, 5, 3] = 1
    mask[1, 4:8, 8:12] = 1
    result = np.asarray(jax.jit(c.conditions)(frozen, dataclasses.replace(batch, mask=mask)).mask)
    expected = np.zeros((4, 4, 4, 1))
    expected[0, 1, 0] = expected[1, 1, 2] = 1
    np.testing.assert_array_equal(result, expected)


def test_bytes_and_floats_encode_alike_and_decode_stays_in_range(run):
    _, c, frozen = run
    x = images()[:2]
    a, b = c.encode(frozen, x), c.encode(frozen, jnp.asarray(x, jnp.float32) / 127.5 - 1)
    np.testing.assert_array_equal(a, b)
    assert np.abs(c.decode(frozen, 100 * a)).max() == 1


def test_encoders_are_frozen(run, batch):
    _, c, frozen = run

    def loss(frozen):
        leaves = [*jax.tree.leaves(c.conditions(frozen, batch)), c.target_latents(frozen, batch)]
        return sum(jnp.sum(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating))

    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(frozen)))


def test_without_an_identity_encoder_faces_have_no_width(tmp_path, batch):
    c, frozen = prepare(CONFIG, tmp_path, portraits=unused)
    assert c.face_dim is None
    assert set(frozen) == {"text", "codec"}
    assert jax.eval_shape(c.conditions, frozen, batch).face_emb.shape == (4, 0)
    with pytest.raises(ValueError, match="no identity encoder"):
        c.identify(frozen, batch.face)


def test_a_second_start_and_a_load_fit_nothing(run):
    workdir, conditioner, frozen = run
    for again, params in (
        prepare(ml_collections.ConfigDict(WITH_FACES), workdir, images=unused, portraits=unused),
        conditioning.load(str(workdir)),
    ):
        assert again == conditioner
        jax.tree.map(np.testing.assert_array_equal, params, frozen)


def test_a_stage_takes_over_the_codec_and_fits_what_is_new(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    _, one = prepare(CONFIG, first)
    checkpoint = first / "checkpoints" / "100"  # a checkpoint inside the run says as much as the run's folder
    checkpoint.mkdir(parents=True)
    _, two = prepare(WITH_FACES, second, init_from=checkpoint, images=unused)
    jax.tree.map(np.testing.assert_array_equal, one["codec"], two["codec"])
    assert "identity" in two
    other = {**CONFIG, "codec": dict(kind="linear", channels=6)}
    with pytest.raises(ValueError, match=r"another codec encoder .*: channels is 8, asked for 6"):
        prepare(other, tmp_path / "third", init_from=first)
    with pytest.raises(FileNotFoundError, match=r"no encoders/encoders\.json"):
        prepare(CONFIG, tmp_path / "fourth", init_from=tmp_path / "nowhere" / "at" / "all")


def test_a_killed_fit_is_done_again(tmp_path):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(WITH_FACES, tmp_path, portraits=killed)
    assert set(json.loads((tmp_path / "encoders" / "encoders.json").read_text())) == {"text", "codec"}
    _, frozen = prepare(WITH_FACES, tmp_path, images=unused)
    assert "identity" in frozen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(text="minlm"), r"unknown conditioning\.text\.kind 'minlm'; did you mean 'minilm'\?"),
        (dict(codec=dict(kind="vea")), r"unknown conditioning\.codec\.kind 'vea'; did you mean 'vae'\?"),
        (dict(codec=dict(kind="linear", ptach=4)), r"unknown conditioning\.codec option 'ptach'; did you mean 'patch'"),
        (dict(idenity=None), r"unknown conditioning part 'idenity'; did you mean 'identity'\?"),
        (dict(codec=None), r"conditioning\.codec is missing; expected one of: linear, vae"),
    ],
)
def test_unknown_names_suggest_the_nearest(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        prepare({**CONFIG, **change}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "length", "dims"), [("clip", 77, (8, 6)), ("t5", 10, (28, 28)), ("sd3", 87, (28, 14))]
)
def test_text_encoders_of_a_pipeline_alone_and_together(tmp_path, kind, length, dims):
    config = dict(folder=str(write_sd3(tmp_path / "sd3")), text=dict(kind=kind), codec=dict(kind="vae"))
    tokenizer = load_tokenizer(conditioning.tokenizer_folder(config))
    conditioner, frozen = prepare(config, tmp_path / "run", images=unused, portraits=unused)
    assert (conditioner.text_dim, conditioner.pooled_dim) == dims
    one, two = (tokenizer(text, length) for text in ("a cat", "it"))
    tokens, mask = np.stack([one.tokens, two.tokens]), np.stack([one.text_mask, two.text_mask])
    text = conditioner.embed_text(frozen, tokens, mask)
    assert text.emb.shape == (2, length, dims[0])
    assert text.pooled.shape == (2, dims[1])
    assert np.abs(text.pooled[0] - text.pooled[1]).max() > 1e-3  # it reads the prompt
    # SD3's weights attend to the padding, single encoders do not.
    np.testing.assert_array_equal(text.mask, np.ones_like(mask) if kind == "sd3" else mask)
    module, params = conditioning.load_text(config)
    assert module == conditioner.text
    jax.tree.map(np.testing.assert_array_equal, params, frozen["text"])


def test_sd3_without_t5_keeps_the_width_that_its_transformer_reads(tmp_path):
    folder = write_sd3(tmp_path / "sd3")
    for name in ("text_encoder_3", "tokenizer_3"):
        (folder / name).rename(tmp_path / name)
    config = dict(folder=str(folder), text=dict(kind="sd3"), codec=dict(kind="vae"))
    conditioner, frozen = prepare(config, tmp_path / "run", images=unused, portraits=unused)
    row = load_tokenizer(conditioning.tokenizer_folder(config))("a cat", 77)
    text = conditioner.embed_text(frozen, row.tokens[None], row.text_mask[None])
    assert text.emb.shape == (1, 77, conditioner.text_dim) == (1, 77, 4096)
    assert np.abs(text.emb[..., :20]).max() > 0  # both CLIPs' states, then zeros
    assert not np.asarray(text.emb)[..., 20:].any()


def test_faces_through_clip(tmp_path, batch):
    folder = write_sd3(tmp_path / "sd3")
    write_image_encoder(folder / "image_encoder")
    config = {**CONFIG, "folder": str(folder), "identity": dict(kind="clip")}
    conditioner, frozen = prepare(config, tmp_path / "run", portraits=unused)
    assert conditioner.face_dim == 6
    faces = np.random.default_rng(2).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    found = np.asarray(conditioner.identify(frozen, faces))
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    emb = jax.jit(conditioner.conditions)(frozen, batch).face_emb
    np.testing.assert_array_equal(np.abs(emb).sum(-1) > 0, batch.has_face)


def test_changed_weights_and_options_are_noticed(tmp_path):
    prepare(CONFIG, tmp_path)
    with pytest.raises(ValueError, match=r"another codec encoder .*: whiten is 0\.5, asked for 1\.0"):
        prepare({**CONFIG, "codec": dict(CONFIG["codec"], whiten=1.0)}, tmp_path)
    file = tmp_path / "encoders" / "codec.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not the weights of the codec encoder that the run was trained with"):
        conditioning.load(tmp_path)
    record = tmp_path / "encoders" / "encoders.json"
    records = json.loads(record.read_text())
    records["text"]["sha256"] = "0" * 64
    record.write_text(json.dumps(records))
    with pytest.raises(ValueError, match="not the weights of the text encoder"):
        conditioning.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        conditioning.load(tmp_path / "elsewhere")


def shapes(frozen):
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), frozen)


def test_abstract_encoders_are_those_that_a_run_prepares(run, tmp_path):
    """Of the embedded kinds without any data, of a pipeline's folder without reading it."""
    _, prepared, frozen = run
    planned, abstract = conditioning.abstract(WITH_FACES)
    assert planned == prepared
    assert shapes(abstract) == shapes(frozen)
    sd3 = dict(folder=str(write_sd3(tmp_path / "sd3")), text=dict(kind="sd3", dtype="bfloat16"), codec="vae")
    prepared, frozen = prepare(sd3, tmp_path / "pipeline", images=unused, portraits=unused)
    planned, abstract = conditioning.abstract(sd3)
    assert planned == prepared
    assert shapes(abstract) == shapes(frozen)


def test_without_its_folder_a_pipeline_is_planned_as_published():
    planned, abstract = conditioning.abstract(dict(text="sd3", codec="vae", identity="clip"))
    assert (planned.text_dim, planned.pooled_dim, planned.latent_channels) == (4096, 2048, 16)
    # CLIP L/14, CLIP bigG/14 and T5 XXL's encoder, as their model cards say: 123M, 695M, 4.76B.
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in abstract["text"].items()}
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {"clip_l": 124, "clip_g": 695, "t5": 4762}
    mesh = jax.sharding.AbstractMesh((1, 64, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    for leaf in sharding.leaf_specs(abstract, sharding.tree_shardings(abstract, mesh), larger_than=2**22):
        assert any(leaf.spec), f"{leaf.path} {leaf.shape} is whole on every device"
