"""The kernel for TPUs, interpreted on a CPU, against attention as its formula says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.marks import nightly
from univg_jax import sharding
from univg_jax.buckets import standard
from univg_jax.models import mmdit
from univg_jax.models.attention import LANES, xla_attention
from univg_jax.models.flash import Stream, block_of, chip_memory, fits, flash, whole_blocks
from univg_jax.models.mmdit import MMDiT, joint_attention
from univg_jax.planning.topology import open_topology

HEADS, C = 2, 128
OTHERS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


def make(n, m, *, b=2, final=False, normed=True, dtype=jnp.float32, seed=0):
    """(image, text, mask, what the outputs are multiplied by in a loss)."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def stream(tokens, *, final):
        q, k, v = (normal(b, tokens, HEADS * C) for _ in range(3))
        q_scale, k_scale = (1 + 0.3 * normal(C, dtype=jnp.float32) for _ in range(2))
        return Stream(
            q=None if final else q,
            k=k,
            v=v,
            q_scale=q_scale if normed and not final else None,
            k_scale=k_scale if normed else None,
        )

    mask = jnp.asarray(rng.integers(0, 2, (b, m)), bool)
    weights = normal(b, n, HEADS * C), None if final else normal(b, m, HEADS * C)
    return stream(n, final=False), stream(m, final=final), mask, weights


def outputs_and_gradients(attend, image, text, mask, weights):
    def loss(image, text):
        outputs = attend(image, text, mask)
        pairs = zip(outputs, weights, strict=True)
        total = sum(jnp.sum(x.astype(jnp.float32) * w) for x, w in pairs if w is not None)
        return total, outputs

    gradients, outputs = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(image, text)
    return outputs, gradients


formula = functools.partial(joint_attention, num_heads=HEADS, grid=None, attention=xla_attention)
kernel = functools.partial(flash, num_heads=HEADS, interpret=True)


def close(found, expected, tolerance):
    """Within a part of the largest number of each array."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize(
    ("n", "m", "options"),
    [
        (256, 32, {}),
        (1040, 16, {}),  # three blocks, which are no multiples of 128 tokens
        (512, 48, dict(final=True)),
        (256, 32, dict(normed=False)),
        (256, 32, dict(normed=False, final=True)),
    ],
)
def test_is_attention(n, m, options):
    """Outputs and all gradients, also those of the norms' scales and of masked text (none)."""
    image, text, mask, weights = make(n, m, **options)
    expected = outputs_and_gradients(formula, image, text, mask, weights)
    found = outputs_and_gradients(kernel, image, text, mask, weights)
    close(found, expected, 1e-5)  # float32 sums of 1,000 terms in another order
    hidden = found[1][1].k[~mask]
    assert not hidden.size or not np.any(hidden)


@pytest.mark.parametrize("n", [242, 252, 256, 968])  # tokens of buckets at 256 and 512 px
@pytest.mark.parametrize("final", [False, True])
def test_what_pads_the_image_is_not_attended_to(n, final):
    """Junk in the padding changes no output of a real token and no gradient, and gets none."""
    image, text, mask, weights = make(whole_blocks(n), 32, final=final)

    def real(tree):  # without the padding of the image's arrays
        return jax.tree.map(lambda x: x[:, :n] if x.ndim == 3 and x.shape[1] > n else x, tree)

    padding = [jnp.where(jnp.arange(len(x[0]))[:, None] < n, x, 0) for x in weights[:1]]
    padded = outputs_and_gradients(
        functools.partial(kernel, tokens=n), image, text, mask, (*padding, weights[1])
    )
    expected = outputs_and_gradients(
        formula, real(image), text, mask, (real(weights[0]), weights[1])
    )
    close(real(padded), expected, 1e-5)  # as `test_is_attention`
    of_image = padded[1][0]
    for gradient in (of_image.q, of_image.k, of_image.v):
        assert not np.any(gradient[:, n:])


