"""Exports that are read back: the same model, on any devices, in fewer bits, for a next stage."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from etils import epath
from jax.sharding import SingleDeviceSharding

from tests.marks import nightly
from tests.smoke_run import CONFIG, FAST
from univg_jax import Pipeline, assembly, checkpoint, checksums, configs, sharding
from univg_jax.errors import NotFoundError, UserError
from univg_jax.export.job import Job
from univg_jax.export.run import export_model
from univg_jax.trained import STORES, open_trained
from univg_jax.trees import named_leaves

pytestmark = pytest.mark.xdist_group("pipeline")


def params_of(root, **options):
    return named_leaves(jax.device_get(checkpoint.load_params(root / "stage3", **options)))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


@pytest.mark.parametrize("name", STORES)
def test_an_export_is_the_checkpoint(exported, root, name):
    """Bit for bit the same parameters, and all else by the same digests."""
    a, b = Pipeline.load(root / "stage3"), Pipeline.load(exported / name)
    assert_equal(named_leaves(a.params), named_leaves(b.params))
    assert (a.step, a.which, a.tasks) == (b.step, b.which, b.tasks)
    same = ("text", "codec", "identity", "tokenizer")
    assert [a.digests[key] for key in same] == [b.digests[key] for key in same]


@pytest.mark.parametrize("name", STORES)
def test_an_export_is_found_from_where_it_lies(exported, root, monkeypatch, name):
    monkeypatch.chdir(exported)
    assert Pipeline.load(name).digests["text"] == Pipeline.load(root / "stage3").digests["text"]


@pytest.mark.parametrize("name", STORES)
def test_every_file_has_a_checksum_and_the_origin_is_told(exported, root, name):
    folder = epath.Path(exported / name)
    assert checksums.find_problems(folder) == ()
    assert checksums.find_additional(folder) == ("README.md",)  # which its reader completes
    facts = json.loads((folder / "provenance.json").read_text())
    assert (facts["format"], facts["step"], facts["parameters"]) == (name, 2, "ema")
    assert facts["digests"]["weights"] == checkpoint.digests(root / "stage3")[2]
    assert facts["config"]["name"] == "emoji_smoke_stage3"
    assert set(facts["compared"]) == {"t2i", "ie", "ip", "lg", "depth", "pose", "seg", "id"}
    assert all(found["most"] <= 1 for found in facts["compared"].values())
    assert facts["revision"]


def test_other_programs_read_the_parameters(exported, root):
    """By the library of each format alone."""
    expected = params_of(root)
    found = safetensors.numpy.load_file(exported / "safetensors" / "model.safetensors")
    assert_equal(expected, {name.replace(".", "/"): x for name, x in found.items()})
    with ocp.PyTreeCheckpointer() as reader:
        found = reader.restore(exported / "orbax" / "params")
    assert_equal(expected, named_leaves(jax.device_get(found)))
    network = json.loads((exported / "safetensors" / "config.json").read_text())
    assert network["backbone"]["in_channels"] == 17
    assert network["backbone"]["depth"] == 2


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("mesh", [None, dict(data=1, fsdp=8), dict(data=2, fsdp=4)], ids=str)
def test_any_devices_hold_the_parameters(exported, root, name, mesh):
    expected = params_of(root)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), checkpoint.load_params(root / "stage3")
    )
    if mesh is None:
        shardings = SingleDeviceSharding(jax.devices()[3])
    else:
        shardings = sharding.tree_shardings(abstract, sharding.make_mesh(**mesh))
    loaded = open_trained(exported / name).load_params(
        which="ema", abstract=abstract, shardings=shardings
    )
    assert_equal(expected, named_leaves(loaded))
    placed = jax.tree.broadcast(shardings, abstract)
    assert jax.tree.map(lambda x: x.sharding, loaded) == placed


@pytest.mark.parametrize("name", STORES)
def test_fewer_bits_are_rounded_once(root, tmp_path, name):
    """Pictures are those of the rounded parameters; what rounding does to them is recorded."""
    job = Job(trained=open_trained(root / "stage3"), dtype="bf16", ema=False)
    done = export_model(job, name, tmp_path / "out")
    assert max(found.most for found in done.compared.values()) <= 1
    expected = {
        key: x.astype(jnp.bfloat16).astype(np.float32)
        for key, x in params_of(root, which="params").items()
    }
    loaded = Pipeline.load(tmp_path / "out")
    assert loaded.which == "params"
    assert_equal(expected, named_leaves(loaded.params))
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert (facts["dtype"], facts["parameters"]) == ("bf16", "params")
    assert facts["rounding"].keys() == facts["compared"].keys()


def test_an_export_of_an_export_is_the_same(exported, root, tmp_path):
    job = Job(trained=open_trained(exported / "orbax"), max_file_bytes=10**6)
    export_model(job, "safetensors", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert_equal(params_of(root), named_leaves(Pipeline.load(tmp_path / "out").params))


@pytest.mark.parametrize("name", ["safetensors", *nightly("orbax")])
def test_training_goes_on_from_an_export(exported, root, tmp_path, name):
    """A stage begins from the export as it does from the run: parameters, encoders, data."""

    def begin(parent, workdir):
        overrides = [f"data.dir={root / 'data'}", *FAST, "train.steps=1", "train.eval_every=100"]
        config = configs.load(f"{CONFIG}3,init_from={parent}", overrides)
        assembly.make_run(config, workdir).train()
        state = checkpoint.load_data_state(workdir)
        return named_leaves(jax.device_get(checkpoint.load_params(workdir))), state

    of_run, data = begin(root / "stage3", tmp_path / "of_run")
    of_export, same_data = begin(exported / name, tmp_path / "of_export")
    assert_equal(of_run, of_export)
    assert data == same_data
    assert any((of_run[key] != x).any() for key, x in params_of(root).items()), "it trained"


def test_what_an_export_cannot_give_is_one_line(exported, root, tmp_path):
    folder = exported / "safetensors"
    with pytest.raises(UserError, match="was exported without the raw parameters"):
        Pipeline.load(folder, ema=False)
    with pytest.raises(NotFoundError, match=r"no step 1 in .*: step 2 was exported"):
        Pipeline.load(folder, step=1)
    overrides = [f"data.dir={root / 'data'}", *FAST, "init_from.which=state"]
    config = configs.load(f"{CONFIG}3,init_from={folder}", overrides)
    with pytest.raises(UserError, match=r"goes on with a run, and .* is an export"):
        assembly.make_run(config, tmp_path / "run")


def copy_of(folder, out):
    epath.Path(out).mkdir()
    for name in checksums.list_files(epath.Path(folder)):
        target = epath.Path(out) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (epath.Path(folder) / name).copy(target)
    return out


@pytest.mark.parametrize("name", STORES)
def test_damage_is_found_before_a_picture_is_made(exported, tmp_path, name):
    folder = copy_of(exported / name, tmp_path / "flipped")
    big = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(big.read_bytes())
    content[len(content) // 2] ^= 1
    big.write_bytes(content)
    with pytest.raises(UserError, match=f"is damaged: .*{big.name} is not what was written"):
        Pipeline.load(folder)


def test_half_an_export_and_a_foreign_one_are_named(exported, tmp_path):
    folder = copy_of(exported / "orbax", tmp_path / "half")
    (folder / checksums.FILE).unlink()
    with pytest.raises(UserError, match=r"is no whole export, it has no checksums.json"):
        Pipeline.load(folder)
    folder = copy_of(exported / "orbax", tmp_path / "other")
    facts = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps(facts | {"format": "stablehlo"}))
    with pytest.raises(UserError, match="in the format stablehlo, which is for other libraries"):
        Pipeline.load(folder)
    (folder / "provenance.json").write_text(json.dumps(facts | {"version": 0}))
    with pytest.raises(UserError, match="exported by another version"):
        Pipeline.load(folder)


def test_kernels_in_8_bits(root, tmp_path):
    """A third of the bytes; pictures are those of the quantized parameters, on any devices."""
    done = export_model(
        Job(trained=open_trained(root / "stage3"), dtype="int8"), "safetensors", tmp_path / "out"
    )
    assert max(found.most for found in done.compared.values()) <= 1
    expected = params_of(root)
    found = named_leaves(Pipeline.load(tmp_path / "out").params)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        step = np.abs(value).max(axis=-2, keepdims=True) / 127 if name.endswith("kernel") else 0
        assert (np.abs(found[name] - value) <= 0.501 * step).all(), name
    file = tmp_path / "out" / "model.safetensors"
    assert file.stat().st_size < 0.4 * sum(x.nbytes for x in expected.values())
    tensors = open_trained(tmp_path / "out").tensors("")
    assert_equal(
        {k: np.asarray(x) for k, x in found.items()}, {k: t.read() for k, t in tensors.items()}
    )
