"""How a run gets, keeps and hands on its frozen encoders."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from data_pipelines.tokenizer import load_tokenizer
from tests.helpers import ENCODERS, ENCODERS_WITH_FACES, prepare_encoders, unused
from tests.sd3_folder import write_sd3
from univg_jax import encoders, sharding
from univg_jax.errors import NotFoundError, UserError
from univg_jax.files import read_sealed, write_sealed
from univg_jax.interop.diffusers import load_transformer, open_vae
from univg_jax.interop.inception import load_inception
from univg_jax.settings import Conditioning
from univg_jax.trees import named_leaves


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, prepare_encoders(ENCODERS_WITH_FACES, workdir)


def test_a_second_start_and_a_load_fit_nothing(run):
    workdir, first = run
    for again in (
        prepare_encoders(ENCODERS_WITH_FACES, workdir, images=unused, portraits=unused),
        encoders.load(str(workdir)),
    ):
        assert again.conditioner == first.conditioner
        jax.tree.map(np.testing.assert_array_equal, again.frozen, first.frozen)


def test_streamed_parameters_are_those_that_are_loaded(run, tmp_path):
    folder = write_sd3(tmp_path / "sd3")
    pretrained = dict(text=dict(kind="sd3", dtype="bfloat16"), codec="vae", identity=None)
    found = prepare_encoders(
        dict(pretrained, folder=str(folder)), tmp_path / "run", images=unused, portraits=unused
    )
    for workdir, loaded in [(tmp_path / "run", found), run]:
        streamed = encoders.tensors(workdir, folder=str(folder))
        expected = named_leaves(dict(loaded.frozen))
        assert streamed.keys() == expected.keys()
        for name, tensor in streamed.items():
            assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
            whole = np.zeros(tensor.shape, tensor.dtype)
            for box, block in tensor.blocks():
                whole[box] = block
            np.testing.assert_array_equal(whole, expected[name])


def test_those_of_a_start_that_failed_do_not_count(tmp_path):
    prepare_encoders(ENCODERS, tmp_path)
    other = {**ENCODERS, "codec": dict(kind="linear", channels=6)}
    with pytest.raises(UserError, match="another codec encoder"):
        prepare_encoders(other, tmp_path)
    assert prepare_encoders(other, tmp_path, anew=True).conditioner.latent_channels == 6
    assert encoders.load(tmp_path).conditioner.latent_channels == 6


def test_a_run_that_lost_its_workdir_while_it_fitted_writes_no_encoders(tmp_path):
    def before_write():
        raise UserError("was taken over")

    with pytest.raises(UserError, match="was taken over"):
        prepare_encoders(ENCODERS, tmp_path, before_write=before_write)
    assert list(tmp_path.rglob("*")) == []


def test_parameters_that_are_skipped_are_not_read(run):
    workdir, first = run
    loaded = encoders.load(workdir, skip=("text",))
    assert loaded.conditioner == first.conditioner
    assert set(loaded.frozen) == {"codec", "identity"}


def test_files_of_a_fitted_encoder_keep_their_names_and_layout(tmp_path):
    """A run that an earlier version began must stay readable."""
    prepare_encoders(ENCODERS, tmp_path)
    folder = tmp_path / "encoders"
    assert {f.name for f in folder.iterdir()} == {"codec.safetensors", "encoders.json"}
    records = read_sealed(folder / "encoders.json")
    digest = records["codec"].pop("sha256")
    assert digest == hashlib.sha256((folder / "codec.safetensors").read_bytes()).hexdigest()
    assert records["codec"] == dict(kind="linear", patch=4, channels=8, whiten=0.5)
    assert records["text"].keys() == {"kind", "dtype", "sha256"}
    assert records["identity"] is None
    assert set(load_file(folder / "codec.safetensors")) == {"mean", "basis", "scale"}


def test_a_stage_takes_over_the_codec_and_fits_what_is_new(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    one = prepare_encoders(ENCODERS, first).frozen
    # a checkpoint inside the run says as much as the run's folder
    checkpoint = first / "checkpoints" / "100"
    checkpoint.mkdir(parents=True)
    two = prepare_encoders(ENCODERS_WITH_FACES, second, init_from=checkpoint, images=unused).frozen
    jax.tree.map(np.testing.assert_array_equal, one["codec"], two["codec"])
    assert "identity" in two
    other = {**ENCODERS, "codec": dict(kind="linear", channels=6)}
    with pytest.raises(UserError, match=r"another codec encoder .*: channels is 8, asked for 6"):
        prepare_encoders(other, tmp_path / "third", init_from=first)
    with pytest.raises(NotFoundError, match=r"no encoders/encoders\.json"):
        prepare_encoders(
            ENCODERS, tmp_path / "fourth", init_from=tmp_path / "nowhere" / "at" / "all"
        )


def test_a_killed_fit_is_done_again(tmp_path):
    def killed():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_encoders(ENCODERS_WITH_FACES, tmp_path, portraits=killed)
    assert set(read_sealed(tmp_path / "encoders" / "encoders.json")) == {"text", "codec"}
    again = prepare_encoders(ENCODERS_WITH_FACES, tmp_path, images=unused)
    assert "identity" in again.frozen


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(text="minlm"), r"unknown conditioning\.text\.kind 'minlm'; did you mean 'minilm'\?"),
        (
            dict(codec=dict(kind="vea")),
            r"unknown conditioning\.codec\.kind 'vea'; did you mean 'vae'\?",
        ),
        (
            dict(codec=dict(kind="linear", ptach=4)),
            r"unknown key of conditioning\.codec: 'ptach'; did you mean 'patch'",
        ),
        (dict(codec=None), r"conditioning\.codec is missing; expected one of: linear, vae"),
        (
            dict(text=dict(kind="minilm", dtype="flaot32")),
            r"unknown conditioning\.text\.dtype 'flaot32'; did you mean 'float32'\?",
        ),
    ],
)
def test_unknown_names_suggest_the_nearest(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        prepare_encoders({**ENCODERS, **change}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "length", "dims"), [("clip", 77, (8, 6)), ("t5", 10, (28, 28)), ("sd3", 87, (28, 14))]
)
def test_text_encoders_of_a_pipeline_alone_and_together(tmp_path, kind, length, dims):
    config = dict(
        folder=str(write_sd3(tmp_path / "sd3")), text=dict(kind=kind), codec=dict(kind="vae")
    )
    tokenizer = load_tokenizer(encoders.tokenizer_folder(Conditioning(**config)))
    prepared = prepare_encoders(config, tmp_path / "run", images=unused, portraits=unused)
    conditioner, frozen = prepared.conditioner, prepared.frozen
    assert (conditioner.text_dim, conditioner.pooled_dim) == dims
    one, two = (tokenizer(text, length) for text in ("a cat", "it"))
    tokens, mask = np.stack([one.tokens, two.tokens]), np.stack([one.text_mask, two.text_mask])
    text = conditioner.embed_text(frozen, tokens, mask)
    assert text.emb.shape == (2, length, dims[0])
    assert text.pooled.shape == (2, dims[1])
    assert np.abs(text.pooled[0] - text.pooled[1]).max() > 1e-3  # it reads the prompt
    # SD3's weights attend to the padding, single encoders do not.
    np.testing.assert_array_equal(text.mask, np.ones_like(mask) if kind == "sd3" else mask)
    module, params = encoders.load_text(Conditioning(**config))
    assert module == conditioner.text
    jax.tree.map(np.testing.assert_array_equal, params, frozen["text"])


def test_sd3_without_t5_keeps_the_width_that_its_transformer_reads(tmp_path):
    folder = write_sd3(tmp_path / "sd3")
    for name in ("text_encoder_3", "tokenizer_3"):
        (folder / name).rename(tmp_path / name)
    config = dict(folder=str(folder), text=dict(kind="sd3"), codec=dict(kind="vae"))
    prepared = prepare_encoders(config, tmp_path / "run", images=unused, portraits=unused)
    conditioner, frozen = prepared.conditioner, prepared.frozen
    row = load_tokenizer(encoders.tokenizer_folder(Conditioning(**config)))("a cat", 77)
    text = conditioner.embed_text(frozen, row.tokens[None], row.text_mask[None])
    assert text.emb.shape == (1, 77, conditioner.text_dim) == (1, 77, 4096)
    assert np.abs(text.emb[..., :20]).max() > 0  # both CLIPs' states, then zeros
    assert not np.asarray(text.emb)[..., 20:].any()


def test_changed_weights_and_options_are_noticed(tmp_path):
    prepare_encoders(ENCODERS, tmp_path)
    with pytest.raises(
        UserError, match=r"another codec encoder .*: whiten is 0\.5, asked for 1\.0"
    ):
        prepare_encoders({**ENCODERS, "codec": dict(ENCODERS["codec"], whiten=1.0)}, tmp_path)
    file = tmp_path / "encoders" / "codec.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"not the weights of the codec encoder that the run .* was trained with"
    ):
        encoders.load(tmp_path)
    record = tmp_path / "encoders" / "encoders.json"
    records = read_sealed(record)
    records["text"]["sha256"] = "0" * 64
    write_sealed(record, records)
    with pytest.raises(UserError, match="not the weights of the text encoder"):
        encoders.load(tmp_path)
    file.unlink()
    with pytest.raises(NotFoundError, match="is not the folder of a run"):
        encoders.load(tmp_path / "elsewhere")


def shapes(frozen):
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), frozen)


@pytest.mark.parametrize("address", ["gs://bucket/sd3", Path("gs://bucket/sd3")])
def test_a_bucket_of_pretrained_weights_is_refused_in_one_line(tmp_path, address):
    config = Conditioning(folder=str(address), text="sd3", codec="vae")
    message = r"^gs:/+bucket/sd3: pretrained weights .* local disks only; copy the folder to one$"
    for use in (encoders.check, encoders.abstract, encoders.load_text, encoders.tokenizer_folder):
        with pytest.raises(UserError, match=message):
            use(config)
    with pytest.raises(UserError, match=message):
        load_transformer(address)
    with pytest.raises(UserError, match=message):
        load_inception(address)


def test_abstract_encoders_are_those_that_a_run_prepares(run, tmp_path):
    """Of the embedded kinds without any data, of a pipeline's folder without reading it."""
    _, prepared = run
    planned = encoders.abstract(Conditioning(**ENCODERS_WITH_FACES))
    assert planned.conditioner == prepared.conditioner
    assert shapes(planned.frozen) == shapes(prepared.frozen)
    sd3 = dict(
        folder=str(write_sd3(tmp_path / "sd3")),
        text=dict(kind="sd3", dtype="bfloat16"),
        codec="vae",
    )
    prepared = prepare_encoders(sd3, tmp_path / "pipeline", images=unused, portraits=unused)
    planned = encoders.abstract(Conditioning(**sd3))
    assert planned.conditioner == prepared.conditioner
    assert shapes(planned.frozen) == shapes(prepared.frozen)


