"""Exports that tests share."""

import pytest

from tests.memory_bucket import bucket  # noqa: F401 (a fixture)
from univg_jax.export.job import Job
from univg_jax.export.run import export_model
from univg_jax.trained import STORES, open_trained


@pytest.fixture(scope="session")
def exported(root, tmp_path_factory):
    """A folder of each format that is read back, of stage 3."""
    out = tmp_path_factory.mktemp("exports")
    for name in STORES:
        export_model(Job(trained=open_trained(root / "stage3")), name, out / name)
    return out
