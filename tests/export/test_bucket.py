"""An export in a bucket is read back: what must be mapped into memory from a copy on the disk."""

import shutil

import jax
import numpy as np
import pytest
from etils import epath

from tests.sd3_folder import write_image_encoder, write_sd3
from tests.sd3_run import write_run
from univg_jax import Pipeline, checksums
from univg_jax.errors import UserError
from univg_jax.export.job import Job
from univg_jax.export.run import export_model
from univg_jax.trained import open_trained
from univg_jax.trees import named_leaves

pytestmark = pytest.mark.xdist_group("pipeline")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def upload(folder, to):
    for name in checksums.list_files(epath.Path(folder)):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (epath.Path(folder) / name).copy(to / name)


def assert_same(a, b):
    a, b = (named_leaves(jax.device_get(x.params)) for x in (a, b))
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def test_safetensors_are_copied_once_and_verified(exported, bucket, home):
    upload(exported / "safetensors", bucket / "export")
    loaded = Pipeline.load("gs://bucket/export")
    assert_same(loaded, Pipeline.load(exported / "safetensors"))
    assert loaded.path == "gs://bucket/export"
    (copy,) = (home / ".cache/univg_jax/exports").iterdir()
    assert loaded.digests["weights"] == copy.name
    weights = copy / "model.safetensors"
    first = weights.stat()
    Pipeline.load("gs://bucket/export")
    assert weights.stat().st_mtime_ns == first.st_mtime_ns, "it was copied again"

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"?")  # a copy that is damaged is made again
    Pipeline.load("gs://bucket/export")
    assert weights.read_bytes() == whole

    shutil.rmtree(home)
    (bucket / "export" / "model.safetensors").write_bytes(whole[:-1] + b"?")
    with pytest.raises(UserError, match=r"export is damaged: model\.safetensors is not"):
        Pipeline.load("gs://bucket/export")
    shutil.rmtree(home)
    (bucket / "export" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"gs://bucket/export is damaged: .*model\.safe"):
        Pipeline.load("gs://bucket/export")


@pytest.mark.nightly
def test_copied_encoders_are_found(tmp_path, bucket):
    folder = write_sd3(tmp_path / "pretrained")
    write_image_encoder(folder / "image_encoder")
    config = "stage3_identity:size=tiny,res=32,encoders=sd3"
    run = write_run(tmp_path / "run", folder=folder, config=config)
    job = Job(trained=open_trained(run), copy_encoders=True)
    before = job.pipeline()
    export_model(job, "safetensors", "gs://bucket/export")
    shutil.rmtree(folder)  # the export needs nothing else
    loaded = Pipeline.load("gs://bucket/export")
    assert_same(loaded, before)
    frozen = [named_leaves(jax.device_get(x.frozen)) for x in (loaded, before)]
    assert frozen[0].keys() == frozen[1].keys()
    for name, value in frozen[0].items():
        np.testing.assert_array_equal(value, frozen[1][name], err_msg=name)