def test_without_its_folder_a_pipeline_is_planned_as_published():
    published = encoders.abstract(Conditioning(text="sd3", codec="vae", identity="clip"))
    planned, abstract = published.conditioner, published.frozen
    assert (planned.text_dim, planned.pooled_dim, planned.latent_channels) == (4096, 2048, 16)
    # CLIP L/14, CLIP bigG/14 and T5 XXL's encoder, as their model cards say: 123M, 695M, 4.76B.
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(part)) for name, part in abstract["text"].items()
    }
    assert {name: round(size / 1e6) for name, size in sizes.items()} == {
        "clip_l": 124,
        "clip_g": 695,
        "t5": 4762,
    }
    mesh = jax.sharding.AbstractMesh(
        (1, 64, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    for leaf in sharding.leaf_specs(
        abstract, sharding.tree_shardings(abstract, mesh), larger_than=2**22
    ):
        assert any(leaf.spec), f"{leaf.path} {leaf.shape} is whole on every device"


def test_a_flipped_bit_in_the_record_is_noticed(tmp_path):
    prepare_encoders(ENCODERS, tmp_path)
    record = tmp_path / "encoders" / "encoders.json"
    record.write_text(record.read_text().replace("0.5", "0.4"))
    with pytest.raises(UserError, match=r"encoders\.json is damaged"):
        encoders.load(tmp_path)
    record.write_text(record.read_text()[:50])
    with pytest.raises(UserError, match=r"encoders\.json is not JSON"):
        encoders.load(tmp_path)


@pytest.mark.parametrize("role", ["text", "codec", "identity"])
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_float16_is_refused_where_its_range_is_too_small(role, kind):
    """T5's and VAEs' products are beyond it; CLIP's towers and MiniLM were published in it."""
    kind = dict(text=kind, codec="vae", identity="clip")[role]
    chosen = dict(text="minilm", codec="vae") | {role: dict(kind=kind, dtype="float16")}
    config = Conditioning(**chosen)
    if kind == "clip":
        encoders.abstract(config)
    else:
        message = rf"^conditioning\.{role}\.dtype='float16': the {kind} encoder's products"
        for use in (encoders.check, encoders.abstract):
            with pytest.raises(UserError, match=message):
                use(config)


def other_weights(folder, part):
    """One number of a network's weights becomes another, in a place that no sample had to see."""
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name].flat[7] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_stage_keeps_its_parents_pretrained_encoders(tmp_path):
    """Another VAE of as many channels is another space of latents."""
    folder = write_sd3(tmp_path / "sd3")
    config = dict(folder=str(folder), text=dict(kind="clip"), codec=dict(kind="vae"))
    prepare_encoders(config, tmp_path / "one")
    # Their dtype is a stage's own, and so is where they lie.
    moved = folder.rename(tmp_path / "moved")
    half = config | dict(folder=str(moved), text=dict(kind="clip", dtype="bfloat16"))
    prepare_encoders(half, tmp_path / "two", init_from=tmp_path / "one")
    other_weights(moved, "vae")
    message = r"moved/vae: not the weights of the codec encoder that the parent run .*two was"
    with pytest.raises(UserError, match=message):
        encoders.check(Conditioning(**half), init_from=tmp_path / "two")
    with pytest.raises(UserError, match=message):
        prepare_encoders(half, tmp_path / "three", init_from=tmp_path / "two")
    with pytest.raises(UserError, match=r"moved/vae: .* that the run .*two was trained with"):
        prepare_encoders(half, tmp_path / "two")
    other = half | dict(text=dict(kind="t5"))
    with pytest.raises(UserError, match=r"another text encoder .*: kind is 'clip', asked for 't5'"):
        encoders.check(Conditioning(**other), init_from=tmp_path / "two")


def test_digests_name_each_encoder(tmp_path):
    folder = write_sd3(tmp_path / "sd3")
    config = dict(folder=str(folder), text=dict(kind="clip"), codec=dict(kind="vae"))
    prepare_encoders(config, tmp_path / "one")
    first = encoders.digests(tmp_path / "one")
    assert set(first) == {"text", "codec"}, "there is no identity encoder"
    prepare_encoders(config, tmp_path / "again")
    assert encoders.digests(tmp_path / "again") == first
    other_weights(folder, "text_encoder")
    prepare_encoders(config, tmp_path / "two")
    second = encoders.digests(tmp_path / "two")
    assert second["text"] != first["text"]
    assert second["codec"] == first["codec"]


def test_a_record_of_an_earlier_version_is_compared_as_it_was_made(tmp_path, caplog):
    """It has samples of the files, and no checksum of itself."""
    folder = write_sd3(tmp_path / "sd3")
    config = dict(folder=str(folder), text=dict(kind="clip"), codec=dict(kind="vae"))
    prepare_encoders(config, tmp_path / "run")
    vae = open_vae(folder / "vae").tensors.sampled_fingerprint()
    record = tmp_path / "run" / "encoders" / "encoders.json"
    records = read_sealed(record)
    records["codec"]["sha256"] = hashlib.sha256(vae.encode()).hexdigest()
    record.write_text(json.dumps(records))
    encoders.load(tmp_path / "run", folder=str(folder))
    warned = [r.message for r in caplog.records if "earlier version" in r.message]
    assert len(warned) == 1
    assert "codec encoder" in warned[0]
    other_weights(folder, "vae")
    with pytest.raises(UserError, match=r"sd3/vae: not the weights of the codec encoder"):
        encoders.load(tmp_path / "run", folder=str(folder))


def test_a_run_with_encoders_of_its_own_does_not_ask_for_its_parent(tmp_path):
    prepare_encoders(ENCODERS, tmp_path / "one")
    prepare_encoders(ENCODERS, tmp_path / "two", init_from=tmp_path / "one", images=unused)
    (tmp_path / "one").rename(tmp_path / "moved")
    prepare_encoders(ENCODERS, tmp_path / "two", init_from=tmp_path / "one", images=unused)
