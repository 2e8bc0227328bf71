import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from univg_jax import sharding, trees
from univg_jax.settings import Optim
from univg_jax.training import optim

LAYERS = 3


def tree(key=0, layers=LAYERS, d=16, f=32):
    """Parameters named as MMDiT names them, with a stack of layers."""
    keys = iter(jax.random.split(jax.random.key(key), 8))
    stack = (layers,) if layers else ()
    return {
        "blocks": {
            "image": {
                "q": {
                    "kernel": jax.random.normal(next(keys), (*stack, d, f)),
                    "bias": jnp.ones((*stack, f)),
                },
                "modulation": {"kernel": jax.random.normal(next(keys), (*stack, d, 6 * d))},
            }
        },
        "patch_embed": {"kernel": jax.random.normal(next(keys), (4, d)), "bias": jnp.ones(d)},
        "out": {"scale": jnp.ones(d)},
    }


@functools.cache  # runs of one config compile once
def compiled(config):
    optimizer = optim.make_optimizer(Optim(**{"warmup": 0, **dict(config)}), total_steps=0)

    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(optimizer.init), jax.jit(step)


def run(config, params, grads, *, steps=3):
    init, step = compiled(tuple(config.items()))
    state = init(params)
    for _ in range(steps):
        params, state = step(params, state, grads)
    return params, state


def layer(params, i):
    """The i-th layer of the stack as an unstacked block, beside the other parameters."""
    return {**params, "blocks": jax.tree.map(lambda x: x[i], params["blocks"])}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_stacked_layers_are_trained_as_if_separate(name):
    # 128: below it Adafactor does not factor, and the factored moments are what could mix layers
    params, grads = tree(0, d=128, f=160), tree(1, d=128, f=160)
    config = dict(name=name, lr=0.01, weight_decay=0.1, clip=0.0)
    stacked, _ = run(config, params, grads)
    for i in range(LAYERS):
        alone, _ = run(config, layer(params, i), layer(grads, i))
        # float32 sums in another order; Newton-Schulz multiplies small differences, updates are
        # ~0.01
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            layer(stacked, i),
            alone,
        )


def test_muon_orthogonalizes_each_layer_of_a_stack_and_leaves_the_rest_to_adamw():
    params, grads = tree(0), tree(1)
    config = dict(name="muon", lr=1.0, clip=0.0, eps=1e-8)
    after, _ = run(config, params, grads, steps=1)
    update = params["blocks"]["image"]["q"]["kernel"] - after["blocks"]["image"]["q"]["kernel"]
    # optax's five Newton-Schulz steps bring singular values into (0.5, 1.5), scaled by 0.2 sqrt(32)
    values = np.linalg.svd(update, compute_uv=False) / (0.2 * np.sqrt(32))
    assert values.min() > 0.5
    assert values.max() < 1.5
    adam, _ = run(dict(config, name="adamw"), params, grads, steps=1)
    rest = lambda p: [p["patch_embed"], p["out"], p["blocks"]["image"]["modulation"]]  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, rest(after), rest(adam))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_weight_decay_is_of_kernels_only(name):
    params = tree()
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _ = run(dict(name=name, lr=0.1, weight_decay=0.5), params, zero, steps=1)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        got = dict(jax.tree_util.tree_leaves_with_path(after))[path]
        decayed = 0.95 if trees.path_name(path).endswith("kernel") else 1.0
        np.testing.assert_allclose(got, x * decayed, rtol=1e-6)  # one rounding


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_frozen_parameters_stay_and_have_no_state(name):
    params = tree()
    after, state = run(
        dict(name=name, lr=0.1, weight_decay=0.1, freeze=("^blocks/",)), params, tree(1)
    )
    jax.tree.map(np.testing.assert_array_equal, after["blocks"], params["blocks"])
    assert not np.array_equal(after["patch_embed"]["kernel"], params["patch_embed"]["kernel"])
    assert not [
        p for p, _ in jax.tree_util.tree_leaves_with_path(state) if "blocks" in trees.path_name(p)
    ]


def test_frozen_gradients_do_not_count_in_the_clipped_norm():
    params, grads = tree(), tree(1)
    loud = {**grads, "blocks": jax.tree.map(lambda g: 1e6 * g, grads["blocks"])}
    # eps=1: scale of the gradient shows
    config = dict(name="adamw", lr=0.1, eps=1.0, clip=1.0, freeze=("^blocks/",))
    jax.tree.map(
        np.testing.assert_array_equal, run(config, params, grads)[0], run(config, params, loud)[0]
    )


def test_freeze_that_matches_nothing_is_an_error():
    with pytest.raises(
        ValueError, match=r"'backbone' matches no parameter; the first are \['blocks/image"
    ):
        optim.make_optimizer(Optim(freeze=("backbone",)), total_steps=0).init(tree())


