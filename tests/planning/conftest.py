import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="module")
def no_cache():
    """What was compiled for a TPU cannot be read back without one."""
    for enabled in (False, True):
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()  # or JAX would keep to what it found at its first program
        if not enabled:
            yield
