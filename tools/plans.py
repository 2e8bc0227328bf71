"""Plans of every recommended pod, and of the same work on 64 to 4096 devices; writes their tables
into BUILD.md.

    python tools/plans.py            both, about half an hour on 2 cores; what is in --cache is not
    compiled again

`tests/test_plan.py` holds (marker `nightly`) what the tables show: everything fits, and FLOPs stay
in their bounds.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import pathlib
from typing import Any

from tqdm import tqdm

ROOT = pathlib.Path(__file__).parents[1]
WEAK = ("v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x16", "v5p:16x16x16")
ROWS = 4  # on a device, in the second table


def recommended() -> list[tuple[str, str, list[str]]]:
    """(config, topology, overrides) of each."""
    from experiments import pods

    return [
        (f"experiments/stage1_t2i.py:size={size},res={res},pod={pod}", topology, [])
        for pod, topology in pods.TOPOLOGIES.items()
        for size in pods.RECOMMENDED[pod]
        for res in pods.RESOLUTIONS
    ]


def weak_scaling() -> list[tuple[str, str, list[str]]]:
    """One model, one number of rows on each device, ever more devices."""
    cases = []
    for topology in WEAK:
        devices = 1
        for side in topology.split(":")[1].split("x"):
            devices *= int(side)
        overrides = [
            f"data.batch_size={ROWS * devices}",
            "mesh.fsdp=64",
            "model.overrides.remat=full",
        ]
        cases.append(("experiments/stage1_t2i.py:size=xl,res=512", topology, overrides))
    return cases


def compile_case(case: tuple[str, str, list[str]]) -> dict[str, Any]:
    """The plan of one case, as JSON."""
    import jax

    from univg_jax.cli.config import load_config
    from univg_jax.cli.plan import compile_for, to_json
    from univg_jax.planning.plan import open_topology

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_threefry_partitionable", True)
    spec, topology, overrides = case
    config = load_config(str(ROOT / spec), overrides)
    return to_json(compile_for(config, open_topology(topology), quick=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", default="runs/plans.json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.cache.parent.mkdir(parents=True, exist_ok=True)
    plans: dict[str, dict[str, Any]] = (
        json.loads(args.cache.read_text()) if args.cache.exists() else {}
    )
    cases = {
        "|".join([case[0], case[1], *case[2]]): case for case in weak_scaling() + recommended()
    }
    missing = [name for name in cases if name not in plans]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        futures = {pool.submit(compile_case, cases[name]): name for name in missing}
        for future in tqdm(
            concurrent.futures.as_completed(futures), total=len(missing), unit="plan"
        ):
            plans[futures[future]] = future.result()
            args.cache.write_text(json.dumps(plans))
    tables = {"pods": pods_table(plans), "weak-scaling": weak_table(plans)}
    build = ROOT / "BUILD.md"
    text = build.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by tools/plans.py -->\n", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = head + begin + table + end + rest.split(end, 1)[1]
    build.write_text(text)


def pods_table(plans: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| pod | size | px | rows | remat, accumulate | HBM of available | FLOPs of model's | roofline | MFU at most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for spec, topology, overrides in recommended():
        plan = plans["|".join([spec, topology, *overrides])]
        values = dict(item.split("=") for item in spec.split(":")[1].split(","))
        (program,) = plan["programs"]
        from experiments import pods

        remat, accumulate = pods.RECOMMENDED[values["pod"]][values["size"]][
            pods.RESOLUTIONS.index(int(values["res"]))
        ]
        memory = f"{program['peak'] / 2**30:.1f} of {plan['chip']['hbm'] / 2**30:.2f} GiB"
        if program["fits"]:
            flops = f"{program['flops'] / program['model_flops']:.3f}"
            rest = f"{flops} | {program['roofline_seconds'] * 1e3:.0f} ms, {program['bound']} | {program['mfu_bound']:.0%}"
        else:
            memory, rest = f"OVER: {memory}", "- | - | -"
        case = f"| {values['pod']} | {values['size'].upper()} | {values['res']} | {plan['rows']:g}"
        lines.append(f"{case} | {remat}, {accumulate} | {memory} | {rest} |")
    return "\n".join(lines) + "\n"


def weak_table(plans: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| devices | data x fsdp | global batch | FLOPs | received | received of the ideal | HBM | roofline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for spec, topology, overrides in weak_scaling():
        plan = plans["|".join([spec, topology, *overrides])]
        (program,) = plan["programs"]
        lines.append(
            f"| {plan['devices']} ({topology}) | {plan['mesh']['data']} x {plan['mesh']['fsdp']} | {plan['batch']} "
            f"| {program['flops']:.4g} | {program['wire_bytes'] / 2**30:.2f} GiB "
            f"| {program['wire_bytes'] / program['ideal_wire_bytes']:.3f} | {program['peak'] / 2**30:.2f} GiB "
            f"| {program['roofline_seconds'] * 1e3:.0f} ms, {program['bound']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