def test_clip_bounds_the_gradient():
    params = {"a": jnp.zeros(4)}
    config = dict(name="adamw", lr=1.0, b1=0.0, b2=0.0, eps=1e6, clip=1.0)
    after, _ = run(config, params, {"a": jnp.full(4, 100.0)}, steps=1)
    # g / (|g| + 1e6) with |g| = 1/2: eps dominates
    np.testing.assert_allclose(after["a"], -0.5e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_first_moment_in_bfloat16(name):
    state = optim.make_optimizer(Optim(name=name, mu_dtype="bfloat16"), total_steps=0).init(tree())
    moments = {
        x.dtype.name
        for p, x in jax.tree_util.tree_leaves_with_path(state)
        if trees.path_name(p).endswith("q/kernel")
        and ("/mu/" in trees.path_name(p) or "/ema/" in trees.path_name(p))
    }
    assert moments == {"bfloat16"}


def test_schedule_at_its_key_steps():
    constant = optim.make_schedule(Optim(lr=2.0, warmup=4), total_steps=0)
    assert [float(constant(t)) for t in (0, 1, 3, 4, 10**6)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = optim.make_schedule(Optim(lr=2.0, warmup=4, schedule="cosine"), total_steps=104)
    found = [float(cosine(t)) for t in (0, 4, 54, 104, 200)]
    np.testing.assert_allclose(found, [0.5, 2.0, 1.0, 0.0, 0.0], atol=1e-6)  # float32 cosine
    assert float(optim.make_schedule(Optim(lr=2.0, warmup=0), total_steps=0)(0)) == 2.0


def test_the_end_of_the_cosine_is_not_the_last_step_where_it_is_given():
    config = Optim(lr=2.0, warmup=4, schedule="cosine", decay_steps=104)
    rates = [
        [float(optim.make_schedule(config, total_steps=total)(t)) for t in range(0, 300, 7)]
        for total in (50, 104, 1000)
    ]
    assert rates[0] == rates[1] == rates[2]


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    config = Optim(lr=1.0, warmup=5, schedule="cosine")
    schedule = optim.make_schedule(config, total_steps=2)
    np.testing.assert_allclose([float(schedule(t)) for t in (0, 1)], [0.2, 0.4], rtol=1e-6)


def loss_fn(params, rows):
    """A mean over valid rows of a loss that is not linear in the parameters."""
    per_row = jnp.square(jnp.tanh(rows["x"] @ params["w"]) - rows["y"]) * rows["valid"]
    return per_row.sum() / rows["valid"].sum(), {"loss": per_row}


def rows(b=16):
    k = jax.random.split(jax.random.key(0), 3)
    valid = (jnp.arange(b) % 5 != 0).astype(jnp.float32)  # uneven over the parts
    return {
        "x": jax.random.normal(k[0], (b, 8)),
        "y": jax.random.normal(k[1], (b,)),
        "valid": valid,
    }


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("fsdp", [1, 4])
def test_accumulation_equals_the_large_batch(accumulate, fsdp):
    params = {"w": jax.random.normal(jax.random.key(2), (8,))}
    (loss, per_row), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, rows())
    mesh = sharding.make_mesh(data=1, fsdp=fsdp, devices=jax.devices()[:fsdp])
    accumulated = optim.value_and_grad(
        loss_fn, accumulate=accumulate, weight=lambda r: r["valid"].sum()
    )
    (loss_a, per_row_a), grads_a = jax.jit(accumulated)(
        params, sharding.shard_batch(jax.device_get(rows()), mesh)
    )
    np.testing.assert_allclose(loss_a, loss, rtol=1e-6)  # float32 sums in another order
    np.testing.assert_allclose(grads_a["w"], grads["w"], rtol=1e-5, atol=1e-7)
    # rows in their order
    np.testing.assert_allclose(per_row_a["loss"], per_row["loss"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_are_float32(accumulate):
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), rows())
    _, grads = optim.value_and_grad(loss_fn, accumulate=accumulate)(params, half)
    assert grads["w"].dtype == jnp.float32


def test_accumulation_must_divide_the_batch():
    with pytest.raises(ValueError, match="accumulate=3 does not divide the batch of 16"):
        optim.value_and_grad(loss_fn, accumulate=3)({"w": jnp.ones(8)}, rows())


def test_ema_forgets_its_start_then_averages():
    ema, params = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    after = optim.update_ema(ema, params, decay=0.9999, step=0)
    np.testing.assert_allclose(after["a"], 0.9, rtol=1e-6)
    after = optim.update_ema(ema, params, decay=0.9, step=jnp.int32(10**6))
    np.testing.assert_allclose(after["a"], 0.1, rtol=1e-6)
    after = optim.update_ema(ema, params, decay=0.9, step=0, warmup=1.0)
    np.testing.assert_allclose(after["a"], 0.1, rtol=1e-6)


def test_an_average_that_is_handed_over_does_not_warm_up_but_new_leaves_do():
    ema = {"old": jnp.zeros(2), "new": {"face": jnp.zeros(2)}}
    params = jax.tree.map(jnp.ones_like, ema)
    after = optim.update_ema(ema, params, decay=0.99, step=0, fresh=("face",))
    np.testing.assert_allclose(after["old"], 0.01, rtol=1e-6)
    np.testing.assert_allclose(after["new"]["face"], 0.9, rtol=1e-6)


@settings(deadline=None, max_examples=20)  # the first example compiles
@given(decay=st.floats(0.0, 0.9999), steps=st.integers(1, 30))
def test_ema_of_a_constant_is_that_constant_and_float32(decay, steps):
    ema, params = {"a": jnp.full(3, 0.3, jnp.float32)}, {"a": jnp.full(3, 0.3, jnp.bfloat16)}
    for t in range(steps):
        ema = optim.update_ema(ema, params, decay=decay, step=t)
    assert ema["a"].dtype == jnp.float32
    # bfloat16(0.3) differs from 0.3 by 2^-9 at most; an average lies between the two
    np.testing.assert_allclose(ema["a"], 0.3, atol=2**-9)
