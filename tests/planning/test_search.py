"""Searches over plans that a function makes up: nothing is compiled."""

import math
import pathlib

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from univg_jax import configs, tpu
from univg_jax.errors import UserError
from univg_jax.planning import search
from univg_jax.planning.plan import Plan, Program
from univg_jax.planning.topology import Topology
from univg_jax.settings import Config

ROOT = pathlib.Path(__file__).parents[2]
HBM = tpu.CHIPS["v5e"].hbm


def tiny(*overrides: str) -> Config:
    return configs.load(f"{ROOT / 'experiments' / 'stage1_t2i.py'}:size=tiny", overrides)


def topology(name: str, count: int) -> Topology:
    devices = jax.devices()[:1] * count
    return Topology(name=name, chip=tpu.CHIPS["v5e"], slices=1, devices=devices)


def make_plan(config: Config, program: Program, **mesh: int) -> Plan:
    return Plan(
        config=config.name,
        topology="",
        chip=tpu.CHIPS["v5e"],
        devices=math.prod(mesh.values()),
        mesh=mesh,
        model=dict(remat=config.model.overrides.get("remat", "none")),
        optimizer=dict(name=config.optim.name, mu_dtype=config.optim.mu_dtype),
        parameters=0,
        batch=config.data.batch_size,
        encoders=False,
        replicated=(),
        programs=(program,),
    )


class LinearMemory:
    """Compiles programs whose memory is a line in the rows of a device, and records the rows."""

    def __init__(self, *, at_rest: float, largest: int) -> None:
        self.at_rest, self.row = at_rest * HBM, (1 - at_rest) * HBM / (largest + 0.5)
        self.compiled: list[float] = []

    def __call__(self, config: Config, topology: Topology) -> Plan:
        rows = config.data.batch_size / 4
        self.compiled.append(rows)
        peak = int(self.at_rest + rows * self.row)
        program = Program(name="train", peak=peak, over=max(peak - HBM, 0.0))
        return make_plan(config, program, data=1, fsdp=4, tensor=1)


@given(largest=st.integers(0, 3000), start=st.integers(1, 200), at_rest=st.floats(0, 0.9))
@settings(deadline=None, max_examples=50)
def test_max_batch_finds_the_largest_with_few_programs(largest, start, at_rest):
    compile_ = LinearMemory(at_rest=at_rest, largest=largest)
    config = tiny(f"data.batch_size={4 * start}")
    assert search.max_batch(config, topology("v5e:2x2", 4), compile_) == 4 * largest
    assert len(compile_.compiled) == len(set(compile_.compiled))
    # At worst it grows fourfold, then halves; memory that is a line needs a few.
    assert len(compile_.compiled) <= 8 + 2 * math.log2(max(largest, start) + 1)


@pytest.mark.parametrize("batch_size", [4, 12, 20])
def test_max_batch_is_a_multiple_of_rows_and_micro_batches_wherever_it_starts(batch_size):
    compile_ = LinearMemory(at_rest=0.5, largest=21)
    config = tiny(f"data.batch_size={batch_size}", "optim.accumulate=2")
    assert search.max_batch(config, topology("v5e:2x2", 4), compile_) == 80


def test_sweep_ranks_what_fits_by_its_roofline():
    tried = []

    def compile_(config: Config, topology: Topology) -> Plan:
        fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
        remat = config.model.overrides["remat"]
        tried.append((fsdp, tensor, remat))
        mesh = dict(data=16 // fsdp // tensor, fsdp=fsdp, tensor=tensor)
        if tensor == 2 or remat == "none":
            return make_plan(config, Program(name="train", over=1.0), **mesh)
        seconds = {"compute": 2.0 - 1 / fsdp, "HBM": dict(minimal=0.5, full=1.95).get(remat, 0.0)}
        return make_plan(config, Program(name="train", seconds=seconds), **mesh)

    plans = search.sweep(tiny("data.batch_size=64"), topology("v5e:4x4", 16), compile_)
    fitting = [p for p in plans if p.fits]
    assert plans[: len(fitting)] == fitting
    rooflines = [p.programs[0].roofline for p in fitting]
    assert rooflines == sorted(rooflines)
    assert fitting[0].mesh == dict(data=4, fsdp=4, tensor=1)
    assert fitting[0].model["remat"] in ("minimal", "full")
    meshes = {(fsdp, tensor) for fsdp, tensor, _ in tried}
    assert meshes == {(16, 1), (8, 1), (4, 1), (8, 2), (4, 2), (2, 2)}
    # Offloading only where nothing else fits.
    assert {tensor for _, tensor, remat in tried if remat == "offload"} == {2}


def test_sweep_refuses_a_batch_that_divides_over_no_mesh():
    with pytest.raises(UserError, match=r"batch_size=7 divides over no mesh of v5e:4x4"):
        search.sweep(tiny("data.batch_size=7"), topology("v5e:4x4", 16), lambda *_: None)


def test_advice_names_stronger_settings_only():
    config = tiny("model.overrides.remat=block", "optim.name=adafactor", "optim.mu_dtype=bfloat16")
    program = Program(name="train", over=3 * 2.0**30)
    text = search.advice(make_plan(config, program, data=1, fsdp=4, tensor=1), program)
    assert "over the HBM by 3.00 GiB" in text
    assert "accumulate" in text
    for useless in ("remat", "adafactor", "mu_dtype", "mesh.fsdp"):
        assert useless not in text
