"""What programs communicate, by kind, group and bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from univg_jax import sharding
from univg_jax.planning.collectives import collectives
from univg_jax.planning.parse import parse


def test_collectives_by_kind_group_and_bytes():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    jax.set_mesh(mesh)
    x = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P("fsdp")))

    def communicate(x):
        def local(x):
            whole = jax.lax.all_gather(x, "fsdp", tiled=True)
            part = jax.lax.psum_scatter(whole * jax.lax.axis_index("fsdp"), "fsdp", tiled=True)
            return jax.lax.psum(part * jax.lax.axis_index("data"), "data")

        return jax.shard_map(local, in_specs=P("fsdp"), out_specs=P("fsdp"))(x)

    found = {
        c.kind: c for c in collectives(parse(jax.jit(communicate).lower(x).compile().as_text()))
    }
    size = 64 * 32 * 4
    assert {kind: (c.group, c.count, c.bytes) for kind, c in found.items()} == {
        "all-gather": (4, 1, size),
        "reduce-scatter": (4, 1, size),
        "all-reduce": (2, 1, size / 4),
    }
    assert found["all-gather"].wire_bytes == found["reduce-scatter"].wire_bytes == size * 3 / 4
    assert found["all-reduce"].wire_bytes == 2 * size / 4 / 2
    # Devices 0 to 3 are the first row of the mesh: over data a group spans 4.
    assert found["all-reduce"].crosses(4)
    assert not found["all-gather"].crosses(4)


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true",
        "replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true",
        "replica_groups=mesh['data'=4,'fsdp'=2] {'data'}, use_global_device_ids=true",
    ],
)
def test_groups_are_read_in_each_of_their_three_notations(groups):
    text = f"""HloModule test

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = f32[8]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add
}}
"""
    (found,) = collectives(parse(text))
    assert (found.kind, found.group, found.span, found.bytes) == ("all-reduce", 4, 6, 32)
