"""Plans of variants of a config: the largest batch that fits, the fastest mesh, what saves memory.

A search is given `compile_`, which makes the plan of a config on a topology, with its train step as
the first program: `compile_plan` with its options set.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from univg_jax.errors import UserError
from univg_jax.files import format_bytes
from univg_jax.models.mmdit import REMAT, make_mmdit
from univg_jax.planning.plan import Plan, Program
from univg_jax.planning.topology import Topology
from univg_jax.progress import Bar
from univg_jax.settings import Config

# Offloading is tried last: its transfers to the host's memory are not part of the roofline, which
# would make it look too fast.
POLICIES = [name for name in REMAT if name != "offload"]

Compile = Callable[[Config, Topology], Plan]


def replace(config: Config, **sections: Mapping[str, Any]) -> Config:
    """`config` with some fields of its sections: `replace(config, data=dict(batch_size=8))`."""
    changed = {n: dataclasses.replace(getattr(config, n), **f) for n, f in sections.items()}
    return dataclasses.replace(config, **changed)


def max_batch(config: Config, topology: Topology, compile_: Compile) -> int:
    """The largest global batch whose train step fits; 0 if not even the smallest does.

    A batch grows in units of one row for each shard of the batch and each micro-batch. Compiling
    one takes from seconds to minutes, so the search should try few. `low` is the largest number of
    units known to fit, and `high` the smallest known not to; the search ends when they are
    neighbors.
    """
    first = compile_(config, topology)
    unit = first.mesh["data"] * first.mesh["fsdp"] * config.optim.accumulate
    guess, remainder = divmod(config.data.batch_size, unit)
    programs = {} if remainder else {guess: first.programs[0]}
    low, high, guess, by_line = 0, None, max(guess, 1), False
    bar = Bar(desc=f"largest batch on {topology.name}", unit="plan", initial=1, leave=False)
    while high is None or high - low > 1:
        bar.set_postfix_str(f"{guess * unit}?")
        if guess not in programs:
            varied = replace(config, data=dict(batch_size=guess * unit))
            programs[guess] = compile_(varied, topology).programs[0]
            bar.update()
        low, high = (guess, high) if programs[guess].fits else (low, guess)
        fitting = sorted((units, p.peak) for units, p in programs.items() if p.fits)[-2:]
        # Memory is only nearly a line. Once there is an upper bound, two guesses by line in a row
        # could both miss on the same side and narrow the interval by one unit each. Halving in
        # between keeps the number of programs logarithmic at worst.
        by_line = len(fitting) == 2 and not (by_line and high is not None)
        halfway = 2 * low if high is None else (low + high) // 2
        guess = _units_at(topology.chip.hbm, *fitting) if by_line else halfway
        if high is None:
            # At least an eighth more. Near the limit the compiler saves memory, so the batch where
            # the line ends fits too, the next line ends just above it, and the search would creep.
            # At most four times as much: two small batches give a poor line.
            guess = min(max(guess, low + max(low // 8, 1)), 4 * low)
        else:
            guess = min(max(guess, low + 1), high - 1)
    bar.close()
    return low * unit


def _units_at(memory: float, one: tuple[int, int], other: tuple[int, int]) -> int:
    """Where the line through two points (units, peak memory) reaches `memory`.

    Arguments take the same memory in every batch, and each row adds its activations. So memory is
    nearly a line in the number of rows, and two points of it give a guess close to the answer.
    """
    (units, peak), (more_units, more_peak) = one, other
    slope = max(more_peak - peak, 1) / (more_units - units)
    return int(units + (memory - peak) / slope)


def sweep(config: Config, topology: Topology, compile_: Compile) -> list[Plan]:
    """Plans of mesh shapes x remat policies: the fastest by roofline first, then what does not fit.

    A policy that recomputes more may still be faster where HBM traffic is the bound, so all are
    tried, but `offload` only where no other fits. Raises UserError if the batch divides over no
    mesh.
    """

    def plan(mesh: Mapping[str, int], remat: str) -> Plan:
        overrides = {**config.model.overrides, "remat": remat}
        return compile_(replace(config, mesh=mesh, model=dict(overrides=overrides)), topology)

    plans = []
    for mesh in Bar(_meshes(config, topology), f"sweep {topology.name}", unit="mesh", leave=False):
        bar = Bar(POLICIES, "remat", unit="plan", leave=False)
        tried = [plan(mesh, remat) for remat in bar]
        plans += tried if any(p.fits for p in tried) else [*tried, plan(mesh, "offload")]
    return sorted(plans, key=lambda plan: (not plan.fits, plan.programs[0].roofline))


def _meshes(config: Config, topology: Topology) -> list[dict[str, int]]:
    """Meshes to try: tensor 1 and 2, with the largest fsdp inside a slice, half and a quarter."""
    backbone = make_mmdit(config.model.size, **config.model.overrides)
    count = len(topology.devices) // topology.slices
    meshes = []
    for tensor in (1, 2):
        shards = count // tensor * topology.slices
        if count % tensor or backbone.num_heads % tensor or config.data.batch_size % shards:
            continue
        largest = math.gcd(count // tensor, backbone.hidden_dim)
        sizes = [largest >> i for i in range(3) if largest % (1 << i) == 0]
        meshes += [dict(data=-1, fsdp=fsdp, tensor=tensor) for fsdp in sizes]
    if not meshes:
        raise UserError(
            f"data.batch_size={config.data.batch_size} divides over no mesh of {topology.name}"
        )
    return meshes


def advice(plan: Plan, program: Program) -> str:
    """By how much a program is over the memory, and what would help, the cheapest first."""
    if program.name == "train":
        remat = plan.model["remat"]
        stronger = POLICIES[POLICIES.index(remat) + 1 :] if remat in POLICIES else []
        options = [f"--config.model.overrides.remat={name}" for name in stronger[:1]]
        others = {
            "--config.optim.accumulate=2 (or twice what it is)": plan.rows > 1,
            "a larger --config.mesh.fsdp": plan.mesh["data"] > 1,
            "--config.optim.mu_dtype=bfloat16": plan.optimizer["mu_dtype"] != "bfloat16",
            "--config.optim.name=adafactor": plan.optimizer["name"] != "adafactor",
        }
        options += [option for option, helps in others.items() if helps]
    else:
        options = ["fewer rows" if program.name == "evaluation" else "more devices"]
    over = f"{plan.topology}: {program.name} is over the HBM by {format_bytes(program.over)}"
    return f"{over}. What helps: {'; '.join(options)}."
