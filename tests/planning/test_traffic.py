"""Bytes of programs that are small enough to be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import SingleDeviceSharding

from univg_jax.models.attention import splash
from univg_jax.models.flash import Stream, flash
from univg_jax.planning import hlo, kernels, traffic
from univg_jax.planning.parse import Execution, Shape, parse
from univg_jax.planning.topology import open_topology
from univg_jax.sharding import make_mesh

F32 = "f32[8,128]{1,0:T(8,128)}"
KIB = 1024


def moved(text):
    """Bytes by cause."""
    totals = {}
    for one in traffic.by_part(parse(text)):
        totals[one.cause] = totals.get(one.cause, 0) + one.bytes
    return totals


# --- tiles ---


@pytest.mark.parametrize(
    ("dtype", "dims", "layout", "size"),
    [
        ("bf16", (16, 128), "{1,0:T(8,128)(2,1)}", 16 * 128 * 2),
        ("bf16", (16, 64), "{1,0:T(8,128)(2,1)}", 16 * 128 * 2),  # heads of 64 take twice as much
        ("bf16", (64, 16), "{0,1:T(8,128)(2,1)}", 16 * 128 * 2),  # by the order in memory
        ("f32", (3, 9, 130), "{2,1,0:T(8,128)}", 3 * 16 * 256 * 4),
        ("f32", (3, 9, 130), "{1,0,2:T(8,128)}", 130 * 8 * 128 * 4),
        ("f32", (), "{:T(128)}", 128 * 4),
        ("s32", (1152,), "{0:T(1024)}", 2048 * 4),
        ("pred", (2, 1152), "{1,0:T(4,128)(4,1)}", 4 * 1152),
        ("f32", (9, 130), "{1,0}", 9 * 130 * 4),
        ("f32", (9, 130), "", 9 * 130 * 4),
        ("s4", (8, 128), "{1,0:T(8,128)(8,1)E(4)}", 512),
    ],
)
def test_an_array_takes_whole_tiles(dtype, dims, layout, size):
    assert Shape(dtype, dims, layout).stored_bytes == size


@given(
    dims=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    tile=st.sampled_from([(8, 128), (2, 128), (128,), (4, 128)]),
    data=st.data(),
)
def test_tiles_only_add_and_never_where_they_fit(dims, tile, data):
    order = data.draw(st.permutations(range(len(dims))))
    layout = f"{{{','.join(map(str, order))}:T({','.join(map(str, tile))})}}"
    shape = Shape("f32", tuple(dims), layout)
    assert shape.stored_bytes >= shape.bytes
    physical = [1, *(dims[i] for i in reversed(order))]
    if all(dim % size == 0 for dim, size in zip(physical[::-1], tile[::-1])):
        assert shape.stored_bytes == shape.bytes


# --- instructions ---

NESTED = """HloModule test

%inner (p: f32[54,8,128], i: s32[]) -> f32[8,128] {
  %p = f32[54,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0:T(8,128)} bitcast(%one)
}

%outer (q: f32[54,8,128], j: s32[], x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0:T(8,128)} parameter(2)
  %q = f32[54,8,128]{2,1,0:T(8,128)} parameter(0)
  %same = f32[54,8,128]{2,1,0:T(8,128)} bitcast(%q)
  %j = s32[]{:S(6)} parameter(1)
  %layer = f32[8,128]{1,0:T(8,128)} fusion(%same, %j), kind=kLoop, calls=%inner
  ROOT %sum = f32[8,128]{1,0:T(8,128)} add(%layer, %x)
}

ENTRY %main (s: f32[54,8,128], k: s32[], y: f32[8,128]) -> f32[8,128] {
  %s = f32[54,8,128]{2,1,0:T(8,128)} parameter(0)
  %k = s32[]{:S(6)} parameter(1)
  %y = f32[8,128]{1,0:T(8,128)} parameter(2)
  ROOT %r = f32[8,128]{1,0:T(8,128)} fusion(%s, %k, %y), kind=kLoop, calls=%outer
}
"""  # noqa: E501


def test_a_slice_in_a_fusion_in_a_fusion_reads_the_slice():
    one = 4 * KIB
    assert moved(NESTED) == {"read": 2 * one, "write": one}


def test_what_else_reads_the_array_reads_all_of_it():
    text = NESTED.replace(
        "ROOT %sum = f32[8,128]{1,0:T(8,128)} add(%layer, %x)",
        "%all = f32[8,128]{1,0:T(8,128)} custom(%same)\n"
        "  ROOT %sum = f32[8,128]{1,0:T(8,128)} add(%layer, %all)",
    )
    assert moved(text)["read"] == 54 * 4 * KIB  # and nothing of y, which has no reader any more


SEVERAL = """HloModule test

