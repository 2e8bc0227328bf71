"""Plans every recommended pod, and one model on 64 to 4096 devices; writes the tables of BUILD.md.

    python tools/plans.py            about an hour on 2 cores

The compiler's effort is that of `--quick`, and full where HBM then is the bound: with full effort
products and collectives are the same, and fewer bytes move.

Plans that are already in the file `--cache` are not compiled again. `tests/planning/test_plan.py`
(marker `nightly`) holds what the tables show: everything fits, and FLOPs stay in their bounds.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import pathlib
from typing import Any

from experiments import pods
from univg_jax.progress import Bar

ROOT = pathlib.Path(__file__).parents[1]
WEAK_SCALING = ("v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16", "v5p:16x16x16")
WEAK_SCALING_ROWS = 4  # rows of the batch on each device


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of a table: what to compile, and for which devices."""

    spec: str
    topology: str
    overrides: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name under which the cache has the plan."""
        return "|".join([self.spec, self.topology, *self.overrides])


def recommended() -> list[tuple[Case, str, str, int]]:
    """Every recommendation: its case, and its pod, model size and resolution."""
    return [
        (
            Case(f"experiments/stage1_t2i.py:size={size},res={res},pod={pod}", topology),
            pod,
            size,
            res,
        )
        for pod, topology in pods.TOPOLOGIES.items()
        for size in pods.ACCUMULATE[pod]
        for res in pods.RESOLUTIONS
    ]


def weak_scaling() -> list[Case]:
    """One model and one number of rows on each device, on more and more devices."""
    cases = []
    for topology in WEAK_SCALING:
        devices = math.prod(int(side) for side in topology.split(":")[1].split("x"))
        overrides = (
            f"data.batch_size={WEAK_SCALING_ROWS * devices}",
            "mesh.fsdp=64",
            "model.overrides.remat=full",
        )
        cases.append(Case("experiments/stage1_t2i.py:size=xl,res=512", topology, overrides))
    return cases


def compile_case(case: Case) -> dict[str, Any]:
    """The plan of one case, as JSON. It runs in a process of its own, where it sets JAX up."""
    import jax

    from univg_jax import configs
    from univg_jax.planning.plan import compile_plan
    from univg_jax.planning.topology import open_topology

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_threefry_partitionable", True)
    config = configs.load(str(ROOT / case.spec), case.overrides)
    topology = open_topology(case.topology)
    plan = compile_plan(config, topology, quick=True)
    if any(program.bound == "HBM" for program in plan.programs):
        plan = compile_plan(config, topology)
    return plan.to_json()


def compile_all(cases: list[Case], *, cache: pathlib.Path, workers: int) -> dict[str, Any]:
    """The plan of each case by its key. Each new one is written to `cache` at once."""
    plans = json.loads(cache.read_text()) if cache.exists() else {}
    missing = [case for case in cases if case.key not in plans]
    cache.parent.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")  # JAX must not be forked
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        futures = {pool.submit(compile_case, case): case for case in missing}
        done = concurrent.futures.as_completed(futures)
        for future in Bar(done, total=len(missing), unit="plan"):
            plans[futures[future].key] = future.result()
            cache.write_text(json.dumps(plans))
    return plans


def pods_table(plans: dict[str, Any]) -> str:
    """One row for each recommendation."""
    lines = [
        "| pod | size | px | rows | remat, accumulate | HBM of available | FLOPs of model's "
        "| roofline | MFU at most | expect |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, pod, size, res in recommended():
        plan = plans[case.key]
        (program,) = plan["programs"]
        remat = plan["model"]["remat"]
        accumulate = pods.ACCUMULATE[pod][size][pods.RESOLUTIONS.index(res)]
        memory = f"{program['peak'] / 2**30:.1f} of {plan['chip']['hbm'] / 2**30:.2f} GiB"
        cells = [f"OVER: {memory}", "-", "-", "-", "-"]
        if program["fits"]:
            roofline = f"{program['roofline_seconds'] * 1e3:.0f} ms, {program['bound']}"
            flops = f"{program['flops'] / program['model_flops']:.3f}"
            shares = (f"{program[name]:.0%}" for name in ("mfu_bound", "expected_mfu"))
            cells = [memory, flops, roofline, *shares]
        how = f"{remat}, {accumulate}" + ", unrolled" * ((pod, size, res) in pods.UNROLLED)
        head = [pod, size.upper(), f"{res}", f"{plan['rows']:g}", how]
        lines.append(f"| {' | '.join(head + cells)} |")
    return "\n".join(lines) + "\n"


def weak_scaling_table(plans: dict[str, Any]) -> str:
    """One row for each number of devices."""
    lines = [
        "| devices | data x fsdp | global batch | FLOPs | received | received of the ideal | HBM "
        "| roofline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in weak_scaling():
        plan = plans[case.key]
        (program,) = plan["programs"]
        cells = [
            f"{plan['devices']} ({case.topology})",
            f"{plan['mesh']['data']} x {plan['mesh']['fsdp']}",
            f"{plan['batch']}",
            f"{program['flops']:.4g}",
            f"{program['wire_bytes'] / 2**30:.2f} GiB",
            f"{program['wire_bytes'] / program['ideal_wire_bytes']:.3f}",
            f"{program['peak'] / 2**30:.2f} GiB",
            f"{program['roofline_seconds'] * 1e3:.0f} ms, {program['bound']}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def insert_tables(text: str, tables: dict[str, str], *, by: str) -> str:
    """`text` with each table between the two comments that carry its name and its tool's."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by tools/{by} -->\n", f"<!-- end of {name} -->"
        head, behind = text.split(begin)
        text = head + begin + table + end + behind.split(end, 1)[1]
    return text


def main() -> None:
    """Compiles what the cache lacks, and writes both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", default="runs/plans.json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    cases = weak_scaling() + [case for case, *_ in recommended()]
    plans = compile_all(cases, cache=args.cache, workers=args.workers)
    tables = {"pods": pods_table(plans), "weak-scaling": weak_scaling_table(plans)}
    build = ROOT / "BUILD.md"
    build.write_text(insert_tables(build.read_text(), tables, by="plans.py"))


if __name__ == "__main__":
    main()
