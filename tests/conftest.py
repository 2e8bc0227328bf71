"""Every test sees 8 virtual CPU devices, strict rank promotion, and checked array types."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"  # tests compile more than they compute

from jaxtyping import install_import_hook

# Before the packages are imported: jaxtyping's annotations become run-time checks.
install_import_hook(["univg_jax", "data_pipelines"], "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