%largest (p: f32[8,128], q: s32[8,128]) -> (f32[8], s32[8]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %q = s32[8,128]{1,0:T(8,128)} parameter(1)
  %least = f32[] constant(0)
  %first = s32[] constant(0)
  ROOT %top = (f32[1024]{0:T(1024)}, s32[1024]{0:T(1024)}) reduce(%p, %q, %least, %first), to_apply=%max
}

ENTRY %main (a: f32[8,128], b: s32[8,128]) -> (f32[8], s32[8]) {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = s32[8,128]{1,0:T(8,128)} parameter(1)
  ROOT %r = (f32[1024]{0:T(1024)}, s32[1024]{0:T(1024)}) fusion(%a, %b), kind=kLoop, calls=%largest
}
"""  # noqa: E501


def test_a_fusion_may_end_in_one_instruction_with_several_results():
    assert moved(SEVERAL) == {"read": 8 * KIB, "write": 8 * KIB}


UPDATE = """HloModule test

%inside (p: bf16[54,16,128], x: f32[16,128], i: s32[]) -> bf16[54,16,128] {
  %p = bf16[54,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[16,128]{1,0:T(8,128)} parameter(1)
  %y = bf16[16,128]{1,0:T(8,128)(2,1)} convert(%x)
  %one = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} bitcast(%y)
  %i = s32[]{:S(6)} parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = bf16[54,16,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p, %one, %i, %zero, %zero)
}

