import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.helpers import fake_batch
from univg_jax import sharding
from univg_jax.batch import BatchShape
from univg_jax.errors import UserError
from univg_jax.models.clip import CLIPText
from univg_jax.models.minilm import MiniLM
from univg_jax.models.mmdit import make_mmdit
from univg_jax.models.t5 import T5Encoder
from univg_jax.planning import hlo
from univg_jax.trees import named_leaves

SHAPE = BatchShape(height=8, width=8, num_tokens=4, face=4)


def shapes(size="tiny", **overrides):
    model = make_mmdit(size, **overrides)
    blank = jax.ShapeDtypeStruct
    return jax.eval_shape(
        model.init,
        jax.random.key(0),
        blank((1, 8, 8, model.in_channels), jnp.float32),
        blank((1, 4, model.text_dim), jnp.float32),
        blank((1, model.pooled_dim), jnp.float32),
        blank((1,), jnp.float32),
    )["params"]


def specs(tree, mesh):
    found = named_leaves(sharding.tree_shardings(tree, mesh))
    return {name: sharding.spec for name, sharding in found.items()}


def unused_rules(tree):
    """The patterns that decide about no leaf of `tree`: misspelt, or shadowed by one above."""
    patterns = [pattern for pattern, _ in sharding.RULES]
    used = {
        next((pattern for pattern in patterns if re.search(pattern, name)), None)
        for name in named_leaves(tree)
    }
    return [pattern for pattern in patterns if pattern not in used]


def device(i, *, num_per_slice):
    return mock.Mock(
        spec=jax.Device,
        id=i,
        slice_index=i // num_per_slice,
        process_index=0,
        platform="cpu",
        device_kind="cpu",
    )


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (dict(), (8, 1, 1)),
        (dict(data=1, fsdp=-1), (1, 8, 1)),
        (dict(data=2, fsdp=2, tensor=2), (2, 2, 2)),
        (dict(fsdp=4), (2, 4, 1)),
    ],
)
def test_mesh_takes_all_devices(sizes, expected):
    mesh = sharding.make_mesh(**sizes)
    assert tuple(mesh.shape.values()) == expected
    assert mesh.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize(
    "sizes", [dict(fsdp=3), dict(data=2), dict(data=-1, fsdp=-1), dict(data=0), dict(tensor=16)]
)
def test_impossible_mesh_is_one_line(sizes):
    with pytest.raises(UserError, match=r"^mesh data=[^\n]*$"):
        sharding.make_mesh(**sizes)


def test_mesh_on_some_devices():
    assert sharding.make_mesh(devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "overrides", [dict(), dict(shared_adaln=True, sandwich_norm=True, position="rope")]
)
def test_every_rule_is_used_and_every_large_leaf_is_split(overrides):
    tree = shapes("xl", **overrides)
    mesh = jax.sharding.AbstractMesh(
        (1, 64, 1), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    assert unused_rules(tree) == []
    for leaf in sharding.leaf_specs(tree, sharding.tree_shardings(tree, mesh), larger_than=2**22):
        assert "fsdp" in leaf.spec, leaf
        if leaf.path.startswith("blocks/"):
            assert leaf.spec[0] is None, leaf  # the scanned layer axis stays whole


def test_tensor_parallel_pairs():
    found = specs(shapes("b"), sharding.make_mesh(data=1, fsdp=4, tensor=2))
    assert found["blocks/image/q/kernel"] == P(None, "fsdp", "tensor")
    assert found["blocks/image/q/bias"] == P(None, "tensor")
    assert found["blocks/text/mlp/in/kernel"] == P(None, "fsdp", "tensor")
    assert found["blocks/text/mlp/out/kernel"] == P(None, "tensor", "fsdp")
    assert found["last_block/image/attn_out/kernel"] == P("tensor", "fsdp")
    assert found["blocks/image/attn_out/bias"] == P()


@pytest.mark.parametrize(
    "encoder", [MiniLM(), CLIPText(), T5Encoder()], ids=lambda m: type(m).__name__
)
def test_every_text_encoder_is_split_over_tensor_like_the_backbone(encoder):
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, 4), jnp.bool_)
    tree = jax.eval_shape(encoder.init, jax.random.key(0), tokens, mask)["params"]
    found = specs(tree, sharding.make_mesh(data=1, fsdp=4, tensor=2))
    kernels = {
        re.sub(r"^.*block[^/]*/", "", name): [*spec][-2:]
        for name, spec in found.items()
        if "block" in name and name.endswith("kernel")
    }
    expected = {name: ["fsdp", "tensor"] for name in ("q", "k", "v", "mlp/in")}
    expected |= {name: ["tensor", "fsdp"] for name in ("attn_out", "mlp/out")}
    if isinstance(encoder, T5Encoder):
        expected["mlp/gate"] = ["fsdp", "tensor"]
    assert kernels == {f"{name}/kernel": spec for name, spec in expected.items()}


def test_fsdp_takes_the_largest_dimension_but_the_last_and_small_leaves_are_whole():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    big = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    tree = {
        "a": big(512, 1024),
        "blocks": {"b": big(4096, 256, 128)},
        "odd": big(1024, 1001),
        "last": big(1001, 1024),
        "small": big(8, 8),
    }
    assert specs(tree, mesh) == {
        "a": P("fsdp"),
        "blocks/b": P(None, "fsdp"),
        "odd": P("fsdp"),
        "last": P(None, "fsdp"),
        "small": P(),
    }


def test_axis_that_does_not_divide_is_dropped_there_only():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    tree = {"block": {"q": {"kernel": jax.ShapeDtypeStruct((6, 10), jnp.float32)}}}
    assert specs(tree, mesh) == {"block/q/kernel": P(None, "tensor")}


