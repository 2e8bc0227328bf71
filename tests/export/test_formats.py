"""Exports of the formats that are read back: whole, the same pictures, any devices."""

import json

import jax
import numpy as np
import pytest

from univg_jax import Pipeline, checksums
from univg_jax.export.job import Job
from univg_jax.export.run import export_model
from univg_jax.trained import STORES, open_trained

pytestmark = pytest.mark.xdist_group("pipeline")


@pytest.fixture(scope="module")
def exported(root, tmp_path_factory):
    """A folder of each format that can be read back, of stage 3."""
    out = tmp_path_factory.mktemp("exports")
    for name in STORES:
        export_model(Job(trained=open_trained(root / "stage3")), name, out / name)
    return out


@pytest.mark.parametrize("name", STORES)
def test_an_export_is_the_checkpoint(exported, root, name):
    """Bit for bit: the same parameters, and so the same picture."""
    a, b = Pipeline.load(root / "stage3"), Pipeline.load(exported / name)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
    assert a.step == b.step
    assert {k: v for k, v in a.digests.items() if k != "weights"} == {
        k: v for k, v in b.digests.items() if k != "weights"
    }
    assert checksums.find_problems(open_trained(exported / name).path) == ()
    names = set(checksums.list_files(open_trained(exported / name).path)) - {checksums.FILE}
    assert names == set(json.loads((exported / name / checksums.FILE).read_text()))