ENTRY %main (a: bf16[54,16,128], b: f32[16,128], k: s32[]) -> bf16[54,16,128] {
  %a = bf16[54,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[16,128]{1,0:T(8,128)} parameter(1)
  %k = s32[]{:S(6)} parameter(2)
  ROOT %r = bf16[54,16,128]{2,1,0:T(8,128)(2,1)} fusion(%a, %b, %k), kind=kLoop, calls=%inside
}
"""


def test_an_update_in_place_writes_the_update():
    assert moved(UPDATE) == {"read": 8 * KIB, "write": 4 * KIB}


def test_an_update_in_the_root_of_an_inner_fusion_is_in_place_too():
    text = UPDATE.replace("ENTRY", "OUTER").replace(
        "OUTER %main",
        """%outside (c: bf16[54,16,128], d: f32[16,128], e: s32[]) -> bf16[54,16,128] {
  %c = bf16[54,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %d = f32[16,128]{1,0:T(8,128)} parameter(1)
  %e = s32[]{:S(6)} parameter(2)
  ROOT %f = bf16[54,16,128]{2,1,0:T(8,128)(2,1)} fusion(%c, %d, %e), kind=kLoop, calls=%inside
}

ENTRY %main""",
    )
    text = text.replace("kind=kLoop, calls=%inside\n}\n", "kind=kLoop, calls=%outside\n}\n")
    text = text.replace("calls=%outside", "calls=%inside", 1)
    assert moved(text) == {"read": 8 * KIB, "write": 4 * KIB}


def test_an_update_of_what_the_fusion_computes_writes_all():
    text = UPDATE.replace(
        "%i = s32[]{:S(6)} parameter(2)",
        "%n = bf16[54,16,128]{2,1,0:T(8,128)(2,1)} negate(%p)\n  %i = s32[]{:S(6)} parameter(2)",
    ).replace("slice(%p,", "slice(%n,")
    assert moved(text) == {"read": (54 * 4 + 8) * KIB, "write": 54 * 4 * KIB}


STACK, ROW = "f32[54,8,128]{2,1,0:T(8,128)}", "f32[1,8,128]{2,1,0:T(8,128)}"
UPDATED = (
    f"%p = {STACK} parameter(0)",
    f"%x = {ROW} parameter(1)",
    "%i = s32[]{:S(6)} parameter(2)",
    "%z = s32[] constant(0)",
    f"%u = {STACK} dynamic-update-slice(%p, %x, %i, %z, %z)",
)


def in_fusion(*lines, result=STACK, before=""):
    """A fusion of a stack, a row and a place, with these lines."""
    body = "\n".join(f"  {line}" for line in (*UPDATED, *lines))
    return entry(
        f"%a = {STACK} parameter(0)",
        f"%b = {ROW} parameter(1)",
        "%k = s32[]{:S(6)} parameter(2)",
        f"ROOT %r = {result} fusion(%a, %b, %k), kind=kLoop, calls=%inside",
        before=f"{before}\n%inside (p: f32[54,8,128]) -> f32[54,8,128] {{\n{body}\n}}",
    )


def test_what_is_computed_of_an_updated_array_reads_and_writes_all_of_it():
    text = in_fusion(f"ROOT %n = {STACK} negate(%u)")
    assert moved(text) == {"read": (54 * 4 + 4) * KIB, "write": 54 * 4 * KIB}


def test_two_updates_of_one_array_are_both_in_place():
    update = "dynamic-update-slice(%u, %x, %j, %z, %z)"
    text = in_fusion("%j = s32[] constant(3)", f"ROOT %v = {STACK} {update}")
    assert moved(text) == {"copy": (4 + 2 * 4) * KIB}


@pytest.mark.parametrize("is_root", [True, False])
def test_an_update_is_in_place_also_as_one_of_the_results_of_an_inner_fusion(is_root):
    both = f"({STACK}, {ROW})"
    lines = (*UPDATED, f"%n = {ROW} negate(%x)", f"ROOT %t = {both} tuple(%u, %n)")
    body = "\n".join(f"  {line}" for line in lines)
    inner = f"%two (q: f32[54,8,128]) -> f32[54,8,128] {{\n{body}\n}}"
    call = f"%f = {both} fusion(%p, %x, %i), kind=kLoop, calls=%two"
    outer = (
        (f"ROOT {call}",)
        if is_root
        else (
            call,
            f"%g = {STACK} get-tuple-element(%f), index=0",
            f"%h = {ROW} get-tuple-element(%f), index=1",
            f"ROOT %w = {both} tuple(%g, %h)",
        )
    )
    text = in_fusion(*outer, result=both, before=inner).replace(f"  {UPDATED[-1]}\n  %f", "  %f")
    text = text.replace(f"  {UPDATED[-1]}\n  ROOT %f", "  ROOT %f")
    assert moved(text) == {"read": 4 * KIB, "write": 8 * KIB}


def test_the_program_of_an_asynchronous_call_counts():
    text = entry(
        f"%a = {F32} parameter(0)",
        f"%s = (({F32}), {F32}, u32[]) call-start(%a), to_apply=%negated",
        f"ROOT %d = {F32} call-done(%s)",
        before=f"%negated (q: f32[8,128]) -> f32[8,128] {{\n  %q = {F32} parameter(0)\n"
        f"  ROOT %n = {F32} negate(%q)\n}}",
    )
    assert moved(text) == {"read": 4 * KIB, "write": 4 * KIB}


def entry(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule test\n\n{before}\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n"


# As a TPU's compiler writes it: contexts left out but for one.
CHAIN = """HloModule test

%start (p: f32[8,128]) -> (f32[8,128], f32[32,128], u32[]) {
  %p = f32[8,128]{1,0:T(8,128)} parameter(0)
  %g = f32[32,128]{1,0:T(8,128)} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %s = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q: f32[8,128], r: f32[32,128], c: u32[], x: f32[8,128]) -> (f32[8,128], f32[8,128], f32[32,128], f32[32,128], u32[]) {
  %x = f32[8,128]{1,0:T(8,128)} parameter(3)
  %n = f32[8,128]{1,0:T(8,128)} negate(%x)
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  %r = f32[32,128]{1,0:T(8,128)} parameter(1)
  %h = f32[32,128]{1,0:T(8,128)} all-gather(%q), replica_groups={{0,1,2,3}}, dimensions={0}
  %c = u32[]{:S(2)} parameter(2)
  ROOT %t = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}, u32[]{:S(2)}) tuple(%n, %q, %r, %h, %c)
}

