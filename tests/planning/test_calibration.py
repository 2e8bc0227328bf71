"""The programs by which plans are calibrated: sizes, costs and what `univg plan` makes of them."""

import math
import statistics

import jax
import jax.numpy as jnp
import pytest

from tools import calibrate_plan as tool
from tools.public_models import Decoder, Flux, train_step
from univg_jax.planning import hlo
from univg_jax.planning.calibration import REACHED, RUNS, expected
from univg_jax.planning.topology import open_topology


def size(shapes) -> int:
    leaves = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return sum(math.prod(shape) for shape in leaves)


@pytest.mark.parametrize(
    ("model", "billions"),
    [(tool.LLAMA_8B, 8.03), (tool.LLAMA_70B, 70.55), (tool.MISTRAL_7B, 7.24), (Flux(), 11.90)],
    ids=["llama-8b", "llama-70b", "mistral-7b", "flux"],
)
def test_models_have_the_published_number_of_parameters(model, billions):
    assert size(model.shapes()) / 1e9 == pytest.approx(billions, abs=0.005)


TINY = Decoder(width=256, depth=3, heads=4, kv_heads=2, mlp=512, vocabulary=1024, block=128)
TOKENS = 512


def attention(decoder: Decoder, *, share: float) -> float:
    """FLOPs a token of one layer's attention forwards: scores and values."""
    return share * 4 * TOKENS * decoder.heads * decoder.head


@pytest.mark.xdist_group("libtpu")
@pytest.mark.usefixtures("no_cache")
def test_a_decoders_products_are_those_of_the_formula():
    """6 FLOPs a parameter of matrices and token, attention, and what is computed again.

    That is the gate and the other half of the MLP's first product, and attention's kernel. One-hot
    tokens need no gradient, so the embedding takes 2 products instead of 3.
    """
    topology = open_topology("v6e:2x2")
    batch = {"tokens": jax.ShapeDtypeStruct((4, TOKENS), jnp.int32)}
    with jax.numpy_rank_promotion("allow"):
        lowered = train_step(TINY, topology.devices, dtype=jnp.float32, **batch)
    counts = hlo.count(lowered.compile(tool.QUICK).as_text(), unit=topology.chip.unit)
    shapes = TINY.shapes()
    layers = size({n: s for n, s in shapes["layers"].items() if "norm" not in n})
    again = 2 * size([shapes["layers"][name] for name in ("gate", "up")])
    ends = 6 * size(shapes["logits"]) + 4 * size(shapes["embedding"])
    # of 4 x 4 blocks the mask has 10; backwards there are five products to the two forwards
    kernels = TINY.depth * attention(TINY, share=10 / 16) * (1 + 1 + 5 / 2)
    assert counts.flops / TOKENS == pytest.approx(6 * layers + again + ends + kernels, rel=1e-3)
    # of 256 x 256 a head of 128 fills one half; every other product fills it all
    assert counts.unit_flops - counts.flops == pytest.approx(kernels * TOKENS, rel=1e-3)
    assert {c.kind for c in counts.collectives} >= {"all-gather"}


def test_every_run_has_a_program_and_no_bound_is_above_what_was_measured():
    assert len(tool.PROGRAMS) == len(RUNS)
    for run, program in zip(RUNS, tool.PROGRAMS):
        assert 0.3 < run.reached < 1, run.name
        assert isinstance(program.model, Flux) == run.name.startswith("Flux"), run.name
        assert f"{program.rows} " in run.name
    assert len(REACHED) == sum(not run.whole for run in RUNS) >= 3


def test_what_to_expect_is_the_bound_over_what_runs_reach():
    found = expected(2.0)
    assert found.least < found.seconds < found.most
    assert found.seconds == pytest.approx(2.0 / statistics.median(REACHED))
    assert (found.least, found.most) == (2.0 / max(REACHED), 2.0 / min(REACHED))
    assert expected(4.0).seconds == 2 * found.seconds


def test_the_table_has_a_row_for_each_run():
    seconds = {"compute": 2.0, "HBM": 1.0, "ICI": 0.1}
    results = [tool.Result(run=run, flops=1e15, seconds=seconds) for run in RUNS]
    lines = [line for line in tool.table(results).splitlines() if line.startswith("| ")][1:]
    assert [line.split("|")[1].strip() for line in lines] == [run.name for run in RUNS]
    shares = [f"{2.0 / run.measured:.0%}" for run in RUNS]
    assert all(share in line for share, line in zip(shares, lines))


def test_the_documented_table_is_that_of_the_recorded_runs():
    text = (tool.ROOT / "docs" / "performance.md").read_text()
    for run in RUNS:
        assert any(
            f"| {run.name} |" in line and f"{run.reached:.0%}" in line for line in text.splitlines()
        ), run.name


@pytest.mark.nightly
@pytest.mark.xdist_group("libtpu")
@pytest.mark.usefixtures("no_cache")
def test_recorded_bounds_are_those_that_the_account_gives(tmp_path):
    for run, program in zip(RUNS, tool.PROGRAMS):
        with jax.numpy_rank_promotion("allow"):
            result = tool.calibrate(run, program, tmp_path)
        assert result.bound == pytest.approx(run.bound, rel=2e-3), run.name
