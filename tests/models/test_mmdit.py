"""MM-DiT: laws that hold without a reference. Parity with diffusers is in
tests/interop/test_diffusers.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from univg_jax import sharding
from univg_jax.errors import UserError
from univg_jax.models.layers import modulated_norm, rotate_2d, sincos_table
from univg_jax.models.mmdit import MMDiT, make_mmdit
from univg_jax.planning import hlo
from univg_jax.sizes import SIZES, size_of
from univg_jax.stored import differences
from univg_jax.trees import named_leaves

TINY = MMDiT(
    hidden_dim=32, depth=3, num_heads=4, in_channels=5, out_channels=2, text_dim=12, pooled_dim=7
)


def inputs(model, *, batch=2, height=6, width=10, tokens=5, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return dict(
        latents=normal(batch, height, width, model.in_channels),
        text_emb=normal(batch, tokens, model.text_dim),
        pooled_emb=normal(batch, model.pooled_dim),
        t=jnp.asarray(rng.uniform(size=batch), jnp.float32),
    )


def quick_jit(f):
    """`jit` for programs that run once: most of these tests' time is compilation."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def initial(model):
    return quick_jit(model.init)(jax.random.key(0), **inputs(model))["params"]


def random_params(model, seed=1):
    """Parameters with nothing at zero, so that every path is active."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs(model))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype), shapes)


def apply(model, params, **kwargs):
    return quick_jit(lambda p, k: model.apply({"params": p}, **k))(params, kwargs)


def output_and_gradients(model, params, **kwargs):
    def loss(p):
        out = model.apply({"params": p}, **kwargs)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)), out

    grads, out = quick_jit(jax.grad(loss, has_aux=True))(params)
    return out, grads


@functools.cache
def reference():
    """Output and gradients of the plain model."""
    return output_and_gradients(TINY, random_params(TINY), **inputs(TINY))


def assert_trees_close(a, b, *, rtol):
    """Leaf by leaf, difference relative to the leaf's largest entry."""
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        error = jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-6)
        assert error <= rtol, f"{jax.tree_util.keystr(path)}: {error}"


@pytest.mark.parametrize("options", [dict(), dict(shared_adaln=True, sandwich_norm=True)], ids=str)
def test_initial_output_is_exactly_zero(options):
    model = dataclasses.replace(TINY, **options)
    assert not apply(model, initial(model), **inputs(model)).any()


@given(padding=st.integers(1, 9), junk=st.floats(-1e3, 1e3, width=32), length=st.integers(1, 5))
@settings(max_examples=4, deadline=None)  # each padding length compiles anew
def test_padded_text_does_not_matter(padding, junk, length):
    params, x = random_params(TINY), inputs(TINY)
    kept = x["text_emb"][:, :length]
    want = apply(TINY, params, **{**x, "text_emb": kept})
    padded = jnp.concatenate([kept, jnp.full((2, padding, TINY.text_dim), junk)], axis=1)
    mask = jnp.broadcast_to(jnp.arange(length + padding) < length, (2, length + padding))
    got = apply(TINY, params, **{**x, "text_emb": padded}, text_mask=mask)
    # float32 sums in another order, through three blocks
    np.testing.assert_allclose(got, want, atol=2e-5 * float(want.std()))


def test_no_mask_attends_to_all():
    want, _ = reference()
    x = inputs(TINY)
    got = apply(TINY, random_params(TINY), **x, text_mask=jnp.ones(x["text_emb"].shape[:2], bool))
    np.testing.assert_allclose(got, want, atol=2e-5 * float(want.std()))  # same sums, other fusions


@pytest.mark.parametrize(
    "options",
    [
        dict(scan=False, remat="minimal"),
        dict(scan=True, remat="minimal"),
        dict(scan=False, remat="full"),
        dict(scan=True, remat="full"),
    ],
    ids=str,
)
def test_scan_and_remat_change_nothing(options):
    want, want_grads = reference()
    got, grads = output_and_gradients(
        dataclasses.replace(TINY, **options), random_params(TINY), **inputs(TINY)
    )
    np.testing.assert_allclose(got, want, atol=2e-5 * float(want.std()))  # same sums, other fusions
    assert_trees_close(grads, want_grads, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(position="rope", sandwich_norm=True),
        dict(shared_adaln=True, qk_norm=None, scan=False),
        dict(depth=1, patch_size=1, mlp_ratio=2),
    ],
    ids=str,
)
def test_options_reach_every_parameter(options):
    model = dataclasses.replace(TINY, **options)
    out, grads = output_and_gradients(model, random_params(model), **inputs(model))
    assert out.shape == (2, 6, 10, 2)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(g).all(), name
        # of the last text stream's six modulations only (shift, scale) of its attention are read
        expected = 1 / 3 if "last_block" in name and "text" in name and "offset" in name else 1.0
        assert (g != 0).mean() > 0.95 * expected, name