def test_the_model_pads_its_image_once_and_is_the_same(monkeypatch):
    """As for a TPU, with the kernel interpreted, beside the formula: outputs and gradients."""
    model = MMDiT(
        hidden_dim=256, depth=3, num_heads=2, in_channels=9, out_channels=4, text_dim=8,
        pooled_dim=8, scan=True, remat="minimal",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = [(2, 22, 26, 9), (2, 21, 8), (2, 8), (2,)]  # 143 tokens of an image, 21 of a text
    inputs = [jnp.asarray(rng.uniform(size=shape), jnp.float32) for shape in shapes]
    params = model.init(jax.random.key(0), *inputs)["params"]
    leaves, tree = jax.tree.flatten(params)  # no zeros, with which a model gives zeros
    random = [0.05 * jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in leaves]
    params = jax.tree.unflatten(tree, random)

    def found():
        def loss(params):
            outputs = model.apply({"params": params}, *inputs)
            return jnp.mean(outputs**2), outputs

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected = found()
    kernels = []

    def interpreted(*args, **options):
        kernels.append(args[0].k.shape[1])
        return flash(*args, **options, interpret=True)

    monkeypatch.setattr(mmdit, "flash", interpreted)
    monkeypatch.setattr(mmdit, "chip_memory", lambda: 128 * 2**20)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    close(found(), expected, 1e-4)  # three layers of float32 sums in another order
    assert set(kernels) == {144}


def test_in_bfloat16_is_as_near_to_float32_as_the_formula_is():
    exact = make(256, 32)
    rounded = make(256, 32, dtype=jnp.bfloat16)
    want = outputs_and_gradients(formula, *exact)

    def error(attend):
        found = outputs_and_gradients(attend, *rounded)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
        return [np.linalg.norm(np.float32(x) - y) / np.linalg.norm(y) for x, y in pairs]

    for ours, theirs in zip(error(kernel), error(formula), strict=True):
        assert ours <= 1.2 * theirs + 1e-3  # both round to 8 bits a few times


@pytest.mark.parametrize("axes", [dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=8)])
def test_on_a_mesh_is_the_same(axes):
    inputs = make(256, 32, b=8)
    alone = outputs_and_gradients(kernel, *inputs)
    with jax.set_mesh(sharding.make_mesh(**axes)):
        found = outputs_and_gradients(kernel, *inputs)
    close(found, alone, 1e-6)  # the sum over rows of the scales' gradients


SIZES = dict(num_heads=2, head_dim=128, itemsize=2, memory=128 * 2**20)  # of a v6e


@pytest.mark.parametrize(
    ("n", "m", "options", "expected"),
    [
        (4096, 48, {}, True),
        (4032, 336, {}, True),
        (16, 16, dict(head_dim=256), True),
        (4096, 40, {}, False),  # the text is no multiple of 16
        (4096, 48, dict(head_dim=64), False),  # half of the lanes
        (16 * 257, 48, {}, False),  # a prime number of rows of 16
        (65536, 48, {}, False),  # more than a head may keep
        (4096, 48, dict(memory=16 * 2**20), False),  # more than a v4 holds
        (1024, 48, dict(memory=16 * 2**20), True),
    ],
)
def test_fits_whole_lanes_and_rows_on_the_chip(n, m, options, expected):
    assert fits(1, n, m, **SIZES | options) == expected


def test_fits_what_a_mesh_can_split():
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        assert fits(4, 256, 16, **SIZES)
        assert not fits(1, 256, 16, **SIZES)
        assert not fits(4, 256, 16, **SIZES | dict(num_heads=3))


@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("topology", ["v4:2x2x4", *nightly(*OTHERS)])
def test_what_fits_compiles(topology):
    """The most tokens of the image that fit, with long text: both kernels, on every chip."""
    devices = open_topology(topology).devices[:1]
    with jax.set_mesh(sharding.make_mesh(devices=devices)):
        m = 512
        memory = chip_memory()
        sizes = [n for n in range(512, 16384, 512) if fits(1, n, m, **SIZES | dict(memory=memory))]
        n = max(sizes)
        shapes = jax.eval_shape(lambda: [jnp.zeros((1, t, 2 * 128), jnp.bfloat16) for t in (n, m)])

        def loss(image, text):
            ones = jnp.ones(128)
            streams = [Stream(q=x, k=x, v=x, q_scale=ones, k_scale=ones) for x in (image, text)]
            outputs = flash(*streams, None, num_heads=2)
            return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in outputs)

        shapes = sharding.with_shardings(shapes, sharding.replicated(jax.sharding.get_mesh()))
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*shapes)
        text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
        assert "flash_forward" in text
        assert "flash_backward" in text


@given(st.integers(1, 5000))
def test_tokens_are_padded_by_less_than_a_block_to_what_the_kernel_takes(n):
    padded = whole_blocks(n)
    assert 0 <= padded - n < LANES
    assert fits(1, padded, 16, **SIZES | dict(memory=2**30)) or padded > 4096


@pytest.mark.parametrize(("side", "most"), [(256, 1.06), (512, 1.025), (1024, 1.0)])
def test_buckets_are_padded_by_little(side, most):
    """And none has more tokens than the square: no bucket takes longer than that."""
    for height, width in standard(side):
        n = height * width // 16**2  # a latent cell has 8 pixels a side, a patch 2 cells
        assert n <= whole_blocks(n) <= min(most * n, (side // 16) ** 2)


def test_a_block_divides_the_tokens():
    assert [block_of(n) for n in (16, 256, 1040, 4096, 4032, 24)] == [16, 256, 208, 512, 448, 0]
