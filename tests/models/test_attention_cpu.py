"""The CPU's attention gives the numbers and the gradients of the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univg_jax.models.attention import xla_attention
from univg_jax.models.attention_cpu import cpu_attention


def output_and_gradients(attention, mask, dtype):
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.normal(size=(3, n, 2, 8)), dtype) for n in (5, 7, 7, 5))  # more keys than queries
    out, backward = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
    return out, *backward(g)


# Unit normal inputs: float32 sums of tens of terms in another order; bfloat16 rounds to 2^-9, some times in a row.
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.float32, 2e-6), (jnp.bfloat16, 4e-2)])
@pytest.mark.parametrize("lengths", [None, (7, 3, 1), (7, 3, 0)], ids=str)
def test_equals_xla_attention(lengths, dtype, atol):
    mask = None if lengths is None else jnp.asarray(np.arange(7) < np.array(lengths)[:, None])
    got, want = (output_and_gradients(attention, mask, dtype) for attention in (cpu_attention, xla_attention))
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert x.dtype == y.dtype == dtype
        np.testing.assert_allclose(x.astype(jnp.float32), y.astype(jnp.float32), atol=atol, err_msg=name)
        assert jnp.abs(y).max() > 0.1, name