%done (u: f32[8,128], v: f32[32,128], w: u32[]) -> f32[32,128] {
  %u = f32[8,128]{1,0:T(8,128)} parameter(0)
  %v = f32[32,128]{1,0:T(8,128)} parameter(1)
  %w = u32[]{:S(2)} parameter(2)
  ROOT %d = f32[32,128]{1,0:T(8,128)} custom-call(%u, %v, %w), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[8,128], b: f32[8,128]) -> f32[32,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %async-collective-start.1 = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%start
  %e = f32[8,128]{1,0:T(8,128)} get-tuple-element(%async-collective-start.1), index=0
  %f = f32[32,128]{1,0:T(8,128)} get-tuple-element(%async-collective-start.1), index=1
  %k = u32[]{:S(2)} get-tuple-element(%async-collective-start.1), index=2
  %step = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}, u32[]{:S(2)}) fusion(%e, %f, %k, %b), kind=kCustom, calls=%async_collective_fusion.1
  %i = f32[8,128]{1,0:T(8,128)} get-tuple-element(%step), index=1
  %j = f32[32,128]{1,0:T(8,128)} get-tuple-element(%step), index=3
  %l = u32[]{:S(2)} get-tuple-element(%step), index=4
  ROOT %async-collective-done.1 = f32[32,128]{1,0:T(8,128)} fusion(%i, %j, %l), kind=kCustom, calls=%done
}
"""  # noqa: E501


def test_a_collective_beside_other_work_moves_its_arrays_once():
    found = traffic.by_part(parse(CHAIN))
    sizes = {(one.part == "collectives", one.cause): one.bytes / KIB for one in found}
    # A device's part is read and the whole written; the step beside it reads and writes its own.
    beside = {(False, "read"): 4, (False, "write"): 4}
    assert sizes == {(True, "read"): 4, (True, "write"): 16} | beside


CHIP = "f32[8,128]{1,0:T(8,128)S(1)}"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # Arrays on the chip cost nothing.
        ([f"%a = {CHIP} parameter(0)", f"ROOT %b = {F32} negate(%a)"], {"write": 4}),
        # A prefetch reads; a copy within HBM does both; the pair counts once.
        (
            [
                f"%a = {F32} parameter(0)",
                f"%s = ({CHIP}, {F32}, u32[]{{:S(2)}}) copy-start(%a)",
                f"ROOT %d = {CHIP} copy-done(%s)",
            ],
            {"read": 4},
        ),
        (
            [
                f"%a = {F32} parameter(0)",
                f"%s = ({F32}, {F32}, u32[]{{:S(2)}}) copy-start(%a)",
                f"ROOT %d = {F32} copy-done(%s)",
            ],
            {"copy": 8},
        ),
        # A copy to another order of dimensions is a transpose.
        (
            [f"%a = {F32} parameter(0)", "ROOT %b = f32[8,128]{0,1:T(8,128)} copy(%a)"],
            {"transpose": 4 + 64},
        ),
        ([f"%a = {F32} parameter(0)", f"ROOT %b = {F32} copy(%a)"], {"copy": 8}),
        (
            [
                "%z = f32[]{:S(6)} constant(0)",
                f"%a = {F32} parameter(0)",
                "ROOT %p = f32[16,128]{1,0:T(8,128)} pad(%a, %z), padding=0_8x0_0",
            ],
            {"pad": 4 + 8},
        ),
        (["%z = f32[]{:S(6)} constant(0)", f"ROOT %b = {F32} broadcast(%z)"], {"fill": 4}),
        # Memory without content is not written.
        (
            [f'ROOT %b = {F32} custom-call(), custom_call_target="AllocateBuffer"'],
            {},
        ),
        (
            [
                f"%a = {F32} parameter(0)",
                f"%s = ({F32}, f32[32,128]{{1,0:T(8,128)}}) all-gather-start(%a), "
                "replica_groups={{0,1,2,3}}",
                "ROOT %d = f32[32,128]{1,0:T(8,128)} all-gather-done(%s)",
            ],
            {"read": 4, "write": 16},
        ),
        # Of some only the results are listed.
        (
            [
                f"%a = {F32} parameter(0)",
                f"%s = {F32} all-reduce-start(%a), replica_groups={{{{0,1}}}}, to_apply=%sum",
                f"ROOT %d = {F32} all-reduce-done(%s)",
            ],
            {"read": 4, "write": 4},
        ),
        # An asynchronous slice and update move what they take and put; nothing where it is on chip.
        *(
            (
                [
                    f"%a = {source} parameter(0)",
                    f"%s = (({source}), f32[1,128]{{1,0:T(1,128)}}, u32[]) slice-start(%a), "
                    "slice={[0:1],[0:128]}",
                    "ROOT %d = f32[1,128]{1,0:T(1,128)} slice-done(%s)",
                ],
                dict.fromkeys(causes, 0.5),
            )
            for source, causes in ((F32, ("read", "write")), (CHIP, ("write",)))
        ),
        (
            [
                "%a = f32[54,8,128]{2,1,0:T(8,128)} parameter(0)",
                "%b = f32[1,8,128]{2,1,0:T(8,128)} parameter(1)",
                "%k = s32[]{:S(6)} constant(2)",
                "%s = ((f32[54,8,128]{2,1,0:T(8,128)}, f32[1,8,128]{2,1,0:T(8,128)}), "
                "f32[54,8,128]{2,1,0:T(8,128)}, u32[]) "
                "dynamic-update-slice-start(%a, %b, %k, %k, %k)",
                "ROOT %d = f32[54,8,128]{2,1,0:T(8,128)} dynamic-update-slice-done(%s)",
            ],
            {"read": 4, "write": 4},
        ),
        # An operand is read once, however often it is named.
        (
            [f"%a = {F32} parameter(0)", f"ROOT %b = {F32} multiply(%a, %a)"],
            {"read": 4, "write": 4},
        ),
    ],
)
def test_an_instruction_moves_what_it_reads_and_writes(lines, expected):
    assert moved(entry(*lines)) == {cause: size * KIB for cause, size in expected.items()}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("jvp(UniVG)/backbone/while/body/closed_call/blocks/image.project/q_norm/mul", "norms"),
        ("jvp(UniVG)/backbone/while/body/blocks/image.update/mlp/in/dot_general", "MLP"),
        ("jvp(UniVG)/backbone/while/body/blocks/image.update/norm/reduce_sum", "norms"),
        ("transpose(jvp(UniVG))/backbone/while/body/blocks/image.update/gate/mul", "gates"),
        ("transpose(jvp(UniVG))/backbone/blocks/shard_map/jit(_pad)/pad", "attention"),
        ("jvp(UniVG)/backbone/blocks/text.modulate/modulation/all_gather", "collectives"),
        ("jvp(UniVG)/backbone/blocks/text.modulate/modulation/dot_general", "modulations"),
        ("jvp(UniVG)/backbone/blocks/image.project/k/dot_general", "projections"),
        ("transpose(jvp(UniVG))/backbone/while/body/jit(f)/dynamic_update_slice", "model, other"),
        ("jvp(UniVG)/backbone/while", "residuals"),
        ("while/body/closed_call/add", "optimizer"),
    ],
)
def test_a_part_is_known_by_its_name(name, part):
    text = entry(
        f"%a = {F32} parameter(0)",
        f'%b = {F32} negate(%a), metadata={{op_name="jit(update)/{name}"}}',
        f"ROOT %c = {F32} copy(%b)",  # the compiler's own copies have no name
    )
    assert {one.part for one in traffic.by_part(parse(text))} == {part}


@pytest.mark.parametrize(
    ("fetch", "result"),
    [
        (f"({CHIP}, {F32}, u32[]{{:S(2)}}) copy-start(%b)", f"{CHIP} copy-done(%s)"),
        (
            f"(({F32}), {CHIP}, u32[]{{:S(2)}}) slice-start(%b), slice={{[0:8],[0:128]}}",
            f"{CHIP} slice-done(%s)",
        ),
    ],
)
def test_what_is_fetched_to_the_chip_belongs_to_its_use(fetch, result):
    text = entry(
        f"%a = {CHIP} parameter(0)",
        f'%b = {F32} negate(%a), metadata={{op_name="jit(update)/jvp(UniVG)/blocks/norm/neg"}}',
        f"%s = {fetch}",
        f"%d = {result}",
        f'ROOT %e = {CHIP} negate(%d), metadata={{op_name="jit(update)/jvp(UniVG)/mlp/neg"}}',
    )
    found = {(one.part, one.cause) for one in traffic.by_part(parse(text))}
    assert found == {("norms", "write"), ("MLP", "read")}


def test_what_has_no_name_before_it_belongs_to_its_use():
    text = entry(
        f"%a = {F32} parameter(0)",
        f"%b = {F32} copy(%a)",
        f'ROOT %c = {F32} negate(%b), metadata={{op_name="jit(update)/jvp(UniVG)/mlp/neg"}}',
    )
    assert {one.part for one in traffic.by_part(parse(text))} == {"MLP"}


# --- programs for a TPU ---


@pytest.fixture(scope="module")
def device(no_cache):
    return open_topology("v6e:2x2").devices[0]


def compiled(function, device, *shapes):
    where = SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=where) for shape in shapes]
    lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",))
    return parse(lowered.compile().as_text())


@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize(("n", "times"), [(4096, 1), (8192, 8192 // 512)])
def test_splash_reads_keys_once_where_the_chip_holds_them_else_once_a_block(device, n, times):
    heads, c = 2, 128

    def attend(q, k, v):
        return splash(q, k, v, None)

    module = compiled(attend, device, *[((1, n, heads, c), jnp.bfloat16)] * 3)
    (run,) = (r for r in module.executions if r.instruction.name.startswith("splash"))
    kernel = kernels.read_kernel(run.instruction.attributes)
    queries, keys = kernel.windows[0].bounds[-2], kernel.windows[1].bounds[-2]
    arrays = run.computation.operand_shapes(run.instruction)[kernel.prefetched :]
    q, k, v = (window.fetched(array) for window, array in zip(kernel.windows[:3], arrays))
    size = n * heads * c * 2
    assert q == size
    assert k == v == size * times
    assert kernel.grid[-2:] == (n / queries, n / keys)


@pytest.mark.xdist_group("libtpu")
@pytest.mark.parametrize("final", [False, True])
def test_flash_moves_every_array_once(device, final):
    """Forwards q, k, v and o; backwards these, the gradient of o, and three gradients."""
    n, m, heads, c, rows = 4096, 512, 16, 128, 16  # larger than the chip's memory
    arrays = [((rows, tokens, heads * c), jnp.bfloat16) for tokens in (n, n, n, m, m, m)]

    def loss(q, k, v, q_text, k_text, v_text):
        ones = jnp.ones(c)
        image = Stream(q=q, k=k, v=v, q_scale=ones, k_scale=ones)
        q_text = None if final else q_text
        text = Stream(q=q_text, k=k_text, v=v_text, q_scale=None, k_scale=ones)
        outputs = flash(image, text, None, num_heads=heads)
        return sum((x.astype(jnp.float32) ** 2).sum() for x in outputs if x is not None)

    with jax.set_mesh(make_mesh(devices=[device])):
        module = compiled(jax.grad(loss, argnums=range(6)), device, *arrays)
    image, text = (tokens * rows * heads * c * 2 for tokens in (n, m))
    queries = 0 if final else text
    for name, operands, results, products in (
        ("flash_forward", 3 * image + 2 * text + queries, image + queries, 2),
        ("flash_backward", 5 * image + 2 * text + 3 * queries, 3 * image + 2 * text + queries, 5),
    ):
        (run,) = (r for r in module.executions if name in r.instruction.name)
        read, written = traffic._moved(run.instruction, run.computation, module)
        # Beside these: sums of queries, scales, and the bias of text, one number in a row of 128.
        few = rows * heads * (n + m) * 4 * 8 + rows * m * 128 * 4
        assert operands <= read <= operands + few
        assert results <= written <= results + few
        found = sum(p.flops for p in hlo._products(run.instruction, run.computation))
        pairs = rows * heads * (n + m) * (n if final else n + m)
        assert found == 2 * products * pairs * c


@pytest.fixture(scope="module")
def scan(device):
    """The gradient of a scan over layers that are too large for the memory on the chip."""
    stack, x = (6, 4096, 4096), (4096, 4096)

    def loss(w, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    return compiled(jax.grad(loss), device, (stack, jnp.float32), (x, jnp.float32))


@pytest.mark.xdist_group("libtpu")
def test_no_instruction_is_charged_more_than_its_operands_and_results_hold(scan):
    charged = 0
    for run in scan.executions:
        if not run.fused:
            one = run.instruction
            alone = Execution(instruction=one, computation=run.computation, times=1, fused=False)
            held = [*run.computation.operand_shapes(one), *one.shapes]
            moved = sum(t.bytes for t in traffic.by_part(scan, [alone]))
            assert moved <= sum(shape.stored_bytes for shape in held), one
            charged += moved > 0
    assert charged > 10


@pytest.mark.xdist_group("libtpu")
def test_a_scan_over_layers_does_not_read_the_stack_for_each(scan):
    total = sum(one.bytes for one in traffic.by_part(scan))
    # Of arrays of 64 MiB it moves 1 to begin with of each layer's weights and sums, 3 forwards and
    # 17 backwards, copies included. Read whole, the four stacks would be 6 times more each.
    assert 10 * 6 * 2**26 <= total <= 24 * 6 * 2**26
