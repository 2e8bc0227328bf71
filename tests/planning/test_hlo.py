"""Counts against programs whose numbers are known: a CPU compiles them; TPU programs are in
`test_plan.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univg_jax.models.mmdit import MMDiT
from univg_jax.planning import hlo


def count(function, *arguments, **options) -> hlo.Counts:
    return hlo.count(jax.jit(function, **options).lower(*arguments).compile().as_text())


def test_a_product_in_a_loop_counts_as_often_as_it_runs():
    a = jnp.ones((16, 32))
    w = jnp.ones((5, 32, 32))

    def layers(a, w):
        def outer(x, w):
            inner = jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), x)
            return inner, None

        return jax.lax.scan(outer, a, w)[0]

    assert count(layers, a, w).flops == 5 * 3 * 2 * 16 * 32 * 32


def test_batched_products_and_convolutions():
    assert count(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((3, 4, 5)), jnp.ones((3, 5, 6))
    ).flops == (2 * 3 * 4 * 5 * 6)
    # Without padding every output sees all 9 taps.
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 7))
    convolution = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count(convolution, image, kernel).flops == 2 * 2 * 6 * 6 * 7 * 9 * 3


BATCHED_PRODUCT = """HloModule test

ENTRY %main (a: bf16[30,8,64], b: bf16[30,16,64]) -> bf16[30,8,16] {
  %a = bf16[30,8,64]{2,1,0} parameter(0)
  %b = bf16[30,16,64]{2,1,0} parameter(1)
  ROOT %c = bf16[30,8,16]{2,1,0} convolution(%a, %b), window={size=30 stride=29 lhs_dilate=30}, dim_labels=0bf_0oi->0bf
}
"""  # noqa: E501


def products(text):
    (product,) = hlo.products(hlo.parse(text))
    return product


def test_products_fill_whole_matrix_units():
    """By the two sizes that the unit holds: the contraction and the narrower side of the result."""
    product = products(BATCHED_PRODUCT)
    assert product == hlo.Product(30, 8, 64, 16)
    assert product.unit_flops(128) == 2 * 30 * 16 * 128 * 128
    assert hlo.Product(1, 4096, 64, 2048).unit_flops(128) == 2 * 2 * 4096 * 64 * 2048
    assert hlo.Product(1, 4096, 64, 2048).unit_flops(256) == 4 * 2 * 4096 * 64 * 2048
    assert hlo.Product(1, 4096, 2048, 64).unit_flops(256) == 4 * 2 * 4096 * 64 * 2048
    assert hlo.Product(1, 300, 256, 512).unit_flops(256) == 2 * 512 * 256 * 512
    whole = hlo.Product(3, 1024, 512, 256)
    assert whole.unit_flops(256) == whole.unit_flops(128) == whole.flops


def test_a_convolution_contracts_its_taps():
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 7))
    convolution = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    text = jax.jit(convolution).lower(image, kernel).compile().as_text()
    assert products(text) == hlo.Product(1, 2 * 6 * 6, 3 * 9, 7)


def test_a_batched_product_as_a_tpu_writes_it_counts_the_taps_that_meet_an_input():
    assert hlo.count(BATCHED_PRODUCT).flops == 2 * 30 * 8 * 16 * 64


PEELED = """HloModule test

%body (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %s = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%s), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %y)
}

%condition (s.1: (s32[], f32[8,8])) -> pred[] {
  %s.1 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %bound = s32[] constant(27)
  ROOT %less = pred[] compare(%i.1, %bound), direction=LT
}

ENTRY %main (x.1: f32[8,8]) -> (s32[], f32[8,8]) {
  %x.1 = f32[8,8]{1,0} parameter(0)
  %first = s32[] constant(1)
  %start = (s32[], f32[8,8]{1,0}) tuple(%first, %x.1)
  ROOT %loop = (s32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_whose_first_iteration_was_peeled_off_runs_once_less():
    assert hlo.count(PEELED).flops == 26 * 2 * 8**3


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.count("HloModule empty")


# The last differs from SD3's block in what it multiplies: one modulation for all, no text after the
# first block.
@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(shared_adaln=True),
        dict(depth=1),
        dict(position="rope", mlp_ratio=3, scan=False),
        dict(source="tokens"),
        dict(head_dim=24),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_analytic_flops_are_those_of_the_compiled_model(fields, train):
    """Exact: every product of the model, and no other, is in the formula."""
    model = MMDiT(
        **(
            dict(hidden_dim=64, depth=3, num_heads=4, text_dim=48, pooled_dim=40, attention="xla")
            | fields
        )
    )
    shapes = [(2, 8, 12, 33), (2, 5, 48), (2, 40), (2,)]
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]

    def loss(params, *inputs):
        return jnp.sum(model.apply({"params": params}, *inputs) ** 2)

    counts = count(jax.grad(loss) if train else loss, params, *inputs)
    expected = 2 * model.matmul_flops(height=8, width=12, num_tokens=5, train=train)
    assert counts.flops == pytest.approx(expected, rel=1e-12)