def test_bfloat16_computes_near_float32_with_float32_parameters():
    model, x = dataclasses.replace(TINY, dtype=jnp.bfloat16), inputs(TINY)
    params = random_params(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    got, want = apply(model, params, **x), reference()[0]
    assert got.dtype == jnp.bfloat16
    # bfloat16 rounds to 2^-9; some tens of roundings in a row
    assert jnp.abs(got.astype(jnp.float32) - want).max() < 0.1 * want.std()


def test_a_custom_attention_is_used():
    def uniform(q, k, v, mask):
        return jnp.broadcast_to(v.mean(axis=1, keepdims=True), q.shape)

    model = dataclasses.replace(TINY, attention=uniform)
    got = apply(model, random_params(model), **inputs(model))
    assert jnp.abs(got - reference()[0]).max() > 1e-3


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_positions_distinguish_tokens(position):
    model = dataclasses.replace(TINY, position=position)
    params, x = random_params(model), inputs(model)
    run = quick_jit(lambda latents: model.apply({"params": params}, **{**x, "latents": latents}))
    latents = x["latents"].at[:, :2, :2].set(3.0)  # one patch stands out
    assert (
        jnp.abs(jnp.roll(run(latents), 2, axis=2) - run(jnp.roll(latents, 2, axis=2))).max() > 1e-3
    )


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_a_source_as_tokens_is_the_lower_half_of_one_tall_picture(position):
    """[noise, mask] above [source, mask], as a model of those channels alone sees it."""
    model = dataclasses.replace(TINY, source="tokens", position=position)
    tall = dataclasses.replace(TINY, in_channels=3, position=position)
    params, x = random_params(model), inputs(model)
    noise, source, mask = jnp.split(x["latents"], [2, 4], axis=-1)
    halves = [jnp.concatenate([half, mask], axis=-1) for half in (noise, source)]
    want = apply(tall, params, **{**x, "latents": jnp.concatenate(halves, axis=1)})
    got = apply(model, params, **x)
    assert got.shape == noise.shape
    # same sums, other fusions
    np.testing.assert_allclose(got, want[:, : got.shape[1]], atol=1e-5 * float(want.std()))


def test_rotation_depends_on_differences_only():
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.normal(size=(2, 1, 8)), jnp.float32)
    grid = lambda v: rotate_2d(jnp.broadcast_to(v[None], (1, 20, 1, 8)), height=4, width=5)[0, :, 0]  # noqa: E731
    scores = grid(q) @ grid(k).T
    index = np.arange(20).reshape(4, 5)
    a, b = index[1:3, 1:3].ravel(), index[2:4, 2:4].ravel()
    # float32 of order 1
    np.testing.assert_allclose(scores[index[0, 0], a], scores[index[1, 1], b], atol=1e-5)


def test_sincos_crop_is_central():
    whole = sincos_table(7, 7, dim=8, max_size=7, base_size=3).reshape(7, 7, 8)
    part = sincos_table(3, 5, dim=8, max_size=7, base_size=3).reshape(3, 5, 8)
    np.testing.assert_array_equal(part, whole[2:5, 1:6])
    with pytest.raises(UserError, match="pos_embed_max_size=7"):
        sincos_table(8, 3, dim=8, max_size=7, base_size=3)


def test_modulated_norm_normalises():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 5, (2, 4, 256)), jnp.float32)
    y = modulated_norm(x, jnp.ones((2, 256)), jnp.full((2, 256), 0.5))
    np.testing.assert_allclose(y.mean(-1), 0.5, atol=1e-5)  # float32 mean of 256
    np.testing.assert_allclose(y.std(-1), 2.0, rtol=1e-4)


@pytest.mark.parametrize(("size", "published"), [("b", 416e6), ("l", 1.8e9), ("xl", 3.7e9)])
def test_published_sizes(size, published):
    model = make_mmdit(size)
    params = jax.eval_shape(model.init, jax.random.key(0), **inputs(model))["params"]
    count = sum(x.size for x in jax.tree.leaves(params))
    assert abs(count / published - 1) < 0.02
    assert model.hidden_dim % 256 == 0  # a side of the matrix unit of a v6e
    assert model.heads_dim // model.num_heads == 128


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_known_by_its_parameters(size):
    model = make_mmdit(size)
    params = jax.eval_shape(model.init, jax.random.key(0), **inputs(model))["params"]
    named = {f"backbone/{name}": x for name, x in named_leaves(params).items()}
    assert size_of(named) == size
    assert size_of({}) is None


