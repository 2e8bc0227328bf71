"""Kernels in 8 bits are near what they were, whatever blocks they come in."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from univg_jax.quantization import SCALE, quantize, restore
from univg_jax.streaming import Tensor, boxes

kernels = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=3, max_side=5),
    elements=st.floats(-1000, 1000, width=32),
)


@given(kernels, st.integers(4, 64))
def test_a_kernel_is_off_by_half_a_step_at_most(values, most):
    tensor = Tensor(
        shape=values.shape,
        dtype=values.dtype,
        blocks=lambda: [(b, values[b]) for b in boxes(values.shape, 4, most_bytes=most)],
    )
    stored = quantize("a/kernel", tensor)
    assert stored["a/kernel"].dtype == np.int8
    scale = stored["a/kernel" + SCALE].read()
    assert scale.shape == (*values.shape[:-2], 1, values.shape[-1])
    found = restore("a/kernel", stored).read()
    assert (np.abs(found - values) <= scale * 0.501).all()
    whole = quantize("a/kernel", Tensor.of(values))
    np.testing.assert_array_equal(found, restore("a/kernel", whole).read())


def test_the_largest_weight_of_an_output_and_a_column_of_zeros_are_exact():
    values = np.array([[2.54, 0.0], [-1.0, 0.0]], np.float32)
    found = restore("kernel/kernel", quantize("kernel/kernel", Tensor.of(values))).read()
    np.testing.assert_allclose(found[0], values[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], [-1.0, 0.0], atol=0.01)


def test_what_is_no_kernel_stays():
    tensor = Tensor.of(np.linspace(0, 1, 5, dtype=np.float32))
    assert quantize("a/bias", tensor) == {"a/bias": tensor}
    assert restore("a/bias", {"a/bias": tensor}) is tensor