@pytest.mark.parametrize(
    "optimizer", [optax.adamw(1e-3), optax.adafactor(1e-3, min_dim_size_to_factor=64)]
)
def test_optimizer_state_lies_where_its_parameter_does(optimizer):
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    params = shapes("tiny")
    by_parameter = specs(params, mesh)
    shape_of = {name: x.shape for name, x in named_leaves(params).items()}
    state = jax.eval_shape(optimizer.init, params)
    placed = jax.tree.leaves(sharding.tree_shardings(state, mesh))
    same_shape = 0
    for (path, leaf), found in zip(named_leaves(state).items(), placed):
        # raises if the spec does not fit: factored moments have fewer dimensions
        found.shard_shape(leaf.shape)
        owner = [n for n in shape_of if path.endswith("/" + n) and shape_of[n] == leaf.shape]
        same_shape += len(owner)
        assert all(found.spec == by_parameter[name] for name in owner)
    assert same_shape > len(shape_of) // 2


def test_init_under_shardings_gives_the_same_parameters():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)

    def init(key):
        return {"block": {"q": {"kernel": jax.random.normal(key, (16, 32))}}}

    out = jax.jit(
        init, out_shardings=sharding.tree_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    )
    np.testing.assert_array_equal(
        out(jax.random.key(0))["block"]["q"]["kernel"],
        init(jax.random.key(0))["block"]["q"]["kernel"],
    )
    assert len(out(jax.random.key(0))["block"]["q"]["kernel"].sharding.device_set) == 8


def test_batch_rows_go_to_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batch = fake_batch(shape=SHAPE, batch_size=8)
    with jax.transfer_guard("disallow"):
        placed = sharding.shard_batch(batch, mesh)
    np.testing.assert_array_equal(sharding.all_gather_to_host(placed.target), batch.target)
    assert placed.target.sharding == sharding.batch_sharding(mesh)
    assert {s.data.shape[0] for s in placed.target.addressable_shards} == {2}
    with pytest.raises(UserError, match="6"):
        sharding.shard_batch(fake_batch(shape=SHAPE, batch_size=6), mesh)


def product_and_gradients(x, w, name):
    def loss(x, w):
        y = sharding.matmul(x, w, name)
        return jnp.sum(jnp.sin(y)), y

    (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, w)
    return y, *gradients


@pytest.mark.parametrize(
    "axes", [dict(data=1, fsdp=8), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)]
)
@pytest.mark.parametrize("name", ["block/q/kernel", "block/mlp/out/kernel", "patch_embed/kernel"])
def test_a_product_with_a_sharded_weight_is_the_product(axes, name):
    x, w = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(64, 256), (256, 128)])
    )
    x = x / 16  # so that the products are about 1, and the sine tells them well apart
    plain = product_and_gradients(x, w, name)  # no mesh: x @ w
    mesh = sharding.make_mesh(**axes)
    jax.set_mesh(mesh)
    spec = sharding.layer_spec(name, w.shape, mesh)
    assert "fsdp" in str(spec)
    placed = jax.device_put(w, jax.sharding.NamedSharding(mesh, spec))
    rows = jax.device_put(x, sharding.batch_sharding(mesh))
    # as in training: a gradient ends where its weight is
    out = (rows.sharding, rows.sharding, placed.sharding)
    y, dx, dw = jax.jit(product_and_gradients, static_argnums=2, out_shardings=out)(
        rows, placed, name
    )
    for ours, theirs in zip((y, dx, dw), plain):
        # float32 sums of up to 256 terms of about 1 in another order.
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_sharded_product_gathers_the_weight_and_scatters_its_gradient_and_nothing_else():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    jax.set_mesh(mesh)
    place = lambda *shape: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, P("fsdp"))
    )
    step = jax.jit(product_and_gradients, static_argnums=2)
    counts = hlo.count(
        step.lower(place(64, 256), place(256, 128), "block/q/kernel").compile().as_text()
    )
    moved = {}
    for c in counts.collectives:
        moved[c.kind] = moved.get(c.kind, 0) + c.wire_bytes
    size = 256 * 128 * 4
    # The loss itself is one number. The second hop of the reduce-scatter moves what the first left.
    assert moved["all-gather"] == size * 7 / 8
    assert moved["reduce-scatter"] == pytest.approx(size * (1 / 2 + 1 / 2 * 3 / 4))
    assert moved.get("all-reduce", 0) <= 16


def test_where_fsdp_is_one_device_a_product_is_a_product():
    jax.set_mesh(sharding.make_mesh(data=8))
    text = (
        jax.jit(lambda x, w: sharding.matmul(x, w, "q/kernel"))
        .lower(jnp.ones((8, 64)), jnp.ones((64, 64)))
        .as_text()
    )
    assert "all_gather" not in text


@pytest.mark.parametrize(
    ("devices", "slices", "width", "expected"),
    [
        (256, 1, 1920, (2, 128, 1)),
        (64, 1, 1920, (1, 64, 1)),
        (512, 2, 1920, (4, 128, 1)),
        (8, 1, 384, (1, 8, 1)),
    ],
)
def test_with_the_models_width_fsdp_takes_what_divides_it(devices, slices, width, expected):
    available = [device(i, num_per_slice=devices // slices) for i in range(devices)]
    mesh = sharding.make_mesh(data=-1, fsdp=-1, width=width, devices=available)
    assert tuple(mesh.shape.values()) == expected
    # Along data first come the slices: no other axis leaves one.
    assert {len({d.slice_index for d in row.flat}) for row in mesh.devices.reshape(slices, -1)} == {
        1
    }


def test_slices_lie_along_data():
    with pytest.raises(UserError, match="multiple of the number of slices, 2"):
        sharding.make_mesh(data=1, fsdp=8, devices=[device(i, num_per_slice=4) for i in range(8)])
