import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from univg_jax import sharding
from univg_jax.batch import Conditions
from univg_jax.models.mmdit import MMDiT
from univg_jax.models.univg import UniVG
from univg_jax.trees import named_leaves

BACKBONE = MMDiT(
    hidden_dim=32, depth=1, num_heads=4, in_channels=9, out_channels=4, text_dim=12, pooled_dim=7
)


def example(seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    conditions = Conditions(
        cond_latents=normal(3, 4, 6, 4),
        mask=jnp.ones((3, 4, 6, 1)),
        text_emb=normal(3, 5, 12),
        text_mask=jnp.ones((3, 5), bool),
        pooled_emb=normal(3, 7),
        face_emb=normal(3, 8),
        identity_slot=jnp.zeros((3, 5), bool).at[1, 2].set(True),
    )
    return normal(3, 4, 6, 4), jnp.asarray([0.1, 0.5, 0.9]), conditions


def quick_jit(f):
    """`jit` for programs that run once: most of these tests' time is compilation."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def random_params(model, seed=1):
    """Parameters with nothing at zero, so that every path is active."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example())["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype), shapes)


def test_channels_enter_in_order_noisy_image_mask():
    model = UniVG(backbone=BACKBONE)
    params, (x_t, t, c) = random_params(model), example()
    latents = jnp.concatenate([x_t, c.cond_latents, c.mask], axis=-1)
    inputs = (latents, c.text_emb, c.pooled_emb, t, c.text_mask)
    want = quick_jit(BACKBONE.apply)({"params": params["backbone"]}, *inputs)
    got = quick_jit(model.apply)({"params": params}, x_t, t, c)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(want.std()))  # same sums, other fusions


def test_the_face_replaces_only_the_slot():
    model = UniVG(backbone=BACKBONE, face_dim=8)
    params, (x_t, t, c) = random_params(model), example()
    run = quick_jit(lambda c: model.apply({"params": params}, x_t, t, c))
    out = run(c)
    other_face = run(dataclasses.replace(c, face_emb=c.face_emb + 1))
    changed = jnp.abs(out - other_face).max(axis=(1, 2, 3))
    assert changed[1] > 1e-4
    assert not changed[jnp.array([0, 2])].any()
    # what the text encoder said at the slot is gone
    other_text = run(dataclasses.replace(c, text_emb=c.text_emb.at[1, 2].add(5.0)))
    np.testing.assert_array_equal(out, other_text)


def test_without_a_face_a_slot_is_a_word_like_any_other():
    model = UniVG(backbone=BACKBONE, face_dim=8)
    params, (x_t, t, c) = random_params(model), example()
    run = quick_jit(lambda c: model.apply({"params": params}, x_t, t, c))
    faceless = dataclasses.replace(c, face_emb=c.face_emb.at[1].set(0))
    nowhere = dataclasses.replace(c, identity_slot=jnp.zeros_like(c.identity_slot))
    np.testing.assert_array_equal(run(faceless), run(nowhere))


def test_without_identity_there_is_no_projector():
    assert set(random_params(UniVG(backbone=BACKBONE))) == {"backbone"}
    assert set(random_params(UniVG(backbone=BACKBONE, face_dim=8))) == {
        "backbone",
        "identity_projector",
    }


def test_face_width_is_checked():
    x_t, t, c = example()
    with pytest.raises(ValueError, match="face_dim=9"):
        UniVG(backbone=BACKBONE, face_dim=9).init(jax.random.key(0), x_t, t, c)


def test_kernels_that_are_cast_beforehand_give_the_same_gradients(monkeypatch):
    """As on an accelerator, where kernels are bfloat16; on a CPU they stay float32."""
    backbone = BACKBONE.clone(depth=3, dtype=jnp.bfloat16, attention="xla", scan=True)
    model = UniVG(backbone=backbone, face_dim=8)
    params, inputs = random_params(model), example()
    assert {x.dtype for x in jax.tree.leaves(model.cast_kernels(params))} == {jnp.dtype("float32")}
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")

    def gradients(cast):
        def loss(params):
            return jnp.mean(model.apply({"params": params}, *inputs) ** 2)

        run = quick_jit(lambda p: jax.grad(loss)(model.cast_kernels(p) if cast else p))
        return run(params)

    found, expected = gradients(cast=True), gradients(cast=False)
    for name, x in named_leaves(found).items():
        assert x.dtype == (jnp.bfloat16 if name.endswith("kernel") else jnp.float32)
    # Only the place of the conversion to float32 differs, and that changes no number.
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.float32(x), y), found, expected)
