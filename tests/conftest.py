"""Every test sees 8 virtual CPU devices, strict rank promotion, and checked array types."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""  # tests neither read nor fill the user's cache
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # tests compile more than they compute

from jaxtyping import install_import_hook

# Before the packages are imported: jaxtyping's annotations become run-time checks.
install_import_hook(["univg_jax", "data_pipelines"], "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

NO_MESH = jax.sharding.get_mesh()


@pytest.fixture(autouse=True)
def _no_mesh_outlives_a_test():
    """`jax.set_mesh` is global: where one test's mesh stayed, the next test's arrays would live on it."""
    jax.set_mesh(NO_MESH)
    yield
    jax.set_mesh(NO_MESH)