def test_a_wrong_size_is_said_before_the_leaves_that_differ():
    shapes = [
        named_leaves(jax.eval_shape(model.init, jax.random.key(0), **inputs(model))["params"])
        for model in (make_mmdit("b"), make_mmdit("b-64"))
    ]
    first, *others = differences(*shapes)
    assert first == "it is of model.size=b-64"
    assert all("norm/scale" in line for line in others)


def test_heads_may_be_wider_than_the_model():
    """With the outputs of additional heads unused, they change nothing."""
    wide = dataclasses.replace(TINY, num_heads=2 * TINY.num_heads, head_dim=8)
    assert TINY.hidden_dim // TINY.num_heads == 8
    params, more = random_params(TINY), random_params(wide)

    def embed(path, small, large):
        ends = [slice(0, n) for n in small.shape]
        if "attn_out" in jax.tree_util.keystr(path):
            large = jnp.zeros_like(large)
        return large.at[tuple(ends)].set(small)

    filled = jax.tree.map_with_path(embed, params, more)
    expected, found = (
        apply(model, p, **inputs(TINY)) for model, p in ((TINY, params), (wide, filled))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32 sums of more terms


def test_sharing_the_modulation_saves_12_d2_a_block():
    def count(**options):
        model = MMDiT(hidden_dim=64, depth=9, num_heads=4, text_dim=8, pooled_dim=8, **options)
        shapes = jax.eval_shape(model.init, jax.random.key(0), **inputs(model))
        return sum(x.size for x in jax.tree.leaves(shapes))

    # of the last text stream 2 d^2 instead of 6 d^2; within the biases
    saved = (9 * 12 - 4 - 12) * 64**2
    assert abs((count() - count(shared_adaln=True)) / saved - 1) < 0.01


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: make_mmdit("tini"), "did you mean 'tiny'"),
        (lambda: make_mmdit("tiny", hiden_dim=3), "did you mean 'hidden_dim'"),
        (lambda: make_mmdit("tiny", remat="ful"), "did you mean 'full'"),
        (lambda: make_mmdit("tiny", num_heads=3), "multiple of 4"),
        (lambda: make_mmdit("tiny", head_dim=6), "head_dim 6 is not a multiple of 4"),
        (lambda: make_mmdit("tiny", qk_norm="layer"), "qk_norm"),
        (lambda: make_mmdit("tiny", source="token"), "did you mean 'tokens'"),
        (lambda: dataclasses.replace(TINY, source="tokens", in_channels=6), "in_channels 6"),
        (lambda: apply(TINY, {}, **inputs(TINY, height=5)), "not divisible into patches"),
        (lambda: initial(dataclasses.replace(TINY, attention="xlb")), "did you mean 'xla'"),
    ],
)
def test_bad_fields_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_every_size_names_only_fields():
    for fields in SIZES.values():
        assert fields.keys() <= {f.name for f in dataclasses.fields(MMDiT)}


@pytest.mark.parametrize(
    ("remat", "gathers"), [("none", 2), ("minimal", 2), ("full", 2), ("block", 2)]
)
def test_gathered_weights_are_not_kept_for_the_backward_pass(remat, gathers):
    """Fully sharded, a policy may keep activations, but a weight is gathered forwards and once more
    backwards.
    """
    mesh = sharding.make_mesh(data=1, fsdp=8)
    jax.set_mesh(mesh)
    model = MMDiT(
        hidden_dim=128,
        depth=4,
        num_heads=2,
        text_dim=64,
        pooled_dim=64,
        remat=remat,
        scan=True,
        attention="xla",
    )
    inputs = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in [(8, 4, 4, 33), (8, 8, 64), (8, 64), (8,)]
    ]
    inputs = sharding.with_shardings(inputs, sharding.batch_sharding(mesh))
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    params = sharding.with_shardings(shapes, sharding.tree_shardings(shapes, mesh))

    def loss(params, *inputs):
        return jnp.sum(model.apply({"params": params}, *inputs) ** 2)

    counts = hlo.count(jax.jit(jax.grad(loss)).lower(params, *inputs).compile().as_text())
    moved = {c.kind: c.bytes for c in counts.collectives}
    blocks = sum(
        x.size * 4
        for path, x in jax.tree_util.tree_leaves_with_path(params["blocks"])
        if any(axis is not None for axis in x.sharding.spec)
    )
    everything = sum(
        x.size * 4
        for x in jax.tree.leaves(params)
        if any(axis is not None for axis in x.sharding.spec)
    )
    # The last block and the ends are outside the loop, where the compiler may gather once.
    assert gathers * blocks <= moved["all-gather"] <= gathers * everything
