"""Every test sees 8 virtual CPU devices, strict rank promotion, and checked array types."""

import atexit
import logging
import os
import pathlib
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Programs that many tests have are compiled once a session, for all of its workers and the
    # processes that they start. The user's own cache is neither read nor filled.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="univg_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"])
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# tests compile more than they compute
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

from jaxtyping import install_import_hook

# Before the packages are imported: jaxtyping's annotations become run-time checks.
install_import_hook(["univg_jax", "data_pipelines"], "beartype.beartype")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from tests.smoke_run import root  # noqa: E402, F401 (a fixture)

jax.config.update("jax_numpy_rank_promotion", "raise")
# A busy machine may be late: no test is about time.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

NO_MESH = jax.sharding.get_mesh()


@pytest.fixture(autouse=True, scope="module")
def _few_programs_outlive_a_module():
    """Every compiled program holds memory that is mapped, and Linux gives a process 65,530 maps; a
    worker came to 24,000 of them and 5 GB. What is asked for again comes from the cache on disk.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")  # of Linux
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _no_mesh_outlives_a_test():
    """`jax.set_mesh` is global: where one test's mesh stayed, the next test's arrays would live on
    it.
    """
    jax.set_mesh(NO_MESH)
    yield
    jax.set_mesh(NO_MESH)


def pytest_unconfigure():
    # What is logged at the very end goes to pytest's stream, which is closed by then.
    logging.raiseExceptions = False
